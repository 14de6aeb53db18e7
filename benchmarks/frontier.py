"""
What ternary tiles buy: validation loss against training FLOPs, file size and decoding speed, for dense, BitNet and TriX
models at three sizes. The command `frontier` of bench.py, and the picture of the README.
"""
from functools import partial
from pathlib import Path

import torch

import settings
from benchmarks.deployed import PROMPT, seconds_per_token
from benchmarks.measure import ROOT, Progress, compare, interleaved, mean_and_sd, report
from benchmarks.quality import TINY, TWIN, evaluated, length, train_seed
from deploy import packed

SIZES = ((2, 96), (3, 128), (4, 192))  # layers, width
TOKENS = 2_000_000
KINDS = {  # name: (config file, learning rate of the matrices at a width of 128, options)
    'dense': (TWIN, 6e-3, ()),
    'BitNet': (TWIN, 4e-3, ('--linear=bitnet', '--ffn=relu2', '--zero_init=false', '--ternary_warmup=0.5')),
    'TriX': (TINY, 16e-3, ('--trix_tiles=16', '--trix_top_k=4', '--trix_hidden=0', '--ternary_warmup=0.5')),
    'TriX, half': (TINY, 16e-3, ('--trix_tiles=8', '--trix_top_k=2', '--trix_hidden=0', '--ternary_warmup=0.5'))}


def runs_of(tokens):
    """{(kind, layers, width): command line}. A vocabulary of 1,024, so that the blocks make up most of each model."""
    runs = {}
    for n_layer, n_embd in SIZES:
        for kind, (file, rate, options) in KINDS.items():
            words = [str(ROOT / 'config' / file), *options, '--vocab_size=1024', f'--n_layer={n_layer}',
                     f'--n_embd={n_embd}', f'--learning_rate={24e-3 * 128 / n_embd:g}',
                     f'--matrix_lr={rate * 128 / n_embd:g}']
            steps = max(1, round(tokens / settings.load(words).batch_tokens))
            runs[kind, n_layer, n_embd] = words + length(steps)
    return runs


def deployed(model):
    """
    A trained model as `export.py pack --embeddings=int8 --matrices=bfloat16` stores it: (bytes, the packed model).
    """
    tensors = packed.pack(model, 'int8', 'bfloat16')
    state = {'packed': tensors, 'embeddings': 'int8', 'matrices': 'bfloat16'}
    size = sum(tensor.nbytes for tensor in tensors.values())
    return size, packed.build(model.config, state, 'packed in memory', torch.device('cpu'))


def frontier(config):
    """
    Train dense, BitNet and TriX models of three sizes on the same 2M tokens, and deploy them alike: ternary matrices
    in 2 bits, dense ones in bfloat16, embeddings in int8. `loss`: nats per token on 131,072 tokens of the validation
    split. `training TFLOP`: of the whole run. `tokens/s`: one sequence, one token at a time, on the CPU, all models in
    turn and by the same program (ternary.cpp, which computes in fp32). Finished runs are used.
    """
    tokens = config.tokens or TOKENS
    folder = Path('runs/quality', f'frontier-{tokens}')
    folder.mkdir(parents=True, exist_ok=True)
    runs = runs_of(tokens)
    rows, runners = [], {}
    progress = Progress('runs', len(runs) * config.seeds)
    for (kind, n_layer, n_embd), words in runs.items():
        losses = []
        for seed in (1337, *range(1, config.seeds)):
            name = f'{kind.lower().replace(", ", "_")}_{n_layer}x{n_embd}'
            out = train_seed(words, folder / name, seed, config)
            model, _, result = evaluated(out, tokens, config)
            losses.append(result['loss'])
            progress.step()
        size, runners[kind, n_layer, n_embd] = deployed(model.cpu())
        rows.append({'model': kind, 'layers': n_layer, 'width': n_embd,
                     'parameters': sum(p.numel() for p in model.parameters()), **mean_and_sd(loss=losses),
                     'training TFLOP': 3 * model.flops_per_token() * tokens / 1e12, 'MB': size / 1e6})
        print(kind, n_layer, n_embd, *(f'{loss:.4f}' for loss in losses), flush=True)
    prompt = torch.zeros(1, PROMPT, dtype=torch.int64)
    times = interleaved({key: partial(seconds_per_token, runner, prompt) for key, runner in runners.items()},
                        config.repeats)
    for row, speed in zip(rows, compare(times, ('dense', *SIZES[0]))):
        row['tokens/s'] = 1 / speed['seconds']
    options = ''.join(f' --{key}={value}' for key, value, default in
                      (('tokens', config.tokens, 0), ('seeds', config.seeds, 3)) if value != default)
    report('frontier', rows, config, options, plot)
    for line in undominated(rows):
        print(line)


def undominated(rows):
    """A line for each ternary model: the dense models that are at least as good, small and fast, if there are any."""
    dense = [row for row in rows if row['model'] == 'dense']
    for row in rows:
        if row['model'] == 'dense':
            continue
        better = [f'{other["layers"]}x{other["width"]}' for other in dense
                  if other['loss'] <= row['loss'] and other['MB'] <= row['MB'] and other['tokens/s'] >= row['tokens/s']]
        verdict = f'dense {" and ".join(better)} is better in everything' if better else 'no dense model dominates it'
        yield f'{row["model"]} {row["layers"]}x{row["width"]}: {verdict}'


def plot(rows, figure):
    """Loss against training FLOPs, file size and decoding speed. A line joins the sizes of a kind."""
    panels = {'training TFLOP': 'training compute (TFLOP)', 'MB': 'file size (MB)',
              'tokens/s': 'decoding speed on this CPU (tokens/s)'}
    from matplotlib.ticker import LogLocator, NullFormatter  # only where a picture is drawn
    axes = figure.subplots(1, 3, sharey=True)
    for panel, (column, label) in zip(axes, panels.items()):
        for i, kind in enumerate(dict.fromkeys(row['model'] for row in rows)):
            own = [row for row in rows if row['model'] == kind]
            panel.errorbar([row[column] for row in own], [row['loss'] for row in own], [row['loss sd'] for row in own],
                           marker='os^D'[i % 4], capsize=3, color=f'C{i}', label=kind)
        panel.set(xlabel=label, xscale='log')
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter('{x:,g}')
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3, which='both')
    axes[0].set_ylabel('validation loss (nats a token)')
    axes[0].legend()
