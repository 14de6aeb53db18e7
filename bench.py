"""Everything that is measured and compared. Ratios come from interleaved repeats in one run; results go to results/.

    python bench.py                          # what this machine makes of each block, on one page, in five minutes
    python bench.py blocks                   # training steps of every block at 9M, 21M and 70M parameters (six minutes)
    python bench.py amp                      # fp32, TF32, bf16 and fp16, as far as the device has them
    python bench.py compile                  # what torch.compile brings on this machine, and what it takes (fifteen minutes)
    python bench.py context                  # attention against resonance, 512 to 32,768 tokens of context (eight minutes)
    python bench.py decode                   # one sequence, a token at a time
    python bench.py batch --model=FILE       # the largest batch that fits
    python bench.py head                     # the loss: chunked, torch's fused one and the plain formula
    python bench.py quality                  # what each FFN learns of the same tokens, three seeds (hours on a CPU)
    python bench.py quality --preset=mixer   # or recall, routing, tiles, bitnet, speedrun, tiny; --match=params, flops or bytes
    python bench.py peers --nanogpt=PATH     # a checkout of nanoGPT: its model and loop against ours
    python bench.py peers --llama_cpp        # packed models decode beside llama.cpp (two minutes)
    python bench.py convert                  # a dense model as a ternary one: loss, size and speed at every stage (six minutes after training)
    python bench.py scaling                  # one process against several, each with one thread or one GPU (five minutes)
    python bench.py plan                     # what train.py --plan says of eight runs, and what they take (five minutes)
    python bench.py loop                     # what surrounds a step: loading, logging, a checkpoint (a minute)
    python bench.py data                     # encoding, preparing and loading: speed and memory (eight minutes)
"""
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, process
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from configurator import UserError, load, run  # before torch, whose import Ctrl-C may interrupt
import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

import checkpoint
from corpora import corpus
from benchmarks import deployed
from runtime import device as hardware
from corpora import building
from runtime import profiling
from benchmarks import quality
from files import replacing
from runtime import runlog
import tokenizer
import settings
from benchmarks.measure import ROOT, compare, interleaved, report, side_by_side, sizes, timed, training_step, whole_process
from model import GPT, GPTConfig, chunked_cross_entropy
from benchmarks.quality import TINY
from runtime.runlog import read_lines
from corpora.shards import open_data
from tokenizer import load_tokenizer

SHAPES = [(GPTConfig(n_embd=width, n_layer=layers, n_head=heads, vocab_size=32_000, tie_embeddings=False), batch, part)
          for width, layers, heads, batch, part in ((128, 4, 4, 16, 2), (256, 6, 8, 16, 3), (512, 12, 8, 8, 5))]  # 1 / part of the repeats
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
CONTEXT_SHAPE = GPTConfig(n_embd=256, n_layer=4, n_head=4, vocab_size=4096, ffn='gelu')


@dataclass
class BenchConfig:
    command: str = ''  # one of those above; may stand without --command=
    repeats: int = 15  # timed repeats of each candidate (blocks and context: a half to a fifteenth of it, the longer a step the fewer)
    quick: bool = False  # blocks and context: at most two repeats, contexts up to 4096; data: no corpus of 1 GB
    preset: str = 'ffn'  # quality: ffn, mixer, recall, routing, tiles, bitnet, speedrun or tiny
    match: str = ''  # quality: give the others as many params, flops (a token) or bytes (packed) as the last one, by their width
    tokens: int = 0  # quality: of each run; 0: as its config file says in the presets tiny and speedrun, 1,250,000 in the others
    seeds: int = 3  # quality: runs of each config, with seeds 1337 (the default), 1, 2, ...
    nanogpt: str = ''  # peers: directory of a checkout of nanoGPT
    llama_cpp: bool = False  # peers: decoding beside llama.cpp's, by the package xllamacpp
    model: str = 'config/trix_tiny.py'  # batch: the config file of a model
    card_gb: float = 0.0  # batch: memory of a card, 0: what is there
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, tf32, bfloat16 or float16

    def problems(self):
        presets = [*quality.PRESETS, 'recall']
        found = [] if self.command in ('', *COMMANDS) else [f'command {self.command!r} is not one of {", ".join(COMMANDS)}']
        found += [] if self.preset in presets else [f'preset {self.preset!r} is not one of {", ".join(presets)}']
        found += [f'{key}={getattr(self, key)} must be at least 1' for key in ('repeats', 'seeds') if getattr(self, key) < 1]
        found += [] if self.match in ('', *quality.MATCHES) else [f'match={self.match!r} is not one of {", ".join(quality.MATCHES)}']
        found += [] if self.tokens >= 0 else [f'tokens={self.tokens} must not be negative']
        if self.llama_cpp and self.command != 'peers':
            found.append('--llama_cpp is for peers')
        if self.command == 'peers' and not (self.llama_cpp and not self.nanogpt) and (missing := quality.not_nanogpt(self.nanogpt)):
            found.append(f'--nanogpt={self.nanogpt}: {missing} there, so this is no checkout of nanoGPT; clone it and give its directory')
        return found



def variants(shape):
    """{name: GPTConfig} of all blocks at a shape; TriX has the tiles of trix_tiny, scaled with the width."""
    tiny = settings.load([str(ROOT / 'config' / 'trix_tiny.py')]).pick(GPTConfig)
    tiles = {key: value for key, value in vars(tiny).items() if key.startswith('trix_')}
    tiles['trix_hidden'] = (tiny.trix_hidden or tiny.n_embd) * shape.n_embd // tiny.n_embd
    changes = {'dense': {'ffn': 'gelu'}, 'swiglu': {'ffn': 'swiglu'}, 'trix': {'ffn': 'trix', **tiles},
               'bitnet': {'ffn': 'swiglu', 'linear': 'bitnet'}, 'resonance': {'mixer': 'resonance', 'ffn': 'gelu'}, 'none': {'ffn': 'none'}}
    return {name: replace(shape, **change) for name, change in changes.items()}


def blocks(config):
    """Training steps of every block at SHAPES. `dense` is attention with a gelu FFN; `bitnet` is `swiglu` with ternary
    matrices, hence the ratio to that. `packed MB`: ternary codes in 2 bits, the rest in bf16. `peak GB`: the most memory while
    training, of the GPU's tensors or, on a CPU, of the whole process, torch included. Needs memory for six models at once."""
    rows = []
    for shape, batch, part in SHAPES[:2 if not config.command and slow(config) else None]:
        title, models = f'{shape.n_layer} x {shape.n_embd}', variants(shape)
        times, peaks = side_by_side(title, models, batch, 2 if config.quick else max(1, config.repeats // part), config)
        for row, swiglu in zip(compare(times, 'dense'), compare(times, 'swiglu')):
            with torch.device('meta'):
                model = GPT(models[row['name']])
            rows.append({'shape': title, 'block': row['name'], **sizes(model), 'packed MB': model.packed_bytes() / 1e6,
                         'tokens/s': batch * shape.block_size / row['seconds'], 'spread': row['spread'], 'ratio to dense': row['ratio'],
                         'low': row['low'], 'high': row['high'], 'ratio to swiglu': swiglu['ratio'], 'peak GB': peaks[row['name']]})
    report('blocks', rows, config, ' --quick' * config.quick, plot_blocks)


def plot_blocks(rows, figure):
    dense, names = {row['shape']: row for row in rows if row['block'] == 'dense'}, list(dict.fromkeys(row['block'] for row in rows))
    panels = {'ratio to dense': 'training speed (and its quartiles)', 'packed MB': 'packed size', 'peak GB': 'peak memory of training'}
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items()):
        for row in rows:
            if i := names.index(row['block']):  # dense is the line at 1
                x, y = list(dense).index(row['shape']) + 0.16 * (i - len(names) / 2), row[key] / dense[row['shape']][key]
                error = [[y - row['low']], [row['high'] - y]] if key == 'ratio to dense' else None
                axes.bar(x, y, 0.15, yerr=error, color=f'C{i}', capsize=3, label='' if x > 0.5 else row['block'])
                axes.text(x, 0.03, f'{y:.2f}', ha='center', color='white', rotation=90)
        axes.axhline(1, color='C0', label='dense')
        axes.set(title=title, xlabel='layers x width, parameters of dense', ylabel='relative to dense', xticks=range(len(dense)),
                 xticklabels=[f'{shape}\n{row["parameters"] / 1e6:.3g}M' for shape, row in dense.items()])
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=len(names))


def context(config):
    """Training steps of attention and resonance over CONTEXTS at 8192 tokens a step or one sequence, and single steps of
    decoding one sequence whose cache is nearly full. `ratio`: the speed of resonance over that of attention within a
    repeat, `spread`: quartiles of that over its median, `peak GB`: as in `blocks`."""
    rows, mixers = [], ('attention', 'resonance')
    for T in [T for T in CONTEXTS if T <= 4096 or not config.quick]:
        batch, repeats = max(1, 8192 // T), min(2 if config.quick else max(1, config.repeats // 3), max(1, 3 * 8192 // T))
        models = {mixer: replace(CONTEXT_SHAPE, block_size=T, mixer=mixer) for mixer in mixers}
        times, decode, peaks = side_by_side(f'context {T:,}', models, batch, repeats, config, ('train', 'decode'))
        attention, resonance = compare(times, 'attention')
        rows.append({'context': T, 'attention tokens/s': batch * T / attention['seconds'], 'resonance tokens/s': batch * T / resonance['seconds'],
                     'ratio': resonance['ratio'], 'spread': (resonance['high'] - resonance['low']) / resonance['ratio'],
                     **{f'{mixer} peak GB': peaks[mixer] for mixer in mixers},
                     **{f'{mixer} ms/token': 1000 * statistics.median(decode[mixer]) for mixer in mixers}})
    report('context', rows, config, ' --quick' * config.quick, plot_context)
    last = [row for row in rows if row['context'] <= 8192][-1]
    print(f'crossover: {crossover(rows) or "none"}; at {last["context"]:,} resonance is {last["ratio"]:.3g} times as fast as attention')


def crossover(rows):
    """The smallest measured context from which on resonance is at least as fast; None if it isn't at the largest."""
    return next((row['context'] for i, row in enumerate(rows) if all(later['ratio'] >= 1 for later in rows[i:])), None)


def plot_context(rows, figure):
    contexts = [f'{row["context"] / 1024:g}k' for row in rows]  # powers of two, evenly spaced: a logarithmic axis
    panels = {'tokens/s': 'training speed', 'ms/token': 'decoding, one sequence', 'peak GB': 'peak memory of training'}
    for axes, (unit, title) in zip(figure.subplots(1, 3), panels.items()):
        for mixer, marker in (('attention', 'o'), ('resonance', 's')):
            axes.plot(contexts, [row[f'{mixer} {unit}'] for row in rows], marker=marker, label=mixer)
        axes.set(title=title, xlabel='context (tokens)', ylabel=unit, ylim=0)
        if unit == 'tokens/s':
            axes.autoscale()
            axes.set_yscale('log', subs=[])
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 3, 5))
            axes.yaxis.set_major_formatter('{x:,g}')
        axes.grid(alpha=0.3)
        axes.legend()


def amp(config):
    """Training steps of the dense model in each precision that the device has; on a CPU of the smallest shape alone, in fp32 and
    bf16, which most CPUs multiply many times slower. `peak GB` as in `blocks`."""
    device, rows = hardware.resolve(config.device, 'auto')[0], []
    dtypes = [dtype for dtype in ('float32', 'tf32', 'bfloat16', 'float16') if has(config.device, dtype)]
    for shape, batch, part in SHAPES[:1 if device.type == 'cpu' else None]:
        batch = 2 if device.type == 'cpu' else batch
        title, models = f'{shape.n_layer} x {shape.n_embd}', dict.fromkeys(dtypes, shape)
        repeats = 2 if config.quick else max(2, config.repeats // 3)
        times, peaks = side_by_side(title, models, batch, repeats, config, dtypes={dtype: dtype for dtype in dtypes})
        rows += [{'shape': title, 'precision': row['name'], 'tokens/s': batch * shape.block_size / row['seconds'],
                  'ratio to float32': row['ratio'], 'low': row['low'], 'high': row['high'], 'peak GB': peaks[row['name']]}
                 for row in compare(times, 'float32')]
    report('amp', rows, config, ' --quick' * config.quick)


def compilation(config):
    """Training steps eager and compiled, of every kind of block at the size of trix_tiny and at 6 x 256. `repaid after`: tokens of a
    run after which the time of compilation is won back, or never."""
    rows, batch = [], 16
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = tempfile.mkdtemp()  # nothing compiled before counts
    for width, layers in ((128, 3), (256, 6))[:1 if config.quick else 2]:
        shape = GPTConfig(n_embd=width, n_layer=layers, n_head=4, vocab_size=8192)
        for block in ('dense', 'trix', 'bitnet', 'resonance'):
            models = dict.fromkeys(('eager', 'compiled'), variants(shape)[block])
            first, times, _ = side_by_side(f'{layers} x {width}, {block}', models, batch, 2 if config.quick else config.repeats, config,
                                           ('first', 'train'), compiles={'eager': 'false', 'compiled': 'true'})
            eager, compiled = compare(times, 'eager')
            took, won = first['compiled'][0] - compiled['seconds'], (eager['seconds'] - compiled['seconds']) / (batch * shape.block_size)
            rows.append({'shape': f'{layers} x {width}', 'block': block, 'eager tokens/s': batch * shape.block_size / eager['seconds'],
                         'compiled tokens/s': batch * shape.block_size / compiled['seconds'], 'ratio': compiled['ratio'],
                         'low': compiled['low'], 'high': compiled['high'], 'seconds to compile': took,
                         'repaid after': f'{took / won / 1e6:.1f}M tokens' if won > 0 else 'never'})
    report('compile', rows, config, ' --quick' * config.quick)


def has(device, dtype):
    try:
        return bool(hardware.resolve(device, dtype))
    except UserError:
        return False


def decode(config):
    """One sequence of the middle shape: prefill of all but 64 tokens of the context at once, and a further token at a time."""
    shape, _, _ = SHAPES[1]
    prefill, token, peaks = side_by_side('decode', variants(shape), 1, 3 if config.quick else config.repeats, config, ('prefill', 'decode'))
    rows = [{'block': one['name'], 'prefill tokens/s': (shape.block_size - 64) / first['seconds'], 'decode tokens/s': 1 / one['seconds'],
             'ratio to dense': one['ratio'], 'low': one['low'], 'high': one['high'], 'peak GB': peaks[one['name']]}
            for first, one in zip(compare(prefill, 'dense'), compare(token, 'dense'))]
    report('decode', rows, config, ' --quick' * config.quick)


def batch(config):
    """
    The largest batch of --model that fits: two real training steps of ever larger batches, each in a process of its own, doubled
    and then bisected to a sixteenth. On a GPU until it is out of memory (or over --card_gb); elsewhere a batch is not tried if two
    smaller ones say that it would not fit into --card_gb or nine tenths of the memory that is free now.
    """
    device, model = hardware.resolve(config.device, config.dtype)[0], settings.load([config.model]).pick(GPTConfig)
    limit = config.card_gb or (math.inf if device.type == 'cuda' else 0.9 * free_memory_gb())
    seen = {}

    def fits(rows):
        if len(seen) > 1 and device.type != 'cuda':
            (a, x), (b, y) = sorted(seen.items())[-2:]
            if y + (y - x) / (b - a) * (rows - b) > limit:
                return False
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
            try:
                seen[rows] = pool.submit(two_steps, model, rows, config.device, config.dtype).result()
            except process.BrokenProcessPool:
                return False
        print(f'{rows:,} x {model.block_size:,}: ' + (f'{seen[rows]:.3g} GB' if seen[rows] else 'out of memory'), flush=True)
        return bool(seen[rows] or seen.pop(rows)) and seen[rows] <= limit
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not low:
        raise UserError(f'{config.model}: not even one sequence of {model.block_size:,} tokens fits into {limit:.3g} GB')
    report('batch', [{'config': Path(config.model).stem, 'context': model.block_size, 'limit GB': float(min(limit, 1e6)),
                      'largest batch': low, 'peak GB': seen[low]}],
           config, f' --model={config.model}' + f' --card_gb={config.card_gb:g}' * bool(config.card_gb))


def two_steps(model, rows, device, dtype):
    """Peak GB of two training steps, None where memory ran out."""
    device, dtype, _ = hardware.resolve(device, dtype)
    try:
        _, step = training_step(model, rows, device, dtype)
        step(), step()
    except (RuntimeError, MemoryError) as error:
        if not profiling.is_out_of_memory(error):
            raise
        return None
    return hardware.peak_memory_gb(device)


def free_memory_gb():
    if Path('/proc/meminfo').exists():
        return int(re.search(r'MemAvailable:\s+(\d+)', Path('/proc/meminfo').read_text())[1]) * 1024 / 1e9
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9


def slow(config):
    return hardware.resolve(config.device, 'auto')[0].type == 'cpu'


def head(config):
    """Forward and backward of the loss at 4096 tokens x width 128 x vocabulary 8192."""
    device, _, why = hardware.resolve(config.device, 'float32')
    torch.manual_seed(0)
    x, w = torch.randn(4096, 128, device=device).requires_grad_(), (0.02 * torch.randn(8192, 128, device=device)).requires_grad_()
    y = torch.randint(8192, (4096,), device=device)
    losses = {'plain': lambda: F.cross_entropy(x @ w.T, y), 'chunked (ours)': lambda: chunked_cross_entropy(x, w, y)}
    if hasattr(F, 'linear_cross_entropy') and hasattr(torch.nn, 'LinearCrossEntropyOptions'):
        options = torch.nn.LinearCrossEntropyOptions
        losses['torch fused'] = lambda: F.linear_cross_entropy(x, w, y, options=options())
        losses['torch fused, chunks of 128'] = lambda: F.linear_cross_entropy(x, w, y, options=options(batch_chunk_size=128, chunking_method=None))
    print(f'the loss on {why}')
    both = {name: lambda loss=loss: timed(lambda: torch.autograd.grad(loss(), (x, w)), device) for name, loss in losses.items()}
    report('head', compare(interleaved(both, config.repeats), 'plain'), config)




def training_run(folder, processes, config, *words):
    """train.py on trix_tiny as a process, or as many under torchrun, with a thread each on a CPU -> subprocess.Popen; its
    metrics are in the folder. Nothing but training and logging happens in it."""
    command = [sys.executable, *(['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []),
               ROOT / 'train.py', ROOT / 'config' / TINY, f'--out_dir={folder}', f'--device={config.device}', f'--dtype={config.dtype}',
               '--warmup_steps=0', '--eval_interval=0', '--sample_interval=0', '--save_interval=0', *words]
    return subprocess.Popen(command, stdout=open(f'{folder}.txt', 'w'), stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def training_lines(folder, *processes):
    """Wait for processes -> the lines of training of the one in the folder."""
    for started in processes:
        if started.wait():
            raise UserError(f'{folder}: {Path(f"{folder}.txt").read_text().strip().splitlines()[-1]}')
    return [line for line in read_lines(Path(folder) / 'metrics.jsonl') if line['kind'] == 'train']


def scaling(config):
    """trix_tiny, 16 x 256 tokens a step in each process: 1, 2, 4, ... processes as far as there are GPUs or cores, in turn.
    `efficiency`: tokens/s against as many times one process alone. `of the machine`: against as many separate runs at the same
    time, which share memory and clock as the processes do, but nothing else; what DDP itself costs."""
    device = hardware.resolve(config.device, config.dtype)[0]
    most = torch.cuda.device_count() if device.type == 'cuda' else os.cpu_count()
    counts = [n for n in (1, 2, 4, 8) if n <= most]
    speeds, separate, steps, repeats = {n: [] for n in counts}, {n: [] for n in counts}, 20, 1 if config.quick else max(1, config.repeats // 5)
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for n in counts:
                words = f'--batch_tokens={n * 4096}', f'--max_steps={steps}', '--log_interval=1'
                out = f'{folder}/{repeat}_{n}'
                lines = training_lines(out, training_run(out, n, config, *words))
                speeds[n].append(statistics.median(line['tokens_per_s'] for line in lines[5:]))
                outs = [f'{out}_{i}' for i in range(n if n > 1 else 0)]
                pin = [f'--device=cuda:{i}' if device.type == 'cuda' else f'--device={config.device}' for i in range(n)]
                runs = [training_run(out, 1, config, *words, '--batch_tokens=4096', where) for out, where in zip(outs, pin)]
                separate[n].append(sum(statistics.median(line['tokens_per_s'] for line in training_lines(out, *runs)[5:]) for out in outs)
                                   or speeds[n][-1])
    report('scaling', [{'processes': n, 'tokens/s': statistics.median(speeds[n]),
                        'efficiency': statistics.median(a / n / b for a, b in zip(speeds[n], speeds[1])),
                        'of the machine': statistics.median(a / b for a, b in zip(speeds[n], separate[n])),
                        'low': min(a / b for a, b in zip(speeds[n], separate[n])), 'high': max(a / b for a, b in zip(speeds[n], separate[n]))}
                       for n in counts], config, ' --quick' * config.quick)


PLANNED = {  # name: config file and command line
    'trix_tiny': (TINY,), 'dense_tiny': ('dense_tiny.py',), 'speedrun_tiny': ('speedrun_tiny.py',),
    'swiglu, 6 x 256': ('dense_tiny.py', '--ffn=swiglu', '--n_layer=6', '--n_embd=256', '--batch_size=8', '--batch_tokens=2048'),
    'trix, 4 x 256, context 512, two micro-steps': (TINY, '--n_layer=4', '--n_embd=256', '--trix_hidden=256', '--block_size=512',
                                                    '--batch_size=4', '--batch_tokens=4096'),
    'bitnet, 4 x 256': ('dense_tiny.py', '--ffn=swiglu', '--linear=bitnet', '--n_layer=4', '--n_embd=256'),
    'resonance, 4 x 192, context 1024': ('dense_tiny.py', '--mixer=resonance', '--n_layer=4', '--n_embd=192', '--block_size=1024',
                                         '--batch_size=4', '--batch_tokens=4096'),
    'gelu, 8 x 512, checkpointing': ('dense_tiny.py', '--n_layer=8', '--n_embd=512', '--batch_size=8', '--batch_tokens=2048',
                                     '--activation_checkpointing=true')}


def plan(config):
    """What `train.py --plan` says of PLANNED, and what a run of 14 steps then takes: GB on top of Python and torch (`base`), and
    seconds a step, the median of the last ten."""
    units, rows = {'GB': 1, 'MB': 1e-3, 'kB': 1e-6}, []
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (file, *words)) in enumerate(list(PLANNED.items())[:2 if config.quick else None]):
            command = [sys.executable, ROOT / 'train.py', ROOT / 'config' / file, *words, f'--device={config.device}',
                       f'--dtype={config.dtype}']
            page = whole_process([*command, '--plan'])[2]
            base, planned = (float(found[1]) * units[found[2]] if (found := re.search(rf'^  {key} +([\d.]+) (.B)', page, re.M)) else 0.0
                             for key in ('base', 'total'))
            seconds = float(re.search(r'^time: ([\d.,]+) s', page, re.M)[1].replace(',', ''))
            whole_process([*command, f'--out_dir={folder}/{i}', '--max_steps=14', '--warmup_steps=0', '--log_interval=1',
                           '--eval_interval=0', '--sample_interval=0', '--save_interval=0', '--compile=false'])
            lines = [line for line in read_lines(Path(folder, str(i), 'metrics.jsonl')) if line['kind'] == 'train']
            memory = max(line['mem_gb'] for line in lines) - base
            step = statistics.median(lines[0]['tokens'] / line['tokens_per_s'] for line in lines[4:])
            rows.append({'run': name, 'planned GB': planned - base, 'GB': memory, 'planned/measured GB': (planned - base) / memory,
                         'planned s/step': seconds, 's/step': step, 'planned/measured s': seconds / step})
            print(name, *(f'{value:.3g}' for value in list(rows[-1].values())[1:]), flush=True)
    report('plan', rows, config, ' --quick' * config.quick)


def loop(config):
    """What trix_tiny's loop does beside the step: seconds each time and the part of the run's time that they are."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        lines = training_lines(f'{folder}/run', training_run(f'{folder}/run', 1, config, '--max_steps=60'))[1:]
        tiny = settings.load([str(ROOT / 'config' / TINY)])
        step = tiny.batch_tokens / statistics.median(line['tokens_per_s'] for line in lines)
        device = hardware.resolve(config.device, config.dtype)[0]
        model, optimize = training_step(tiny.pick(GPTConfig), 2, device, torch.float32)
        optimize()
        log, logged = runlog.RunLog(f'{folder}/log'), dict(lines[-1])
        state = {'model': model.state_dict(), 'optimizer': optimize.optimizer.state_dict(), 'step': 1, 'config': {}, 'tokenizer': {}, 'data': {}}
        path = Path(folder, 'log', 'checkpoints', 'step_0000001.pt')
        checkpoint.save(path, state)
        content = path.read_bytes()

        def write():
            with replacing(path.with_name('plain.pt')) as file:
                file.write(content)
        times = interleaved({
            'statistics': lambda: timed(model.statistics, device),
            'metrics, log, status': lambda: timed(lambda: (log.line('metrics.jsonl', **logged), log.say('x' * 100), log.status(**logged)), device),
            'checkpoint': lambda: timed(lambda: checkpoint.save(path, state), device),
            'its bytes written': lambda: timed(write, device)}, config.repeats)
    every = {'statistics': tiny.log_interval, 'metrics, log, status': tiny.log_interval, 'checkpoint': tiny.save_interval,
             'its bytes written': tiny.save_interval}
    rows = [{'what': name, 'ms': 1000 * statistics.median(seconds), 'every steps': every[name],
             'percent of the time': 100 * statistics.median(seconds) / every[name] / step} for name, seconds in times.items()]
    wait = statistics.median(line['loader_wait'] for line in lines)
    ratio = statistics.median(a / b for a, b in zip(times['checkpoint'], times['its bytes written']))
    report('loop', [{'what': 'step', 'ms': 1000 * step, 'every steps': 1, 'percent of the time': 100.0},
                    {'what': 'waiting for a batch', 'ms': 1000 * wait * step, 'every steps': 1, 'percent of the time': 100 * wait}, *rows], config)
    print(f'a checkpoint ({len(content) / 1e6:.1f} MB) takes {ratio:.2f} of the time of writing its bytes (median of {config.repeats})')


def texts_of_pylib(folder, megabytes):
    """A .jsonl of so much text: the standard library, over and over with another last line, so that nothing is there twice."""
    texts, size = [document.text for document in corpus.pylib_corpus().documents() if document.text], 0
    path = Path(folder) / f'{megabytes}.jsonl'
    with open(path, 'w') as file:
        for copy in itertools.count():
            for text in texts:
                if size >= megabytes * 1e6:
                    return path
                text += f'# {copy}\n'
                size += len(text.encode())
                file.write(json.dumps({'text': text}) + '\n')


def preparation(path, out, *words):
    """prepare.py on a .jsonl, as a process -> seconds, and GB of the largest of its processes."""
    return whole_process([sys.executable, ROOT / 'prepare.py', f'--dataset=text:{path}', f'--out={out}', *words])[:2]


def data(config):
    """
    What prepare.py and data.py do: text encoded by one thread of tiktoken, by the processes of prepare.py, and by prepare.py from
    file to file; the byte-level BPE; the memory for a small and a large corpus; shards opened and read. `of the machine`: against
    as many threads of tiktoken at the same time, each in a process that has its text already.
    """
    processes, repeats = min(os.cpu_count(), 16), 2 if config.quick else max(1, config.repeats // 2)
    fresh = partial(ProcessPoolExecutor, 1, multiprocessing.get_context('spawn'))
    with tempfile.TemporaryDirectory() as folder:
        path, megabytes = texts_of_pylib(folder, 100), 100
        texts = read_texts(path)
        Path(folder, 'tokenizer.json').write_text(json.dumps(tokenizer.train_bpe(texts, 8192)))
        batches = [texts[i::200] for i in range(100)]  # half a megabyte each
        sizes = [sum(len(text.encode()) for text in batch) / 1e6 for batch in batches]

        def encoded():
            stream = building.encoded((building.Batch(i, None, None, {'train': batch}) for i, batch in enumerate(batches)), folder, processes)
            for _ in range(2 * processes):  # they start, and load the tokenizer
                next(stream)
            start = time.perf_counter()
            for _ in stream:
                pass
            return (time.perf_counter() - start) / sum(sizes[2 * processes:])

        def end_to_end():
            shutil.rmtree(Path(folder, 'out'), ignore_errors=True)
            return preparation(path, f'{folder}/out', f'--tokenizer={folder}/tokenizer.json')[0] / megabytes

        with contextlib.ExitStack() as stack:
            pools = [stack.enter_context(fresh(initializer=start_encoding, initargs=(folder, path))) for _ in range(processes)]

            def threads(n):  # the slowest of them
                return max(future.result() for future in [pool.submit(encoding_seconds) for pool in pools[:n]]) / n
            names = ['one thread of tiktoken', f'{processes} of them', f'{processes} processes of prepare.py', 'prepare.py, file to file']
            candidates = partial(threads, 1), partial(threads, processes), encoded, end_to_end
            times = interleaved(dict(zip(names, candidates)), repeats, warmup=1)
        against = [compare(times, name) for name in names[:3]]
        report('data', [{'name': row['name'], 'MB/s': 1 / row['seconds'], 'ratio': row['ratio'], 'low': row['low'], 'high': row['high'],
                         'of the machine': best['ratio'], 'of the processes': ours['ratio']} for row, best, ours in zip(*against)],
               config, ' --quick' * config.quick)

        small, large, rows, given = *((30, 60) if config.quick else (250, 1000)), [], f'--tokenizer={folder}/prepared0/tokenizer.json'
        cases = (large, '--vocab_size=32000', ', with a BPE of 32,000'), (large, given, ''), (small, given, '')
        for i, (size, word, how) in enumerate(cases):
            path = texts_of_pylib(folder, size)
            seconds, peak = preparation(path, f'{folder}/prepared{i}', word)
            rows.append({'what': f'prepare.py on {size:,} MB{how}', 'seconds': seconds, 'peak GB': peak})
        with fresh() as pool:
            seconds, peak, megabytes = pool.submit(bpe_training, 32_000, 30).result()
        rows.append({'what': f'a BPE of 32,000 on {megabytes:.0f} MB', 'seconds': seconds, 'peak GB': peak})
        report('data', rows, config, ' --quick' * config.quick, name='data_memory')
        with fresh() as pool:
            report('data', [pool.submit(opened_shards, folder).result()], config, ' --quick' * config.quick, name='data_shards')


def read_texts(path):
    with open(path) as file:
        return [json.loads(line)['text'] for line in file]


def start_encoding(folder, path):
    """For `encoding_seconds`: the tokenizer as tiktoken ships GPT-2's, with its pattern, and 25 MB of text."""
    global encoding, sample
    ours, sample = load_tokenizer(folder), read_texts(path)[::4]
    ranks = {ours.decode_single_token_bytes(token): token for token in range(ours.eot_token)}
    encoding = tiktoken.Encoding('plain', pat_str=tokenizer.PATTERN, mergeable_ranks=ranks, special_tokens={tokenizer.EOT: ours.eot_token})


def encoding_seconds():
    """Seconds a megabyte, as everybody encodes text."""
    start = time.perf_counter()
    for text in sample:
        encoding.encode_ordinary(text)
    return (time.perf_counter() - start) / sum(len(text.encode()) for text in sample) * 1e6


def bpe_training(vocab_size, megabytes):
    """Seconds, peak GB of the process, and how many MB of text there were."""
    texts, size = [], 0
    for document in corpus.pylib_corpus().documents():
        if document.text and size < megabytes * 1e6:
            texts.append(document.text)
            size += len(document.text.encode())
    start = time.perf_counter()
    tokenizer.train_bpe(texts, vocab_size)
    return time.perf_counter() - start, hardware.peak_memory_gb(torch.device('cpu')), size / 1e6


def opened_shards(folder):
    """1,000 files of 100 x 32,768 ids (holes on the disk): opened, and random batches of 4 rows read."""
    path, head = Path(folder) / 'shards', io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {'descr': '<u2', 'fortran_order': False, 'shape': (100, 32_768)})
    entry, files = {'first': 0, 'rows': 100, 'tokens': 3_276_800, 'bytes': head.tell() + 6_553_600, 'max_id': 0, 'sha256': ''}, {}
    for split, count in (('train', 990), ('val', 10)):
        (path / split).mkdir(parents=True)
        files[split] = [{'name': f'{split}/{i:04d}.npy', **entry} for i in range(count)]
        for listed in files[split]:
            (path / listed['name']).write_bytes(head.getvalue())
            os.truncate(path / listed['name'], entry['bytes'])
    meta = {'version': 1, 'kind': 'shards', 'source': {}, 'vocab_size': 50_257, 'row': 32_768, 'files': files}
    (path / 'meta.json').write_text(json.dumps(meta))
    before = hardware.peak_memory_gb(torch.device('cpu'))
    start = time.perf_counter()
    shards = open_data(path, 32_768, 50_257)
    opened = time.perf_counter() - start
    after = hardware.peak_memory_gb(torch.device('cpu'))
    seconds = [timed(lambda: shards.batch(step, 0, 4, 4), torch.device('cpu')) for step in range(200)]
    return {'files': 1000, 'tokens': shards.train_tokens, 'seconds to open': opened, 'GB more': after - before,
            'ms a batch of 4 rows': 1000 * statistics.median(seconds), 'slowest of 200': 1000 * max(seconds)}


def peers(config):
    """Those that are named."""
    if config.nanogpt:
        quality.peers(config)
    if config.llama_cpp:
        deployed.llama_cpp(config)


COMMANDS = {'blocks': blocks, 'amp': amp, 'compile': compilation, 'context': context, 'decode': decode, 'batch': batch, 'head': head, 'quality': quality.quality,
            'peers': peers, 'convert': deployed.convert, 'scaling': scaling, 'plan': plan, 'loop': loop, 'data': data}


def main(argv):
    config = load(argv, BenchConfig, positional=('command',), usage=__doc__)
    config.quick = config.quick or not config.command
    for command in [config.command] if config.command else ['blocks', 'amp', 'context', 'decode', 'head']:
        COMMANDS[command](config)


if __name__ == '__main__':
    run(main)
