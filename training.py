"""One optimizer step, one validation, and where a run stands. Used by train.py, --plan and the benchmarks.

    progress = Progress()                                             # or Progress.load(a checkpoint)
    train_step = TrainStep(model, optimizers, config, device, dtype, group)
    losses = train_step.backward(progress.step, batches, micro_steps) # forward and backward of the micro-batches
    result = train_step.judge(losses, progress.recent)                # clip; loss, gradient norm, and whether to use it
    train_step.update(result)
"""
import math
import random
import statistics
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

import torch

from kernels import autocast
from optim import full_tensor, local_tensor

WATCHED_STEPS = 10  # first steps of a process in which every parameter should have a gradient that is not exactly zero


@dataclass
class Progress:
    """Where a run stands. A checkpoint holds all of it."""
    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens trained on
    windows: int = 0  # windows of the training data read
    best: float = math.inf  # lowest validation loss so far
    best_step: int = 0  # the step that had it
    skipped: int = 0  # steps in a row without an update
    recent: list[float] = field(default_factory=list)  # losses that a spike is measured against
    seconds: float = 0.0  # of training, without validation, samples and saving

    def state_dict(self):
        return asdict(self)

    @classmethod
    def load(cls, state):
        """From the dict of a checkpoint. One of an older version has no `recent`."""
        return cls(**{f.name: state[f.name] for f in fields(cls) if f.name in state})


class StepResult(NamedTuple):
    loss: float  # mean over the micro-batches of all processes
    norm: float  # of the whole gradient, before clipping
    losses: list  # of each micro-batch of this process, tensors; they add up to the loss
    skip: str | None  # why there is no update: 'skipped' (not finite), 'spike' or 'zero_gradient'


class TrainStep:
    """
    An optimizer step of a model: gradients of all micro-batches, the decision whether to use them, the update.

    config: a TrainConfig with the model's options. group: the processes (parallel.Group). `forward` is what is called in training,
    the model itself unless the caller sets it to a compiled model or to one wrapped by DDP.
    """

    def __init__(self, model, optimizers, config, device, dtype, group, teacher=None):
        self.model, self.forward, self.optimizers, self.teacher = model, model, optimizers, teacher
        self.config, self.device, self.dtype, self.group = config, device, dtype, group
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.steps = 0  # judged by this object
        self.zero_steps = 0  # in a row whose gradient was exactly zero
        self.silent = None  # names of the parameters without a gradient in any of the first WATCHED_STEPS steps

    def loss(self, module, step, micro, micro_steps, x, y):
        """The part that a micro-batch has in a step's loss: x, y (B, T) -> scalar."""
        if self.model.config.dropout:
            number = micro * self.group.world + self.group.rank
            torch.manual_seed(dropout_seed(self.config.seed, step, number))
        with autocast(self.device, self.dtype):
            soft = self.teacher.soft_targets(x, self.config.distill_weight) if self.teacher else None
            return module(x, y, soft=soft) / micro_steps

    def backward(self, step, batches, micro_steps, stopping=lambda: False):
        """
        Forward and backward of the next `micro_steps` items (x, y) of the iterator `batches` -> the loss of each, a tensor. None if
        stopping() comes true in between, which all processes ask at the same points.
        """
        losses = []
        for micro in range(micro_steps):
            x, y = (part.to(self.device, non_blocking=True) for part in next(batches))
            with self.group.micro_step(self.forward, last=micro + 1 == micro_steps):
                loss = self.loss(self.forward, step, micro, micro_steps, x, y)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            if micro + 1 < micro_steps and stopping():
                return None
        return losses

    def judge(self, losses, recent=()):
        """Clip the gradient and decide whether to use it -> StepResult. recent: the losses before, for spikes."""
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf))
        loss, norm = sum(losses).item(), norm.item()  # the one wait for the device in a step
        loss = self.group.sum(loss)[0] / self.group.world
        skip = self.why_skip(loss, norm, recent)
        self.zero_steps = self.zero_steps + 1 if skip == 'zero_gradient' else 0
        if self.steps < WATCHED_STEPS:
            names = self.without_gradient()
            self.silent = [name for name in names if self.silent is None or name in self.silent]
        self.steps += 1
        return StepResult(loss, norm, losses, skip)

    def why_skip(self, loss, norm, recent):
        """The reason not to use a gradient, None to use it."""
        config, scaler = self.config, self.scaler
        if norm == 0:
            return 'zero_gradient'
        overflow = not math.isfinite(norm) and scaler.is_enabled() and scaler.get_scale() > 1
        if not math.isfinite(loss) or not math.isfinite(norm) and not overflow:
            return 'skipped'  # after an overflow in fp16 the scaler itself skips, and halves the scale
        if config.spike_z and len(recent) >= max(2, config.spike_window // 2):
            if loss > statistics.fmean(recent) + config.spike_z * max(statistics.stdev(recent), 1e-6):
                return 'spike'
        return None

    def without_gradient(self):
        """Names of the parameters whose gradient is missing or exactly zero in all processes that share them."""
        params = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        flags = [torch.zeros((), device=self.device) if p.grad is None else local_tensor(p.grad).any() for _, p in params]
        flags = torch.stack([flag.to(self.device, torch.float32) for flag in flags]).tolist()  # a wait, in the first steps only
        if any(local_tensor(p) is not p for _, p in params):  # FSDP: a process holds a part of each
            flags = self.group.sum(*flags)
        return [name for (name, _), flag in zip(params, flags) if not flag]

    def update(self, result):
        """The optimizers' step, unless the result says to skip it; then the gradients are freed."""
        if not result.skip:
            for optimizer in self.optimizers.values():
                self.scaler.step(optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.model.update_balance(0.0 if result.skip else 1e-3)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)


def dropout_seed(seed, step, number):
    """A seed for each micro-batch of a run: its dropout depends neither on the processes nor on where a resume began."""
    return random.Random(f'{seed} {step} {number}').getrandbits(63)


@torch.no_grad()
def validate(model, data, token_bytes, windows, batch_size, device, dtype, stop=lambda: False, group=None):
    """
    Mean loss over fixed windows of the validation split, shared by the processes of the group.

    token_bytes (n_vocab,): length of each token in bytes, None if unknown. Targets of -1 are not counted. -> {loss (nats a token),
    perplexity, bits_per_byte (None without token_bytes), tokens}, or None if stop() comes true, which is asked before every batch.
    """
    rank, world = (group.rank, group.world) if group else (0, 1)
    training = model.training
    model.eval()
    total, tokens, size = 0.0, 0, 0
    batches = [windows[i:i + batch_size] for i in range(0, len(windows), batch_size)]
    for i in range(0, len(batches), world):
        if stopped := stop():
            break
        mine = i + rank < len(batches)
        x, y = data.val_batch(batches[i + rank if mine else 0])  # (B, T) each
        with autocast(device, dtype):  # a process that has no batch left computes one, too: a sharded model needs all processes
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
