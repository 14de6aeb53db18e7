"""
What one config file takes, and what makes it faster: the commands steps, batch and memory of bench.py.

Each command is a function of a BenchConfig. It prints a table and writes <config.out>/<machine>/<command>.json.
"""
import math
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor, process
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import settings
from benchmarks.blocks import is_cpu, supports
from benchmarks.measure import Candidate, compare, report, side_by_side, training_step
from configurator import UserError
from model import GPT, GPTConfig
from runtime import device as hardware
from runtime import plan
from runtime.runlog import duration

CARDS_GB = (8, 12, 16, 24)  # columns of `memory`
LONGEST = 12 * 3600  # seconds; `steps` does not start if it takes longer
QUICK = 2  # repeats of `steps --quick`


def options_of(config, *changed):
    """The options of a command, as on the command line: --model, and those of `changed` that are set."""
    values = {key: getattr(config, key) for key in ('model', *changed)}
    return ''.join(f' --{key}={value:g}' if isinstance(value, float) else f' --{key}={value}'
                   for key, value in values.items() if value)


# ----------------------------------------------------------------------------------------------------------------------
# Speed-ups

def steps(config):
    """
    Training steps of --model with one change at a time, each beside `base` in turn: fp32, eager, and the config file's
    own batch, chunks and activation checkpointing. `ratio`: tokens/s over those of `base` within a repeat. The time
    is estimated first, and UserError if it is longer than LONGEST.
    """
    base, changes = variations(config)
    repeats = QUICK if config.quick else max(2, config.repeats // 3)
    T = base.shape.block_size
    print(f'{config.model}: training steps of {base.batch_size} x {T:,} tokens in fp32, and with one change at a time: '
          f'{", ".join(changes)}', flush=True)
    check_time(config, base, changes, repeats)
    # Alone first: it must fit. Later, two models are in memory at a time.
    times, peaks = beside(f'{config.model}, base alone', {'base': base}, 2, config)
    if times is None:
        raise UserError(f'{config.model}: a step of {base.batch_size} x {T:,} tokens in fp32 is out of memory; '
                        f'see python bench.py batch --model={config.model}')
    seconds = compare(times, 'base')[0]['seconds']
    rows = [{'change': 'base', 'tokens/s': base.batch_size * T / seconds, 'ratio': 1.0, 'low': 1.0, 'high': 1.0,
             'peak GB': peaks['base']}]
    for number, (name, candidate) in enumerate(changes.items(), 1):
        title = f'{name} (change {number} of {len(changes)})'
        times, peaks = beside(title, {'base': base, name: candidate}, repeats, config)
        if times is None:
            rows.append({**dict.fromkeys(rows[0], ''), 'change': f'{name}: out of memory'})
            continue
        row = compare(times, 'base')[1]
        more = candidate.batch_size / base.batch_size  # tokens of a step, over those of base
        rows.append({'change': name, 'tokens/s': candidate.batch_size * T / row['seconds'],
                     'ratio': row['ratio'] * more, 'low': row['low'] * more, 'high': row['high'] * more,
                     'peak GB': peaks[name]})
    report('steps', rows, config, options_of(config), name=f'steps_{Path(config.model).stem}')


def check_time(config, base, changes, repeats):
    """Print how long `steps` takes, by an estimate. UserError if it takes longer than LONGEST."""
    device = hardware.resolve(config.device, 'float32')[0]
    speed, how = plan.achieved(device, torch.float32)
    with torch.device('meta'):
        flops = GPT(replace(base.shape, eot_id=0)).flops_per_token() * base.shape.block_size * base.batch_size
    # A change runs beside base. Each step counts as that of base, times its batch size over that of base.
    beside_base = sum(1 + change.batch_size / base.batch_size for change in changes.values())
    step, alone = flops / speed, 1 + 2
    seconds, quick_seconds = (step * (alone + (1 + n) * beside_base) for n in (repeats, QUICK))
    print(f'a step takes about {duration(step)} and the whole command about {duration(seconds)}, '
          f'by an estimate: {how}. Compiling and starting processes come on top', flush=True)
    if seconds > LONGEST:
        quick = '--quick, or ' if quick_seconds <= LONGEST else ''
        raise UserError(f'{config.model}: more than {duration(LONGEST)} on {device}: try {quick}a faster '
                        'device, or a copy of the file with a smaller batch_size, block_size or n_layer')


def variations(config):
    """(base, {name: Candidate with one change}) of --model: what the device has, and what the model has a use for."""
    run = settings.load([config.model])
    shape, checkpointing = run.pick(GPTConfig), run.activation_checkpointing
    options = SimpleNamespace(**run.as_dict())
    base = Candidate(shape, run.batch_size, 'float32', 'false', options)
    half = 'bfloat16' if supports(config.device, 'bfloat16') else 'float16'
    # Most CPUs multiply bf16 many times slower than fp32.
    dtypes = [] if is_cpu(config) else [dtype for dtype in ('tf32', half) if supports(config.device, dtype)]
    changes = {dtype: replace(base, dtype=dtype) for dtype in dtypes}
    changes['compile'] = replace(base, compile='true')
    toggled = SimpleNamespace(**{**vars(options), 'activation_checkpointing': not checkpointing})
    changes[f'activation checkpointing {"off" if checkpointing else "on"}'] = replace(base, options=toggled)
    if 'resonance' in (shape.mixer, shape.ffn):
        for n in (shape.chunk_size // 4, shape.chunk_size * 4):
            if 16 <= n <= shape.block_size:
                changes[f'chunk_size={n}'] = replace(base, shape=replace(shape, chunk_size=n))
    for n in (base.batch_size // 2, 2 * base.batch_size):
        if n:
            changes[f'batch_size={n}'] = replace(base, batch_size=n)
    return base, changes


def beside(title, candidates, repeats, config):
    """(times, peaks) of side_by_side. (None, None) if a candidate runs out of memory."""
    try:
        return side_by_side(title, candidates, repeats, config)
    except (RuntimeError, MemoryError) as error:
        if not hardware.is_out_of_memory(error):
            raise
    except UserError as error:
        print(error)  # a process has died, most likely of memory
    print(f'{title}: out of memory', flush=True)
    return None, None


# ----------------------------------------------------------------------------------------------------------------------
# The largest batch

def batch(config):
    """
    The largest batch of --model that fits, to a sixteenth: doubled until it does not fit, then bisected. Each batch
    size is two real training steps in its own process, with the optimizer and the activation checkpointing of the
    config file. A GPU tries until it is out of memory or over --card_gb. Elsewhere the limit is --card_gb or nine
    tenths of the free memory, and a batch that smaller ones show to be too large is not tried.
    """
    device = hardware.resolve(config.device, config.dtype)[0]
    run = settings.load([config.model])
    shape, options = run.pick(GPTConfig), SimpleNamespace(**run.as_dict())
    T = shape.block_size
    memory_limit = config.card_gb or (math.inf if device.type == 'cuda' else 0.9 * free_memory_gb())
    peaks = {}  # {batch size: peak GB}
    how = 'with activation checkpointing' if run.activation_checkpointing else 'without activation checkpointing'
    print(f'{config.model}: two steps of each batch size, {how}', flush=True)

    def fits(batch_size):
        if device.type != 'cuda' and extrapolated(peaks, batch_size) > memory_limit:
            return False
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
            try:
                peak = pool.submit(two_steps, shape, batch_size, config.device, config.dtype, options).result()
            except process.BrokenProcessPool:
                return False
        if peak is None:
            print(f'{batch_size:,} x {T:,}: out of memory', flush=True)
            return False
        print(f'{batch_size:,} x {T:,}: {peak:.3g} GB', flush=True)
        peaks[batch_size] = peak
        return peak <= memory_limit

    largest, too_large = 0, 1
    while fits(too_large):
        largest, too_large = too_large, 2 * too_large
    while too_large - largest > max(1, largest // 16):
        middle = (largest + too_large) // 2
        if fits(middle):
            largest = middle
        else:
            too_large = middle
    if not largest:
        raise UserError(f'{config.model}: not even one sequence of {T:,} tokens fits into {memory_limit:.3g} GB')
    row = {'config': Path(config.model).stem, 'context': T, 'checkpointing': on_off(run.activation_checkpointing),
           'limit GB': float(min(memory_limit, 1e6)), 'largest batch': largest, 'peak GB': peaks[largest]}
    report('batch', [row], config, options_of(config, 'card_gb'))


def on_off(value):
    return 'on' if value else 'off'


def extrapolated(peaks, batch_size):
    """GB of a batch, on the straight line through the two largest of peaks {batch size: GB}. 0 if there are fewer."""
    if len(peaks) < 2:
        return 0.0
    (a, gb_a), (b, gb_b) = sorted(peaks.items())[-2:]
    return gb_b + (gb_b - gb_a) / (b - a) * (batch_size - b)


def two_steps(shape, batch_size, device, dtype, options):
    """Peak GB of two training steps. None if they run out of memory."""
    device, dtype, _ = hardware.resolve(device, dtype)
    try:
        _, step = training_step(shape, batch_size, device, dtype, options=options)
        step()
        step()
    except (RuntimeError, MemoryError) as error:
        if not hardware.is_out_of_memory(error):
            raise
        return None
    return hardware.peak_memory_gb(device)


def free_memory_gb():
    meminfo = Path('/proc/meminfo')
    if meminfo.exists():
        return int(re.search(r'MemAvailable:\s+(\d+)', meminfo.read_text())[1]) * 1024 / 1e9
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# Memory by batch, precision and checkpointing

def memory(config):
    """
    The estimated memory of a training step of --model on a GPU, for --batch_sizes in fp32 and fp16, with and without
    activation checkpointing, and the cards on which it fits. As in train.py --plan, only tensors count: the CUDA
    context takes about half a GB on top, and a card has a little more memory than its name says.
    """
    run = settings.load([config.model])
    rows = []
    for name, dtype in (('fp32', torch.float32), ('fp16', torch.float16)):
        estimated = plan.estimate(run, 'cuda', dtype)
        for batch_size in config.batch_sizes:
            for checkpointing in (False, True):
                kinds = {kind: size / 1e9 for kind, size in estimated(batch_size, checkpointing).items()}
                total = sum(kinds.values())
                rows.append({
                    'batch': batch_size, 'precision': name, 'checkpointing': on_off(checkpointing),
                    'parameters GB': kinds['parameters'], 'gradients GB': kinds['gradients'],
                    'optimizer GB': kinds['optimizer'], 'activations GB': kinds['activations'],
                    'other GB': kinds['buffers'] + kinds['copies'] + kinds['workspace'], 'total GB': total,
                    'fits on': ', '.join(f'{gb}' for gb in CARDS_GB if total <= gb) + ' GB'
                    if total <= CARDS_GB[-1] else 'none'})
    print(f'{config.model}: estimated memory of a step with {run.block_size:,} tokens a sequence; '
          f'cards of {", ".join(map(str, CARDS_GB))} GB')
    report('memory', rows, config, options_of(config), name=f'memory_{Path(config.model).stem}')
