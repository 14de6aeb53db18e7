"""Everything that is measured and compared. Ratios come from interleaved repeats in one run; results go to results/.

    python bench.py                          # blocks --quick and head: what this machine makes of them, in five minutes
    python bench.py blocks                   # training steps of every block at 9M, 21M and 70M parameters (six minutes)
    python bench.py context                  # attention against resonance, 512 to 32,768 tokens of context (eight minutes)
    python bench.py head                     # the loss: chunked, torch's fused one and the plain formula
    python bench.py quality                  # trix_tiny, dense_tiny and a bigram table at equal tokens, three seeds (an hour)
    python bench.py quality --preset=routing # shorter comparisons: tiles, routing, bitnet
    python bench.py peers --nanogpt=PATH     # a checkout of nanoGPT: its model and loop against ours
    python bench.py scaling                  # one process against several, each with one thread or one GPU (five minutes)
    python bench.py loop                     # what surrounds a step: loading, logging, a checkpoint (a minute)
    python bench.py data                     # encoding, preparing and loading: speed and memory (six minutes)
"""
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, process
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

import checkpoint
import corpus
import device as hardware
import prepare
import runlog
import tokenizer
import train
from checkpoint import load_model
from configurator import UserError, load, run
from data import TokenData
from evaluate import validate
from model import GPT, GPTConfig, chunked_cross_entropy
from optim import make_optimizers
from runlog import read_lines
from shards import open_data
from tokenizer import load_tokenizer, token_bytes

ROOT = Path(__file__).parent
RESULTS = ROOT / 'results'
SHAPES = [(GPTConfig(n_embd=width, n_layer=layers, n_head=heads, vocab_size=32_000, tie_embeddings=False), batch, part)
          for width, layers, heads, batch, part in ((128, 4, 4, 16, 2), (256, 6, 8, 16, 3), (512, 12, 8, 8, 5))]  # 1 / part of the repeats
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
TINY, SHORT = 'trix_tiny.py', ('--max_steps=305', '--warmup_steps=30', '--eval_interval=305', '--eval_tokens=65536', '--sample_interval=0',
                                '--save_interval=305', '--keep=1')
QUALITY = {  # preset: {name: config file and command line of its runs}; differences count against the last one
    'tiny': {'trix_tiny': (TINY,), 'dense_tiny': ('dense_tiny.py',)},
    'tiles': {**{f'{E}x{h}_top{k}': (TINY, *SHORT, f'--trix_tiles={E}', f'--trix_hidden={h}', f'--trix_top_k={k}')
                 for E, h, k in ((8, 128, 2), (16, 64, 2), (16, 64, 4))}, 'dense': (TINY, *SHORT, '--ffn=gelu')},
    'routing': {'signature': (TINY, *SHORT), 'hash': (TINY, *SHORT, '--trix_router=hash'), 'first': (TINY, *SHORT, '--trix_router=first')},
    'bitnet': {'bitnet': (TINY, *SHORT, '--ffn=swiglu', '--linear=bitnet', '--learning_rate=3e-3'),
               'dense_twin': (TINY, *SHORT, '--ffn=swiglu')},
}
CONTEXT_SHAPE = GPTConfig(n_embd=256, n_layer=4, n_head=4, vocab_size=4096, ffn='gelu')


@dataclass
class BenchConfig:
    command: str = ''  # blocks, context, head, quality, peers, scaling, loop or data (empty: blocks --quick and head); may stand without --command=
    repeats: int = 15  # timed repeats of each candidate (blocks and context: a half to a fifteenth of it, the longer a step the fewer)
    quick: bool = False  # blocks and context: at most two repeats, contexts up to 4096; data: no corpus of 1 GB
    preset: str = 'tiny'  # quality: tiny, tiles, routing or bitnet
    seeds: int = 3  # quality: runs of each config, with seeds 1337 (the default), 1, 2, ...
    nanogpt: str = ''  # peers: directory of a checkout of nanoGPT
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, tf32, bfloat16 or float16

    def problems(self):
        found = [] if self.command in ('', *COMMANDS) else [f'command {self.command!r} is not one of {", ".join(COMMANDS)}']
        found += [] if self.preset in QUALITY else [f'preset {self.preset!r} is not one of {", ".join(QUALITY)}']
        found += [f'{key}={getattr(self, key)} must be at least 1' for key in ('repeats', 'seeds') if getattr(self, key) < 1]
        if self.command == 'peers' and not (Path(self.nanogpt) / 'train.py').is_file():
            found.append(f'--nanogpt={self.nanogpt}: no train.py there; clone nanoGPT and give its directory')
        return found


def timed(function, device):
    hardware.synchronize(device)
    start = time.perf_counter()
    function()
    hardware.synchronize(device)
    return time.perf_counter() - start


def interleaved(candidates, repeats, warmup=2):
    """{name: function that returns seconds} -> {name: seconds of each repeat}, the candidates in turn so that drift hits all
    alike. Before that, `warmup` rounds that don't count."""
    rounds = [{name: function() for name, function in candidates.items()} for _ in range(warmup + repeats)]
    return {name: [seconds[name] for seconds in rounds[warmup:]] for name in candidates}


def compare(times, reference):
    """Rows of {name, seconds (median), spread (quartiles over the median), ratio, low, high}: the speed against `reference`
    within a repeat, its median and quartiles over the repeats."""
    rows = []
    for name, seconds in times.items():
        low, middle, high = map(float, np.percentile(seconds, (25, 50, 75)))
        ratio = np.percentile([b / a for a, b in zip(seconds, times[reference])], (50, 25, 75))
        rows.append({'name': name, 'seconds': middle, 'spread': (high - low) / middle, **dict(zip(('ratio', 'low', 'high'), map(float, ratio)))})
    return rows


def report(title, rows, config, options='', plot=None, name=''):
    """Print rows as a Markdown table and keep them in results/<name or title>.json with what is needed to measure them
    again, and what plot(rows, figure) draws in a .png beside it."""
    table = [list(rows[0])] + [[f'{v:.4g}' if isinstance(v, float) else f'{v:,}' if isinstance(v, int) else v
                                for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ['-' * width for width in widths])
    print('\n' + '\n'.join('| ' + ' | '.join(map(str.ljust, row, widths)) + ' |' for row in table) + '\n')
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    where, when = machine(config), date.today().isoformat()
    RESULTS.mkdir(exist_ok=True)
    result = {'command': f'python bench.py {title}{options}', 'machine': where, 'torch': torch.__version__, 'commit': commit, 'date': when}
    (RESULTS / f'{name or title}.json').write_text(json.dumps({**result, 'rows': rows}, indent=1) + '\n')
    if plot:
        from matplotlib.figure import Figure  # here, because the process of every candidate imports this file
        figure = Figure(figsize=(13, 5), layout='constrained')
        plot(rows, figure)
        figure.suptitle(f'bench.py {title}{options}: {where}, {when}', fontsize=12)
        figure.savefig(RESULTS / f'{name or title}.png', dpi=120)


def machine(config):
    device = hardware.resolve(config.device, config.dtype)[0]
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        name = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')), name)
    return f'{name}, {torch.get_num_threads()} threads'


def training_step(model_config, rows, device, dtype):
    """-> (model, function): a new model, and one optimizer step of it on `rows` sequences of random tokens."""
    torch.manual_seed(0)
    model, config = GPT(model_config).to(device), train.load([])
    optimizer = make_optimizers(model, config, device)['optimizer']
    idx = torch.randint(model_config.vocab_size, (rows, model_config.block_size + 1)).to(device)

    def step():
        with hardware.autocast(device, dtype):
            loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_balance(1e-3)
    step.optimizer = optimizer
    return model, step


@torch.no_grad()
def decoding(model, device, dtype):
    """A generator: first it fills the cache of one sequence up to 64 positions before the end, then it adds a token a time."""
    cache, idx = model.eval().new_cache(1), torch.randint(model.config.vocab_size, (1, model.config.block_size - 64), device=device)
    while True:
        with hardware.autocast(device, dtype):
            model(idx, cache=cache)
        yield
        idx = idx[:, :1]


def build(model_config, rows, config, threads):
    """In the process of a model: make it, and the jobs that `do` does there."""
    torch.set_num_threads(threads)
    device, dtype, _ = hardware.resolve(config.device, config.dtype)
    model, step = training_step(model_config, rows, device, dtype)
    tokens = decoding(model, device, dtype)
    do.jobs = {'train': lambda: timed(step, device), 'peak': lambda: hardware.peak_memory_gb(device),
               'decode': lambda: timed(lambda: [next(tokens) for _ in range(8)], device) / 8}


def do(job):
    time.sleep(0.02)  # the OpenMP threads of the process that was at work before spin for a few ms
    return do.jobs[job]()


def side_by_side(title, models, rows, repeats, config, decode=False):
    """models {name: GPTConfig} -> {name: seconds of training steps}, {name: peak GB of them}, {name: seconds a decoded token},
    in turn. Each model has a process of its own, so that its peak of memory is its own, too."""
    print(f'{title}: {repeats} repeats on {hardware.resolve(config.device, config.dtype)[2]}', flush=True)
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['torch._dynamo'])  # seconds to import, and every optimizer needs it: once for all
    pools = {name: ProcessPoolExecutor(1, server, build, (model, rows, config, torch.get_num_threads())) for name, model in models.items()}

    def each(job):
        return {name: lambda pool=pool: pool.submit(do, job).result() for name, pool in pools.items()}
    try:
        times = interleaved(each('train'), repeats, warmup=1)
        return times, {name: peak() for name, peak in each('peak').items()}, interleaved(each('decode'), 4, warmup=1) if decode else {}
    except process.BrokenProcessPool:
        raise UserError(f'{title}: the process of a model came to its end; if it gave no reason, the machine is out of memory') from None
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)


def sizes(model):
    table = model.parameter_table()
    return {'parameters': sum(total for _, total, _ in table), 'used by a token': sum(used for *_, used in table),
            'MFLOP/token': model.flops_per_token() / 1e6}


def variants(shape):
    """{name: GPTConfig} of all blocks at a shape; TriX has the tiles of trix_tiny, scaled with the width."""
    tiny = train.load([str(ROOT / 'config' / 'trix_tiny.py')]).pick(GPTConfig)
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
    for shape, batch, part in SHAPES:
        title, models = f'{shape.n_layer} x {shape.n_embd}', variants(shape)
        times, peaks, _ = side_by_side(title, models, batch, 2 if config.quick else max(1, config.repeats // part), config)
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
        times, peaks, decode = side_by_side(f'context {T:,}', models, batch, repeats, config, decode=True)
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


def bigram(data, config):
    """Loss in nats a token, on all of the validation split, of a bigram table counted on the tokens that a run of `config`
    trains on, interpolated with unigrams: p(y|x) = (c(xy) + d n(x) p(y)) / (c(x) + d n(x)), n(x) the number of different
    successors of x (Witten and Bell 1991 at d = 1). d is the best of seven for the validation split: in the table's favour."""
    V, rows = data.n_vocab, config.batch_tokens // config.block_size
    single, pairs = np.ones(V), {}
    for first in range(0, config.max_steps, 100):  # 100 steps at a time
        keys = []
        for step in range(first, min(first + 100, config.max_steps)):
            x, y = data.batch(step, 0, rows, rows, seed=config.seed)
            single += np.bincount(y.ravel(), minlength=V)
            keys.append((x * V + y).ravel())
        pairs[first] = np.unique(np.concatenate(keys), return_counts=True)
    keys, where = np.unique(np.concatenate([k for k, _ in pairs.values()]), return_inverse=True)
    counts = np.bincount(where, weights=np.concatenate([c for _, c in pairs.values()]))
    total, successors = np.bincount(keys // V, weights=counts, minlength=V), np.bincount(keys // V, minlength=V)
    single /= single.sum()
    x, y = (a.ravel() for a in data.val_batch(data.val_windows()))
    at = np.minimum(np.searchsorted(keys, x * V + y), len(keys) - 1)
    seen = np.where(keys[at] == x * V + y, counts[at], 0)

    def loss(d):
        extra = d * np.maximum(successors[x], 1)
        return -np.log((seen + extra * single[y]) / (total[x] + extra)).mean()
    return min(loss(d) for d in (0.3, 0.5, 0.7, 1, 1.5, 2, 3))


def quality(config):
    """Train the runs of a preset of QUALITY with several seeds, all on the same tokens in the same order (runs that are
    already there are used), and evaluate them: `tiny` on all of the validation split, the others, of 1.25M tokens each, on
    131,072 tokens of it. `speed`: training steps, side by side, against the last of the preset."""
    device, dtype, _ = hardware.resolve(config.device, config.dtype)
    rows, models, whole = [], {}, config.preset == 'tiny'
    for name, (file, *words) in QUALITY[config.preset].items():
        results = []
        for seed in (1337, *range(1, config.seeds)):
            out = f'runs/quality/{config.preset}/{name}_{seed}'
            done = subprocess.run([sys.executable, ROOT / 'train.py', ROOT / 'config' / file, *words, f'--seed={seed}', f'--out_dir={out}',
                                   '--resume=auto', f'--device={config.device}', f'--dtype={config.dtype}'])
            if done.returncode:
                sys.exit(done.returncode)
            model, state = load_model(out, device)
            data = TokenData(state['data']['path'], model.config.block_size, model.config.vocab_size)
            lengths = token_bytes(load_tokenizer(data.tokenizer))
            results.append(validate(model, data, lengths, data.val_windows(0 if whole else 131_072), 16, device, dtype))
        models[name] = model.config
        spread = {key: [result[key] for result in results] for key in ('loss', 'bits_per_byte')}
        rows.append({'model': name, **sizes(model), 'packed MB': model.packed_bytes() / 1e6, **figures(**spread)})
        print(name, *(f'{loss:.4f}' for loss in spread['loss']))
    times, _, _ = side_by_side('quality', models, 16, config.repeats, config)
    for row, speed in zip(rows, compare(times, name)):
        row['speed'] = speed['ratio']
    if whole:
        loss = bigram(data, train.load([str(ROOT / 'config' / 'trix_tiny.py')]))
        _, y = data.val_batch(data.val_windows())
        rows.append({**dict.fromkeys(rows[0], 0), 'model': 'bigram table',
                     **figures(loss=[loss], bits_per_byte=[loss / math.log(2) * y.size / int(lengths[y].sum())])})
    options = f' --preset={config.preset}' * (not whole) + f' --seeds={config.seeds}' * (config.seeds != 3)
    report('quality', rows, config, options, plot_frontier if config.preset == 'tiles' else None, f'quality_{config.preset}')
    gap, noise = rows[0]['loss'] - rows[1]['loss'], 2 * math.hypot(rows[0]['loss sd'], rows[1]['loss sd'])
    if config.seeds > 1:
        print(f'{rows[0]["model"]} - {rows[1]["model"]}: {gap:+.4f} nats a token; differences within {noise:.4f} (2 sd) are noise')


def plot_frontier(rows, figure):
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), {'speed': 'training speed relative to dense', 'packed MB': 'packed MB'}.items()):
        for i, row in enumerate(rows):
            axes.scatter(row[key], row['loss'], color=f'C{i}', s=60, label=row['model'])
        axes.set(xlabel=title, ylabel='validation loss (nats a token)' if key == 'speed' else '')
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside right upper')


def figures(**spread):
    """Mean and standard deviation over runs: figures(loss=[3, 4]) -> {'loss': 3.5, 'loss sd': 0.71}"""
    return {name: value for key, values in spread.items() for name, value in
            ((key, statistics.mean(values)), (f'{key} sd', statistics.stdev(values) if len(values) > 1 else 0.0))}


def whole_process(words, **options):
    """Run a program -> seconds, GB of the largest of its processes, what it printed. UserError if it fails."""
    # By way of a small Python, because Linux charges a new process with the memory of the one that starts it.
    wait = ("import os, sys, time; start = time.perf_counter(); pid = os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:]); "
            "_, status, usage = os.wait4(pid, 0); "
            "print(time.perf_counter() - start, usage.ru_maxrss, file=sys.stderr); sys.exit(os.waitstatus_to_exitcode(status))")
    with tempfile.TemporaryFile('w+') as out:
        done = subprocess.run([sys.executable, '-S', '-c', wait, *map(str, words)], stdout=out, stderr=subprocess.PIPE, text=True, **options)
        out.seek(0)
        said = out.read()
    *errors, last = done.stderr.splitlines()
    if done.returncode:
        raise UserError(f"{' '.join(map(str, words[:3]))} failed: {(errors or said.splitlines() or [''])[-1]}")
    seconds, kilobytes = last.split()
    return float(seconds), int(kilobytes) / 1e6, said


def peers(config):
    """nanoGPT's own train.py against ours, each as a process of its own, in turn, on the same bins: plain GPT, 3 layers,
    width 128, 4 heads, context 256, vocabulary 8192, 16 sequences a step."""
    device = hardware.resolve(config.device, config.dtype)[0].type
    data = train.find_data(train.load(['--dataset=pylib', '--vocab_size=8192', '--block_size=256']))
    shape = ['--n_layer=3', '--n_head=4', '--n_embd=128', '--block_size=256', '--batch_size=16', f'--device={device}']
    times, memory, steps = {'nanoGPT': [], 'ours': []}, {'nanoGPT': 0.0, 'ours': 0.0}, config.repeats + 5
    with tempfile.TemporaryDirectory() as folder:
        for split in ('train', 'val'):
            os.symlink((data.path / f'{split}.bin').resolve(), f'{folder}/{split}.bin')
        # nanoGPT reads the size of the vocabulary from a pickled dict; this is {'vocab_size': 8192} in protocol 0.
        Path(folder, 'meta.pkl').write_bytes(b'(dVvocab_size\nI8192\ns.')
        for repeat in range(3):
            commands = {
                'nanoGPT': (Path(config.nanogpt).resolve(), [
                    *shape, f'--dataset={folder}', f'--out_dir={folder}/theirs', '--gradient_accumulation_steps=1', '--compile=False',
                    '--eval_iters=1', '--eval_interval=1000000', '--log_interval=1', f'--max_iters={steps}', '--dropout=0.0']),
                'ours': (ROOT, [
                    *shape, f'--dataset={data.path.resolve()}', f'--out_dir={folder}/ours{repeat}', '--vocab_size=8192', '--ffn=gelu',
                    '--positions=learned', '--norm=layernorm', '--compile=false', '--eval_interval=0', '--sample_interval=0',
                    '--save_interval=0', '--log_interval=1', f'--max_steps={steps}'])}
            for name, (cwd, words) in commands.items():
                _, peak, said = whole_process([sys.executable, 'train.py', *words], cwd=cwd)
                if name == 'ours':
                    speeds = [16 * 256 / float(s.replace(',', '')) for s in re.findall(r'([\d,]+) tokens/s', said)]
                else:
                    speeds = [float(ms) / 1000 for ms in re.findall(r'time ([\d.]+)ms', said)]
                times[name] += speeds[4:steps]  # the first steps warm up, nanoGPT's first is an evaluation, too
                memory[name] = max(memory[name], peak)
    rows = compare({name: seconds[:min(map(len, times.values()))] for name, seconds in times.items()}, 'nanoGPT')
    report('peers', [{**row, 'tokens/s': 16 * 256 / row['seconds'], 'peak GB': memory[row['name']]} for row in rows], config, ' --nanogpt=PATH')


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


def loop(config):
    """What trix_tiny's loop does beside the step: seconds each time and the part of the run's time that they are."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        lines = training_lines(f'{folder}/run', training_run(f'{folder}/run', 1, config, '--max_steps=60'))[1:]
        tiny = train.load([str(ROOT / 'config' / TINY)])
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
            with runlog.replacing(path.with_name('plain.pt')) as file:
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
            stream = prepare.encoded((prepare.Batch(i, None, None, {'train': batch}) for i, batch in enumerate(batches)), folder, processes)
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
            times = interleaved(dict(zip(names, (partial(threads, 1), partial(threads, processes), encoded, end_to_end))), repeats, warmup=1)
        against = [compare(times, name) for name in names[:3]]
        report('data', [{'name': row['name'], 'MB/s': 1 / row['seconds'], 'ratio': row['ratio'], 'low': row['low'], 'high': row['high'],
                         'of the machine': best['ratio'], 'of the processes': ours['ratio']} for row, best, ours in zip(*against)], config, ' --quick' * config.quick)

        small, large, rows, given = *((30, 60) if config.quick else (250, 1000)), [], f'--tokenizer={folder}/prepared0/tokenizer.json'
        for i, (size, word, how) in enumerate(((large, '--vocab_size=32000', ', with a BPE of 32,000'), (large, given, ''), (small, given, ''))):
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
    (path / 'meta.json').write_text(json.dumps({'version': 1, 'kind': 'shards', 'source': {}, 'vocab_size': 50_257, 'row': 32_768, 'files': files}))
    before = hardware.peak_memory_gb(torch.device('cpu'))
    start = time.perf_counter()
    shards = open_data(path, 32_768, 50_257)
    opened = time.perf_counter() - start
    after = hardware.peak_memory_gb(torch.device('cpu'))
    seconds = [timed(lambda: shards.batch(step, 0, 4, 4), torch.device('cpu')) for step in range(200)]
    return {'files': 1000, 'tokens': shards.train_tokens, 'seconds to open': opened, 'GB more': after - before,
            'ms a batch of 4 rows': 1000 * statistics.median(seconds), 'slowest of 200': 1000 * max(seconds)}


COMMANDS = {'data': data, 'blocks': blocks, 'context': context, 'head': head, 'quality': quality, 'peers': peers, 'scaling': scaling, 'loop': loop}


def main(argv):
    config = load(argv, BenchConfig, positional=('command',), usage=__doc__)
    config.quick = config.quick or not config.command
    for command in [config.command] if config.command else ['blocks', 'head']:
        COMMANDS[command](config)


if __name__ == '__main__':
    run(main)
