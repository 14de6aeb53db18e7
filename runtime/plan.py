"""
Estimate parameters, memory, time and disk before a run starts, and suggest changes if the run does not fit.

    python train.py config/x.py --plan                    # on this machine
    python train.py config/x.py --plan --card_gb=16       # on a GPU with 16 GB, even if this machine has no GPU

If a few real training steps are cheap, the plan runs them and measures memory and time. Each batch size runs in its own
process. Otherwise both are estimated. The page says which. Nothing here starts a run or writes a file.
"""
import contextlib
import itertools
import multiprocessing
import os
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, process
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from runtime import device as hardware
import schedule as schedules
from configurator import UserError, columns
from model import GPT, GPTConfig
from optim import make_optimizers
from runtime.parallel import Group
from runtime.profiling import counted, has_bfloat16, is_out_of_memory, logit_bytes, measured, readable
from settings import due_steps, epoch_lines, is_on
from tokenizer import id_dtype
from training import TrainStep

EFFICIENCY = 0.35  # an assumption: the fraction of matrix-product speed that training reaches
PROBE = 60  # approximate time limit for the steps of a probe, in seconds


# ----------------------------------------------------------------------------------------------------------------------
# Estimated memory and time

def shape_of(config):
    """The GPTConfig of a run with any eot_id. A plan can come before the data, and memory does not depend on the id."""
    return replace(config.pick(GPTConfig), eot_id=0)


def activations(config, kind, dtype):
    """
    Estimate the bytes that a micro-step keeps for backward.

    Returns (bytes per sequence, bytes per sequence with activation checkpointing, bytes independent of the batch).
    profiling.measured measures small models, and the result is scaled. Memory grows in proportion to layers and
    vocabulary. It also grows in proportion to context, unless the CPU's attention has dropout.
    Tensors are fake (without content), except for TriX and for document masks with resonance.

    kind: 'cpu' or 'cuda'. With dropout, attention on the CPU keeps T x T weights. Attention on CUDA does not, so the
    estimate for 'cuda' ignores dropout.
    """
    config = config if kind == 'cpu' else replace(config, dropout=0.0)
    masked = config.document_mask and ('resonance' in config.mixers() or config.ffn == 'resonance')
    fake, T = config.ffn != 'trix' and not masked, config.block_size  # sizes for TriX and documents depend on tokens
    if not fake and config.mixers() == ['resonance'] * config.n_layer:
        T = min(T, 2 * config.chunk_size)
    elif not fake and not config.dropout:
        T = min(T, 64)
    n, V = 1 if len(set(config.mixers())) == 1 else config.n_layer, 512

    def kept(n_layer, vocab_size):
        model = GPT(replace(config, n_layer=n_layer, vocab_size=vocab_size, block_size=T))
        plain, checkpointed, copies = measured(model, torch.device('cpu'), dtype)
        return plain * config.block_size / T, checkpointed * config.block_size / T, copies
    with FakeTensorMode() if fake else contextlib.nullcontext():
        small, wide = kept(n, V), kept(n, 2 * V)
        deep = kept(n + 1, V) if n < config.n_layer else small
    return tuple(a + (b - a) * (config.n_layer - n) + (c - a) * (config.vocab_size / V - 1) for a, b, c in zip(small, deep, wide))


def estimate(config, kind, dtype):
    """Estimate the memory of a training step.

    Returns a function (rows, checkpointing) -> {kind of memory: bytes}, for micro-steps of `rows` sequences."""
    with torch.device('meta'):
        model = GPT(shape_of(config))
        optimizers = make_optimizers(model, config, torch.device('cpu')).values()
    *a_sequence, copies = activations(model.config, kind, dtype)
    fixed = {kind: size for kind, size, _ in counted(model, optimizers)}

    def memory(rows, checkpointing):
        return {**fixed, 'copies': copies, 'activations': rows * a_sequence[checkpointing],
                'loss': logit_bytes(model, rows, torch.device(kind), dtype)}
    return memory


def achieved(device, dtype):
    """(FLOP/s that training should reach, a text that explains the figure)"""
    part = f'{EFFICIENCY:.0%} (an assumption) of'
    if peak := hardware.peak_flops(device, dtype):
        name = torch.cuda.get_device_name(device)
        return EFFICIENCY * peak, f'{part} the {peak / 1e12:,.0f} TFLOP/s that the maker of {name} states'
    size = 1024 if device.type == 'cpu' else 4096
    a, n, seconds = torch.randn(size, size, dtype=dtype, device=device), 0, 0.0
    a @ a
    hardware.synchronize(device)
    start = time.perf_counter()
    while seconds < 1:
        a @ a
        hardware.synchronize(device)
        n, seconds = n + 1, time.perf_counter() - start
    speed = 2 * size**3 * n / seconds
    return EFFICIENCY * speed, (f'{part} the {speed / 1e9:,.0f} GFLOP/s measured now on {device} '
                                f'in products of {size} x {size} matrices, {str(dtype).removeprefix("torch.")}')


# ----------------------------------------------------------------------------------------------------------------------
# Measured memory and time

@dataclass
class Measured:
    rows: int  # sequences of the micro-steps that were measured
    bytes: float  # that they took
    a_sequence: float  # of that, by half as many sequences
    micro: float  # seconds of a micro-step
    rest: float  # seconds of what follows until the next one: clipping, the optimizer


def steps(options, shape, rows, pattern, threads):
    """Run training steps with random tokens. Must run in its own process.

    Step i has pattern[i] micro-steps of `rows` sequences.
    Returns (bytes used, seconds per micro-step, seconds for the rest of a step).
    The times are medians without the first step."""
    torch.set_num_threads(threads)
    device, dtype, _ = hardware.resolve(options.device, options.dtype)
    before, times = hardware.peak_memory_gb(device), []
    torch.manual_seed(options.seed)
    model = GPT(shape).to(device).train()
    model.activation_checkpointing = options.activation_checkpointing
    train_step = TrainStep(model, make_optimizers(model, options, device), options, device, dtype, Group())
    random_ids = (torch.randint(shape.vocab_size, (rows, shape.block_size + 1)).to(device) for _ in itertools.count())
    batches = ((idx[:, :-1], idx[:, 1:]) for idx in random_ids)
    for micro_steps in pattern:
        start = time.perf_counter()
        losses = train_step.backward(0, batches, micro_steps)
        hardware.synchronize(device)
        middle = time.perf_counter()
        train_step.update(train_step.judge(losses))
        hardware.synchronize(device)
        times.append(((middle - start) / micro_steps, time.perf_counter() - middle))
        model.statistics()
    taken = hardware.peak_memory_gb(device) - before
    return taken * 1e9, *(statistics.median(each) for each in zip(*times[1:]))


def probe(config, rows, micro_steps, seconds_a_row, fits):
    """
    Measure a few real training steps.

    Returns a Measured. Returns None if even one sequence is too large or too slow, or if memory runs out anyway.
    Starts from `rows` sequences and halves them until the steps fit in memory and in PROBE seconds.
    seconds_a_row: the expected seconds per sequence of a micro-step.
    fits(n): whether a micro-step of n sequences should fit in memory.
    Runs four steps with that many sequences, and two steps with half as many.
    Short steps are repeated more often, because several seconds of measurement are more reliable than one.
    """
    several = min(2, micro_steps)
    cost = 1 + 3 * several + (1 + several) / 2  # at least this many micro-steps of n sequences in total
    n = next((n for n in (rows >> i for i in range(rows.bit_length())) if cost * n * seconds_a_row <= PROBE and fits(n)), 0)
    if not n:
        return None
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['torch._dynamo'])  # import once: it is slow, and every optimizer needs it
    options, shape = SimpleNamespace(**config.as_dict()), shape_of(config)
    repeats = next((k for k in range(12, 3, -1) if k * several * n * seconds_a_row <= PROBE / 10), 3)

    def run(n, *pattern):
        with ProcessPoolExecutor(1, server) as pool:
            return pool.submit(steps, options, shape, n, pattern, torch.get_num_threads()).result()
    try:
        # Several steps, because the load of TriX tiles changes and its memory grows a little for some steps.
        most, micro, rest = run(n, 1, *repeats * [several])
        less = run(n // 2, 1, several)[0] if n > 1 else most
    except process.BrokenProcessPool:
        return None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    return Measured(n, most, max(0.0, most - less) / max(1, n - n // 2), micro, rest)


# ----------------------------------------------------------------------------------------------------------------------
# Disk

def checkpoint_bytes(config):
    """(bytes of one checkpoint, bytes of one archive). Both hold the model's state dict in fp32. A checkpoint also holds
    the optimizers' moments."""
    with torch.device('meta'):
        model = GPT(shape_of(config))
        optimizers = make_optimizers(model, config, torch.device('cpu')).values()
    tensors = {id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}  # a tied matrix counts once
    weights = sum(tensors.values())
    return weights + next(size for kind, size, _ in counted(model, optimizers) if kind == 'optimizer'), weights


def checkpoints_at_most(config, best=True):
    """
    (largest number of checkpoints on disk at once, a text that explains it).

    Counts the newest, the best, the permanent checkpoints, and a checkpoint that is being written. best=False: count no
    checkpoints for better validations, because their number is unknown.
    """
    if not is_on(config, 'save_interval'):
        return 1, 'only if the run is interrupted (--save_interval=0)'
    best = best and config.save_on_best and is_on(config, 'eval_interval')
    permanent = {*config.mandatory_steps, *schedules.both_sides(config), *due_steps(config, 'keep_every')}
    # A better validation also saves a checkpoint.
    regular = due_steps(config, 'save_interval') | (due_steps(config, 'eval_interval') if best else set())
    saves = len({config.max_steps} | permanent | regular)
    if not config.keep:
        return saves, 'all are kept (--keep=0)' + (', if every validation is better than those before' if best else '')
    words = [f'keep={config.keep}']
    if best:
        words.append('the best')
    if permanent:
        words.append(f'{len(permanent)} permanent')
    return min(saves, config.keep + best + len(permanent)) + 1, ', '.join([*words, 'one being written'])


def check_disk(config):
    """UserError if the disk has no room for the checkpoints and archives that the run will keep."""
    (n, reason), (each, weights) = checkpoints_at_most(config, best=False), checkpoint_bytes(config)
    archives = len(due_steps(config, 'archive_every'))
    out = Path(config.out_dir)
    present = sum(file.stat().st_size for folder in ('checkpoints', 'archives') for file in (out / folder).glob('*.pt'))
    needed, free = n * each + archives * weights, free_bytes(out) + present
    if needed > free and (archives or is_on(config, 'save_interval')):
        more = f' and {archives:,} archives of {readable(weights)}' if archives else ''
        raise UserError(f'{out}: no room for {n:,} checkpoints ({reason}) of {readable(each)}{more} = {readable(needed)}: '
                        f'{readable(free)} are free. Use a smaller --keep, longer intervals, or another --out_dir')


def free_bytes(path):
    """Free bytes on the file system of a path. The path need not exist."""
    return shutil.disk_usage(next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.is_dir())).free


# ----------------------------------------------------------------------------------------------------------------------
# The page of the plan

def page(config, rows, micro_steps, data=None, world=1):
    """The whole plan as text. Memory is per process.

    rows: sequences per micro-step. world: number of processes. data: the loader of the prepared data, or None.
    Raises UserError, for example if the device or the precision is not available."""
    if config.card_gb and not torch.cuda.is_available():
        device, dtype = torch.device('cuda'), hardware.DTYPES.get(config.dtype, torch.bfloat16)
        why, here = f'a GPU of {config.card_gb:g} GB, {str(dtype).removeprefix("torch.")}: none is here', False
    else:
        (device, dtype, why), here = hardware.resolve(config.device, config.dtype), True
    with torch.device('meta'):
        model = GPT(shape_of(config))
    size, whose = room(device, config.card_gb)
    # Memory of Python and torch before the model exists. On a CUDA GPU, only tensors count.
    base = hardware.peak_memory_gb(device) * 1e9 if device.type != 'cuda' else 0
    speed, how = achieved(device, dtype if device.type != 'cpu' else torch.float32) if here else (None, '')
    kinds, fsdp = estimate(config, device.type if device.type == 'cuda' else 'cpu', dtype), config.parallel == 'fsdp' and world > 1

    def estimated(rows, checkpointing):
        return sum(share(kinds(rows, checkpointing), world if fsdp else 1).values())

    def total(rows, checkpointing=config.activation_checkpointing):
        """Bytes of a step: the measured bytes plus the estimated difference. Without a measurement, the estimate."""
        own = config.activation_checkpointing
        if not seen:
            return estimated(rows, checkpointing)
        slope = seen.a_sequence or estimated(2, own) - estimated(1, own)
        return seen.bytes + slope * (rows - seen.rows) + estimated(rows, checkpointing) - estimated(rows, own)
    seen = here and not fsdp and probe(config, rows, micro_steps, model.flops_per_token() * config.block_size / speed,
                                       lambda n: base + 1.5 * estimated(n, config.activation_checkpointing) < size)
    memory = share(kinds(rows, config.activation_checkpointing), world if fsdp else 1)
    parts = ([f'plan for {why}' + (f'; {world} processes, {config.parallel}' if world > 1 else '')], parameter_lines(model),
             memory_lines(config, memory, total, seen, rows, base, size, whose),
             ['the teacher of --distill_from is not in these figures: its weights, and a forward of it a micro-step'] * bool(config.distill_from),
             [] if base + total(rows) <= size else changes(config, device, dtype, rows, world, size - base, total, memory),
             *([[f'epochs={config.epochs:g}: {config.dataset} is not prepared yet, so the number of steps, the time, the disk '
                 'and the schedule are unknown']] if config.epochs and not data else [
                 run_lines(config, data), time_lines(config, model, seen, speed, how, rows, micro_steps, world),
                 disk_lines(config, data), [schedules.picture(config)]]))
    return '\n\n'.join('\n'.join(lines) for lines in parts if lines)


def share(memory, parts):
    """FSDP divides parameters, gradients and optimizer state by the number of processes, `parts`."""
    return {kind: size / parts if kind in ('parameters', 'gradients', 'optimizer') else size for kind, size in memory.items()}


def room(device, card_gb):
    """(bytes of memory for training, the name of the device that has them)"""
    if card_gb:
        return card_gb * 1e9, f'a card of {card_gb:g} GB'
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory, f'{device}'
    if device.type == 'mps':
        return torch.mps.recommended_max_memory(), f'{device}'
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'), 'this machine'


def parameter_lines(model):
    table = [each for each in model.parameter_table() if each[1]]
    total, used = (sum(column) for column in list(zip(*table))[1:])
    embedding = sum(p.numel() for part in (model.wte, model.wpe) if part for p in part.parameters())
    return [f'{total:,} parameters, {used:,} active (used by a token), {embedding:,} in embeddings'
            + ' (tied to the head)' * model.config.tie_embeddings + f'; {model.flops_per_token() / 1e6:,.1f} MFLOP a token',
            columns([('  kind', 'parameters', 'active'), *((f'  {kind}', f'{n:,}', f'{u:,}') for kind, n, u in table)])]


HOW = {'copies': 'ternary codes, weights in low precision, the gradient of the head', 'activations': 'kept by forward for backward',
       'loss': 'chunks of logits', 'optimizer': 'its moments', 'buffers': 'tables and counters'}


def memory_lines(config, memory, total, seen, rows, base, size, whose):
    """Two tables: memory by kind, and memory by batch_size."""
    T, step = config.block_size, total(rows)
    table = [(f'  {kind}', readable(each), HOW.get(kind, '')) for kind, each in memory.items() if each >= 0.0005 * step]
    if seen:
        rest = step - sum(memory.values())
        table.append(('  measured', ('-' if rest < 0 else '+') + readable(abs(rest)), 'by a real step'
                      + (f' of {seen.rows} x {T}' if seen.rows != rows else '') + (
            ': temporaries, what malloc and libraries hold' if rest >= 0 else ': not all of these are there at once')))
    if base:
        table.append(('  base', readable(base), 'Python and torch, before the model'))
    table.append(('  total', readable(base + step), f'of {readable(size)} of {whose}: ' + ('fits' if base + step <= size else 'DOES NOT FIT')
                  + ('' if seen else ' (an estimate, without what operators and malloc hold: nothing was run)')))
    cells = [('  batch_size', 'plain', '', '--activation_checkpointing=true', '')]
    for n in sorted({1, max(1, rows // 2), rows, 2 * rows, 4 * rows}):
        both = [base + total(n, checkpointing) for checkpointing in (False, True)]
        cells.append((f'  {n}' + ' (this run)' * (n == rows), *(word for each in both for word in (
            readable(each), 'fits' if each <= size else 'does not fit'))))
    return [f'memory of a training step with micro-steps of {rows} x {T} tokens'
            + ', with activation checkpointing' * config.activation_checkpointing, columns(table), '', 'memory by batch_size', columns(cells)]


def changes(config, device, dtype, rows, world, size, total, memory):
    """One line for each unused option that saves memory, with the memory of a step under that option."""
    found, tokens = [], config.batch_tokens
    smaller = [n for n in range(rows - 1, 0, -1) if tokens % (n * config.block_size * world) == 0]
    for checkpointing in {config.activation_checkpointing, True}:
        n = next((n for n in smaller if total(n, checkpointing) <= size), smaller[-1] if smaller else None)
        more = checkpointing and not config.activation_checkpointing
        if more:
            found.append(('--activation_checkpointing=true (same results, slower)', total(rows, True)))
        if n:
            found.append((f'--batch_size={n} --batch_tokens={tokens}{" --activation_checkpointing=true" * more} (same results)',
                          total(n, checkpointing)))
    if dtype == torch.float32 and has_bfloat16(device):
        half = estimate(config, device.type, torch.bfloat16)(rows, config.activation_checkpointing)
        found.append(('--dtype=bfloat16', sum(half.values())))
    if config.parallel != 'fsdp' and dtype != torch.float16:
        now = total(rows)
        found.append(('--parallel=fsdp on 8 devices (same results)', now - sum(memory.values()) + sum(share(memory, 8).values())))
    lines = [f'  {option}: {readable(then)}' + (', fits' if then <= size else ', not enough alone') for option, then in found]
    if not any(then <= size for _, then in found):
        lines.append('  or a smaller model: --n_layer, --n_embd, --block_size')
    return ['it does not fit; what to change:', *lines]


def run_lines(config, data):
    tokens = config.max_steps * config.batch_tokens
    text = f'{config.max_steps:,} steps of {config.batch_tokens:,} tokens = {tokens:,} tokens'
    if not data:
        return [f'{text}; {config.dataset} is not prepared yet, so the epochs are unknown']
    passes = tokens / (data.n_windows * config.block_size)
    lines = [f'{text}: {passes:.2f} epochs of the {data.train_tokens:,} in {data.path}', *epoch_lines(config, data.n_windows)]
    repeats = None if config.epochs else data.repeats(tokens)
    return [*lines, repeats] if repeats else lines


def time_lines(config, model, seen, speed, how, rows, micro_steps, world):
    """How long the run takes, from the probe or from a stated assumption.

    A validation token takes a third of the time of a training token, because it needs no backward."""
    work = model.flops_per_token() * config.max_steps * config.batch_tokens
    evals = len(due_steps(config, 'eval_interval')) + 1 if is_on(config, 'eval_interval') else 0
    part = 1 + evals * config.eval_tokens / 3 / (config.max_steps * config.batch_tokens)
    note = (f', with {evals} validations' if part > 1 else '') + '; samples, checkpoints and the preparation of data come on top'
    if not speed:
        times = ', '.join(f'{name} {duration(part * work / (EFFICIENCY * tflops * 1e12 * world))}'
                          for name, tflops in hardware.PEAK_TFLOPS.items())
        return [f'time of the {work:.2e} FLOPs at {EFFICIENCY:.0%} (an assumption) of the peak that the makers state: {times}{note}']
    if seen:
        seconds = micro_steps * seen.micro * rows / seen.rows + seen.rest
        how = 'measured now, on real steps with random tokens, not compiled'
    else:
        seconds, how = work / config.max_steps / (speed * world), f'an estimate: {how}'
    return [f'time: {number(seconds)} s a step, {number(config.batch_tokens / seconds)} tokens/s ({how}); '
            f'{duration(part * seconds * config.max_steps)} in all{note}']


def disk_lines(config, data):
    (n, why), (each, weights), free = checkpoints_at_most(config), checkpoint_bytes(config), free_bytes(config.out_dir)
    archives = len(due_steps(config, 'archive_every'))
    more = f'; {archives:,} archives of {readable(weights)} = {readable(archives * weights)}' if archives else ''
    width = id_dtype(config.vocab_size).itemsize  # bytes per token
    size = width * config.max_steps * config.batch_tokens
    if data:
        there = sum(file.stat().st_size for file in data.path.rglob('*') if file.is_file())
        text = f'{readable(there)} of data are in {data.path}'
    elif config.dataset == 'fineweb_edu':  # prepares only as many tokens as the run reads
        text = f'{readable(size)} of data are to be prepared'
    else:
        text = f'{config.dataset} is not prepared yet: {width} bytes a token'
    needed = n * each + archives * weights + (size if not data and config.dataset == 'fineweb_edu' else 0)
    return [f'disk: {n:,} checkpoints at most ({why}) of {readable(each)} = {readable(n * each)} in {config.out_dir}{more}; {text}; '
            f'{readable(free)} are free: ' + ('enough' if needed <= free else 'NOT ENOUGH: a smaller --keep, or another --out_dir')]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers as text

def duration(seconds):
    for unit, size in (('years', 365 * 86_400), ('days', 86_400), ('h', 3600), ('min', 60)):
        if seconds >= size:
            return f'{number(seconds / size)} {unit}'
    return f'{number(seconds)} s'


def number(x):
    return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def count(n):
    """1_638_400 -> '1.64M'"""
    unit, letter = next((u for u in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')) if n >= 0.9995 * u[0]), (1, ''))
    return f'{n / unit:.3g}{letter}'
