"""
Estimate parameters, memory, time and disk before a run starts, and suggest changes if the run does not fit.

    python train.py config/x.py --plan                               # on this machine
    python train.py config/x.py --plan --card="RTX 3060" --price=0.2 # on another card, and the cost at 0.2 an hour
    python train.py config/x.py --plan --card_gb=16                  # the memory alone, on a GPU with 16 GB

If a few real training steps are cheap, the plan runs them and measures memory and time. Each batch size runs in its own
process. Otherwise both are estimated. The page says which. Nothing here starts a run or writes a file.
"""
import contextlib
import itertools
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, process
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import schedule as schedules
from configurator import UserError, columns
from model import GPT
from optim import cast_matrices, make_optimizers
from runtime import device as hardware
from runtime.disk import checkpoint_bytes, checkpoints_at_most, free_bytes, model_of, readable, shape_of
from runtime.parallel import OneProcess
from runtime.profiling import (COPIES, MemoryOption, counted, has_bfloat16, logit_bytes, measured,
                               memory_options, working_bytes)
from runtime.runlog import duration
from settings import due_steps, epoch_lines, is_on
from tokenizer import id_dtype
from training import TrainStep

EFFICIENCY = 0.35  # an assumption: the fraction of matrix-product speed that training reaches
LIBRARIES = 0.2e9  # bytes of code and workspace that a first step loads on a CPU, as measured with torch 2.13
PROBE = 60  # approximate time limit for the steps of a probe, in seconds


# ----------------------------------------------------------------------------------------------------------------------
# Estimated memory and time

def measurable(config, kind):
    """(the config to measure, whether fake tensors will do, the number of tokens to measure). See activations()."""
    config = config if kind == 'cpu' else replace(config, dropout=0.0)
    masked = config.document_mask and ('resonance' in config.mixers() or config.ffn == 'resonance')
    fake, T = config.ffn != 'trix' and not masked, config.block_size  # sizes for TriX and documents depend on tokens
    if not fake and config.mixers() == ['resonance'] * config.n_layer:
        T = min(T, 2 * config.chunk_size)
    elif not fake and not config.dropout:
        T = min(T, 64)
    return config, fake, T


def block_work(config, kind, dtype, weights_dtype='float32'):
    """profiling.working_bytes for a sequence: (bytes that a block keeps for backward, bytes on top at its peak)."""
    config, fake, T = measurable(config, kind)
    n_layer = config.attention_every or 1  # one block of each kind
    with FakeTensorMode() if fake else contextlib.nullcontext():
        model = GPT(replace(config, n_layer=n_layer, vocab_size=512, block_size=T))
        cast_matrices(model, weights_dtype)
        one, two = (working_bytes(model, rows, torch.device('cpu'), dtype) for rows in (1, 2))
    return tuple((b - a) * config.block_size / T for a, b in zip(one, two))


def activations(config, kind, dtype, weights_dtype='float32'):
    """
    Estimate the bytes that a micro-step keeps for backward.

    Returns (bytes per sequence, bytes per sequence with activation checkpointing, bytes independent of the batch).
    profiling.measured measures small models, and the result is scaled. Memory grows in proportion to layers and
    vocabulary. It also grows in proportion to context, unless the CPU's attention has dropout.
    Tensors are fake (without content), except for TriX and for document masks with resonance.

    kind: 'cpu' or 'cuda'. With dropout, attention on the CPU keeps T x T weights. Attention on CUDA does not, so the
    estimate for 'cuda' ignores dropout.
    """
    config, fake, T = measurable(config, kind)
    n, V = 1 if len(set(config.mixers())) == 1 else config.n_layer, 512

    def kept(n_layer, vocab_size):
        model = GPT(replace(config, n_layer=n_layer, vocab_size=vocab_size, block_size=T))
        cast_matrices(model, weights_dtype)
        plain, checkpointed, copies = measured(model, torch.device('cpu'), dtype)
        return plain * config.block_size / T, checkpointed * config.block_size / T, copies
    with FakeTensorMode() if fake else contextlib.nullcontext():
        small, wide = kept(n, V), kept(n, 2 * V)
        deep = kept(n + 1, V) if n < config.n_layer else small
    return tuple(a + (b - a) * (config.n_layer - n) + (c - a) * (config.vocab_size / V - 1)
                 for a, b, c in zip(small, deep, wide))


def estimate(config, kind, dtype):
    """Estimate the memory of a training step.

    Returns a function (rows, checkpointing) -> {kind of memory: bytes}, for micro-steps of `rows` sequences."""
    with torch.device('meta'):
        model = model_of(config)
        optimizers = make_optimizers(model, config, torch.device('cpu')).values()
    *a_sequence, copies = activations(model.config, kind, dtype, config.weights_dtype)
    a_block, on_top = block_work(model.config, kind, dtype, config.weights_dtype)
    fixed = {kind: size for kind, size, _ in counted(model, optimizers)}

    def memory(rows, checkpointing):
        # The backward of the loss holds the gradients of the head and of its input a second time, scaled.
        head = model.lm_head.weight.nbytes + 4 * rows * config.block_size * config.n_embd
        loss = max(head, logit_bytes(model, rows, torch.device(kind), dtype))
        # The loss comes before the backward of the blocks. With checkpointing, no block is recomputed yet.
        recomputed = rows * a_block if checkpointing else 0
        return {**fixed, 'copies': copies, 'activations': rows * a_sequence[checkpointing],
                'workspace': max(rows * on_top, loss - recomputed)}
    return memory


def achieved(device, dtype):
    """(FLOP/s that training should reach, a text that explains the figure)"""
    part = f'{EFFICIENCY:.0%} (an assumption) of'
    if peak := hardware.peak_flops(device, dtype):
        name = torch.cuda.get_device_name(device)
        return EFFICIENCY * peak, f'{part} the {peak / 1e12:,.4g} TFLOP/s that the maker of {name} states'
    size, speed = matmul_flops(device, dtype)
    return EFFICIENCY * speed, (f'{part} the {speed / 1e9:,.0f} GFLOP/s measured now on {device} '
                                f'in products of {size} x {size} matrices, {name_of(dtype)}')


def matmul_flops(device, dtype, duration=1.0):
    """(n, FLOP/s of products of n x n matrices), measured for `duration` seconds."""
    size = 1024 if device.type == 'cpu' else 4096
    a = torch.randn(size, size, dtype=dtype, device=device)
    a @ a
    hardware.synchronize(device)
    start, seconds, products = time.perf_counter(), 0.0, 0
    while seconds < duration:
        a @ a
        hardware.synchronize(device)
        products += 1
        seconds = time.perf_counter() - start
    return size, 2 * size**3 * products / seconds


def name_of(dtype):
    return str(dtype).removeprefix('torch.')


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
    before = hardware.peak_memory_gb(device)
    times = []  # (seconds per micro-step, seconds for the rest) of each step
    torch.manual_seed(options.seed)
    model = GPT(shape).to(device).train()
    cast_matrices(model, options.weights_dtype)
    model.activation_checkpointing = options.activation_checkpointing
    train_step = TrainStep(model, make_optimizers(model, options, device), options, device, dtype, OneProcess())
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
    halves = [rows >> i for i in range(rows.bit_length())]
    n = next((n for n in halves if cost * n * seconds_a_row <= PROBE and fits(n)), 0)
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
        if not hardware.is_out_of_memory(error):
            raise
        return None
    return Measured(n, most, max(0.0, most - less) / max(1, n - n // 2), micro, rest)


# ----------------------------------------------------------------------------------------------------------------------
# What the plan is for

@dataclass
class Target:
    """The device that a plan is for: in this machine, or another card."""
    device: torch.device
    dtype: torch.dtype
    description: str
    is_here: bool  # real steps can be measured
    half: torch.dtype | None  # its 16-bit precision
    memory_limit: float  # bytes
    limit_name: str
    speed: float | None = None  # FLOP/s that training should reach; None: unknown
    speed_source: str = ''
    is_other_card: bool = False  # so its time is not that of this machine

    @property
    def kind(self):
        """The kind of device whose memory is estimated."""
        return 'cpu' if self.device.type in ('cpu', 'mps') else 'cuda'


def find_target(config):
    """The Target of a config. UserError if a card, a device or a precision is not available."""
    if config.card or config.card_gb:
        return other_card(config)
    device, dtype, description = hardware.resolve(config.device, config.dtype)
    half = torch.bfloat16 if has_bfloat16(device) else torch.float16 if device.type == 'cuda' else None
    target = Target(device, dtype, description, True, half, *room(device, 0))
    target.speed, target.speed_source = achieved(device, dtype if device.type != 'cpu' else torch.float32)
    return target


def other_card(config):
    """The Target of --card and --card_gb."""
    key, gb = hardware.choose_card(config.card, config.card_gb) if config.card else (None, config.card_gb)
    auto = hardware.card_dtype(key) if key else 'bfloat16'
    precision = auto if config.dtype == 'auto' else config.dtype
    if precision not in hardware.DTYPES:
        raise UserError(f'--dtype={precision}: expected auto, {", ".join(hardware.DTYPES)}')
    dtype = hardware.DTYPES[precision]
    name = f'{key} with {gb:g} GB' if key else f'a GPU with {gb:g} GB'
    is_here = torch.cuda.is_available() and config.device.startswith(('auto', 'cuda'))
    if is_here:  # its memory can be measured on the GPU of this machine
        device, dtype, _ = hardware.resolve(config.device, precision)
        description = f'{name}, {precision}; memory is measured on {torch.cuda.get_device_name(device)}'
    else:
        device, description = torch.device('cuda'), f'{name}, {precision}; this card is not in this machine'
    half = None if auto == 'float32' else hardware.DTYPES[auto]
    target = Target(device, dtype, description, is_here, half, *room(device, gb), is_other_card=True)
    if key:
        peak = hardware.card_flops(key, dtype, tf32=precision == 'tf32')
        if not peak:
            raise UserError(f'--dtype={precision}: {key} does not have it; use --dtype={auto}')
        target.speed, target.speed_source = EFFICIENCY * peak, (
            f'{EFFICIENCY:.0%} (an assumption) of the {peak / 1e12:,.4g} TFLOP/s that its maker states')
    return target


def room(device, card_gb):
    """(bytes of memory for training, the name of the device that has them)"""
    if card_gb:
        return card_gb * 1e9, f'a card of {card_gb:g} GB'
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory, f'{device}'
    if device.type == 'mps':
        return torch.mps.recommended_max_memory(), f'{device}'
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'), 'this machine'


# ----------------------------------------------------------------------------------------------------------------------
# The page of the plan

class StepMemory:
    """
    The memory of a training step in one process, under any MemoryOption: measured where a probe has run, plus the
    estimated difference to what was measured.
    """

    def __init__(self, config, target, rows, world):
        self.config, self.target, self.rows = config, target, rows
        self.parts = world if config.parallel == 'fsdp' and world > 1 else 1
        self.measured = None  # a Measured
        self.estimates = {}  # dtype: the function of estimate()
        self.now = MemoryOption('', '', rows, config.activation_checkpointing, target.dtype)
        # Memory of Python and torch before the model exists. On a CUDA GPU, only tensors count.
        self.base = hardware.peak_memory_gb(target.device) * 1e9 if target.device.type != 'cuda' else 0
        self.libraries = LIBRARIES if target.device.type == 'cpu' else 0

    def by_kind(self, option):
        """{kind of memory: estimated bytes}"""
        if option.dtype not in self.estimates:
            self.estimates[option.dtype] = estimate(self.config, self.target.kind, option.dtype)
        memory = self.estimates[option.dtype](option.rows, option.checkpointing)
        return share(memory, self.parts * option.shards)

    def estimated(self, option):
        return sum(self.by_kind(option).values())

    def total(self, option):
        """Bytes of a step, without `base`."""
        seen, now = self.measured, self.now
        if not seen:
            return self.estimated(option) + self.libraries
        slope = seen.a_sequence or self.estimated(replace(now, rows=2)) - self.estimated(replace(now, rows=1))
        at_these_rows = seen.bytes + slope * (option.rows - seen.rows)
        return at_these_rows + self.estimated(option) - self.estimated(replace(now, rows=option.rows))

    def fits(self, option):
        return self.base + self.total(option) <= self.target.memory_limit


def share(memory, parts):
    """FSDP divides parameters, gradients and optimizer state by the number of processes, `parts`."""
    return {kind: size / parts if kind in ('parameters', 'gradients', 'optimizer') else size
            for kind, size in memory.items()}


def page(config, rows, micro_steps, data=None, world=1):
    """The whole plan as text. Memory is per process.

    rows: sequences per micro-step. world: number of processes. data: the loader of the prepared data, or None.
    Raises UserError, for example if the device or the precision is not available."""
    target = find_target(config)
    with torch.device('meta'):
        model = model_of(config)
    memory = StepMemory(config, target, rows, world)
    if target.is_here and memory.parts == 1:
        here = target.speed if not target.is_other_card else achieved(target.device, target.dtype)[0]
        memory.measured = probe(
            config, rows, micro_steps, model.flops_per_token() * config.block_size / here,
            lambda n: memory.base + 1.5 * memory.estimated(replace(memory.now, rows=n)) < target.memory_limit)
    seconds, source = step_seconds(config, target, model, memory.measured, rows, micro_steps, world)
    title = f'plan for {target.description}'
    if world > 1:
        title += f'; {world} processes, {config.parallel}'
    teacher = ['the teacher of --distill_from needs more: its weights, and one forward in each micro-step']
    parts = [[title], parameter_lines(model), memory_lines(config, memory), teacher if config.distill_from else [],
             [] if memory.fits(memory.now) else suggestions(config, memory, world)]
    if config.epochs and not data:
        parts.append([f'epochs={config.epochs:g}: {config.dataset} is not prepared yet, so the number of steps, the '
                      'time, the disk and the schedule are unknown'])
    else:
        parts += [run_lines(config, data), time_lines(config, data, seconds, source, world), disk_lines(config, data),
                  schedules.plot(config), timetable(config, data, seconds, world)]
    return '\n\n'.join('\n'.join(lines) for lines in parts if lines)


def parameter_lines(model):
    table = [row for row in model.parameter_table() if row[1]]
    total = sum(parameters for _, parameters, _ in table)
    active = sum(used for *_, used in table)
    embedding = sum(p.numel() for part in (model.wte, model.wpe) if part for p in part.parameters())
    tied = ' (tied to the head)' if model.config.tie_embeddings else ''
    rows = [(f'  {kind}', f'{parameters:,}', f'{used:,}') for kind, parameters, used in table]
    return [f'{total:,} parameters, {active:,} active (used by a token), {embedding:,} in embeddings{tied}; '
            f'{model.flops_per_token() / 1e6:,.1f} MFLOP a token', columns([('  kind', 'parameters', 'active'), *rows])]


HOW = {'copies': COPIES, 'activations': 'kept by forward for backward', 'optimizer': 'its moments',
       'buffers': 'tables and counters',
       'workspace': 'of backward: gradients of activations inside a block, or those of the head, or a chunk of logits'}


def memory_lines(config, memory):
    """Two tables: memory by kind, and memory by batch_size."""
    T, now, rows, target, seen = config.block_size, memory.now, memory.rows, memory.target, memory.measured
    step = memory.total(now)
    kinds = memory.by_kind(now)
    table = [(f'  {kind}', readable(size), HOW.get(kind, '')) for kind, size in kinds.items() if size >= 0.0005 * step]
    if seen:
        rest = step - sum(kinds.values())
        of_what = f'in a real step of {seen.rows} x {T}' if seen.rows != rows else 'in a real step'
        why = 'temporaries, and what malloc and libraries hold'
        if rest < 0:
            why = 'not all of these exist at the same time'
        table.append(('  measured', ('-' if rest < 0 else '+') + readable(abs(rest)), f'{of_what}: {why}'))
    elif memory.libraries:
        table.append(('  libraries', readable(memory.libraries), 'code and workspace (an assumption)'))
    if memory.base:
        table.append(('  base', readable(memory.base), 'Python and torch, before the model'))
    verdict = 'fits' if memory.fits(now) else 'DOES NOT FIT'
    if not seen:
        heap = ', which can be as much again for tensors below 32 MB' if target.device.type == 'cpu' else ''
        verdict += f' (an estimate, without what operators and malloc hold{heap}: nothing was run)'
    table.append(('  total', readable(memory.base + step),
                  f'of {readable(target.memory_limit)} of {target.limit_name}: {verdict}'))
    cells = [('  batch_size', 'plain', '', '--activation_checkpointing=true', '')]
    for n in sorted({1, max(1, rows // 2), rows, 2 * rows, 4 * rows}):
        row = [f'  {n} (this run)' if n == rows else f'  {n}']
        for checkpointing in (False, True):
            option = replace(now, rows=n, checkpointing=checkpointing)
            row += [readable(memory.base + memory.total(option)), 'fits' if memory.fits(option) else 'does not fit']
        cells.append(row)
    title = f'memory of a training step with micro-steps of {rows} x {T} tokens'
    if config.activation_checkpointing:
        title += ', with activation checkpointing'
    return [title, columns(table), '', 'memory by batch_size', columns(cells)]


def suggestions(config, memory, world):
    """One line for each unused option that saves memory, with the memory of a step under that option."""
    options = memory_options(config, memory.rows, memory.target.dtype, memory.target.half, world)
    shown = [option for option in options if option.rows == memory.rows]
    for checkpointing in (False, True):  # the largest batch that fits, or the smallest there is
        batches = [option for option in options if option.rows < memory.rows and option.checkpointing == checkpointing]
        shown += [option for option in batches if memory.fits(option)][:1] or batches[-1:]
    lines = [f'  {option}: {readable(memory.base + memory.total(option))}'
             + (', fits' if memory.fits(option) else ', not enough alone') for option in shown]
    if not any(map(memory.fits, shown)):
        lines.append('  or a smaller model: --n_layer, --n_embd, --block_size')
    return ['it does not fit; what to change:', *lines]


def run_lines(config, data):
    tokens = config.max_steps * config.batch_tokens
    text = f'{config.max_steps:,} steps of {config.batch_tokens:,} tokens = {tokens:,} tokens'
    if not data:
        return [f'{text}; {config.dataset} is not prepared yet, so the epochs are unknown']
    passes = tokens / (data.n_windows * config.block_size)
    lines = [f'{text}: {passes:.2f} epochs of the {data.train_tokens:,} in {data.path}',
             *epoch_lines(config, data.n_windows)]
    repeats = None if config.epochs else data.repeats(tokens)
    return [*lines, repeats] if repeats else lines


def step_seconds(config, target, model, seen, rows, micro_steps, world):
    """(seconds of an optimizer step, how they are known). (None, '') if the speed of the card is unknown."""
    if seen and not target.is_other_card:
        seconds = micro_steps * seen.micro * rows / seen.rows + seen.rest
        return seconds, 'measured now, on real steps with random tokens, not compiled'
    if not target.speed:
        return None, ''
    work = model.flops_per_token() * config.batch_tokens
    return work / (target.speed * world), f'an estimate: {target.speed_source}'


def with_validations(config, data):
    """(the time of a whole run over that of its steps, number of validations whose time is known).

    A validation token takes a third of the time of a training token, because it needs no backward."""
    tokens = config.eval_tokens
    if not tokens and data:  # the whole validation split
        tokens = len(data.val_windows(0)) * config.block_size
    if not is_on(config, 'eval_interval') or not tokens:
        return 1.0, 0
    evals = len(due_steps(config, 'eval_interval')) + 1
    return 1 + evals * tokens / 3 / (config.max_steps * config.batch_tokens), evals


def time_lines(config, data, seconds, source, world):
    """How long the run takes, and what it costs with --price."""
    if not seconds:
        lines = ['time: unknown, because --card_gb gives the memory of a card alone; name the card for an estimate: '
                 '--card="RTX 3060"']
        return lines + ([f'cost: unknown without the time (--price={config.price:g})'] if config.price else [])
    part, evals = with_validations(config, data)
    whole = part * seconds * config.max_steps
    counted_in, on_top = f', with {evals} validations' if evals else '', 'samples, checkpoints'
    if is_on(config, 'eval_interval') and not evals:
        on_top = f'validations, {on_top}'
    lines = [f'time: {number(seconds)} s a step, {number(config.batch_tokens / seconds)} tokens/s ({source}); '
             f'{duration(whole)} in all{counted_in}; {on_top} and the preparation of data come on top']
    if config.price:
        hours, cards = whole / 3600, f' x {world} cards' if world > 1 else ''
        cost = number(hours * config.price * world)
        lines.append(f'cost: {cost} = {number(hours)} h x {config.price:g} an hour{cards}')
    return lines


def timetable(config, data, seconds, world):
    """The steps at which something changes, the quarters of the run and the mandatory steps, with hours and cost."""
    what = {step: [text] for step, text in schedules.marks(config).items()}
    for quarter in (1, 2, 3):
        what.setdefault(config.max_steps * quarter // 4, []).append(f'{quarter}/4 of the run')
    for step in config.mandatory_steps:
        what.setdefault(step, []).append('mandatory checkpoint')
    what.setdefault(config.max_steps, []).append('end')
    header = ['        step', '        lr', 'weight decay']
    if seconds:
        header.append('   hours')
        if config.price:
            header.append('    cost')
    rows = [header]
    for step in sorted(what):
        row = [f'{step:12,}', ' ' * 10, ' ' * 12]
        if step < config.max_steps:
            rate, weight_decay = schedules.schedule(step, config)
            row = [f'{step:12,}', f'{rate:10.3e}', f'{weight_decay:12g}']
        if seconds:
            hours = with_validations(config, data)[0] * step * seconds / 3600
            row.append(f'{number(hours):>8}')
            if config.price:
                row.append(f'{number(hours * config.price * world):>8}')
        rows.append([*row, ', '.join(what[step])])
    rows[0].append('')
    return [columns(rows)]


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
    verdict = 'enough' if needed <= free else 'NOT ENOUGH: a smaller --keep, or another --out_dir'
    return [f'disk: {n:,} checkpoints at most ({why}) of {readable(each)} = {readable(n * each)} in '
            f'{config.out_dir}{more}; {text}; {readable(free)} are free: {verdict}']


# ----------------------------------------------------------------------------------------------------------------------
# Numbers as text

def number(x):
    return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def count(n):
    """1_638_400 -> '1.64M'"""
    unit, letter = next((u for u in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')) if n >= 0.9995 * u[0]), (1, ''))
    return f'{n / unit:.3g}{letter}'
