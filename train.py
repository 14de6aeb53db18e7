"""Train a language model, from corpus to checkpoint.

    python train.py config/trix_tiny.py                                  # a 2M-parameter TriX model on Python's own library
    python train.py config/trix_tiny.py --ffn=gelu --out_dir=runs/dense  # any knob on the command line; --help lists them
    python train.py config/trix_tiny.py --resume=auto                    # go on from the newest good checkpoint, exactly
    torchrun --standalone --nproc_per_node=8 train.py config/trix_medium.py  # the same batches on 8 GPUs (--device=cpu: processes)

Exit codes: 0 finished, 2 a mistake in the call or an input, 3 diverged, 75 interrupted (saved; try again with --resume=auto).
"""
import contextlib
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import configurator  # before torch, whose import Ctrl-C may interrupt
import torch

import checkpoint
import compiler
import device as hardware
import parallel
import plan
import prepare as preparation
import profiling
import runlog
import schedule as schedules
from configurator import UserError, read_json
from corpus import DATASETS
from data import Prefetcher, data_dir
from evaluate import validate
from hints import hints
from interrupt import Interrupt, Overdue, wanted_signals
from model import GPT, GPTConfig
from optim import OPTIMIZERS, make_optimizers, set_rates
from prepare import PrepareConfig
from sample import sample_grid
from shards import check_split, open_data
from tokenizer import load_tokenizer, token_bytes


@dataclass
class TrainConfig:
    out_dir: str = ''  # directory of the run (empty: runs/<names of the config files, with - between>)
    dataset: str = 'pylib'  # pylib, wikitext2, wikitext103, fineweb_edu, text:PATH, shards:DIR, or a directory that prepare.py made
    tokenizer: str = 'bpe'  # of a dataset that has yet to be prepared: bpe (trained on it, of vocab_size), gpt2, or a tokenizer.json
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 16  # sequences in a micro-step of each process, at most
    batch_tokens: int = 0  # tokens in an optimizer step over all processes, a multiple of batch_size * block_size (0: just that)
    learning_rate: float = 1e-3  # peak, after the warm-up
    matrix_lr: float = 0.0  # that of the matrices that Muon has, 0: learning_rate
    min_lr_ratio: float = 0.1  # learning rate at the end, as a part of the peak
    warmup_steps: int = -1  # steps of linear warm-up (-1: a twentieth of the run, a tenth for onecycle)
    schedule: str = 'cosine'  # after the warm-up: cosine, restarts, onecycle, wsd, linear, constant or two_stage
    restart_steps: int = 0  # restarts: steps of the first cycle (0: the whole run)
    restart_factor: int = 2  # restarts: each cycle is this many times as long as the one before
    decay_steps: int = 0  # wsd: steps of the last, falling part (0: a fifth of the run)
    boundary_step: int = 0  # two_stage: where the second stage, without weight decay, begins (0: half of the run)
    mid_lr_ratio: float = 2 / 3  # two_stage: learning rate at the boundary, as a part of the peak
    optimizer: str = 'adamw'  # adamw, or muon for the matrices of the blocks and adamw for the rest
    weight_decay: float = 0.1  # on matrices; norms, biases and other vectors have none
    beta1: float = 0.9  # AdamW: decay of the mean of the gradients
    beta2: float = 0.95  # AdamW: decay of the mean of their squares
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    eval_interval: int = 100  # steps between validations; like every interval, 0 switches it off
    eval_tokens: int = 65_536  # tokens of a validation, always the same windows (0: all of the split)
    log_interval: int = 10  # steps between lines on the console and in metrics.jsonl
    sample_interval: int = 100  # steps between samples: every prompt, greedy, typical and wild
    sample_prompts: str = '|The|In this|def|import'  # prompts of those samples, '|' between them (empty: the start of a document)
    sample_tokens: int = 64  # tokens of each
    save_interval: int = 100  # steps between checkpoints (there is one at the end and at every better validation, too)
    keep: int = 3  # newest checkpoints that are kept, beside the best and the mandatory ones (0: all)
    mandatory_steps: tuple[int, ...] = ()  # steps with a checkpoint that is never deleted (two_stage adds both sides of its boundary)
    max_skipped: int = 5  # steps in a row with a non-finite loss or gradient, or a spike, that end the run
    spike_z: float = 0.0  # skip a step whose loss is this many standard deviations above the mean of the last spike_window (0: never)
    spike_window: int = 100  # steps that a spike is measured against; there are none before half of them are done
    seed: int = 1337  # of the initialisation, the order of the data and dropout
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, tf32, bfloat16 or float16
    compile: str = 'auto'  # torch.compile: auto (on a GPU, and on a CPU in runs of 10M tokens and more), true or false
    compile_timeout: int = 600  # seconds that compilation may take before the run goes on without it
    activation_checkpointing: bool = False  # recompute activations in backward: less memory, more time
    parallel: str = 'ddp'  # several processes: ddp, or fsdp, which shares out weights, gradients and optimizer
    dist_timeout: int = 600  # seconds that a process waits for the others
    init_from: str = ''  # start with the weights of this run or checkpoint, which export.py convert made or which is to be tuned further
    distill_from: str = ''  # learn from the distribution of this run's model, too: its tokenizer must be the same
    distill_weight: float = 0.5  # the part of the loss that this is: (1 - w) cross-entropy + w KL(teacher || model)
    anneal_steps: int = 0  # ffn=trix: steps over which a token's tiles come down from all of them to trix_top_k
    resume: str = ''  # auto: go on from the newest good checkpoint in out_dir, if any; or a checkpoint or run to go on from
    other_data: bool = False  # let --resume go on with other data than the checkpoint's
    verify: bool = False  # read all tokens again and compare their sha256, even if no file has changed since the last time
    plan: bool = False  # show what the run takes (parameters, memory, time, disk) and its schedule, and end
    card_gb: float = 0.0  # --plan: for a GPU with so much memory, whether or not one is here (0: for this machine)
    profile: bool = False  # record three early steps with torch.profiler, and where the memory goes
    tensorboard: bool = False  # scalars and samples for TensorBoard, too, in out_dir/tensorboard
    wandb: bool = False  # scalars for Weights & Biases, too (WANDB_MODE=offline needs no network)

    def problems(self):
        found = [f'{key}={getattr(self, key)} must be at least 1' for key in
                 ('max_steps', 'batch_size', 'max_skipped', 'spike_window', 'sample_tokens', 'compile_timeout', 'dist_timeout') if getattr(self, key) < 1]
        if not 0 < self.learning_rate < math.inf:
            found.append(f'learning_rate={self.learning_rate} must be over 0')
        if self.seed >= 2**63:
            found.append(f'seed={self.seed} must be below 2^63')
        found += [f'{key}={getattr(self, key)} must not be negative' for key in
                  ('batch_tokens', 'matrix_lr', 'grad_clip', 'eval_interval', 'eval_tokens', 'log_interval',
                   'sample_interval', 'save_interval', 'keep', 'spike_z', 'seed') if getattr(self, key) < 0]
        if not 0 <= self.card_gb < math.inf:
            found.append(f'card_gb={self.card_gb}: expected the memory of a card in GB, or 0')
        found += [f'{key}={getattr(self, key)} must lie in [0, 1)' for key in ('beta1', 'beta2') if not 0 <= getattr(self, key) < 1]
        if not 0 <= self.distill_weight <= 1:
            found.append(f'distill_weight={self.distill_weight} must lie in [0, 1]')
        if not 0 <= self.anneal_steps <= max(1, self.max_steps):
            found.append(f'anneal_steps={self.anneal_steps} must lie between 0 and max_steps={self.max_steps}')
        found += [f'{key}={getattr(self, key)!r} is not one of {", ".join(choices)}' for key, choices in
                  (('optimizer', OPTIMIZERS), ('parallel', ('ddp', 'fsdp'))) if getattr(self, key) not in choices]
        if wrong := [step for step in self.mandatory_steps if not 0 < step <= self.max_steps]:
            found.append(f'mandatory_steps={",".join(map(str, wrong))}: the run ends at max_steps={self.max_steps}')
        if self.matrix_lr and self.optimizer != 'muon':
            found.append(f'matrix_lr={self.matrix_lr} is for --optimizer=muon')
        if self.parallel == 'fsdp' and self.optimizer == 'muon':
            found.append('optimizer=muon needs whole matrices: use --parallel=ddp, or --optimizer=adamw')
        if self.parallel == 'fsdp' and self.dtype == 'float16':
            found.append('dtype=float16 can\'t be scaled over sharded gradients: use --dtype=bfloat16 or --parallel=ddp')
        return found


def load(argv):
    """Command line -> checked config; a pure function."""
    config = configurator.load(argv, GPTConfig, TrainConfig, usage=__doc__,
                               check=lambda c: batch_problems(c) + schedule_problems(c) + annealing_problems(c))
    files = [Path(word).stem for word in argv if word.endswith('.py') and not word.startswith('--')]
    config.out_dir = os.path.expanduser(config.out_dir) or f'runs/{"-".join(files) or "default"}'
    config.batch_tokens = config.batch_tokens or config.batch_size * config.block_size
    return config


def schedule_problems(config):
    """Also puts the number of warm-up steps in, and, where --max_steps cuts the run of a file short, the usual parts for the
    file's own that don't fit any more."""
    parts = {'warmup_steps': -1, 'restart_steps': 0, 'decay_steps': 0, 'boundary_step': 0}
    for _ in range(2):
        if config.warmup_steps == -1:
            config.warmup_steps = max(0, config.max_steps // (10 if config.schedule == 'onecycle' else 20))
        found = schedules.problems(config) if config.max_steps >= 1 else []
        short = [key for key in parts if config.origin[key] not in ('default', 'command line')]
        if not found or config.origin['max_steps'] != 'command line' or not short:
            break
        for key in short:
            setattr(config, key, parts[key])
            config.origin[key] = f'automatic, for a run shorter than that of {config.origin[key]}'
    return found


def batch_problems(config):
    micro = config.batch_size * config.block_size
    if micro < 1 or config.batch_tokens % micro == 0:
        return []
    below = config.batch_tokens // micro * micro
    nearest = ' or '.join(f'{n}' for n in (below, below + micro) if n)
    return [f'batch_tokens={config.batch_tokens} is no multiple of batch_size * block_size = {micro}; the nearest are {nearest}']


def annealing_problems(config):
    if config.anneal_steps and (config.ffn != 'trix' or config.trix_router == 'hash'):
        return [f'anneal_steps={config.anneal_steps} needs ffn=trix, and no trix_router=hash, which knows only trix_top_k tiles of a token']
    return []


def micro_batches(config, world):
    """(sequences of a micro-step in each process, micro-steps of a step). UserError if `world` processes can't share a step."""
    rows = config.batch_tokens // config.block_size
    size = min(config.batch_size, max(1, rows // world))
    if rows % (world * size):
        unit = world * size * config.block_size
        below = config.batch_tokens // unit * unit
        nearest = ' or '.join(f'{n}' for n in (below, below + unit) if n)
        raise UserError(f'batch_tokens={config.batch_tokens} is {rows} sequences, which {world} processes can\'t share in micro-steps '
                        f'of {size}; the nearest batch_tokens that they can are {nearest} (or change batch_size or the processes)')
    return size, rows // (world * size)


# ----------------------------------------------------------------------------------------------------------------------
# Before the loop

def find_data(config, prepare=True, verify='once'):
    """
    What loads the tokens that config.dataset names. They are prepared now if they are missing and can be; prepare=False: None then.
    UserError where a prepared directory holds anything but what the config asks for. verify: as TokenData has it.
    """
    name = config.dataset
    if name.startswith('shards:'):
        rows = Path(name.removeprefix('shards:')).expanduser()
        if (rows / 'meta.json').is_file():  # made by prepare.py pack or split
            return open_data(rows, config.block_size, config.vocab_size, verify)
        path, check = data_dir(name), lambda: check_split(rows, path)
        words = [f'--vocab_size={config.vocab_size}']
    elif name in DATASETS or name.startswith('text:'):
        wanted = PrepareConfig(dataset=name, tokenizer=config.tokenizer)
        words = [f'--tokenizer={config.tokenizer}']
        if config.tokenizer == 'bpe':
            wanted.vocab_size = config.vocab_size
            words += [f'--vocab_size={config.vocab_size}']
        if name == 'fineweb_edu':
            wanted.max_tokens = enough_tokens(config.max_steps * config.batch_tokens)
            words += [f'--max_tokens={wanted.max_tokens}']
        path, check = preparation.directory(wanted), lambda: preparation.check_prepared(wanted, path)
    else:
        path = data_dir(name)
        if not prepare and not path.is_dir():
            return None
        if not path.is_dir():
            raise UserError(f'dataset={name}: no directory {path}, and prepare.py knows only {", ".join(DATASETS)}, text:PATH and '
                            'shards:DIR: bring the tokens there, or choose --dataset=pylib')
        return open_data(path, config.block_size, config.vocab_size, verify)

    if (path / 'meta.json').is_file():
        check()
    elif not prepare:
        return None
    else:
        runlog.speak(f'No prepared data at {path}: preparing {name} (one-time; under a minute for pylib)')
        if others := sorted(str(file.parent) for file in path.parent.glob('fineweb_edu*/meta.json')) if name == 'fineweb_edu' else []:
            runlog.speak(f'  prepared already, for --dataset=DIR: {", ".join(others)}')
        command = [sys.executable, str(Path(__file__).with_name('prepare.py')), f'--dataset={name}', f'--out={path}', *words]
        if code := subprocess.run(command).returncode:
            sys.exit(code)  # prepare.py has said why
    return open_data(path, config.block_size, config.vocab_size, verify)


def enough_tokens(tokens):
    """What to prepare for a run of so many tokens: at least one more, rounded up to two digits, so that similar runs share it."""
    unit = 10 ** max(0, len(str(tokens + 1)) - 2)
    return -(-(tokens + 1) // unit) * unit


def find_teacher(config, data, device):
    """The model of --distill_from, or None. UserError if its tokens are not those of the data."""
    if not config.distill_from:
        return None
    model, state = checkpoint.load_model(config.distill_from, device, config.block_size)
    checkpoint.same_tokenizer(state, data, config.distill_from, '--distill_from')
    if model.config.vocab_size != config.vocab_size:
        raise UserError(f'--distill_from={config.distill_from}: its vocabulary has {model.config.vocab_size} entries, '
                        f'this model\'s {config.vocab_size}')
    return model.requires_grad_(False)


def random_state(device):
    return {'cpu': torch.get_rng_state(), 'cuda': torch.cuda.get_rng_state(device) if device.type == 'cuda' else None}


def set_random_state(state, device):
    torch.set_rng_state(state['cpu'].cpu())
    if device.type == 'cuda' and state['cuda'] is not None:
        torch.cuda.set_rng_state(state['cuda'].cpu(), device)


def dropout_seed(config, step, number):
    """A seed for each micro-batch of a run, so that its dropout depends on neither the processes nor on where a resume began."""
    return random.Random(f'{config.seed} {step} {number}').getrandbits(63)


WATCHED = 10  # first steps of a process in which every parameter should have a gradient that is not exactly zero


def without_gradient(model, total):
    """Names of the parameters whose gradient is missing or exactly zero. total: sums numbers over processes, where parameters are split."""
    names, flags = zip(*((name, p.grad is not None and parallel.local(p.grad).any()) for name, p in model.named_parameters() if p.requires_grad))
    device = next(model.parameters()).device
    flags = torch.stack([torch.as_tensor(flag, device=device) for flag in flags]).tolist()  # one wait for the device
    return [name for name, flag in zip(names, total(*flags) if total else flags) if not flag]


@contextlib.contextmanager
def memory_guard(advice):
    """Around what may run out of memory: a UserError with what advice() says then, when what was in the making is freed."""
    out = False
    try:
        yield
    except Exception as error:
        if not profiling.is_out_of_memory(error):
            raise
        out = True
    if out:
        raise UserError(advice())


# ----------------------------------------------------------------------------------------------------------------------

def checked(config, group, model, compute, device, dtype, interrupt, sharded):
    """The compiled model and a note, or (model, why it is not compiled) if compilation fails, takes too long, or computes anything
    else than eager execution. None if a signal came meanwhile."""
    fast, overdue = compiler.compiled(model), False
    try:
        problem, note = compiler.check(model, fast, compute, device, dtype, interrupt.limit(config.compile_timeout),
                                       group.sum if sharded else lambda *numbers: numbers, group.lost)
    except Overdue:
        overdue, problem, note = True, f'it took over {config.compile_timeout} s (--compile_timeout)', ''
        model.zero_grad(set_to_none=True)
    if overdue and sharded:  # the others may be anywhere in the step, which all take together
        if interrupt.signals:
            return None
        raise UserError(f'rank {group.rank}: {problem}: use --compile=false, or give it longer')
    if group.any(interrupt.signals):
        return None
    if group.any(problem):
        if problem and not group.main:
            print(f'rank {group.rank}: compile off: {problem}', file=sys.stderr, flush=True)
        return model, f'compile off: {problem or "another process says why"}'
    return fast, note


def main(argv):
    try:
        config = load(argv)
    except UserError:
        if os.environ.get('RANK', '0') != '0':
            sys.exit(2)  # rank 0 says it for all
        raise
    group = parallel.start(config.dist_timeout)
    for number in wanted_signals():
        if number != signal.SIGINT:
            signal.signal(number, lambda *_: sys.exit(75))  # nothing to save before the loop
    say = runlog.speak if group.main else (lambda text: None)
    say(config.table())
    if config.plan:
        if group.main:
            say(plan.page(config, *micro_batches(config, group.world), find_data(config, prepare=False), group.world))
        return
    runlog.check_packages(tensorboard=config.tensorboard, wandb=config.wandb)
    device, dtype, why = hardware.resolve(config.device, config.dtype, group.local_rank if group.world > 1 else None)
    rows, micro_steps = micro_batches(config, group.world)
    group.connect(device)
    with group.together(), contextlib.ExitStack() as around:
        code = train(config, group, device, dtype, why, rows, micro_steps, say, around)
    group.disconnect()
    if code:
        sys.exit(code)


def train(config, group, device, dtype, why, rows, micro_steps, say, around):
    """The run -> exit code. `around` is an ExitStack that the caller leaves."""
    use_compile, why_compile = compiler.choose(config.compile, device, config.max_steps * config.batch_tokens)
    # With --verify one process of each machine reads everything; the others open what the main process has verified.
    verify = 'always' if config.verify and group.local_rank == 0 else 'once'
    data = group.first(lambda: find_data(config, verify=verify))
    origin, state = checkpoint.resume(config, data, group.world, say)
    group.same('data', data.fingerprint)
    group.same('checkpoint', str(origin))
    out, encoding = Path(config.out_dir), load_tokenizer(data.tokenizer) if data.tokenizer else None
    lengths, windows = token_bytes(encoding) if encoding else None, data.val_windows(config.eval_tokens)

    def out_of_memory():
        return profiling.advice(model, list(optimizers.values()), config, device, dtype, group.world)

    torch.manual_seed(config.seed)
    model, optimizers = GPT(config.pick(GPTConfig)), {}
    if state:
        checkpoint.load_weights(model, state, origin)
    elif config.init_from:
        path, other = checkpoint.find(config.init_from, say=say)
        checkpoint.same_tokenizer(other, data, path, '--init_from')
        checkpoint.load_weights(model, other, path)
        say(f'weights from {path}')
        del other
    teacher = find_teacher(config, data, device)
    sharded = group.world > 1 and config.parallel == 'fsdp'
    with memory_guard(out_of_memory):
        if not sharded:
            model.to(device)
        model.activation_checkpointing = config.activation_checkpointing
        if sharded:
            group.shard(model, device)
        optimizers = make_optimizers(model, config, device)
        matrix_ratio = (config.matrix_lr or config.learning_rate) / config.learning_rate
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    batch_rows = config.batch_tokens // config.block_size
    first_step = state['step'] if state else 0
    first_tokens, first_window = (state['tokens'], state['windows']) if state else (0, 0)
    offset = first_window - first_step * batch_rows  # 0 unless steps before the resume had another size

    def tokens_at(step):
        """Tokens trained on in the first `step` steps of the run."""
        return first_tokens + (step - first_step) * config.batch_tokens

    def batch(step, micro):
        x, y = data.batch(step, micro, rows, batch_rows, group.rank, group.world, config.seed, offset)
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        return (x.pin_memory(), y.pin_memory()) if device.type == 'cuda' else (x, y)

    def micro_loss(module, step, micro, x, y):
        """The part of a step's loss that a micro-batch has; its graph is there for backward."""
        if config.dropout:
            torch.manual_seed(dropout_seed(config, step, micro * group.world + group.rank))
        with hardware.autocast(device, dtype):
            soft = teacher.soft_targets(x, config.distill_weight) if teacher else None
            return module(x, y, soft=soft) / micro_steps

    trained, interrupt = model, Interrupt()  # trained: what is called in training; model: everywhere else
    if state and state['step'] >= config.max_steps:
        use_compile, why_compile = False, 'compile off: no step is left to do'
    if use_compile:
        say(why_compile)
        scale = 1024.0 if scaler.is_enabled() else 1.0
        model.set_top_k(schedules.top_k(first_step, config))
        x, y = (part.to(device) for part in batch(first_step, 0))
        with memory_guard(out_of_memory):
            result = checked(config, group, model, lambda module: scale * micro_loss(module, first_step, 0, x, y), device, dtype, interrupt, sharded)
        if not result:
            say('interrupted before the first step: nothing to save')
            return 75
        trained, why_compile = result
        del x, y
    trained = group.wrap(trained, device) if group.world > 1 and not sharded else trained
    step, best, best_step, skipped, seconds, recent = first_step, math.inf, 0, 0, 0.0, []
    if state:
        for name, optimizer in optimizers.items():
            parallel.load_optimizer(optimizer, state[name])
        scaler.load_state_dict(state['scaler'])
        set_random_state(state['rng'], device)
        best, best_step, skipped, seconds = (state[key] for key in ('best', 'best_step', 'skipped', 'seconds'))
        recent, processes = state.get('recent', []), state.get('processes', 1)
        del state

    per_token, peak = model.flops_per_token(), hardware.peak_flops(device, dtype)
    boundary = schedules.boundary(config)
    forever = {*config.mandatory_steps, *((boundary, boundary + 1) if boundary is not None else ())}  # before and after a new stage
    stop = False  # whether all have agreed to stop
    group.barrier('the first step')  # from here on a signal reaches the loop of every process
    log = runlog.RunLog(out, group.main)
    around.enter_context(log.failing())
    around.enter_context(memory_guard(out_of_memory))  # in validation, say, or in the optimizer
    log.cut(step)
    log.config({**config.as_dict(), 'data_fingerprint': data.fingerprint})
    if group.main:
        log.trackers += [runlog.tensorboard(out, step)] if config.tensorboard else []
        log.trackers += [runlog.wandb(out, config.as_dict())] if config.wandb else []
    log.say(f'on {why}; {why_compile}' + (f'; {group.world} processes, {config.parallel}' if group.world > 1 else ''))
    for kind, total, used in model.parameter_table():
        log.say(f'  {kind:10s} {total:12,} parameters' + (f', of which a token uses {used:,}' if used != total else ''))
    for name, optimizer in optimizers.items():
        matrices = sum(len(g['params']) for g in optimizer.param_groups if g['decays'])
        log.say(f'  {type(optimizer).__name__}: {matrices} matrices' + (
            f' and {sum(len(g["params"]) for g in optimizer.param_groups) - matrices} vectors' if name == 'optimizer' else ''))
    log.say(f'{sum(p.numel() for p in model.parameters()):,} parameters, {per_token / 1e6:.1f} MFLOP a token; '
            f'{data.train_tokens:,} training tokens in {data.path}; {config.max_steps:,} steps of {config.batch_tokens:,} tokens '
            f'= {f"{group.world} processes x " * (group.world > 1)}{micro_steps} micro-step{"s" * (micro_steps > 1)} of '
            f'{rows} x {config.block_size}: {tokens_at(config.max_steps) / data.train_tokens:.2f} epochs')
    if line := data.repeats(tokens_at(config.max_steps)):
        log.say(line)
    if not encoding:
        log.say('no tokenizer.json beside the shards: no samples and no bits per byte')
    if origin:
        log.line('metrics.jsonl', kind='event', event='resumed', step=step, checkpoint=str(origin), processes=[processes, group.world])

    def stopping():
        """Whether any process was asked to stop; all of them must call this at the same points."""
        nonlocal stop
        stop = stop or group.any(interrupt.signals)
        return stop

    def save():
        path = out / 'checkpoints' / f'step_{step:07d}.pt'
        content = {
            'model': parallel.whole(model.state_dict(), group.main),
            **{name: parallel.whole(optimizer.state_dict(), group.main) for name, optimizer in optimizers.items()},
            'scaler': scaler.state_dict(), 'step': step, 'tokens': tokens_at(step), 'windows': offset + step * batch_rows, 'best': best, 'best_step': best_step,
            'skipped': skipped, 'recent': recent, 'seconds': seconds, 'config': config.as_dict(), 'tokenizer': data.tokenizer,
            'data': {'path': str(data.path), 'fingerprint': data.fingerprint}, 'rng': random_state(device), 'processes': group.world}
        if group.main:
            checkpoint.save(path, content)
            checkpoint.retain(path, config.keep, {best_step, *forever})
        return path

    def status(state, **more):
        log.status(state=state, step=step, max_steps=config.max_steps, tokens=tokens_at(step),
                   best=best if math.isfinite(best) else None, best_step=best_step,
                   checkpoint=str(saved) if saved else None, processes=group.world, **more)

    def micro_losses():
        """Forward and backward of a step -> the parts of the loss, a part for each micro-step; fewer if asked to stop."""
        parts = []
        for micro in range(micro_steps):
            x, y = (part.to(device, non_blocking=True) for part in next(batches))
            with group.micro_step(trained, last=micro + 1 == micro_steps):
                part = micro_loss(trained, step, micro, x, y)
                scaler.scale(part).backward()
            parts.append(part.detach())
            if micro + 1 < micro_steps and stopping():
                break
        return parts

    def why_skipped(loss, norm):
        if norm == 0:
            return 'zero_gradient'
        if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled() and scaler.get_scale() > 1)):
            return 'skipped'  # with fp16 the scaler skips, and halves the scale, by itself
        if config.spike_z and len(recent) >= max(2, config.spike_window // 2):
            if loss > statistics.fmean(recent) + config.spike_z * max(statistics.stdev(recent), 1e-6):
                return 'spike'

    def record(event, loss, norm, lr, parts):
        """What is worth knowing about a step that was skipped."""
        every = group.gather([part.item() * micro_steps for part in parts])
        names = [name for name, p in model.named_parameters() if p.grad is not None and not parallel.local(p.grad).isfinite().all()]
        rows_of = [[data.rows(step, micro, rows, batch_rows, rank, group.world, config.seed, offset).tolist() for rank in range(group.world)]
                   for micro in range(micro_steps)]
        log.line('metrics.jsonl', kind='event', event=event, step=step + 1, loss=loss, grad_norm=norm, lr=lr,
                 windows=[sum(ranks, []) for ranks in rows_of], micro_losses=every, nonfinite_gradients=len(names), first_of_them=names[:5],
                 recent_mean=statistics.fmean(recent) if recent else None)
        why = f', {len(names)} parameters with non-finite gradients from {names[0]} on' if names else {
            'spike': ', a spike', 'zero_gradient': ', exactly zero'}.get(event, '')
        log.say(f'step {step + 1:,} skipped: loss {loss:.4f}, gradient norm {norm:.4g}{why} '
                f'({skipped + 1} in a row, {config.max_skipped} end the run)')

    last_loss, saved, zeros, silent = None, origin, 0, None
    batches = Prefetcher(batch, ((s, m) for s in range(step, config.max_steps) for m in range(micro_steps)))
    profile = profiling.Profile(out, device, say=log.say) if config.profile and group.main else None
    evals = [line for line in runlog.read_lines(out / 'metrics.jsonl') if line.get('kind') == 'eval']
    rounds, hinted = runlog.read_lines(out / 'samples.jsonl'), set()
    since, waited, mark = 0, 0.0, time.perf_counter()  # steps and loader seconds since the last log line, its time
    status('running')
    model.statistics()  # flip rates count from here
    while True:
        # ---- at the top, `step` steps are done: validate, sample, save
        last = step >= config.max_steps
        model.set_top_k(schedules.top_k(step, config))
        paused = time.perf_counter()

        def due(interval):
            return interval and (step % interval == 0 or last)
        better = False
        if due(config.eval_interval) and (result := validate(model, data, lengths, windows, rows, device, dtype, stopping, group)):
            evals.append({'kind': 'eval', 'step': step, **result, 'tokens': tokens_at(step)})
            log.line('metrics.jsonl', **evals[-1])
            log.say(f'step {step:,}: validation loss {result["loss"]:.4f}, perplexity {result["perplexity"]:.1f}'
                    + (f', {result["bits_per_byte"]:.4f} bits per byte' if encoding else ''))
            better = result['loss'] < best
            if better:
                best, best_step = result['loss'], step
        if encoding and due(config.sample_interval) and not stop:
            prompts = configurator.as_utf8(config.sample_prompts).split('|')
            try:
                with hardware.autocast(device, dtype):
                    samples = sample_grid(model, encoding, prompts, config.sample_tokens, config.seed, stopping)
            except UserError as error:
                samples = []
                log.say(f'no samples: {error}')
            for sample in samples if not stop else ():
                rounds.append({'step': step, **sample})
                log.line('samples.jsonl', **rounds[-1])
                if sample['mode'] == 'typical':
                    log.say(f'  sample: {sample["prompt"] + sample["text"]!r}')
        for hint in hints(evals, rounds) if due(config.eval_interval) or due(config.sample_interval) else ():
            if hint.split(':')[0] not in hinted:
                hinted.add(hint.split(':')[0])
                log.say(f'  hint: {hint}')
        now = out / 'checkpoints' / f'step_{step:07d}.pt'
        wanted = step and config.save_interval and (due(config.save_interval) and not skipped or better or step in forever)
        if (stopping() or wanted) and saved != now:
            saved = save()
        if last or stop:
            break
        mark += time.perf_counter() - paused  # those don't count as training time

        # ---- one optimizer step
        lr, wd = schedules.schedule(step, config)
        for kind, optimizer in optimizers.items():
            set_rates(optimizer, lr * matrix_ratio if kind == 'muon' else lr, wd)
        with memory_guard(out_of_memory):
            parts = micro_losses()
        if stop:  # the step is not whole: it is done again after the resume
            continue
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        norm = parallel.full(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))
        last_loss, norm = sum(parts).item(), norm.item()  # the one wait for the device in a step
        last_loss = group.sum(last_loss)[0] / group.world
        event = why_skipped(last_loss, norm)
        zeros = zeros + 1 if event == 'zero_gradient' else 0
        if step < first_step + WATCHED:
            silent = [name for name in without_gradient(model, group.sum if sharded else None) if silent is None or name in silent]
        if silent and not zeros and step + 1 == min(first_step + WATCHED, config.max_steps) >= first_step + 3:  # zero_init: not in the first one
            log.line('metrics.jsonl', kind='event', event='no_gradient', step=step + 1, parameters=len(silent), first_of_them=silent[:5])
            log.say(f'no gradient in any of the first {step + 1 - first_step} steps, so nothing is learnt there: {", ".join(silent[:5])}'
                    + (f' and {len(silent) - 5} more parameters' if len(silent) > 5 else ''))
        if event:
            record(event, last_loss, norm, lr, parts)
        else:
            for optimizer in optimizers.values():
                scaler.step(optimizer)
            recent = [*recent, last_loss][-config.spike_window:] if config.spike_z else []
        if scaler.is_enabled():
            scaler.update()
        model.update_balance(0.0 if event else 1e-3)
        logged = config.log_interval and ((step + 1) % config.log_interval == 0 or step + 1 == config.max_steps)
        measured = model.statistics() if logged else {}
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        skipped = skipped + 1 if event else 0
        step, since = step + 1, since + 1
        if skipped == config.max_skipped or zeros == WATCHED:
            status('diverged', loss=last_loss)
            if zeros:
                log.say(f'the gradient was exactly zero in {zeros} steps: nothing is learnt (if the model is compiled, try --compile=false)')
                return 3
            log.say(f'diverged; the last good checkpoint is {saved}: lower the learning rate, and --resume={saved}'
                    if saved else 'diverged before the first checkpoint: lower the learning rate')
            return 3
        if profile:
            profile.step()
        if config.profile and step == first_step + 1:
            log.say(profiling.breakdown_table(profiling.memory_breakdown(model, list(optimizers.values()), rows, device, dtype), device))

        if logged:
            hardware.synchronize(device)
            span = time.perf_counter() - mark
            seconds, mark = seconds + span, mark + span
            speed, memory = since * config.batch_tokens / span, hardware.peak_memory_gb(device)
            eta = (config.max_steps - step) * config.batch_tokens / speed
            log.line('metrics.jsonl', kind='train', step=step, tokens=tokens_at(step), loss=last_loss, lr=lr, wd=wd,
                     grad_norm=norm, tokens_per_s=speed, mfu=per_token * speed / (peak * group.world) if peak else None,
                     mem_gb=memory, loader_wait=(batches.wait - waited) / span, **measured)
            log.say(f'step {step:,}/{config.max_steps:,} ({100 * step / config.max_steps:.0f} %)  loss {last_loss:.4f}  lr {lr:.2e}  '
                    f'norm {norm:.2f}  {speed:,.0f} tokens/s  {memory:.2f} GB  {int(eta // 60)}:{int(eta % 60):02d} left', progress=True)
            status('running', loss=last_loss, tokens_per_s=speed, eta=eta, mem_gb=memory)
            since, waited = 0, batches.wait

    if profile:
        profile.close()
    if not last:
        status('interrupted', loss=last_loss)
        log.say(f'interrupted at step {step:,}, saved {saved}: go on with the same command and --resume=auto')
        return 75
    status('finished', loss=last_loss)
    log.say(f'finished: {step:,} steps, {tokens_at(step) / 1e6:.1f}M tokens in {seconds / 60:.1f} minutes of training; '
            + (f'best validation loss {best:.4f} at step {best_step:,}' if math.isfinite(best) else f'last loss {last_loss}'))
    if saved and encoding:
        log.say(f'sample from it: {Path(sys.executable).name} sample.py {out} --num=3')
    return 0


if __name__ == '__main__':
    configurator.run(main)
