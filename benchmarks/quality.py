"""
Which block learns more: runs on the same tokens in the same order, several seeds, and no ranking where the noise is larger.
The commands `quality` and `peers` of bench.py, which lists the presets.
"""
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from runtime import device as hardware
import settings
from corpora.preparation import open_dataset
from checkpoint import load_model
from configurator import UserError, read_json
from data import TokenData
from benchmarks.measure import ROOT, compare, mean_and_sd, report, side_by_side, sizes, whole_process
from model import GPT, GPTConfig
from runtime.runlog import read_lines
from tokenizer import load_tokenizer, token_bytes
from training import validate

TINY, TWIN, SPEEDRUN = 'trix_tiny.py', 'dense_tiny.py', 'speedrun_tiny.py'
SOURCE = str(ROOT / 'config' / 'recipes' / 'source.py')
PRESETS = {  # name: {name of a run: its config file and command line}; differences count against the last one
    'tiny': {'trix_tiny': (TINY,), 'dense_tiny': (TWIN,)},
    'ffn': {**{ffn: (TWIN, f'--ffn={ffn}') for ffn in ('relu2', 'swiglu')}, 'trix': (TINY,),
            'bitnet': (TWIN, '--ffn=bitnet'), 'resonance': (TWIN, '--ffn=resonance'), 'none': (TWIN, '--ffn=none'), 'gelu': (TWIN,)},
    'mixer': {'resonance': (TWIN, '--mixer=resonance'), 'hybrid': (TWIN, '--mixer=resonance', '--attention_every=3'), 'attention': (TWIN,)},
    'tiles': {**{f'{E}x{h}_top{k}': (TINY, SOURCE, f'--trix_tiles={E}', f'--trix_hidden={h}', f'--trix_top_k={k}')
                 for E, h, k in ((8, 128, 2), (16, 64, 2), (16, 64, 4))}, 'dense': (TINY, SOURCE, '--ffn=gelu')},
    'routing': {router: (TINY, SOURCE, f'--trix_router={router}') for router in ('signature', 'hash', 'first')},
    'speedrun': {**{name: (SPEEDRUN, '--ffn=relu2', *words) for name, words in {
        'adamw': ('--optimizer=adamw', '--matrix_lr=0', '--learning_rate=4e-3'),  # the best of 2, 4 and 8e-3 (seed 1337)
        'no_qk_norm': ('--qk_norm=false',), 'no_zero_init': ('--zero_init=false',), 'no_taps': ('--embed_taps=0',),
        'cosine': ('--schedule=cosine',), 'embed_norm': ('--embed_norm=true',), 'softcap_15': ('--logit_softcap=15',)}.items()},
                 'speedrun_tiny': (SPEEDRUN,), 'base': (SPEEDRUN, '--ffn=relu2')},  # the recipe is the base and what made it better
    'bitnet': {'bitnet': (TINY, SOURCE, '--ffn=swiglu', '--linear=bitnet', '--learning_rate=3e-3'),
               'dense_twin': (TINY, SOURCE, '--ffn=swiglu')},
}
FULL = ('tiny', 'speedrun')  # presets that train as long as the files say, if --tokens says nothing
MATCHES = {'params': 'parameters', 'flops': 'MFLOP/token', 'bytes': 'packed MB'}
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # two-sided 95 % of t with 1, 2, ... degrees of freedom
PAIRS = (4, 8, 16, 32, 64)  # recall: keys with their values that a sequence shows before it asks for them


# ----------------------------------------------------------------------------------------------------------------------
# Runs of a preset

def length(config):
    """Tokens of each run; 0: as many as its file says."""
    return config.tokens or (0 if config.preset in FULL else 1_250_000)


def runs_of(config):
    """{name: command line of its run}, as long as length() says, matched as config.match says."""
    found, tokens = {}, length(config)
    for name, (file, *words) in PRESETS[config.preset].items():
        words = [str(ROOT / 'config' / file), *words]
        if tokens:
            batch = settings.load(words).batch_tokens
            steps = max(1, round(tokens / batch))
            words += [f'--max_steps={steps}', f'--warmup_steps={steps // 10}', f'--eval_interval={max(1, steps // 10)}',
                      '--eval_tokens=65536', '--sample_interval=0', f'--save_interval={steps}', '--keep=1']
        found[name] = words
    data = {name: tuple(vars(settings.load(words))[key] for key in ('dataset', 'tokenizer', 'vocab_size')) for name, words in found.items()}
    if len(set(data.values())) > 1:
        raise UserError(f'preset {config.preset}: a loss a token is no measure between runs on different data or tokenizers: '
                        + ', '.join(f'{name} {" ".join(map(str, each))}' for name, each in data.items()) + ': give all of them the same')
    if config.match:
        shapes = {name: settings.load(words).pick(GPTConfig) for name, words in found.items()}
        *others, reference = shapes
        target = measures(shapes[reference])[MATCHES[config.match]]
        for name in others:
            key, value = matched(shapes[name], MATCHES[config.match], target)
            found[name].append(f'--{key}={value}')
    return found


def measures(shape):
    with torch.device('meta'):
        model = GPT(shape)
    return {**sizes(model), 'packed MB': model.packed_bytes() / 1e6}


def matched(shape, what, target):
    """
    (knob, value) that brings a measure of a model next to the target: the hidden width of its FFN, of a TriX tile, or the number
    of layers where the FFN has no width.
    """
    key, step = {'trix': ('trix_hidden', 8), 'none': ('n_layer', 1), 'resonance': ('n_layer', 1)}.get(shape.ffn, ('d_ff', 8))

    def measure(n):
        return measures(replace(shape, **{key: step * n}))[what]
    low, high = 1, 2
    while measure(high) < target and high < 2**16:
        low, high = high, 2 * high
    while high - low > 1:  # measures grow with the knob
        middle = (low + high) // 2
        low, high = (middle, high) if measure(middle) < target else (low, middle)
    return key, step * min((low, high), key=lambda n: abs(measure(n) - target))


PLACES = ('out_dir', 'resume', 'device', 'dtype', 'compile', 'other_data', 'verify', 'sample_prompts')  # knobs that don't change what is learnt


def trained(words):
    """The run of a command line; one that is there already goes on or is used as it is. UserError if that was made with other knobs."""
    config = settings.load(words)
    file, now = Path(config.out_dir) / 'config.json', config.as_dict()
    before = read_json(file) if file.is_file() else now
    changed = [key for key in now if key not in PLACES and json.dumps(before.get(key, now[key])) != json.dumps(now[key])]
    if changed:
        raise UserError(f'{config.out_dir}: a run is there that was made with other knobs ({", ".join(changed)}): move it away, '
                        'so that it is not taken for this one')
    status = file.with_name('status.json')
    ended = status.is_file() and read_json(status).get('state') == 'finished'
    if ended and before.get('data_fingerprint') == open_dataset(config).fingerprint:
        return  # train.py would only evaluate it again
    if code := subprocess.run([sys.executable, ROOT / 'train.py', *words]).returncode:
        sys.exit(code)  # it has said why


def quality(config):
    """
    Train the runs of a preset with several seeds, all on the same tokens in the same order (runs that are there already are used),
    and evaluate them: those that are as long as their files say on all of the validation split, the others on 131,072 tokens of it.
    `speed`: training steps, side by side, against the last of the preset. `rank`: the places that a run may have, by paired t-tests over the seeds at 95 %.
    """
    if config.preset == 'recall':
        return recall(config)
    device, dtype, _ = hardware.resolve(config.device, config.dtype)
    rows, models, losses, curves = [], {}, {}, {}
    runs = runs_of(config)
    tokens = length(config)
    folder = '-'.join(filter(None, (config.preset, config.match, str(tokens or ''))))
    Path('runs/quality', folder).mkdir(parents=True, exist_ok=True)
    for name, words in runs.items():
        results, curves[name] = [], []
        for seed in (1337, *range(1, config.seeds)):
            out = f'runs/quality/{folder}/{name}_{seed}'
            trained([*words, f'--seed={seed}', f'--out_dir={out}', '--resume=auto', f'--device={config.device}', f'--dtype={config.dtype}'])
            model, state = load_model(out, device)
            data = TokenData(state['data']['path'], model.config.block_size, model.config.vocab_size)
            lengths = token_bytes(load_tokenizer(data.tokenizer))
            results.append(validate(model, data, lengths, data.val_windows(131_072 if tokens else 0), 16, device, dtype))
            curves[name].append(evaluations(out))
        models[name], losses[name] = model.config, [result['loss'] for result in results]
        spread = {key: [result[key] for result in results] for key in ('loss', 'bits_per_byte')}
        rows.append({'model': name, **sizes(model), 'packed MB': model.packed_bytes() / 1e6, **mean_and_sd(**spread)})
        print(name, *(f'{loss:.4f}' for loss in losses[name]))
    times, _ = side_by_side('quality', models, 16, config.repeats, config)
    for row, speed, rank in zip(rows, compare(times, name), ranks(losses).values()):
        row |= {'rank': rank, 'tokens/s': 16 * model.config.block_size / speed['seconds'], 'speed': speed['ratio']}
    if config.preset == 'tiny':
        windows = data.val_windows(131_072 if tokens else 0)
        loss = bigram(data, settings.load(runs['trix_tiny']), windows)
        _, y = data.val_batch(windows)
        rows.append({**dict.fromkeys(rows[0], 0), 'model': 'bigram table', 'rank': '',
                     **mean_and_sd(loss=[loss], bits_per_byte=[loss / math.log(2) * y.size / int(lengths[y].sum())])})
    options = ''.join(f' --{key}={value}' for key, value, usual in (
        ('preset', config.preset, 'ffn'), ('match', config.match, ''), ('tokens', config.tokens, 0), ('seeds', config.seeds, 3))
        if value != usual)
    speeds = {row['model']: row['tokens/s'] for row in rows}
    report('quality', rows, config, options, lambda rows, figure: plot_curves(curves, speeds, figure),
           name='_'.join(filter(None, ('quality', config.preset, config.match))), losses=losses, curves=curves)
    for line in verdicts(losses):
        print(line)


def evaluations(run):
    """[(tokens, validation loss)] of a run"""
    return [(line['tokens'], line['loss']) for line in read_lines(Path(run) / 'metrics.jsonl') if line['kind'] == 'eval']


def difference(a, b):
    """(mean of a - b over the seeds, what it must exceed at 95 %: infinite with one seed)"""
    d = [x - y for x, y in zip(a, b)]
    if len(d) < 2:
        return d[0], math.inf
    t = STUDENT[len(d) - 2] if len(d) - 2 < len(STUDENT) else 2.2
    return statistics.mean(d), t * statistics.stdev(d) / math.sqrt(len(d))


def ranks(losses):
    """{name: loss of each seed} -> {name: '1' or '2-4', the places that it may have}, '-' with one seed."""
    found = {}
    for name, own in losses.items():
        against = [difference(own, other) for key, other in losses.items() if key != name]
        better = sum(gap > noise for gap, noise in against)
        worse = sum(-gap > noise for gap, noise in against)
        first, last = 1 + better, len(losses) - worse
        found[name] = '-' if len(own) < 2 else f'{first}' if first == last else f'{first}-{last}'
    return found


def verdicts(losses):
    *others, reference = losses
    for name in others:
        gap, noise = difference(losses[name], losses[reference])
        if noise == math.inf:
            yield f'{name} - {reference}: {gap:+.4f} nats a token; one seed tells nothing about the noise'
        else:
            word = 'inside the noise' if abs(gap) <= noise else f"{name} is {'worse' if gap > 0 else 'better'}"
            yield f'{name} - {reference}: {gap:+.4f} nats a token +- {noise:.4f} (95 %): {word}'


def plot_curves(curves, speeds, figure):
    """Validation loss against tokens, and against the seconds that these take at the speed measured side by side."""
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), ('million tokens', 'seconds of training')):
        for i, (name, seeds) in enumerate(curves.items()):
            tokens = [at for at, _ in seeds[0]]
            loss = np.array([[value for _, value in seed] for seed in seeds if len(seed) == len(tokens)])
            x = np.array(tokens) / (1e6 if unit[0] == 'm' else speeds[name])
            axes.plot(x, loss.mean(0), color=f'C{i}', label=name)
            axes.fill_between(x, loss.min(0), loss.max(0), color=f'C{i}', alpha=0.2, lw=0)
        low = min(value for seeds in curves.values() for seed in seeds for _, value in seed)
        axes.set(xlabel=unit, ylabel='validation loss (nats a token)' if unit[0] == 'm' else '', ylim=(low - 0.1, low + 2.5))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside right upper')


# ----------------------------------------------------------------------------------------------------------------------
# Recall

def recall_batch(draw, rows, pairs, vocab_size=256):
    """
    Multi-query associative recall (Arora et al., arXiv:2312.04927), in its plainest form: `pairs` different keys, each with a
    value, then the keys in another order, each followed by its value. -> x, y (rows, 4 pairs) int64, y -1 where nothing is asked.
    """
    half = vocab_size // 2
    keys = np.argsort(draw.random((rows, half)), 1)[:, :pairs]
    values = draw.integers(half, vocab_size, (rows, pairs))
    order = np.argsort(draw.random((rows, pairs)), 1)
    asked, answers = np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)
    x = np.concatenate([np.stack(part, 2).reshape(rows, -1) for part in ((keys, values), (asked, answers))], 1)
    y = np.full_like(x, -1)
    y[:, 2 * pairs::2] = answers
    return torch.from_numpy(x), torch.from_numpy(y)


def recall_accuracy(shape, pairs, steps, seed, device):
    """The share of right answers of a new model trained on `steps` batches of 64, on others."""
    torch.manual_seed(seed)
    model, draw = GPT(shape).to(device), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 3e-3 * min((step + 1) / 100, 1 - step / steps)
        x, y = (part.to(device) for part in recall_batch(draw, 64, pairs))
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_balance(1e-3)
    x, y = (part.to(device) for part in recall_batch(np.random.default_rng(10**9 + seed), 512, pairs))
    with torch.no_grad():
        return float((model(x).argmax(-1) == y)[y >= 0].float().mean())


def recall(config):
    """How many of the pairs that it was shown each mixer finds again: accuracy of two layers of width 64, every seed."""
    device, steps = hardware.resolve(config.device, 'float32')[0], 200 if config.quick else 1500
    base = dict(n_layer=2, n_head=2, n_embd=64, vocab_size=256, ffn='gelu')
    mixers = {'resonance': {'mixer': 'resonance'}, 'hybrid': {'mixer': 'resonance', 'attention_every': 2}, 'attention': {}}
    rows = []
    for pairs in PAIRS[:2] if config.quick else PAIRS:
        row = {'pairs': pairs, 'tokens': 4 * pairs}
        for name, change in mixers.items():
            shape = GPTConfig(**base, **change, block_size=4 * pairs)
            row |= mean_and_sd(**{name: [recall_accuracy(shape, pairs, steps, seed, device) for seed in range(config.seeds)]})
        rows.append(row)
        print(*(f'{key} {value:.3g}' for key, value in row.items()), flush=True)
    options = ' --preset=recall' + f' --seeds={config.seeds}' * (config.seeds != 3) + ' --quick' * config.quick
    report('quality', rows, config, options, plot_recall, name='quality_recall')


def plot_recall(rows, figure):
    axes = figure.subplots()
    for name in ('attention', 'hybrid', 'resonance'):
        x, y, sd = zip(*((row['pairs'], row[name], row[f'{name} sd']) for row in rows))
        axes.errorbar(x, y, sd, marker='o', capsize=3, label=name)
    axes.set(xscale='log', xticks=[row['pairs'] for row in rows], xticklabels=[row['pairs'] for row in rows],
             xlabel='pairs to remember', ylabel='accuracy', ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()


# ----------------------------------------------------------------------------------------------------------------------
# References

def bigram(data, config, windows):
    """Loss in nats a token, on windows of the validation split, of a bigram table counted on the tokens that a run of `config`
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
    x, y = (a.ravel() for a in data.val_batch(windows))
    at = np.minimum(np.searchsorted(keys, x * V + y), len(keys) - 1)
    seen = np.where(keys[at] == x * V + y, counts[at], 0)

    def loss(d):
        extra = d * np.maximum(successors[x], 1)
        return -np.log((seen + extra * single[y]) / (total[x] + extra)).mean()
    return min(loss(d) for d in (0.3, 0.5, 0.7, 1, 1.5, 2, 3))


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT beside ours

PEER_RATES = (4e-3, 8e-3, 1.6e-2)  # learning rates that nanoGPT may choose from (1e-3 and 2e-3 are behind)
PEER_TOKENS, PEER_BATCH = 5_000_000, 16 * 256
PEER_SHAPE = ['--n_layer=3', '--n_head=4', '--n_embd=128', '--block_size=256', '--batch_size=16']
# The same model as nanoGPT's, and what surrounds the steps switched off.
SAME = ['--vocab_size=8192', '--ffn=gelu', '--positions=learned', '--norm=layernorm', '--compile=false']
BARE = ['--eval_interval=0', '--sample_interval=0', '--save_interval=0', '--log_interval=1']
# nanoGPT's train.py has its seed written in it: this adds to it. Its arguments: the seed, then its own.
WITH_SEED = ("import sys, torch; plain, seed = torch.manual_seed, int(sys.argv.pop(1)); torch.manual_seed = lambda n: plain(n + seed); "
             "sys.path.insert(0, '.'); sys.argv[0] = 'train.py'; exec(open('train.py').read())")


def missing_from_nanogpt(path):
    """What a directory lacks to be a checkout of nanoGPT, '' if nothing."""
    for name, marks in (('train.py', ('gradient_accumulation_steps', 'configurator.py')), ('configurator.py', ()),
                        ('model.py', ('class GPTConfig', 'class GPT('))):
        file = Path(path) / name
        text = file.read_text(errors='replace') if file.is_file() else ''
        if not text or any(mark not in text for mark in marks):
            return f'no {name} of it' if text else f'no {name}'
    return ''


def nanogpt(config, data, folder, out, seed, *words):
    """-> (directory, command line) of nanoGPT's own train.py on our bins, which get a place under `folder` as it expects them."""
    for split in ('train', 'val'):
        (folder / f'{split}.bin').unlink(missing_ok=True)
        os.symlink((data.path / f'{split}.bin').resolve(), folder / f'{split}.bin')
    # nanoGPT reads the size of the vocabulary from a pickled dict; this is {'vocab_size': 8192} in protocol 0.
    (folder / 'meta.pkl').write_bytes(b'(dVvocab_size\nI8192\ns.')
    device = hardware.resolve(config.device, config.dtype)[0].type
    return Path(config.nanogpt).resolve(), [
        sys.executable, '-c', WITH_SEED, seed, *PEER_SHAPE, f'--device={device}', f'--dataset={folder.resolve()}',
        f'--out_dir={out.resolve()}', '--gradient_accumulation_steps=1', '--compile=False', '--eval_iters=1', '--log_interval=1',
        '--dropout=0.0', *words]


def peers(config):
    """
    nanoGPT's own train.py against ours on the same bins: 3 layers, width 128, 4 heads, context 256, vocabulary 8192, 16 sequences
    a step. First the steps, each run as a process of its own, in turn: the same plain GPT, and config/speedrun_tiny.py. Then, unless
    --quick, time to loss (see `race`).
    """
    device = hardware.resolve(config.device, config.dtype)[0].type
    data = open_dataset(settings.load(['--dataset=pylib', '--vocab_size=8192', '--block_size=256']))
    recipe, steps = str(ROOT / 'config' / SPEEDRUN), config.repeats + 5
    sizes = {'nanoGPT': PEER_BATCH, 'ours': PEER_BATCH, 'speedrun_tiny': settings.load([recipe]).batch_tokens}
    times, memory = {name: [] for name in sizes}, dict.fromkeys(sizes, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for repeat in range(3):
            train_py = [sys.executable, 'train.py']
            here = [f'--dataset={data.path.resolve()}', f'--device={device}', f'--max_steps={steps}', *BARE]
            commands = {
                'nanoGPT': nanogpt(config, data, folder, folder / 'theirs', 0, '--eval_interval=1000000', f'--max_iters={steps}'),
                'ours': (ROOT, [*train_py, *PEER_SHAPE, *SAME, *here, f'--out_dir={folder}/ours{repeat}']),
                'speedrun_tiny': (ROOT, [*train_py, recipe, *here, '--warmup_steps=0', f'--out_dir={folder}/fast{repeat}'])}
            for name, (cwd, words) in commands.items():
                _, peak, said = whole_process(words, cwd=cwd)
                if name == 'nanoGPT':
                    seconds = [float(ms) / 1000 for ms in re.findall(r'time ([\d.]+)ms', said)]
                else:
                    seconds = [sizes[name] / float(s.replace(',', '')) for s in re.findall(r'([\d,]+) tokens/s', said)]
                times[name] += [PEER_BATCH / sizes[name] * s for s in seconds[4:steps]]  # the first steps warm up; of as many tokens each
                memory[name] = max(memory[name], peak)
    rows = compare({name: seconds[:min(map(len, times.values()))] for name, seconds in times.items()}, 'nanoGPT')
    report('peers', [{**row, 'tokens/s': PEER_BATCH / row['seconds'], 'peak GB': memory[row['name']],
                      'memory ratio': memory[row['name']] / memory['nanoGPT']} for row in rows], config, ' --nanogpt=PATH')
    if not config.quick:
        race(config, data, {row['name']: row['seconds'] / PEER_BATCH for row in rows})


def race(config, data, seconds):
    """
    Time to loss: nanoGPT trains on PEER_TOKENS at the best of PEER_RATES (chosen with its first seed), and config/speedrun_tiny.py
    until its validation loss is no higher, on all of the validation split by the same code; config.seeds seeds each. Seconds are
    those of training alone: tokens times the seconds a token that `peers` has measured side by side. What is trained is kept.
    """
    folder, steps = Path('runs/peers'), PEER_TOKENS // PEER_BATCH

    def loss_of(rate, seed):
        loss = nanogpt_trained(config, data, rate, seed, folder / f'nanogpt_{rate:g}_{seed}')
        print(f'nanoGPT, learning rate {rate:g}, seed {seed}: {loss:.4f}', flush=True)
        return loss
    rate = min(PEER_RATES, key=lambda rate: loss_of(rate, 0))
    rows, recipe = [], str(ROOT / 'config' / SPEEDRUN)
    for seed in range(config.seeds):
        target, out = loss_of(rate, seed), folder / f'speedrun_tiny_{seed}'
        trained([recipe, f'--dataset={data.path.resolve()}', '--eval_tokens=0', '--eval_interval=100', '--sample_interval=0',
                 f'--seed={1337 + seed}', f'--out_dir={out}', '--resume=auto', f'--device={config.device}', f'--dtype={config.dtype}'])
        curve = evaluations(out)
        tokens = next((tokens for tokens, loss in curve if loss <= target), None)
        theirs = steps * PEER_BATCH * seconds['nanoGPT']
        rows.append({'seed': seed, 'nanoGPT loss': target, 'nanoGPT tokens': steps * PEER_BATCH, 'nanoGPT seconds': theirs,
                     'speedrun_tiny loss': curve[-1][1], 'tokens to nanoGPT\'s loss': tokens or 'never',
                     'seconds to it': tokens * seconds['speedrun_tiny'] if tokens else 'never',
                     'part of the time': tokens * seconds['speedrun_tiny'] / theirs if tokens else 'never'})
    report('peers', rows, config, ' --nanogpt=PATH', name='peers_race', learning_rate=rate)


def nanogpt_trained(config, data, rate, seed, out):
    """
    The loss on all of our validation split that nanoGPT's own loop reaches after PEER_TOKENS. It is kept in `out` beside what it was
    trained with, and read from there if that is still the same.
    """
    steps, kept = PEER_TOKENS // PEER_BATCH, out / 'loss.json'
    knobs = [f'--learning_rate={rate}', f'--min_lr={rate / 10}', f'--max_iters={steps}', f'--lr_decay_iters={steps}', '--warmup_iters=100',
             '--beta2=0.99', f'--eval_interval={steps}']
    made_with = {'seed': seed, 'knobs': PEER_SHAPE + knobs, 'data': data.fingerprint}
    result = read_json(kept) if kept.is_file() else {}
    if {**result, 'loss': None} != {**made_with, 'loss': None}:
        out.mkdir(parents=True, exist_ok=True)
        cwd, words = nanogpt(config, data, out, out, seed, *knobs)
        whole_process(words, cwd=cwd)
        result = {**made_with, 'loss': nanogpt_loss(config, data, out / 'ckpt.pt')}
        kept.write_text(json.dumps(result))
    return result['loss']


@torch.no_grad()
def nanogpt_loss(config, data, path):
    """The loss of a checkpoint of nanoGPT on all of our validation split, by its own model."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', Path(config.nanogpt) / 'model.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    state = torch.load(path, map_location='cpu', weights_only=True)
    model = module.GPT(module.GPTConfig(**state['model_args']))
    model.load_state_dict(state['model'])
    model.eval()
    windows, total = data.val_windows(), 0.0
    for i in range(0, len(windows), 16):
        x, y = map(torch.from_numpy, data.val_batch(windows[i:i + 16]))
        total += model(x, y)[1].item() * len(x)
    return total / len(windows)
