"""One optimizer step, one validation, and the progress of a run. Used by train.py, --plan and the benchmarks.

    progress = Progress()                                              # or Progress.load(checkpoint_dict)
    train_step = TrainStep(model, optimizers, config, device, dtype, group)
    losses = train_step.backward(progress.step, batches, micro_steps)  # forward and backward of the micro-batches
    result = train_step.judge(losses, progress.recent)                 # clips; loss, gradient norm, reason to skip
    train_step.update(result)                                          # optimizer step, unless skipped
"""
import contextlib
import math
import random
import statistics
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

import torch

from kernels import autocast
from optim import full_tensor, local_tensor

WATCHED_STEPS = 10  # within the first 10 steps of a process, every parameter should get a nonzero gradient


@dataclass
class Progress:
    """The progress of a run. A checkpoint stores every field."""
    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens trained on
    windows: int = 0  # windows of the training data read
    best: float = math.inf  # lowest validation loss so far
    best_step: int = 0  # the step that had it
    skipped: int = 0  # steps in a row without an update
    recent: list[float] = field(default_factory=list)  # losses that a spike is measured against
    seconds: float = 0.0  # of training, without validation, samples and saving
    spent: float = 0.0  # seconds of everything, for max_hours
    fitted_steps: int = 0  # max_steps that max_hours allows, 0: not measured yet
    kept_steps: list[int] = field(default_factory=list)  # steps whose checkpoints keep_every protects
    smoothed: float | None = None  # stop_on=plateau: running mean of the training loss
    plateau_loss: float = math.inf  # stop_on=plateau: the last loss that was an improvement
    plateau_step: int = 0  # stop_on=plateau: its step

    def state_dict(self):
        return asdict(self)

    @classmethod
    def load(cls, state):
        """Build from the dict in a checkpoint. Checkpoints of older versions have no `recent`."""
        return cls(**{f.name: state[f.name] for f in fields(cls) if f.name in state})


class StepResult(NamedTuple):
    loss: float  # mean over the micro-batches of all processes
    norm: float  # of the whole gradient, before clipping
    losses: list  # of each micro-batch of this process, tensors; they add up to the loss
    skip: str | None  # why there is no update: 'skipped' (not finite), 'spike' or 'zero_gradient'


class TrainStep:
    """
    One optimizer step: compute the gradients of all micro-batches, decide whether to use them, update.

    config: a TrainConfig with the model's options. group: a OneProcess or a Group. Training calls `forward`. It is the
    model, unless the caller sets it to a compiled model or a DDP-wrapped model.
    """

    def __init__(self, model, optimizers, config, device, dtype, group, teacher=None):
        self.model, self.forward, self.optimizers, self.teacher = model, model, optimizers, teacher
        self.config, self.device, self.dtype, self.group = config, device, dtype, group
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.steps = 0  # steps that this object has judged
        self.zero_steps = 0  # consecutive steps with an exactly zero gradient
        self.silent = None  # names of the parameters that had no gradient in all of the first WATCHED_STEPS steps

    def loss(self, module, step, micro, micro_steps, x, y):
        """The share of one micro-batch in the loss of a step: x, y (B, T) -> scalar."""
        if self.model.config.dropout:
            number = micro * self.group.world + self.group.rank
            torch.manual_seed(dropout_seed(self.config.seed, step, number))
        with autocast(self.device, self.dtype):
            teacher = self.teacher.soft_targets(x, self.config.distill_weight) if self.teacher else None
            return module(x, y, teacher=teacher) / micro_steps

    def backward(self, step, batches, micro_steps, stopping=lambda: False):
        """
        Forward and backward of the next `micro_steps` items (x, y) of the iterator `batches`.

        Returns a list of one loss tensor per micro-batch, or None if stopping() returns True between two micro-batches.
        All processes call stopping() at the same points.
        """
        losses = []
        fixed = self.model.fixed_weights()  # ternary codes are made once per optimizer step
        fixed_teacher = self.teacher.fixed_weights() if self.teacher else contextlib.nullcontext()
        for micro in range(micro_steps):
            x, y = (part.to(self.device, non_blocking=True) for part in next(batches))
            with fixed, fixed_teacher, self.group.micro_step(self.forward, last=micro + 1 == micro_steps):
                loss = self.loss(self.forward, step, micro, micro_steps, x, y)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            if micro + 1 < micro_steps and stopping():
                return None
        return losses

    def judge(self, losses, recent=()):
        """Clip the gradient and decide whether to use it -> StepResult. recent: past losses, to detect spikes."""
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf))
        loss = sum(losses)
        loss, norm = torch.stack((loss, norm.to(loss))).tolist()  # the only device sync in a step
        loss = self.group.sum(loss)[0] / self.group.world
        skip = self.why_skip(loss, norm, recent)
        self.zero_steps = self.zero_steps + 1 if skip == 'zero_gradient' else 0
        if self.steps < WATCHED_STEPS:
            names = self.without_gradient()
            self.silent = [name for name in names if self.silent is None or name in self.silent]
        self.steps += 1
        return StepResult(loss, norm, losses, skip)

    def why_skip(self, loss, norm, recent):
        """The reason to skip the update, or None to do it."""
        config, scaler = self.config, self.scaler
        if norm == 0:
            return 'zero_gradient'
        overflow = not math.isfinite(norm) and scaler.is_enabled() and scaler.get_scale() > 1
        if not math.isfinite(loss) or not math.isfinite(norm) and not overflow:
            return 'skipped'  # not for an fp16 overflow: the scaler skips that step itself and halves its scale
        if config.spike_z and len(recent) >= max(2, config.spike_window // 2):
            if loss > statistics.fmean(recent) + config.spike_z * max(statistics.stdev(recent), 1e-6):
                return 'spike'
        return None

    def without_gradient(self):
        """Names of the parameters whose gradient is missing or exactly zero, on all processes that hold a shard."""
        params = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        flags = [torch.zeros((), device=self.device) if p.grad is None else local_tensor(p.grad).any()
                 for _, p in params]
        # This syncs with the device, but only in the first steps.
        flags = torch.stack([flag.to(self.device, torch.float32) for flag in flags]).tolist()
        if any(local_tensor(p) is not p for _, p in params):  # FSDP: each process holds one shard
            flags = self.group.sum(*flags)
        return [name for (name, _), flag in zip(params, flags) if not flag]

    def update(self, result):
        """Step the optimizers unless result.skip is set. Free the gradients in both cases."""
        if not result.skip:
            for optimizer in self.optimizers.values():
                self.scaler.step(optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.model.update_balance(0.0 if result.skip else 1e-3)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)


def dropout_seed(seed, step, number):
    """One seed per micro-batch of a run. Dropout is then independent of the process count and of resuming."""
    return random.Random(f'{seed} {step} {number}').getrandbits(63)


@torch.no_grad()
def validate(model, data, token_bytes, windows, batch_size, device, dtype, stop=lambda: False, group=None):
    """
    Mean loss over fixed windows of the validation split. The processes of the group share the windows.

    token_bytes (n_vocab,): the length of each token in bytes, or None if unknown. Targets of -1 do not count.
    Returns {loss (nats per token), perplexity, bits_per_byte (None without token_bytes), tokens}. Returns None if
    stop() returns True. stop() is called before every batch.
    """
    rank, world = (group.rank, group.world) if group else (0, 1)
    training = model.training
    model.eval()
    fixed = model.fixed_weights()
    total, tokens, size = 0.0, 0, 0
    batches = [windows[i:i + batch_size] for i in range(0, len(windows), batch_size)]
    for i in range(0, len(batches), world):
        if stopped := stop():
            break
        mine = i + rank < len(batches)
        x, y = data.val_batch(batches[i + rank if mine else 0])  # (B, T) each
        # A process without a batch computes a spare one, because a sharded model needs all processes.
        with autocast(device, dtype), fixed:
            loss = model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
        if mine:
            y = y[y >= 0]
            total, tokens = total + loss.item() * y.size, tokens + y.size
            size += 0 if token_bytes is None else int(token_bytes[y].sum())
    model.train(training)
    if stopped:
        return None
    if group:
        total, tokens, size = group.sum(total, tokens, size)
    loss = total / tokens
    return {'loss': loss, 'perplexity': math.exp(min(loss, 700)), 'tokens': int(tokens),
            'bits_per_byte': None if token_bytes is None else total / math.log(2) / max(size, 1)}
