"""Everything that is measured and compared. Ratios come from interleaved repeats in one run; results go to results/.

    python bench.py                          # blocks and head: what this machine makes of them, in two minutes
    python bench.py blocks                   # training throughput of every FFN at trix_tiny's shape, as a ratio to gelu
    python bench.py head                     # the loss: chunked, torch's fused one and the plain formula
    python bench.py quality                  # trix_tiny, dense_tiny and a bigram table at equal tokens, three seeds (an hour)
    python bench.py peers --nanogpt=PATH     # a checkout of nanoGPT: its model and loop against ours
"""
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import device as hardware
import train
from checkpoint import load_model
from configurator import UserError, load, run
from data import TokenData, load_tokenizer, token_bytes
from evaluate import validate
from model import FFNS, GPT, GPTConfig, chunked_cross_entropy

ROOT = Path(__file__).parent


@dataclass
class BenchConfig:
    command: str = ''  # blocks, head, quality or peers (empty: blocks and head); may stand without --command=
    repeats: int = 15  # timed repeats of each candidate, after two that don't count
    seeds: int = 3  # quality: runs of each config, with seeds 1337 (the default), 1, 2, ...
    nanogpt: str = ''  # peers: directory of a checkout of nanoGPT
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, bfloat16 or float16

    def problems(self):
        found = [] if self.command in ('', *COMMANDS) else [f'command {self.command!r} is not one of {", ".join(COMMANDS)}']
        found += [f'{key}={getattr(self, key)} must be at least 1' for key in ('repeats', 'seeds') if getattr(self, key) < 1]
        if self.command == 'peers' and not (Path(self.nanogpt) / 'train.py').is_file():
            found.append(f'--nanogpt={self.nanogpt}: no train.py there; clone nanoGPT and give its directory')
        return found


def interleaved(candidates, repeats, device):
    """{name: function} -> {name: seconds of each repeat}, the candidates in turn so that drift hits all alike."""
    times = {name: [] for name in candidates}
    for repeat in range(-2, repeats):
        for name, function in candidates.items():
            hardware.synchronize(device)
            start = time.perf_counter()
            function()
            hardware.synchronize(device)
            if repeat >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def compare(times, reference):
    """Rows of {name, seconds (median), spread (quartiles over the median), ratio}: the speed against `reference`, as the
    median over repeats of the ratio within a repeat."""
    rows = []
    for name, seconds in times.items():
        low, middle, high = np.percentile(seconds, (25, 50, 75))
        ratio = statistics.median(b / a for a, b in zip(seconds, times[reference]))
        rows.append({'name': name, 'seconds': float(middle), 'spread': float((high - low) / middle), 'ratio': ratio})
    return rows


def report(title, rows, config, options=''):
    """Print rows as a Markdown table and keep them in results/<title>.json with what is needed to measure them again."""
    table = [list(rows[0])] + [[f'{v:.4g}' if isinstance(v, float) else f'{v:,}' if isinstance(v, int) else v
                                for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ['-' * width for width in widths])
    print('\n' + '\n'.join('| ' + ' | '.join(map(str.ljust, row, widths)) + ' |' for row in table) + '\n')
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    (ROOT / 'results').mkdir(exist_ok=True)
    with open(ROOT / 'results' / f'{title}.json', 'w') as file:
        json.dump({'command': f'python bench.py {title}{options}', 'machine': machine(config), 'torch': torch.__version__,
                   'commit': commit, 'date': date.today().isoformat(), 'rows': rows}, file, indent=1)
        file.write('\n')


def machine(config):
    device = hardware.resolve(config.device, config.dtype)[0]
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        name = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')), name)
    return f'{name}, {torch.get_num_threads()} threads'


def blocks(config):
    """Training steps of every FFN at the shape of trix_tiny (16 x 256 tokens)."""
    device, dtype, why = hardware.resolve(config.device, config.dtype)
    tiny = train.load([str(ROOT / 'config' / 'trix_tiny.py')]).pick(GPTConfig)
    idx = torch.randint(tiny.vocab_size, (16, tiny.block_size + 1), device=device, generator=torch.Generator(device).manual_seed(0))
    models, steps = {}, {}
    for ffn in FFNS:
        torch.manual_seed(0)
        model = models[ffn] = GPT(GPTConfig(**{**vars(tiny), 'ffn': ffn})).to(device)
        optimizer = train.make_optimizer(model, train.load([]), device)

        def step(model=model, optimizer=optimizer):
            with hardware.autocast(device, dtype):
                loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.update_balance(1e-3)
        steps[ffn] = step
    print(f'training steps on {why}')
    rows = []
    for row in compare(interleaved(steps, config.repeats, device), 'gelu'):
        table = models[row['name']].parameter_table()
        rows.append({'ffn': row['name'], 'parameters': sum(total for _, total, _ in table), 'used by a token': sum(used for *_, used in table),
                     'MFLOP/token': models[row['name']].flops_per_token() / 1e6, 'tokens/s': idx[:, 1:].numel() / row['seconds'],
                     'spread': row['spread'], 'ratio to gelu': row['ratio']})
    report('blocks', rows, config)


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
        losses['torch fused, chunks of 128'] = lambda: F.linear_cross_entropy(
            x, w, y, options=options(batch_chunk_size=128, chunking_method=None))
    print(f'the loss on {why}')
    both = {name: lambda loss=loss: torch.autograd.grad(loss(), (x, w)) for name, loss in losses.items()}
    report('head', compare(interleaved(both, config.repeats, device), 'plain'), config)


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
    """Train trix_tiny and dense_tiny with several seeds (runs that are already there are used), evaluate on all of the split."""
    rows = []
    for name in ('trix_tiny', 'dense_tiny'):
        results = []
        for seed in (1337, *range(1, config.seeds)):
            out = f'runs/quality/{name}_{seed}'
            done = subprocess.run([sys.executable, ROOT / 'train.py', ROOT / 'config' / f'{name}.py', f'--seed={seed}',
                                   f'--out_dir={out}', '--resume=auto', f'--device={config.device}', f'--dtype={config.dtype}'])
            if done.returncode:
                sys.exit(done.returncode)
            device, dtype, _ = hardware.resolve(config.device, config.dtype)
            model, state = load_model(out, device)
            data = TokenData(state['data']['path'], model.config.block_size, model.config.vocab_size)
            lengths = token_bytes(load_tokenizer(data.tokenizer))
            results.append(validate(model, data, lengths, data.val_windows(), 16, device, dtype))
        table = model.parameter_table()
        spread = {key: [result[key] for result in results] for key in ('loss', 'bits_per_byte')}
        rows.append({'model': name, 'parameters': sum(total for _, total, _ in table), 'used by a token': sum(used for *_, used in table),
                     'MFLOP/token': model.flops_per_token() / 1e6, **figures(**spread)})
        print(name, *(f'{loss:.4f}' for loss in spread['loss']))
    run_config = train.load([str(ROOT / 'config' / 'trix_tiny.py')])
    loss = bigram(data, run_config)
    x, y = data.val_batch(data.val_windows())
    rows.append({'model': 'bigram table', 'parameters': 0, 'used by a token': 0, 'MFLOP/token': 0.0,
                 **figures(loss=[loss], bits_per_byte=[loss / math.log(2) * y.size / int(lengths[y].sum())])})
    report('quality', rows, config)
    gap, noise = rows[0]['loss'] - rows[1]['loss'], 2 * math.hypot(rows[0]['loss sd'], rows[1]['loss sd'])
    print(f'trix_tiny - dense_tiny: {gap:+.4f} nats a token; differences within {noise:.4f} (2 sd) are noise')


def figures(**spread):
    """Mean and standard deviation over runs: figures(loss=[3, 4]) -> {'loss': 3.5, 'loss sd': 0.71}"""
    return {name: value for key, values in spread.items() for name, value in
            ((key, statistics.mean(values)), (f'{key} sd', statistics.stdev(values) if len(values) > 1 else 0.0))}


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
                with open(f'{folder}/{name}.txt', 'w') as out:
                    process = subprocess.Popen([sys.executable, 'train.py', *words], cwd=cwd, stdout=out, stderr=subprocess.STDOUT)
                    _, code, usage = os.wait4(process.pid, 0)
                said = Path(f'{folder}/{name}.txt').read_text()
                if code:
                    raise UserError(f'{name} failed: {said.strip().splitlines()[-1]}')
                if name == 'ours':
                    speeds = [16 * 256 / float(s.replace(',', '')) for s in re.findall(r'([\d,]+) tokens/s', said)]
                else:
                    speeds = [float(ms) / 1000 for ms in re.findall(r'time ([\d.]+)ms', said)]
                times[name] += speeds[4:steps]  # the first steps warm up, nanoGPT's first is an evaluation, too
                memory[name] = max(memory[name], usage.ru_maxrss / 1e6)
    rows = compare({name: seconds[:min(map(len, times.values()))] for name, seconds in times.items()}, 'nanoGPT')
    report('peers', [{**row, 'tokens/s': 16 * 256 / row['seconds'], 'peak GB': memory[row['name']]} for row in rows], config, ' --nanogpt=PATH')


COMMANDS = {'blocks': blocks, 'head': head, 'quality': quality, 'peers': peers}


def main(argv):
    config = load(argv, BenchConfig, positional=('command',), usage=__doc__)
    for command in [config.command] if config.command else ['blocks', 'head']:
        COMMANDS[command](config)


if __name__ == '__main__':
    run(main)
