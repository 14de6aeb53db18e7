"""
Which model learns more: runs on the same tokens in the same order, with several seeds, and no ranking within the noise.
The command `quality` of bench.py.
"""
import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import settings
from corpora.opening import open_dataset
from benchmarks.measure import (ROOT, Progress, alike, compare, mean_and_sd, packed_bytes, report, side_by_side,
                                sizes)
from checkpoint import load_model
from configurator import UserError, read_json
from data import TokenData
from files import replacing
from model import GPT, GPTConfig
from runtime import device as hardware
from runtime.runlog import read_lines
from tokenizer import load_tokenizer, token_bytes
from training import validate

TINY, TWIN, SPEEDRUN = 'trix_tiny.py', 'dense_tiny.py', 'speedrun_tiny.py'
SOURCE = str(ROOT / 'config' / 'recipes' / 'source.py')
TILES = ((8, 128, 2), (16, 64, 2), (16, 64, 4))  # number of tiles, hidden units of a tile, tiles of a token
PRESETS = {  # name: {name of a run: its config file and command line}; the last run is the reference
    'tiny': {'trix_tiny': (TINY,), 'dense_tiny': (TWIN,)},
    'ffn': {
        'relu2': (TWIN, '--ffn=relu2'),
        'swiglu': (TWIN, '--ffn=swiglu'),
        'trix': (TINY,),
        'bitnet': (TWIN, '--ffn=bitnet'),
        'resonance': (TWIN, '--ffn=resonance'),
        'none': (TWIN, '--ffn=none'),
        'gelu': (TWIN,)},
    'mixer': {
        'resonance': (TWIN, '--mixer=resonance'),
        'hybrid': (TWIN, '--mixer=resonance', '--attention_every=3'),
        'attention': (TWIN,)},
    'tiles': {
        **{f'{E}x{h}_top{k}': (TINY, SOURCE, f'--trix_tiles={E}', f'--trix_hidden={h}', f'--trix_top_k={k}')
           for E, h, k in TILES},
        'dense': (TINY, SOURCE, '--ffn=gelu')},
    'routing': {router: (TINY, SOURCE, f'--trix_router={router}') for router in ('signature', 'hash', 'first')},
    'speedrun': {  # `base` with one change each; speedrun_tiny is `base` with GELU
        'adamw': (SPEEDRUN, '--ffn=relu2', '--optimizer=adamw', '--matrix_lr=0',
                  '--learning_rate=4e-3'),  # the best of 2e-3, 4e-3 and 8e-3 (seed 1337)
        'no_qk_norm': (SPEEDRUN, '--ffn=relu2', '--qk_norm=false'),
        'no_zero_init': (SPEEDRUN, '--ffn=relu2', '--zero_init=false'),
        'no_taps': (SPEEDRUN, '--ffn=relu2', '--embed_taps=0'),
        'cosine': (SPEEDRUN, '--ffn=relu2', '--schedule=cosine'),
        'embed_norm': (SPEEDRUN, '--ffn=relu2', '--embed_norm=true'),
        'softcap_15': (SPEEDRUN, '--ffn=relu2', '--logit_softcap=15'),
        'speedrun_tiny': (SPEEDRUN,),
        'base': (SPEEDRUN, '--ffn=relu2')},
    'bitnet': {
        'bitnet': (TINY, SOURCE, '--ffn=swiglu', '--linear=bitnet', '--learning_rate=3e-3'),
        'dense_twin': (TINY, SOURCE, '--ffn=swiglu')}}  # and trix, see trix_runs()
FULL_LENGTH = ('tiny', 'speedrun')  # presets that train as long as their config files say, unless --tokens is given
TRIX_TOKENS = 6_500_000  # of each run of the preset trix
TRIX_RATES = (2e-3, 4e-3, 8e-3, 16e-3)  # of the matrices at a width of 256; scaled by 1 / width
MATCHES = {'params': 'parameters', 'flops': 'MFLOP/token', 'bytes': 'packed MB'}
# Student's t: the two-sided 95 % quantile with 1, 2, ... degrees of freedom
STUDENT_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
RECALL_PAIRS = (4, 8, 16, 32, 64)  # pairs of a key and its value in a sequence of `recall`


# ----------------------------------------------------------------------------------------------------------------------
# Runs of a preset

def tokens_of_run(config):
    """Tokens of each run; 0: as many as its config file says."""
    if config.tokens or config.preset in FULL_LENGTH:
        return config.tokens
    return TRIX_TOKENS if config.preset == 'trix' else 1_250_000


def trix_runs(n_layer, n_embd):
    """
    The preset trix at a size: {name: (config file, options)}. A token uses 4 n_embd hidden units of the FFN, as in the
    dense reference; half as many in `half`; 3 n_embd in `shared`. Muon, linear decay, four taps and QK-norm in all.
    """
    size = (f'--n_layer={n_layer}', f'--n_embd={n_embd}', f'--n_head={max(4, n_embd // 64)}',
            f'--learning_rate={24e-3 * 128 / n_embd:g}')
    tiles = {  # name: number of tiles, tiles of a token, hidden units of a tile, further options
        '16_4': (16, 4, n_embd), '8_2': (8, 2, 2 * n_embd), '32_8': (32, 8, n_embd // 2),
        'half_8_2': (8, 2, n_embd), 'half_16_4': (16, 4, n_embd // 2),
        'shared': (8, 2, n_embd, '--trix_shared=true'),
        'hash': (16, 4, n_embd, '--trix_router=hash'),
        'first': (16, 4, n_embd, '--trix_router=first')}
    found = {f'trix_{name}': (TINY, *size, f'--trix_tiles={E}', f'--trix_top_k={k}', f'--trix_hidden={h}', *more)
             for name, (E, k, h, *more) in tiles.items()}
    return found | {ffn: (TWIN, *size, f'--ffn={ffn}') for ffn in ('relu2', 'swiglu', 'bitnet', 'none', 'gelu')}


def shape_of(config):
    """(layers, width) of --shape. UserError if it is not of the form 6x256."""
    layers, _, width = config.shape.partition('x')
    if not (layers.isdecimal() and width.isdecimal() and int(layers) and int(width)):
        raise UserError(f'shape={config.shape!r} is not LAYERSxWIDTH, such as 6x256')
    return int(layers), int(width)


def runs_of(config):
    """{name: command line of the run}, with the length of tokens_of_run() and the widths that config.match asks for."""
    runs, tokens = {}, tokens_of_run(config)
    preset = trix_runs(*shape_of(config)) if config.preset == 'trix' else PRESETS[config.preset]
    for name, (file, *words) in preset.items():
        words = [str(ROOT / 'config' / file), *words]
        if tokens:
            words += length(max(1, round(tokens / settings.load(words).batch_tokens)))
        runs[name] = words
    check_same_data(config.preset, runs)
    if config.match in MATCHES:
        shapes = {name: settings.load(words).pick(GPTConfig) for name, words in runs.items()}
        *others, reference = shapes
        target = measures(shapes[reference])[MATCHES[config.match]]
        for name in others:
            key, value = matched(shapes[name], MATCHES[config.match], target)
            runs[name].append(f'--{key}={value}')
    return runs


def length(steps):
    """The options of a run of this many steps, with ten validations and one checkpoint."""
    return [f'--max_steps={steps}', f'--warmup_steps={steps // 10}', f'--eval_interval={max(1, steps // 10)}',
            '--eval_tokens=65536', '--sample_interval=0', f'--save_interval={steps}', '--keep=1']


def at_equal_time(runs, folder, config):
    """
    Change the number of steps so that all runs take as long as the last one. The speeds are measured once, side by
    side, and kept in the folder of the runs, so that the same command continues the same runs.
    """
    file, configs = folder / 'speeds.json', {name: settings.load(words) for name, words in runs.items()}
    if not file.is_file():
        models = {name: run.pick(GPTConfig) for name, run in configs.items()}
        times, _ = side_by_side('speed', alike(models, 16), config.repeats, config)
        speeds = {row['name']: row['ratio'] for row in compare(times, list(runs)[-1])}
        with replacing(file) as opened:
            opened.write(json.dumps(speeds).encode())
    speeds = read_json(file, advice='delete it, and the speeds are measured again')
    return {name: [*words, *length(max(1, round(configs[name].max_steps * speeds[name])))]
            for name, words in runs.items()}


def check_same_data(preset, runs):
    """UserError unless all runs have the same data and tokenizer."""
    keys = ('dataset', 'tokenizer', 'vocab_size')
    data = {name: tuple(vars(settings.load(words))[key] for key in keys) for name, words in runs.items()}
    if len(set(data.values())) > 1:
        listed = ', '.join(f'{name} {" ".join(map(str, values))}' for name, values in data.items())
        raise UserError(f'preset {preset}: the loss per token cannot be compared between different data or tokenizers: '
                        f'{listed}: give all runs the same')


def measures(shape):
    """{column: value} of the sizes of a model"""
    with torch.device('meta'):
        model = GPT(shape)
    return {**sizes(model), 'packed MB': packed_bytes(model) / 1e6}


def matched(shape, column, target):
    """
    (option, value) that brings a size of a model closest to the target: the hidden width of its FFN or of a TriX
    tile, or the number of layers where the FFN has no width.
    """
    options = {'trix': ('trix_hidden', 8), 'none': ('n_layer', 1), 'resonance': ('n_layer', 1)}
    key, unit = options.get(shape.ffn, ('d_ff', 8))

    def size(n):
        return measures(replace(shape, **{key: unit * n}))[column]
    low, high = 1, 2
    while size(high) < target and high < 2**16:
        low, high = high, 2 * high
    while high - low > 1:  # the size grows with n
        middle = (low + high) // 2
        if size(middle) < target:
            low = middle
        else:
            high = middle
    return key, unit * min((low, high), key=lambda n: abs(size(n) - target))


def numbers(text):
    """'1e-3,2e-3' -> (0.001, 0.002). UserError unless all are positive numbers."""
    try:
        found = tuple(float(word) for word in text.split(',') if word)
    except ValueError:
        found = (0,)
    if not all(0 < number < math.inf for number in found):
        raise UserError(f'rates={text!r} is not a list of positive numbers, such as 4e-3,8e-3')
    return found


def rates_of(config):
    """The learning rates of the matrices that each run tries. None: the one of its config file."""
    if config.rates or config.preset != 'trix':
        return numbers(config.rates)
    return tuple(rate * 256 / shape_of(config)[1] for rate in TRIX_RATES)


def tuned(runs, folder, tokens, config):
    """
    Try every rate of rates_of() for every run, with seed 1337 and at full length.

    Returns ({name: the best rate}, {name: {rate: loss}}).
    """
    trials, best = {}, {}
    rates = rates_of(config)
    progress = Progress('learning rates', len(runs) * len(rates))
    for name, words in runs.items():
        trials[name] = {}
        for rate in rates:
            out = train_seed(*with_rate(words, f'{folder}/{name}', rate), 1337, config)
            trials[name][rate] = evaluated(out, tokens, config)[2]['loss']
            progress.step()
        best[name] = min(trials[name], key=trials[name].get)
        if best[name] in (min(rates), max(rates)) and len(rates) > 1:
            print(f'{name}: its best rate, {best[name]:g}, is at the edge of those tried', flush=True)
    return best, trials


# Options that don't change what is learnt
NEUTRAL = ('out_dir', 'resume', 'device', 'dtype', 'compile', 'other_data', 'verify', 'sample_prompts')


def is_trained(words):
    """
    Whether the run of a command line is finished, on the data that there are now. UserError if its directory has a run
    with other options.
    """
    config = settings.load(words)
    file = Path(config.out_dir) / 'config.json'
    before = read_json(file) if file.is_file() else config.as_dict()
    if config.epochs and before.get('max_steps'):  # config.json has the steps that followed from the data
        config.max_steps = before['max_steps']
        settings.step_problems(config)  # sets the steps that depend on them
    now = config.as_dict()
    changed = [key for key in now
               if key not in NEUTRAL and json.dumps(before.get(key, now[key])) != json.dumps(now[key])]
    if changed:
        raise UserError(f'{config.out_dir} has a run with other options ({", ".join(changed)}). Move it away, so that '
                        'it is not used for this one')
    status = file.with_name('status.json')
    finished = status.is_file() and read_json(status).get('state') == 'finished'
    return finished and before.get('data_fingerprint') == open_dataset(config).fingerprint


def ensure_trained(words):
    """Train the run of a command line unless it is already finished. An unfinished one is resumed."""
    if is_trained(words):
        return  # train.py would only evaluate it again
    code = run_train(words)
    if code:
        sys.exit(code)  # train.py has printed the reason


def run_train(words, **options):
    """Run train.py -> its exit code. On Ctrl-C, wait until the run has saved. options: of subprocess.Popen."""
    process = subprocess.Popen([sys.executable, ROOT / 'train.py', *words], **options)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the run has got it, too
            print('waiting until the run has saved a checkpoint', file=sys.stderr, flush=True)


def quality(config):
    """
    Train the runs of a preset with several seeds, all on the same tokens in the same order, and evaluate them. Runs
    that are already finished are used. The validation loss is that of the whole split for runs as long as their
    config files say, and of 131,072 tokens for the others. `speed`: training steps, side by side, against the last
    run of the preset. `rank`: the places that a run may have, by paired t-tests over the seeds at 95 %.
    """
    if config.preset == 'recall':
        return recall(config)
    runs, tokens = runs_of(config), tokens_of_run(config)
    shape = config.shape if config.preset == 'trix' else ''
    folder = Path('runs/quality', '-'.join(filter(None, (config.preset, shape, config.match, str(tokens or '')))))
    folder.mkdir(parents=True, exist_ok=True)
    if config.match == 'time':
        runs = at_equal_time(runs, folder, config)
    rates, trials = tuned(runs, folder, tokens, config) if rates_of(config) else ({}, {})
    rows, models, losses, curves = [], {}, {}, {}
    progress = Progress('runs of the preset', len(runs) * config.seeds)
    for name, words in runs.items():
        results, curves[name] = [], []
        for seed in (1337, *range(1, config.seeds)):
            out = train_seed(*with_rate(words, f'{folder}/{name}', rates.get(name)), seed, config)
            model, data, result = evaluated(out, tokens, config)
            results.append(result)
            curves[name].append(evaluations(out))
            progress.step()
        models[name] = model.config
        losses[name] = [result['loss'] for result in results]
        spread = {key: [result[key] for result in results] for key in ('loss', 'bits_per_byte')}
        rows.append({'model': name, **sizes(model), 'packed MB': packed_bytes(model) / 1e6, **mean_and_sd(**spread)})
        if name in rates:
            rows[-1]['rate'] = rates[name]
        print(name, *(f'{loss:.4f}' for loss in losses[name]))
    times, _ = side_by_side('quality', alike(models, 16), config.repeats, config)
    for row, speed, rank in zip(rows, compare(times, name), ranks(losses).values()):
        row |= {'rank': rank, 'tokens/s': 16 * model.config.block_size / speed['seconds'], 'speed': speed['ratio']}
    if config.preset == 'tiny':
        bigram_loss = bigram_row(data, settings.load(runs['trix_tiny']), validation_windows(data, tokens))
        rows.append({**dict.fromkeys(rows[0], 0), 'rank': '', **bigram_loss})
    speeds = {row['model']: row['tokens/s'] for row in rows}
    report('quality', rows, config, options_of(config), lambda rows, figure: plot_curves(curves, speeds, figure),
           name='_'.join(filter(None, ('quality', config.preset, shape, config.match))), losses=losses, curves=curves,
           trials=trials)
    for line in verdicts(losses):
        print(line)


def with_rate(words, name, rate):
    """The command line and the name of a run at a learning rate of the matrices. None: that of its config file."""
    return ([*words, f'--matrix_lr={rate:g}'], f'{name}_{rate:g}') if rate else (words, name)


def train_seed(words, name, seed, config):
    """Train a run with a seed, unless it is finished. Returns its directory."""
    out = f'{name}_{seed}'
    ensure_trained([*words, f'--seed={seed}', f'--out_dir={out}', '--resume=auto', f'--device={config.device}',
                    f'--dtype={config.dtype}'])
    return out


def options_of(config):
    """The options of `quality` that differ from their defaults, as on the command line."""
    defaults = {'preset': 'ffn', 'shape': '6x256', 'match': '', 'tokens': 0, 'seeds': 3, 'rates': ''}
    return ''.join(f' --{key}={getattr(config, key)}' for key, default in defaults.items()
                   if getattr(config, key) != default)


def validation_windows(data, tokens):
    """Windows of the whole validation split for runs of full length (tokens 0), of 131,072 tokens for the others."""
    return data.val_windows(131_072 if tokens else 0)


def evaluated(run, tokens, config):
    """-> (model, data, validation result) of a finished run"""
    device, dtype, _ = hardware.resolve(config.device, config.dtype)
    model, state = load_model(run, device)
    data = TokenData(state['data']['path'], model.config.block_size, model.config.vocab_size)
    n_bytes = token_bytes(load_tokenizer(data.tokenizer))
    return model, data, validate(model, data, n_bytes, validation_windows(data, tokens), 16, device, dtype)


def evaluations(run):
    """[(tokens, validation loss)] over a run"""
    lines = read_lines(Path(run) / 'metrics.jsonl')
    return [(line['tokens'], line['loss']) for line in lines if line['kind'] == 'eval']


def difference(a, b):
    """(mean of a - b over the seeds, the noise at 95 % that it must exceed: infinite with one seed)"""
    differences = [x - y for x, y in zip(a, b)]
    n = len(differences)
    if n < 2:
        return differences[0], math.inf
    t = STUDENT_T[n - 2] if n - 2 < len(STUDENT_T) else 2.2
    return statistics.mean(differences), t * statistics.stdev(differences) / math.sqrt(n)


def ranks(losses):
    """{name: loss of each seed} -> {name: '1' or '2-4'}, the places that a run may have; '-' with one seed."""
    places = {}
    for name, loss in losses.items():
        against = [difference(loss, other) for key, other in losses.items() if key != name]
        first = 1 + sum(gap > noise for gap, noise in against)
        last = len(losses) - sum(-gap > noise for gap, noise in against)
        if len(loss) < 2:
            places[name] = '-'
        else:
            places[name] = f'{first}' if first == last else f'{first}-{last}'
    return places


def verdicts(losses):
    """A line for each run but the last: its difference to the last, and whether that is more than noise."""
    *others, reference = losses
    for name in others:
        gap, noise = difference(losses[name], losses[reference])
        if noise == math.inf:
            yield f'{name} - {reference}: {gap:+.4f} nats per token; with one seed the noise is unknown'
        else:
            verdict = 'within the noise' if abs(gap) <= noise else f'{name} is {"worse" if gap > 0 else "better"}'
            yield f'{name} - {reference}: {gap:+.4f} nats per token +- {noise:.4f} (95 %): {verdict}'


def plot_curves(curves, speeds, figure):
    """Validation loss against tokens, and against the seconds of these tokens at the speed measured side by side."""
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    for i, (name, seeds) in enumerate(curves.items()):
        tokens = np.array([tokens for tokens, _ in seeds[0]])
        loss = np.array([[loss for _, loss in seed] for seed in seeds if len(seed) == len(tokens)])
        for axes, x in ((by_tokens, tokens / 1e6), (by_seconds, tokens / speeds[name])):
            axes.plot(x, loss.mean(0), color=f'C{i}', label=name)
            axes.fill_between(x, loss.min(0), loss.max(0), color=f'C{i}', alpha=0.2, lw=0)
    lowest = min(loss for seeds in curves.values() for seed in seeds for _, loss in seed)
    by_tokens.set(xlabel='million tokens', ylabel='validation loss (nats a token)', ylim=(lowest - 0.1, lowest + 2.5))
    by_seconds.set(xlabel='seconds of training')
    for axes in (by_tokens, by_seconds):
        axes.grid(alpha=0.3)
    figure.legend(*by_tokens.get_legend_handles_labels(), loc='outside right upper')


# ----------------------------------------------------------------------------------------------------------------------
# Recall

def recall_batch(rng, batch_size, pairs, vocab_size=256):
    """
    Multi-query associative recall (Arora et al., arXiv:2312.04927) in its plainest form: `pairs` different keys, each
    followed by a value, then the keys in another order, each followed by its value again.
    -> x, y (batch_size, 4 pairs) int64; y is the value where a key is repeated, else -1
    """
    half = vocab_size // 2
    keys = np.argsort(rng.random((batch_size, half)), 1)[:, :pairs]
    values = rng.integers(half, vocab_size, (batch_size, pairs))
    order = np.argsort(rng.random((batch_size, pairs)), 1)
    queries, answers = np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)
    shown = np.stack((keys, values), 2).reshape(batch_size, -1)  # key, value, key, value, ...
    repeated = np.stack((queries, answers), 2).reshape(batch_size, -1)
    x = np.concatenate([shown, repeated], 1)
    y = np.full_like(x, -1)
    y[:, 2 * pairs::2] = answers
    return torch.from_numpy(x), torch.from_numpy(y)


def recall_accuracy(shape, pairs, steps, seed, device):
    """
    The share of correct answers of a new model, on other sequences than the `steps` batches of 64 that it is trained
    on.
    """
    torch.manual_seed(seed)
    model, rng = GPT(shape).to(device), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 3e-3 * min((step + 1) / 100, 1 - step / steps)
        x, y = (part.to(device) for part in recall_batch(rng, 64, pairs))
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_balance(1e-3)
    x, y = (part.to(device) for part in recall_batch(np.random.default_rng(10**9 + seed), 512, pairs))
    with torch.no_grad():
        return float((model(x).argmax(-1) == y)[y >= 0].float().mean())


def recall(config):
    """
    How many of the pairs in a sequence each mixer recalls: the accuracy of two layers of width 64, over the seeds.
    """
    device = hardware.resolve(config.device, 'float32')[0]
    steps = 200 if config.quick else 1500
    base = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=256, ffn='gelu')
    mixers = {
        'resonance': replace(base, mixer='resonance'),
        'hybrid': replace(base, mixer='resonance', attention_every=2),
        'attention': base}
    rows = []
    for pairs in RECALL_PAIRS[:2] if config.quick else RECALL_PAIRS:
        row = {'pairs': pairs, 'tokens': 4 * pairs}
        for name, shape in mixers.items():
            shape = replace(shape, block_size=4 * pairs)
            accuracies = [recall_accuracy(shape, pairs, steps, seed, device) for seed in range(config.seeds)]
            row |= mean_and_sd(**{name: accuracies})
        rows.append(row)
        print(*(f'{key} {value:.3g}' for key, value in row.items()), flush=True)
    options = ' --preset=recall'
    if config.seeds != 3:
        options += f' --seeds={config.seeds}'
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

def bigram_row(data, config, windows):
    """The cells of a table for the bigram table: its name, its loss and its bits per byte."""
    loss = bigram(data, config, windows)
    _, y = data.val_batch(windows)
    n_bytes = int(token_bytes(load_tokenizer(data.tokenizer))[y].sum())
    return {'model': 'bigram table', **mean_and_sd(loss=[loss], bits_per_byte=[loss / math.log(2) * y.size / n_bytes])}


def bigram(data, config, windows):
    """
    The loss in nats per token, on windows of the validation split, of a bigram table counted on the tokens that a run
    of `config` trains on, interpolated with unigrams: p(y|x) = (c(xy) + d n(x) p(y)) / (c(x) + d n(x)), where n(x) is
    the number of different successors of x (Witten and Bell 1991 at d = 1). d is the best of seven on the validation
    split itself, which favours the table.
    """
    V, batch_size = data.n_vocab, config.batch_tokens // config.block_size
    unigrams, parts = np.ones(V), []
    for first in range(0, config.max_steps, 100):  # 100 steps at a time
        keys = []
        for step in range(first, min(first + 100, config.max_steps)):
            x, y = data.batch(step, 0, batch_size, batch_size, seed=config.seed)
            unigrams += np.bincount(y.ravel(), minlength=V)
            keys.append((x * V + y).ravel())
        parts.append(np.unique(np.concatenate(keys), return_counts=True))
    keys, positions = np.unique(np.concatenate([keys for keys, _ in parts]), return_inverse=True)
    counts = np.bincount(positions, weights=np.concatenate([counts for _, counts in parts]))  # of each pair in keys
    total = np.bincount(keys // V, weights=counts, minlength=V)  # c(x)
    successors = np.bincount(keys // V, minlength=V)  # n(x)
    unigrams /= unigrams.sum()
    x, y = (a.ravel() for a in data.val_batch(windows))
    at = np.minimum(np.searchsorted(keys, x * V + y), len(keys) - 1)
    pair_counts = np.where(keys[at] == x * V + y, counts[at], 0)

    def loss(d):
        extra = d * np.maximum(successors[x], 1)
        return -np.log((pair_counts + extra * unigrams[y]) / (total[x] + extra)).mean()
    return min(loss(d) for d in (0.3, 0.5, 0.7, 1, 1.5, 2, 3))
