"""Train a language model, from corpus to checkpoint.

    python train.py config/trix_tiny.py                                  # a 2M-parameter TriX model on Python's library
    python train.py config/trix_tiny.py --ffn=gelu --out_dir=runs/dense  # change any option; --help lists them
    python train.py config/trix_tiny.py --resume=auto                    # continue from the newest good checkpoint
    torchrun --standalone --nproc_per_node=8 train.py config/trix_medium.py  # the same batches on 8 GPUs

Exit codes: 0 finished, 2 a mistake in the call or an input, 3 diverged, 75 interrupted and saved (--resume=auto
continues).
"""
import configurator  # before torch, so Ctrl-C can interrupt torch's import
configurator.answer_help(__name__, __doc__, 'model.GPTConfig', 'settings.TrainConfig')
import contextlib
import functools
import itertools
import math
import signal
import statistics
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import checkpoint
import schedule as schedules
import settings
from configurator import UserError, read_json
from corpora.opening import open_training_data
from data import Prefetcher
from kernels import autocast
from model import GPT, GPTConfig
from optim import cast_matrices, local_tensor, make_optimizers, set_rates
from runtime import compiler, disk, parallel, runlog
from runtime import device as hardware
from runtime.generation import encode, sample_grid
from runtime.hints import LEAST_GAIN, hints
from runtime.interrupt import Interrupt, Overdue, wanted_signals
from runtime.limits import TimeLimit, note_loss, on_plateau, smooth
from settings import TrainConfig, epoch_lines, fit_steps, is_on, micro_batches, resolve_steps
from tokenizer import load_tokenizer, token_bytes
from training import WATCHED_STEPS, Progress, TrainStep, validate


def load(argv):
    """Command line -> checked config. A pure function."""
    return settings.load(argv, usage=__doc__, import_pretrained=import_pretrained)


def import_pretrained():
    from deploy import pretrained  # a plain run does not need it
    return pretrained


def main(argv):
    with parallel.once_per_machine():
        config = load(argv)
    group = parallel.start(config.dist_timeout)
    say = runlog.speak if group.main else (lambda text: None)
    with before_the_loop(say):
        with parallel.once_per_machine():
            say(config.changes())
            if not config.files and config.origin['out_dir'] == 'default':
                say(f'no config file: this run trains with the defaults, into {config.out_dir}')
            if config.plan:
                if group.main:
                    from runtime import plan  # a plain run does not need it
                    data = open_training_data(config, prepare=False)
                    say(plan.page(config, *micro_batches(config, group.world), data, group.world))
                return
            check_call(config, group)
        local_rank = group.local_rank if group.world > 1 else None
        device, dtype, reason = hardware.resolve(config.device, config.dtype, local_rank)
        group.connect(device)
        with group.together(), contextlib.ExitStack() as exit_stack:
            code = train(config, group, device, dtype, reason, say, exit_stack)
        group.disconnect()
    if code:
        sys.exit(code)


def check_call(config, group):
    """Raises UserError for mistakes that can be found before the processes connect."""
    if config.tensorboard or config.wandb:
        from runtime import trackers  # a plain run does not need it
        trackers.check_packages(config)
    if (config.tensorboard or config.profile) and configurator.utf8_path(config.out_dir) is None:
        raise UserError(f'out_dir={config.out_dir}: not UTF-8. The libraries behind --tensorboard and --profile '
                        'cannot open such a path')
    hardware.resolve(config.device, config.dtype, 0 if group.world > 1 else None)
    micro_batches(config, group.world)  # fails if the processes can't split a step


@contextlib.contextmanager
def before_the_loop(say):
    """A signal before the loop ends the program with a message: nothing to save. The loop has its own handlers."""
    for number in wanted_signals():
        if number != signal.SIGINT:
            signal.signal(number, lambda *_: sys.exit(75))
    try:
        yield
    except SystemExit as over:
        if over.code == 75:
            say('interrupted before the first step: nothing to save')
        raise


def train(config, group, device, dtype, reason, say, exit_stack):
    """
    The whole run -> exit code.

    say: prints on the console of the main process
    reason: one line on why this device and dtype were chosen
    exit_stack: closes everything that the run opens when the caller leaves it
    """
    # ---- data, and the checkpoint to resume from
    start = time.monotonic()
    # With --verify one process per machine reads all data. The others open data that was already verified.
    verify = 'always' if config.verify and group.local_rank == 0 else 'once'
    data = open_training_data(config, verify=verify, first=group.first, say=say)
    asked = config.copy()
    sharded = group.world > 1 and config.parallel == 'fsdp'
    find = find_and_map(group) if sharded else checkpoint.find
    origin, state = checkpoint.resume(config, data, group.world, say, find)
    group.same('data', data.fingerprint)
    group.same('checkpoint', str(origin))
    progress = Progress.load(state) if state else Progress()
    resolve_steps(asked, data.n_windows, progress.step, progress.windows)
    if group.any(line := is_finished(config, progress, origin)):
        say(line)
        return 0
    if group.main:
        disk.check_disk(config)
    use_compile, compile_line = compiler.choose(config.compile, device, asked.max_steps * config.batch_tokens)

    # ---- model and optimizers
    torch.manual_seed(config.seed)
    source, weights = (origin, state) if state else weights_to_start_from(config, data, find, say)
    new_model = functools.partial(GPT, config.pick(GPTConfig))
    if sharded:
        from runtime import sharding  # a plain run does not need it
    model = sharding.meta_model(new_model, draw=not weights) if sharded else new_model()
    optimizers = {}

    def out_of_memory():
        from runtime import profiling  # a plain run does not need it
        return profiling.advice(model, list(optimizers.values()), config, device, dtype, group.world)

    with memory_guard(out_of_memory):
        set_precision(model, config, device, say)
        if sharded:
            group.shard(model, device)
        else:
            model.to(device)
        model.activation_checkpointing = config.activation_checkpointing
        if weights:
            checkpoint.load_weights(model, weights, source)
        elif sharded:
            sharding.draw_weights(model)
        optimizers |= make_optimizers(model, config, device)
    del weights
    teacher = find_teacher(config, data, device)
    train_step = TrainStep(model, optimizers, config, device, dtype, group, teacher)
    run = Run(config, group, device, dtype, data, train_step, progress, asked)
    run.time_limit = TimeLimit(config.max_hours, progress.spent + time.monotonic() - start)

    # ---- compilation
    interrupt = Interrupt()
    if use_compile and state and progress.step >= config.max_steps:
        use_compile, compile_line = False, 'compile off: no step is left to do'
    if use_compile:
        say(compile_line)
        with memory_guard(out_of_memory):
            result = compiled_model(run, interrupt, sharded)
        if not result:
            say('interrupted before the first step: nothing to save')
            return 75
        train_step.forward, compile_line = result
    if group.world > 1 and not sharded:
        train_step.forward = group.wrap(train_step.forward, device)

    # ---- state of the resumed run
    processes_before = group.world
    if state:
        for name, optimizer in optimizers.items():
            group.load_optimizer(optimizer, state[name])
        train_step.scaler.load_state_dict(state['scaler'])
        set_random_state(state['rng'], device)
        processes_before = state.get('processes', 1)
        del state

    # ---- the files of the run, and its first lines
    group.barrier('the first step')  # from here on, the loop of every process handles signals
    log = run.log = runlog.RunLog(config.out_dir, group.main)
    exit_stack.enter_context(log.failing())
    exit_stack.enter_context(memory_guard(out_of_memory))  # for example in validation or in the optimizer
    log.cut(progress.step)
    log.config({**config.as_dict(), 'data_fingerprint': data.fingerprint})
    if group.main and (config.tensorboard or config.wandb):
        from runtime import trackers  # a plain run does not need it
        log.trackers = trackers.start(config, log.out, progress.step)
    say_first_lines(run, f'on {reason}; {compile_line}')
    if origin:
        run.saved = origin
        log.line('metrics.jsonl', kind='event', event='resumed', step=progress.step, checkpoint=str(origin),
                 processes=[processes_before, group.world])
    return loop(run, interrupt)


@dataclass
class Run:
    """State of the training loop. The functions below take it as their first argument."""
    config: TrainConfig
    group: object  # OneProcess or Group
    device: torch.device
    dtype: torch.dtype
    data: object  # TokenData, PackedRows or ShardData
    train_step: TrainStep
    progress: Progress
    asked: configurator.Config  # the config before max_hours shortened the run
    time_limit: TimeLimit = None
    log: runlog.RunLog = None
    saved: Path = None  # the newest checkpoint
    evals: list = field(default_factory=list)  # lines of metrics.jsonl, also those before a resume
    samples: list = field(default_factory=list)  # lines of samples.jsonl
    hinted: set = field(default_factory=set)  # kinds of hints that were given
    stopped: bool = False  # all processes have agreed to stop
    last_loss: float = None

    def __post_init__(self):
        config = self.config
        self.model = self.train_step.model
        self.micro_batch_size, self.micro_steps = micro_batches(config, self.group.world)
        self.rows_per_step = config.batch_tokens // config.block_size
        self.offset = self.progress.windows - self.progress.step * self.rows_per_step  # 0 unless the step size changed
        self.encoding = load_tokenizer(self.data.tokenizer) if self.data.tokenizer else None
        self.token_bytes = token_bytes(self.encoding) if self.encoding else None
        self.val_windows = self.data.val_windows(config.eval_tokens)
        self.out = Path(config.out_dir)

    @property
    def pinned_steps(self):
        """Steps with a checkpoint that is never deleted."""
        return {*self.config.mandatory_steps, *schedules.both_sides(self.config), *self.progress.kept_steps}

    @property
    def total_tokens(self):
        """Tokens that the run will have seen at its end."""
        return self.progress.tokens + (self.config.max_steps - self.progress.step) * self.config.batch_tokens

    def windows(self, step, micro, rank):
        """(micro_batch_size,) int64: the training windows of a micro-batch."""
        return self.data.rows(step, micro, self.micro_batch_size, self.rows_per_step, rank, self.group.world,
                              self.config.seed, self.offset)

    def todo(self):
        """(step, micro) of the steps that remain. max_steps may change during the run."""
        for step in itertools.count(self.progress.step):
            if step >= self.config.max_steps:
                return
            yield from ((step, micro) for micro in range(self.micro_steps))

    def batch(self, step, micro):
        """x, y (micro_batch_size, T) of this process, on the CPU."""
        x, y = self.data.batch(step, micro, self.micro_batch_size, self.rows_per_step, self.group.rank,
                               self.group.world, self.config.seed, self.offset)
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        return (x.pin_memory(), y.pin_memory()) if self.device.type == 'cuda' else (x, y)


# ----------------------------------------------------------------------------------------------------------------------
# The loop

def loop(run, interrupt):
    """Train until max_steps, or until the run is on a plateau, interrupted or diverged -> exit code."""
    config, progress, train_step, model, log = run.config, run.progress, run.train_step, run.model, run.log
    last_step_here = min(WATCHED_STEPS, config.max_steps - progress.step)
    batches = Prefetcher(run.batch, run.todo())
    profile = None
    if config.profile:
        from runtime import profiling  # a plain run does not need it
        profile = profiling.Profile(run.out, run.device, say=log.say) if run.group.main else None
    run.evals += [line for line in runlog.read_lines(run.out / 'metrics.jsonl') if line.get('kind') == 'eval']
    run.samples += runlog.read_lines(run.out / 'samples.jsonl')
    meter = Meter(run, batches)

    def stopping():
        """Whether any process received a signal to stop. All processes must call this at the same points."""
        run.stopped = run.stopped or run.group.any(interrupt.signals)
        return run.stopped

    write_status(run, 'running')
    model.statistics()  # resets the counters, so flip rates start here
    while True:
        # ---- progress.step steps are done: validate, sample, save
        set_stage(model, progress.step, config)
        with meter.paused():
            better = is_due(run, 'eval_interval') and run_validation(run, stopping)
            if run.encoding and progress.step and is_due(run, 'sample_interval') and not run.stopped:
                run_samples(run, stopping)
            give_hints(run)
            last = progress.step >= config.max_steps or on_plateau(config, progress)
            if stopping() or should_save(run, better, last):
                save(run)
            if progress.step and settings.is_due(config, 'archive_every', progress.step, progress.tokens):
                archive(run)
        if last or run.stopped:
            break

        # ---- one optimizer step
        lr, wd = schedules.schedule(progress.step, config)
        for kind, optimizer in train_step.optimizers.items():
            ratio = config.matrix_lr / config.learning_rate if kind == 'muon' and config.matrix_lr else 1
            set_rates(optimizer, lr * ratio, wd)
        losses = train_step.backward(progress.step, batches, run.micro_steps, stopping)
        if losses is None:
            continue  # the step is incomplete, so the resumed run repeats it
        result = train_step.judge(losses, progress.recent)
        if result.skip:
            record_skipped(run, result, lr)
        train_step.update(result)
        advance(run, result)
        meter.steps += 1

        # ---- report the step
        if train_step.steps == last_step_here >= 3:  # with zero_init, blocks have no gradient in the first step
            warn_of_silent_parameters(run)
        if progress.skipped == config.max_skipped or train_step.zero_steps == WATCHED_STEPS:
            return diverged(run)
        if profile:
            profile.step(last=progress.step >= config.max_steps)
        if config.profile and train_step.steps == 1:
            table = profiling.memory_breakdown(model, list(train_step.optimizers.values()), run.micro_batch_size,
                                               run.device, run.dtype)
            log.say(profiling.breakdown_table(table, run.device))
        if is_due(run, 'log_interval'):
            log_step(run, meter, result, lr, wd)
        if config.max_hours and run.time_limit.is_due(train_step.steps, config.max_steps):
            fit_to_time(run)

    if profile:
        profile.close()
    return ended(run, last)


def advance(run, result):
    """Count a completed step, with or without an update."""
    progress = run.progress
    progress.step += 1
    progress.tokens += run.config.batch_tokens
    progress.windows += run.rows_per_step
    progress.skipped = progress.skipped + 1 if result.skip else 0
    if run.config.spike_z and not result.skip:
        progress.recent = [*progress.recent, result.loss][-run.config.spike_window:]
    run.last_loss = result.loss
    if run.config.stop_on and not is_on(run.config, 'eval_interval') and not result.skip:
        note_loss(progress, smooth(progress, result.loss, run.config))


def is_due(run, key):
    """Whether the action with the interval `key` is due after this step. Every action that is on is due at the end."""
    config, progress = run.config, run.progress
    at_the_end = progress.step >= config.max_steps and is_on(config, key)
    return at_the_end or settings.is_due(config, key, progress.step, progress.tokens)


def fit_to_time(run):
    """Let the run end at the step that max_hours allows. All processes must call this."""
    config, progress, limit, before = run.config, run.progress, run.time_limit, run.config.max_steps
    if progress.step >= before:
        return
    max_steps = limit.fitting_steps(progress.step, run.train_step.steps, before, run.asked.max_steps,
                                    lambda seconds: run.group.gather([seconds])[0][0])
    progress.fitted_steps = max_steps
    if max_steps == before:
        return
    fit_steps(config, run.asked, max_steps)
    run.log.config({**config.as_dict(), 'data_fingerprint': run.data.fingerprint})
    run.log.line('metrics.jsonl', kind='event', event='max_hours', step=progress.step, max_steps=max_steps,
                 before=before, step_seconds=limit.step_seconds)
    run.log.say(f'max_hours={config.max_hours:g}: at {limit.step_seconds:.3g} s a step, the run ends at step '
                f'{max_steps:,} (before: {before:,})')


class Meter:
    """Speed since the last log line, without the time for validation, samples and saving."""

    def __init__(self, run, batches):
        self.run, self.batches, self.steps, self.waited, self.start = run, batches, 0, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        pause = time.perf_counter()
        yield
        self.start += time.perf_counter() - pause

    def read(self):
        """-> (tokens/s, fraction of the time spent waiting for data). Restarts the measurement."""
        hardware.synchronize(self.run.device)
        span = time.perf_counter() - self.start
        speed, wait = self.steps * self.run.config.batch_tokens / span, (self.batches.wait - self.waited) / span
        self.run.progress.seconds += span
        self.start, self.steps, self.waited = self.start + span, 0, self.batches.wait
        return speed, wait


# ----------------------------------------------------------------------------------------------------------------------
# Between steps: validation, samples, checkpoints

def run_validation(run, stopping):
    """Validate and log the result -> whether it is the best so far."""
    progress = run.progress
    result = validate(run.model, run.data, run.token_bytes, run.val_windows, run.micro_batch_size, run.device,
                      run.dtype, stopping, run.group)
    if not result:
        return False
    run.evals.append({'kind': 'eval', 'step': progress.step, **result, 'tokens': progress.tokens})
    run.log.line('metrics.jsonl', **run.evals[-1])
    run.log.say(f'step {progress.step:,}: validation loss {result["loss"]:.4f}, perplexity {result["perplexity"]:.1f}'
                + (f', {result["bits_per_byte"]:.4f} bits per byte' if run.encoding else ''))
    note_loss(progress, result['loss'])
    if result['loss'] >= progress.best:
        return False
    progress.best, progress.best_step = result['loss'], progress.step
    return True


def run_samples(run, stopping):
    """Sample every prompt in all modes. Prints the typical samples."""
    config, log, prompts = run.config, run.log, []
    for prompt in configurator.as_utf8(config.sample_prompts).split('|'):
        try:
            encode(run.encoding, prompt)
            prompts.append(prompt)
        except UserError as error:  # the tokenizer lacks one of its characters
            log.say(f'no samples of the prompt {prompt!r}: {error}')
    try:
        with autocast(run.device, run.dtype):
            samples = sample_grid(run.model, run.encoding, prompts, config.sample_tokens, config.seed, stopping)
    except UserError as error:
        log.say(f'no samples: {error}')
        return
    for sample in samples if not run.stopped else ():
        run.samples.append({'step': run.progress.step, **sample})
        log.line('samples.jsonl', **run.samples[-1])
        if sample['mode'] == 'typical':
            log.say(shown_sample(sample['prompt'] + sample['text'], run.progress.step >= config.max_steps))


def shown_sample(text, last):
    """A sample for the console: on one line, escaped, during the run. At its end, as text."""
    if not last:
        return f'  sample: {text!r}'
    readable = ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)  # no control characters
    return '  sample:\n' + textwrap.indent(readable, '    ')


def give_hints(run):
    """Print hints from the losses and samples so far, each kind of hint once."""
    if not is_due(run, 'eval_interval') and not is_due(run, 'sample_interval'):
        return
    # Training losses are judged only without validation. They are read back, because the run keeps none of them.
    train = [] if run.evals else runlog.read_lines(run.out / 'metrics.jsonl')
    for hint in hints(run.evals, run.samples, train):
        kind = hint.split(':')[0]
        if kind not in run.hinted:
            run.hinted.add(kind)
            run.log.say(f'  hint: {hint}')


def should_save(run, better, last):
    """Whether this step gets a checkpoint: it is due, the last one, validation improved, or the step is pinned."""
    config, progress = run.config, run.progress
    if not progress.step or not is_on(config, 'save_interval'):
        return False
    if settings.is_due(config, 'keep_every', progress.step, progress.tokens):
        progress.kept_steps = sorted({*progress.kept_steps, progress.step})
    regular = (last or is_due(run, 'save_interval')) and not progress.skipped
    return regular or better and config.save_on_best or progress.step in run.pinned_steps


def save(run):
    """Write a checkpoint of this step, unless it exists, and delete old ones. All processes must call this."""
    path = run.out / 'checkpoints' / f'step_{run.progress.step:07d}.pt'
    if run.saved == path:
        return
    train_step, group = run.train_step, run.group
    run.progress.spent = run.time_limit.spent()
    optimizers = {name: group.whole(optimizer.state_dict()) for name, optimizer in train_step.optimizers.items()}
    content = {
        'model': group.whole(run.model.state_dict()), **optimizers,
        'scaler': train_step.scaler.state_dict(), **run.progress.state_dict(), **origin_of(run),
        'rng': random_state(run.device), 'processes': group.world}

    def write():
        checkpoint.save(path, content)
        checkpoint.retain(path, run.config.keep, {run.progress.best_step, *run.pinned_steps})
    group.in_main(path.name, write)  # a large checkpoint can take longer than dist_timeout
    run.saved = path


def archive(run):
    """Write the weights of this step, without the state of the optimizer. All processes must call this."""
    weights = run.group.whole(run.model.state_dict())
    if run.group.main:
        (run.out / 'archives').mkdir(exist_ok=True)
        checkpoint.save(run.out / 'archives' / f'step_{run.progress.step:07d}.pt', {
            'model': weights, 'optimizer': {}, 'step': run.progress.step, 'tokens': run.progress.tokens,
            **origin_of(run)})


def origin_of(run):
    """What a file needs beside its weights: the config, the tokenizer and the data that they come from."""
    return {'config': run.config.as_dict(), 'tokenizer': run.data.tokenizer,
            'data': {'path': str(run.data.path), 'fingerprint': run.data.fingerprint}}


# ----------------------------------------------------------------------------------------------------------------------
# Messages of a run

def say_first_lines(run, first):
    """Print device, processes, model, data and steps."""
    config, group, model, log = run.config, run.group, run.model, run.log
    log.say(first + (f'; {group.world} processes, {config.parallel}' if group.world > 1 else ''))
    for kind, total, active in model.parameter_table():
        log.say(f'  {kind:10s} {total:12,} parameters' + (f', {active:,} active a token' if active != total else ''))
    for name, optimizer in run.train_step.optimizers.items():
        count = sum(len(group['params']) for group in optimizer.param_groups)
        matrices = sum(len(group['params']) for group in optimizer.param_groups if group['decays'])
        vectors = f' and {count - matrices} vectors' if name == 'optimizer' else ''
        log.say(f'  {type(optimizer).__name__}: {matrices} {"matrix" if matrices == 1 else "matrices"}{vectors}')
    processes = f'{group.world} processes x ' if group.world > 1 else ''
    micro_steps = f'{run.micro_steps} micro-step' + ('s' if run.micro_steps > 1 else '')
    parameters = sum(p.numel() for p in model.parameters())
    log.say(f'{parameters:,} parameters, {model.flops_per_token() / 1e6:.1f} MFLOP a token; '
            f'{run.data.train_tokens:,} training tokens in {run.data.path}; '
            f'{config.max_steps:,} steps of {config.batch_tokens:,} tokens '
            f'= {processes}{micro_steps} of {run.micro_batch_size} x {config.block_size}: '
            f'{run.total_tokens / (run.data.n_windows * config.block_size):.2f} epochs')
    for line in epoch_lines(config, run.data.n_windows):
        log.say(line)
    if config.packing == 'best_fit':
        log.say(run.data.summary())
    if not config.epochs and (line := run.data.repeats(run.total_tokens)):
        log.say(line)
    if not run.encoding:
        log.say('no tokenizer.json beside the shards: no samples and no bits per byte')


def write_status(run, state, **more):
    progress = run.progress
    run.log.status(state=state, step=progress.step, max_steps=run.config.max_steps, tokens=progress.tokens,
                   best=progress.best if math.isfinite(progress.best) else None, best_step=progress.best_step,
                   checkpoint=str(run.saved) if run.saved else None, processes=run.group.world, **more)


def log_step(run, meter, result, lr, wd):
    """Log the step on the console, in metrics.jsonl and in status.json."""
    config, progress, log = run.config, run.progress, run.log
    speed, loader_wait = meter.read()
    memory, peak = hardware.peak_memory_gb(run.device), hardware.peak_flops(run.device, run.dtype)
    mfu = run.model.flops_per_token() * speed / (peak * run.group.world) if peak else None
    eta = (config.max_steps - progress.step) * config.batch_tokens / speed
    log.line('metrics.jsonl', kind='train', step=progress.step, tokens=progress.tokens, loss=result.loss, lr=lr, wd=wd,
             grad_norm=result.norm, tokens_per_s=speed, mfu=mfu, mem_gb=memory, loader_wait=loader_wait,
             **run.model.statistics())
    percent, minutes = 100 * progress.step / config.max_steps, f'{int(eta // 60)}:{int(eta % 60):02d}'
    log.say(f'step {progress.step:,}/{config.max_steps:,} ({percent:.0f} %)  loss {result.loss:.4f}  lr {lr:.2e}  '
            f'wd {wd:g}  {schedules.stage(progress.step - 1, config)[0]}  norm {result.norm:.2f}  '
            f'{speed:,.0f} tokens/s  {memory:.2f} GB  {minutes} left', progress=True)
    write_status(run, 'running', loss=result.loss, tokens_per_s=speed, eta=eta, mem_gb=memory)


def record_skipped(run, result, lr):
    """Log a step without an update, before its gradients are freed. All processes must call this."""
    config, progress, log = run.config, run.progress, run.log
    micro_losses = run.group.gather([loss.item() * run.micro_steps for loss in result.losses])
    broken = [(name, p.grad is not None and not local_tensor(p.grad).isfinite().all())
              for name, p in run.model.named_parameters()]
    counts = run.group.sum(*(flag for _, flag in broken))  # with FSDP, each process has a part of every gradient
    names = [name for (name, _), count in zip(broken, counts) if count]
    windows = [[] for _ in range(run.micro_steps)]
    for micro in range(run.micro_steps):
        for rank in range(run.group.world):
            windows[micro] += run.windows(progress.step, micro, rank).tolist()
    log.line('metrics.jsonl', kind='event', event=result.skip, step=progress.step + 1, loss=result.loss,
             grad_norm=result.norm, lr=lr, windows=windows, micro_losses=micro_losses,
             nonfinite_gradients=len(names), first_of_them=names[:5],
             recent_mean=statistics.fmean(progress.recent) if progress.recent else None)
    reason = {'spike': ', a spike', 'zero_gradient': ', exactly zero'}.get(result.skip, '')
    if names:
        reason = f', {len(names)} parameters with non-finite gradients from {names[0]} on'
    log.say(f'step {progress.step + 1:,} skipped: loss {result.loss:.4f}, gradient norm {result.norm:.4g}{reason} '
            f'({progress.skipped + 1} in a row, {config.max_skipped} end the run)')


def warn_of_silent_parameters(run):
    """Print a line if some parameters had no gradient in any of the first steps."""
    names, steps = run.train_step.silent, run.train_step.steps
    if not names or run.train_step.zero_steps:  # if all gradients are exactly zero, the run ends anyway
        return
    run.log.line('metrics.jsonl', kind='event', event='no_gradient', step=run.progress.step, parameters=len(names),
                 first_of_them=names[:5])
    more = f' and {len(names) - 5} more parameters' if len(names) > 5 else ''
    run.log.say(f'no gradient in any of the first {steps} steps, so these parameters learn nothing: '
                f'{", ".join(names[:5])}{more}')


def diverged(run):
    """Print the last lines of a run that can't continue -> exit code."""
    write_status(run, 'diverged', loss=run.last_loss)
    if zeros := run.train_step.zero_steps:
        run.log.say(f'the gradient was exactly zero in {zeros} steps: the model learns nothing '
                    '(if the model is compiled, try --compile=false)')
    elif run.saved:
        run.log.say('diverged: lower the learning rate and continue from the last good checkpoint with '
                    f'--resume={run.saved}')
    else:
        run.log.say('diverged before the first checkpoint: lower the learning rate')
    return 3


def ended(run, finished):
    """Print the last lines of a finished or interrupted run -> exit code."""
    config, progress, log = run.config, run.progress, run.log
    if not finished:
        write_status(run, 'interrupted', loss=run.last_loss)
        log.say(f'interrupted at step {progress.step:,}, saved {run.saved}: '
                'continue with the same command and --resume=auto')
        return 75
    if progress.step < config.max_steps:
        log.line('metrics.jsonl', kind='event', event='plateau', step=progress.step, loss=progress.plateau_loss,
                 since=progress.plateau_step)
        log.say(f'stop_on=plateau: the loss has not improved by {100 * LEAST_GAIN:g} % since step '
                f'{progress.plateau_step:,} ({progress.plateau_loss:.4f}): '
                f'stopping at step {progress.step:,} of {config.max_steps:,}')
    write_status(run, 'finished', loss=run.last_loss)
    result = 'no step was left' if run.last_loss is None else f'last loss {run.last_loss:.4f}'
    if math.isfinite(progress.best):
        result = f'best validation loss {progress.best:.4f} at step {progress.best_step:,}'
    log.say(f'finished: {progress.step:,} steps, {progress.tokens:,} tokens '
            f'in {runlog.duration(progress.seconds)} of training; {result}')
    for line in next_steps(run) if run.saved else ():
        log.say(line)
    return 0


def next_steps(run):
    """What to do with the result of a finished run, one line each."""
    config, python = run.config, Path(sys.executable).name
    lines = [f'sample from it: {python} sample.py {run.out} --num=3'] if run.encoding else []
    same = f' --tokenizer={run.data.path}/tokenizer.json' if config.init_from and config.tokenizer == 'bpe' else ''
    return [*lines, f'see its curves: {python} watch.py {run.out} --plot',
            f'train longer: the same command with {twice_as_long(config)} --resume=auto',
            f'train on your own text: the same command with --dataset=text:PATH --out_dir=runs/mine{same}',
            'read more: README.md, docs/data.md, and --help of every command']


def twice_as_long(config):
    """The options that make a run twice as long."""
    longer = f'--epochs={2 * config.epochs:g}' if config.epochs else f'--max_steps={2 * config.max_steps}'
    return f'{longer} --max_hours={2 * config.max_hours:g}' if config.max_hours else longer


# ----------------------------------------------------------------------------------------------------------------------
# Before the loop

def is_finished(config, progress, origin):
    """A line for a run that is resumed although it has finished. Empty if it has not, or continues elsewhere."""
    if origin is None or Path(config.out_dir).resolve() not in origin.resolve().parents:
        return ''
    try:
        state = read_json(Path(config.out_dir) / 'status.json').get('state')
    except UserError:
        return ''
    if state != 'finished':  # killed before its last lines were written
        return ''
    if progress.step >= config.max_steps:
        return (f'{config.out_dir} is finished: {progress.step:,} steps are done. '
                f'Nothing to do; train longer with {twice_as_long(config)}')
    if on_plateau(config, progress):
        return (f'{config.out_dir} has stopped on a plateau at step {progress.step:,}. Nothing to do; '
                f'train on with --stop_on= or --plateau_steps={2 * config.plateau_steps}')
    return ''


def find_and_map(group):
    """checkpoint.find for a sharded model: the main process finds and verifies the file, and all processes map it."""
    def find(run, say):
        path = group.in_main(f'the checkpoint of {run}', lambda: str(checkpoint.find(run, say=say, mmap=True)[0]))
        return Path(path), checkpoint.load(path, verify=False, mmap=True)
    return find


def weights_to_start_from(config, data, find, say):
    """The source of --init_from and a dict with its weights, or (None, None)."""
    source = config.init_from
    if not source:
        return None, None
    pretrained = import_pretrained()
    if pretrained.is_pretrained(source):
        state = pretrained.load(source, config.block_size, say)
    else:
        source, state = find(source, say=say)
    checkpoint.same_tokenizer(state, data, source, '--init_from')
    say(f'weights from {source}')
    return source, state


def find_teacher(config, data, device):
    """The model of --distill_from, or None. UserError if its tokenizer or its vocabulary size doesn't match."""
    if not config.distill_from:
        return None
    from deploy import packed  # a plain run does not need it
    model, state = packed.load_model(config.distill_from, device, config.block_size)
    checkpoint.same_tokenizer(state, data, config.distill_from, '--distill_from')
    if model.config.vocab_size != config.vocab_size:
        raise UserError(f'--distill_from={config.distill_from}: its vocabulary has {model.config.vocab_size} entries, '
                        f'the vocabulary of this model has {config.vocab_size}')
    return model.requires_grad_(False)


def set_precision(model, config, device, say):
    """Convert the matrices of the blocks to weights_dtype. With dtype=fp8, let them multiply in fp8."""
    cast_matrices(model, config.weights_dtype)
    if config.dtype == 'fp8':
        from runtime import fp8  # a plain run does not need it
        say(fp8.start(model, device))


def set_stage(model, step, config):
    """What changes in the model on schedule: the number of tiles per token, and how far the weights are ternary."""
    model.set_top_k(schedules.top_k(step, config))
    model.set_ternary(schedules.ternary_share(step, config))


def compiled_model(run, interrupt, sharded):
    """
    (module to call in training, a line about it). The module is the compiled model. It is the model itself if
    compilation fails, takes too long, or gives other results than eager execution. None if a signal arrived during
    compilation. UserError if compilation of a sharded model takes too long.
    """
    from runtime import compile_check  # a plain run does not need it
    config, group, model, step = run.config, run.group, run.model, run.progress.step
    set_stage(model, step, config)
    scale = 1024.0 if run.train_step.scaler.is_enabled() else 1.0
    x, y = (part.to(run.device) for part in run.batch(step, 0))

    def compute(module):
        return scale * run.train_step.loss(module, step, 0, run.micro_steps, x, y)

    fast, overdue = compiler.compiled(model), False
    try:
        problem, note = compile_check.check(model, fast, compute, run.device, run.dtype,
                                            interrupt.limit(config.compile_timeout),
                                            group.sum if sharded else lambda *numbers: numbers, group.lost)
    except Overdue:
        overdue, problem, note = True, f'it took over {config.compile_timeout} s (--compile_timeout)', ''
        model.zero_grad(set_to_none=True)
    if overdue and sharded:  # the other processes may be in the middle of this collective step
        if interrupt.signals:
            return None
        raise UserError(f'rank {group.rank}: {problem}: use --compile=false, or a longer --compile_timeout')
    if group.any(interrupt.signals):
        return None
    if group.any(problem):
        if problem and not group.main:
            print(f'rank {group.rank}: compile off: {problem}', file=sys.stderr, flush=True)
        return model, f'compile off: {problem or "another process says why"}'
    return fast, note


@contextlib.contextmanager
def memory_guard(advice):
    """Turns out-of-memory into a UserError with advice(). advice() runs after the failed block's memory is freed."""
    failed = False
    try:
        yield
    except Exception as error:
        if not hardware.is_out_of_memory(error):
            raise
        failed = True
    if failed:
        raise UserError(advice())


def random_state(device):
    return {'cpu': torch.get_rng_state(), 'cuda': torch.cuda.get_rng_state(device) if device.type == 'cuda' else None}


def set_random_state(state, device):
    torch.set_rng_state(state['cpu'].cpu())
    if device.type == 'cuda' and state['cuda'] is not None:
        torch.cuda.set_rng_state(state['cuda'].cpu(), device)


if __name__ == '__main__':
    configurator.run(main)
