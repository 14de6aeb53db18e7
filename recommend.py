"""
What to train on prepared data: the presets that suit them, with size, time and memory of a run, and the command lines.

    python prepare.py recommend data/pylib                # for this machine
    python prepare.py recommend shards --card_gb=16       # shards that were not split yet; with the memory of another card
"""
import contextlib
import math
import os
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import device as hardware
import train
from configurator import UserError, columns
from model import GPT, GPTConfig, OncePerStep
from profiling import logit_bytes, measured, readable
from shards import find_shards, inspect, nearest
from show import open_whole, row_of
from tokenizer import from_file, load_tokenizer

CONFIGS = Path(__file__).with_name('config')
TOKENS_A_PARAMETER = 20  # compute-optimal (Hoffmann et al., arXiv:2203.15556)
EPOCHS = 4  # repeated so often, data are worth almost as much as new ones (Muennighoff et al., arXiv:2305.16264)
EFFICIENCY = 0.35  # of the speed of a matrix product that training reaches: an assumption


@dataclass
class Corpus:
    dataset: str  # as --dataset= names it
    tokens: int  # of the train split
    val_tokens: int = 0  # 0: not split yet
    vocab_size: int = 0  # 0: unknown
    row: int = 0  # tokens of a row, 0: bins


@dataclass
class Plan:
    name: str  # of the preset
    parameters: int
    flops: float  # a token
    batch_tokens: int
    max_steps: int
    memory: float  # bytes of a training step


def recommend(path, device='auto', card_gb=0.0, say=print):
    """
    Say which presets of config/ suit the data in `path` (prepared, or shards that were not split yet), what a run of each takes
    on `device` (card_gb: with the memory of a card of so many GB), and the command lines for the best. Raises UserError.
    """
    if not 0 <= card_gb < math.inf:
        raise UserError(f'--card_gb={card_gb}: expected the memory of a card in GB, or 0')
    corpus = corpus_of(path)
    device, dtype, _ = hardware.resolve(device, 'auto')
    kind = 'cpu' if device.type == 'cpu' and not card_gb else 'cuda'
    dtype = torch.bfloat16 if card_gb and device.type == 'cpu' else dtype  # a card has it
    size, whose = room(device, card_gb)
    presets, left_out = suited(path, corpus)
    plans = sorted((plan(name, config, kind, dtype) for name, config in presets), key=lambda p: p.parameters)

    N = corpus.tokens / TOKENS_A_PARAMETER
    say(f'{path}: {corpus.tokens:,} train tokens' + (f' in rows of {corpus.row:,}' if corpus.row else '')
        + (f', vocabulary {corpus.vocab_size:,}' if corpus.vocab_size else ', vocabulary unknown without a tokenizer.json')
        + ('' if corpus.val_tokens else ', validation not split off yet'))
    say(f'compute-optimal for one epoch: {count(N)} parameters, {TOKENS_A_PARAMETER} tokens each (arXiv:2203.15556); '
        f'{EPOCHS} epochs lose little (arXiv:2305.16264): {count(EPOCHS * N)}')
    if left_out:
        say('\nleft out:\n' + columns([(f'  {name}', reason) for name, reason in left_out]))
    if not plans:
        sizes = f', --block_size={" or ".join(map(str, nearest(corpus.row, 1024)))}' if corpus.row else ''
        return say(f'\nno preset suits the data as it is: give the nearest one a --vocab_size that does{sizes}')
    speed, how = achieved(device, dtype if device.type != 'cpu' else torch.float32)
    say('\n' + columns(plan_rows(plans, corpus, speed, size)))
    say(f'tokens/parameter: of one epoch; the other figures: of all max_steps of the preset. '
        f'Time on one device at {speed / 1e12:.3g} TFLOP/s: {how}.\n'
        f'Memory: an estimate, 16 bytes a parameter and what a micro-step keeps in {str(dtype).removeprefix("torch.")}, '
        f'against {readable(size)} of {whose}.')
    for each in best(plans, corpus.tokens, size):
        say('\n' + advice(each, corpus, speed, size))


# ----------------------------------------------------------------------------------------------------------------------
# What the data are, and which presets they suit

def corpus_of(path):
    """A Corpus, by meta.json or, where there is none, by the headers of shards alone. Raises UserError."""
    path = Path(path)
    if (path / 'meta.json').exists() or path.is_dir() and any(path.glob('*.bin')):
        data = open_whole(path)
        named = str(path) if '/' in str(path) else f'./{path}'  # without a slash it would be a name in data/
        if row := row_of(data):
            return Corpus(named, data.train_tokens, data.n_val_windows * row, data.n_vocab, row)
        return Corpus(named, data.train_tokens, data.n_val_windows + 1, data.n_vocab)  # windows of one token
    shapes = {file: inspect(file)[:2] for file in find_shards(path)}
    rows = {length for _, length in shapes.values()}
    if len(rows) > 1:
        raise UserError(f'{path}: rows of {" and ".join(f"{row:,}" for row in sorted(rows))} tokens: '
                        f'python prepare.py validate {path} names the files')
    tokenizer = path / 'tokenizer.json'
    vocab_size = load_tokenizer(from_file(tokenizer)).n_vocab if tokenizer.is_file() else 0
    return Corpus(f'shards:{path}', sum(n * row for n, row in shapes.values()), 0, vocab_size, *rows)


def suited(path, corpus):
    """([(name, config)] of presets that suit the data, [(name, reason)] of the others). UserError if bins are too small for all."""
    presets, left_out, shortest = [], [], math.inf
    for file in sorted(CONFIGS.glob('*.py')):
        try:
            config = train.load([str(file)])
            shortest = min(shortest, config.block_size)
            reason = unsuited(config, corpus)
        except UserError as error:
            reason = ' '.join(str(error).splitlines())
        if reason:
            left_out.append((file.stem, reason))
        else:
            presets.append((file.stem, config))
    if not corpus.row and min(corpus.tokens, corpus.val_tokens) < shortest + 1:
        raise UserError(f'{path}: {corpus.tokens:,} train and {corpus.val_tokens:,} val tokens, fewer in one than a window of the '
                        f'smallest preset, block_size + 1 = {shortest + 1}: prepare more text')
    return presets, left_out


def unsuited(config, corpus):
    """Why a model can't be trained on the data as it is, '' if it can."""
    T, row = config.block_size, corpus.row
    if corpus.vocab_size > config.vocab_size:
        return f'its vocabulary of {config.vocab_size:,} is smaller than that of the data, {corpus.vocab_size:,}'
    if row and (T > row or row % T and (row - 1) % T):
        return f'its block_size of {T:,} divides neither rows of {row:,} tokens nor {row - 1:,}'
    if not row:
        for split, tokens in (('train', corpus.tokens), ('val', corpus.val_tokens)):
            if tokens < T + 1:
                return f'the {split} split has {tokens:,} tokens, fewer than one window of block_size + 1 = {T + 1:,}'
    return ''


# ----------------------------------------------------------------------------------------------------------------------
# Estimates

def activations(config, checkpointing, rows, kind, dtype):
    """
    Bytes that a micro-step of `rows` sequences keeps for backward, by profiling.measured on small models: they grow in proportion
    to layers, vocabulary and, unless the CPU's attention has dropout, context. Tensors are fake, without content, but in TriX.

    kind: 'cpu' or 'cuda', whose attention keeps no T x T weights for dropout, as the CPU's does: there dropout is left out.
    """
    config = config if kind == 'cpu' else replace(config, dropout=0.0)
    fake, T = config.ffn != 'trix', config.block_size  # the sizes in TriX depend on the tokens
    if config.mixers() == ['resonance'] * config.n_layer:
        T = min(T, 2 * config.chunk_size)
    elif not fake and not config.dropout:
        T = min(T, 64)
    n, V, keep = 1 if len(set(config.mixers())) == 1 else config.n_layer, 512, OncePerStep.keep

    def kept(n_layer, vocab_size):
        model = GPT(replace(config, n_layer=n_layer, vocab_size=vocab_size, block_size=T))
        *a_sequence, copies = measured(model, torch.device('cpu'), dtype)
        return rows * a_sequence[checkpointing] * config.block_size / T + copies
    try:
        OncePerStep.keep = keep and not fake  # it compares weights
        with FakeTensorMode() if fake else contextlib.nullcontext():
            small = kept(n, V)
            layer = kept(n + 1, V) - small if n < config.n_layer else 0
            return small + layer * (config.n_layer - n) + (kept(n, 2 * V) - small) * (config.vocab_size / V - 1)
    finally:
        OncePerStep.keep = keep


def plan(name, config, kind, dtype):
    """The figures of a preset. Memory: fp32 weights, gradients and AdamW's two moments, what is kept for backward, the logits."""
    with torch.device('meta'):
        model = GPT(config.pick(GPTConfig))
    parameters = sum(p.numel() for p in model.parameters())
    memory = 16 * parameters + logit_bytes(model, config.batch_size, torch.device(kind), dtype)
    memory += activations(model.config, config.activation_checkpointing, config.batch_size, kind, dtype)
    return Plan(name, parameters, model.flops_per_token(), config.batch_tokens, config.max_steps, memory)


def achieved(device, dtype):
    """(FLOP/s that training is expected to reach, how they were got)"""
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


def room(device, card_gb):
    """(bytes of memory to train in, whose they are)"""
    if card_gb:
        return card_gb * 1e9, f'a card of {card_gb:g} GB'
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory, f'{device}'
    if device.type == 'mps':
        return torch.mps.recommended_max_memory(), f'{device}'
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'), 'this machine'


def duration(seconds):
    for unit, size in (('years', 365 * 86_400), ('days', 86_400), ('h', 3600), ('min', 60)):
        if seconds >= size:
            return f'{number(seconds / size)} {unit}'
    return f'{number(seconds)} s'


def number(x):
    return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


# ----------------------------------------------------------------------------------------------------------------------
# In words

def plan_rows(plans, corpus, speed, size):
    rows = [('preset', 'parameters', 'tokens/parameter', 'epochs', 'FLOPs', 'time', 'memory', 'fits')]
    for p in plans:
        tokens = p.max_steps * p.batch_tokens
        rows.append((p.name, f'{p.parameters:,}', number(corpus.tokens / p.parameters), number(tokens / corpus.tokens),
                     f'{p.flops * tokens:.2e}', duration(p.flops * tokens / speed), readable(p.memory),
                     'yes' if p.memory <= size else 'no'))
    return rows


def mismatch(parameters, tokens):
    """How far a size is from those that one epoch (0) to EPOCHS of the data feed: log of the ratio."""
    fed = tokens / TOKENS_A_PARAMETER
    return max(0.0, math.log(fed / parameters), math.log(parameters / (EPOCHS * fed)))


def best(plans, tokens, size):
    """The preset that suits the data best, of those that fit into memory if any do, and the next one if it is nearly as good."""
    fitting = [p for p in plans if p.memory <= size] or plans
    first, *others = sorted(fitting, key=lambda p: (mismatch(p.parameters, tokens), -p.parameters))
    return [first, *[p for p in others[:1] if mismatch(p.parameters, tokens) < math.log(2)]]


def advice(p, corpus, speed, size):
    """Why a preset, for how long, and the commands."""
    name, wanted = f'config/{p.name}.py', TOKENS_A_PARAMETER * p.parameters
    steps = max(1, min(wanted, EPOCHS * corpus.tokens) // p.batch_tokens)
    tokens, epochs = steps * p.batch_tokens, wanted / corpus.tokens
    why = f'{name}: {TOKENS_A_PARAMETER} tokens for each of {count(p.parameters)} parameters: {number(epochs)} epochs of the data'
    if epochs > EPOCHS:
        why += (f', over {EPOCHS}: with {EPOCHS} it has seen {tokens / p.parameters:.2g} a parameter; a smaller model '
                '(--n_layer, --n_embd) or more text would suit better')
    elif epochs < 1:
        why += ': the data would feed a larger model'
    time_taken = duration(p.flops * tokens / speed)
    lines = [why, f'  {steps:,} steps of {p.batch_tokens:,} tokens, {p.flops * tokens:.2e} FLOPs, about {time_taken} on one device']
    if p.memory > size:
        lines.append(f'  {readable(p.memory)} do not fit: a smaller --batch_size, --activation_checkpointing=true, '
                     'or --parallel=fsdp over several')
    words = shlex.join([name, f'--dataset={corpus.dataset}', f'--max_steps={steps}'])
    several = max(2, torch.cuda.device_count())
    return '\n'.join([*lines, f'  python train.py {words}', f'  torchrun --standalone --nproc_per_node={several} train.py {words}'])


def count(n):
    """1_638_400 -> '1.64M'"""
    unit, letter = next((u for u in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')) if n >= 0.9995 * u[0]), (1, ''))
    return f'{n / unit:.3g}{letter}'
