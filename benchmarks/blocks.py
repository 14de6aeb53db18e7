"""
Speed and memory of models on random tokens: the commands blocks, context, amp, compile and head of bench.py.

Each command is a function of a BenchConfig. It prints a table and writes <config.out>/<machine>/<command>.json, some
with a picture.
"""
import os
import statistics
import tempfile
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import settings
from benchmarks.measure import (ROOT, Candidate, alike, compare, interleaved, packed_bytes, report, side_by_side, sizes,
                                timed)
from configurator import UserError
from kernels import (FUSED_DEVICES, PRODUCT_TOLERANCE, autocast, chunked_cross_entropy, fft_convolution,
                     product_convolution)
from model import GPT, Attention, GPTConfig, Resonance
from runtime import compiler
from runtime import device as hardware

untied = partial(GPTConfig, vocab_size=32_000, tie_embeddings=False)
SHAPES = [  # (shape, sequences a step, divisor of --repeats: the longer a step, the fewer repeats)
    (untied(n_embd=128, n_layer=4, n_head=4), 16, 2),
    (untied(n_embd=256, n_layer=6, n_head=8), 16, 3),
    (untied(n_embd=512, n_layer=12, n_head=8), 8, 5)]
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
HEAD_SHAPES = {'cpu': (4096, 128, 8192), 'cuda': (32_768, 768, 50_304)}  # tokens, width, vocabulary
FFN_SHAPES = {'cpu': ((128, 2048),), 'cuda': ((128, 65_536), (512, 65_536), (768, 32_768))}  # width, tokens
CONTEXT_SHAPE = GPTConfig(n_embd=256, n_layer=4, n_head=4, vocab_size=4096, ffn='gelu')

# One mixer: on a GPU with the sizes of config/resonance_32k.py
MIXER_SHAPES = {'cpu': GPTConfig(block_size=2048, n_embd=128, n_head=2, num_frequencies=16),
                'cuda': GPTConfig(block_size=32_768, n_embd=1024, n_head=16, num_frequencies=128)}
PRODUCT_CHUNKS, FFT_CHUNKS = (64, 128, 256, 512), (256, 2048)


def variants(shape):
    """{name: GPTConfig} of all blocks at a shape. TriX has the tiles of trix_tiny, scaled with the width."""
    tiny = settings.load([str(ROOT / 'config' / 'trix_tiny.py')]).pick(GPTConfig)
    tiles = {key: value for key, value in vars(tiny).items() if key.startswith('trix_')}
    tiles['trix_hidden'] = (tiny.trix_hidden or tiny.n_embd) * shape.n_embd // tiny.n_embd
    return {
        'dense': replace(shape, ffn='gelu'),
        'swiglu': replace(shape, ffn='swiglu'),
        'trix': replace(shape, ffn='trix', **tiles),
        'bitnet': replace(shape, ffn='swiglu', linear='bitnet'),
        'resonance': replace(shape, mixer='resonance', ffn='gelu'),
        'none': replace(shape, ffn='none')}


def title_of(shape):
    return f'{shape.n_layer} x {shape.n_embd}'


def is_cpu(config):
    return hardware.resolve(config.device, 'auto')[0].type == 'cpu'


# ----------------------------------------------------------------------------------------------------------------------
# Training steps of the blocks

def blocks(config):
    """
    Training steps of every block at SHAPES. `dense` is attention with a GELU FFN. `bitnet` is `swiglu` with ternary
    matrices, so `ratio to swiglu` is its fair comparison. `packed MB`: ternary codes in 2 bits, everything else in
    bf16. `peak GB`: peak memory of training; on a GPU that of its tensors, on a CPU that of the whole process, torch
    included. Six models are in memory at once.
    """
    # Without a command everything takes five minutes: a CPU skips the largest shape.
    shapes = SHAPES[:2] if not config.command and is_cpu(config) else SHAPES
    rows = []
    for number, (shape, batch_size, divisor) in enumerate(shapes, 1):
        models = variants(shape)
        repeats = 2 if config.quick else max(1, config.repeats // divisor)
        title = f'{title_of(shape)} (shape {number} of {len(shapes)})'
        times, peaks = side_by_side(title, alike(models, batch_size), repeats, config)
        for to_dense, to_swiglu in zip(compare(times, 'dense'), compare(times, 'swiglu')):
            name = to_dense['name']
            with torch.device('meta'):
                model = GPT(models[name])
            rows.append({
                'shape': title_of(shape), 'block': name, **sizes(model), 'packed MB': packed_bytes(model) / 1e6,
                'tokens/s': batch_size * shape.block_size / to_dense['seconds'], 'spread': to_dense['spread'],
                'ratio to dense': to_dense['ratio'], 'low': to_dense['low'], 'high': to_dense['high'],
                'ratio to swiglu': to_swiglu['ratio'], 'peak GB': peaks[name]})
    report('blocks', rows, config, plot=plot_blocks)
    ffns(config)


def plot_blocks(rows, figure):
    dense = {row['shape']: row for row in rows if row['block'] == 'dense'}
    shapes = list(dense)
    others = list(dict.fromkeys(row['block'] for row in rows if row['block'] != 'dense'))
    panels = {'ratio to dense': 'training speed (and its quartiles)', 'packed MB': 'packed size',
              'peak GB': 'peak memory of training'}
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items()):
        for row in rows:
            if row['block'] == 'dense':
                continue  # the line at 1
            i = 1 + others.index(row['block'])
            x = shapes.index(row['shape']) + 0.16 * (i - (1 + len(others)) / 2)
            y = row[key] / dense[row['shape']][key]
            error = [[y - row['low']], [row['high'] - y]] if key == 'ratio to dense' else None
            label = row['block'] if row['shape'] == shapes[0] else ''  # once in the legend
            axes.bar(x, y, 0.15, yerr=error, color=f'C{i}', capsize=3, label=label)
            axes.text(x, 0.03, f'{y:.2f}', ha='center', color='white', rotation=90)
        axes.axhline(1, color='C0', label='dense')
        axes.set(title=title, xlabel='layers x width, parameters of dense', ylabel='relative to dense',
                 xticks=range(len(dense)),
                 xticklabels=[f'{shape}\n{row["parameters"] / 1e6:.3g}M' for shape, row in dense.items()])
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=1 + len(others))


def ffns(config):
    """
    Forward and backward of an FFN alone, on batches that fill a card: a dense FFN (GELU, width 4C) beside a TriX FFN
    with 8 tiles of width C, 2 of them used, in the execution that it chooses and in another one. Compiled on a GPU,
    eager on a CPU.
    """
    device, dtype, description = hardware.resolve(config.device, config.dtype)
    rows = []
    for C, N in FFN_SHAPES.get(device.type, FFN_SHAPES['cpu']):
        torch.manual_seed(0)
        x = torch.randn(1, N, C, device=device).requires_grad_()
        grad = torch.randn(1, N, C, device=device)
        other = 'grouped' if device.type == 'cuda' and dtype == torch.bfloat16 else 'dense'
        with autocast(device, dtype):
            chosen = lone_ffn('trix', C, device).fastest(x.flatten(0, 1))
        candidates = {'dense': lone_ffn('gelu', C, device)}
        for execution in dict.fromkeys((other, chosen)):
            candidates[f'trix, {execution}'] = trix = lone_ffn('trix', C, device)
            trix.execution = execution

        def step(module, parameters):
            with autocast(device, dtype):
                y = module(x)
            torch.autograd.grad(y, (x, *parameters), grad.to(y.dtype))

        def measure(ffn):
            module = compiler.compiled(ffn) if device.type == 'cuda' else ffn
            return partial(timed, partial(step, module, list(ffn.parameters())), device)
        title = f'an FFN of width {C} on {N:,} tokens'
        print(f'{title} on {description}')
        times = interleaved({name: measure(ffn) for name, ffn in candidates.items()},
                            2 if config.quick else config.repeats, title=title)
        for row in compare(times, 'dense'):
            rows.append({'width': C, 'tokens': N, 'FFN': row['name'], 'ms': 1000 * row['seconds'],
                         'spread': row['spread'], 'ratio to dense': row['ratio'], 'low': row['low'],
                         'high': row['high']})
    report('blocks', rows, config, name='blocks_ffn')


def lone_ffn(ffn, C, device):
    """An initialised FFN of width C without its model. TriX has 8 tiles of width C, and a token uses 2."""
    shape = GPTConfig(n_embd=C, n_head=1, n_layer=1, vocab_size=64, ffn=ffn, trix_tiles=8, trix_top_k=2)
    return GPT(shape).blocks[0].ffn.to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Attention against resonance

def context(config):
    """
    Attention and resonance over CONTEXTS: training steps of 8192 tokens (one sequence where the context is longer), and
    decoding steps of one sequence whose cache is nearly full. `ratio`: the speed of resonance over that of attention
    within a repeat. `spread`: the quartiles of the ratio over its median. `peak GB`: as in `blocks`.

    Then the parts of a resonance layer: one mixer, and its convolution by FFTs and by matrix products in chunks of
    several lengths. On a GPU also training steps of config/resonance_32k.py against its attention twin.
    """
    rows = []
    contexts = [T for T in CONTEXTS if T <= 4096 or not config.quick]
    for number, T in enumerate(contexts, 1):
        batch_size = max(1, 8192 // T)
        repeats = min(2 if config.quick else max(1, config.repeats // 3), max(1, 3 * 8192 // T))
        models = {mixer: replace(CONTEXT_SHAPE, block_size=T, mixer=mixer) for mixer in ('attention', 'resonance')}
        title = f'context {T:,} ({number} of {len(contexts)})'
        times, decode_times, peaks = side_by_side(title, alike(models, batch_size), repeats, config,
                                                  ('train', 'decode'))
        attention, resonance = compare(times, 'attention')
        rows.append({
            'context': T,
            'attention tokens/s': batch_size * T / attention['seconds'],
            'resonance tokens/s': batch_size * T / resonance['seconds'],
            'ratio': resonance['ratio'], 'spread': (resonance['high'] - resonance['low']) / resonance['ratio'],
            **{f'{mixer} peak GB': peaks[mixer] for mixer in models},
            **{f'{mixer} ms/token': 1000 * statistics.median(decode_times[mixer]) for mixer in models}})
    report('context', rows, config, plot=plot_context)
    last = [row for row in rows if row['context'] <= 8192][-1]
    print(f'crossover: {crossover(rows) or "none"}; '
          f'at {last["context"]:,} tokens resonance has {last["ratio"]:.3g} times the speed of attention')
    mixers(config)
    if not is_cpu(config):  # on a CPU, the table above has to do
        attention_twin(config)


def mixers(config):
    """Forward and backward of one sequence: mixers of a shape in MIXER_SHAPES, and the convolution of resonance."""
    device, dtype, description = hardware.resolve(config.device, config.dtype)
    shape = MIXER_SHAPES.get(device.type, MIXER_SHAPES['cpu'])
    torch.manual_seed(0)
    x = torch.randn(1, shape.block_size, shape.n_embd, device=device, requires_grad=True)
    weight = torch.randn_like(x)
    attention, layer = Attention(shape).to(device), Resonance(shape).to(device)
    layer.init_weights()
    torch.nn.init.normal_(layer.out_proj.weight, std=0.02)
    layer_input = [x, *layer.parameters()]
    filters = [p.detach().requires_grad_() for p in (layer.nu, layer.theta, *layer.amplitudes())]

    def mixer(module, inputs):
        with autocast(device, dtype):
            y = module(x)
        torch.autograd.grad((y * weight).sum(), inputs)

    def convolution(function, **options):
        torch.autograd.grad((function(x, *filters, **options) * weight).sum(), [x, *filters])
    steps = {'resonance': partial(mixer, layer, layer_input),
             'attention': partial(mixer, attention, [x, *attention.parameters()])}
    use_compile, _ = compiler.choose('auto', device)
    if use_compile:
        steps['resonance, compiled'] = partial(mixer, torch.compile(layer, fullgraph=True), layer_input)
    for S in FFT_CHUNKS:
        steps[f'convolution, FFT, chunks of {S}'] = partial(convolution, fft_convolution, S=min(S, shape.block_size))
    low = dtype if dtype in PRODUCT_TOLERANCE else torch.float32
    for S in PRODUCT_CHUNKS:
        options = {'S': S, 'dtype': low}
        steps[f'convolution, products, chunks of {S}'] = partial(convolution, product_convolution, **options)
        if use_compile:
            compiled = torch.compile(product_convolution, fullgraph=True, dynamic=False)
            steps[f'convolution, products, chunks of {S}, compiled'] = partial(convolution, compiled, **options)
    print(f'\na mixer of {shape.block_size:,} tokens, width {shape.n_embd}, {shape.num_frequencies} modes '
          f'on {description}')
    repeats = 2 if config.quick else config.repeats
    times = interleaved({name: partial(timed, step, device) for name, step in steps.items()}, repeats, title='mixers')
    rows = [{'part': row['name'], 'ms': 1000 * row['seconds'], 'spread': row['spread'], 'ratio': row['ratio']}
            for row in compare(times, 'resonance')]
    report('context', rows, config, name='mixers')


def attention_twin(config):
    """Training steps of config/resonance_32k.py, and of the same model with attention."""
    options = settings.load([str(ROOT / 'config' / 'resonance_32k.py')])
    shape = options.pick(GPTConfig)
    models = {mixer: Candidate(replace(shape, mixer=mixer), options.batch_size, options=options)
              for mixer in ('attention', 'resonance')}
    repeats = 2 if config.quick else max(2, config.repeats // 3)
    times, peaks = side_by_side('resonance_32k', models, repeats, config)
    rows = [{'mixer': row['name'], 'tokens/s': options.batch_size * shape.block_size / row['seconds'],
             'ratio to attention': row['ratio'], 'low': row['low'], 'high': row['high'],
             'peak GB': peaks[row['name']]} for row in compare(times, 'attention')]
    report('context', rows, config, name='resonance_32k')


def crossover(rows):
    """The smallest context from which on resonance is never slower. None if it is slower at the largest."""
    contexts = [row['context'] for i, row in enumerate(rows) if all(later['ratio'] >= 1 for later in rows[i:])]
    return contexts[0] if contexts else None


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


# ----------------------------------------------------------------------------------------------------------------------
# Precisions and torch.compile

def amp(config):
    """
    Training steps of the dense model in each precision that the device supports. A CPU gets the smallest shape only, in
    fp32 and bf16, because most CPUs multiply bf16 many times slower. `peak GB`: as in `blocks`.
    """
    dtypes = [dtype for dtype in ('float32', 'tf32', 'bfloat16', 'float16') if supports(config.device, dtype)]
    repeats = 2 if config.quick else max(2, config.repeats // 3)
    rows = []
    for shape, batch_size, _ in SHAPES[:1] if is_cpu(config) else SHAPES:
        if is_cpu(config):
            batch_size = 2
        candidates = {dtype: Candidate(shape, batch_size, dtype) for dtype in dtypes}
        times, peaks = side_by_side(title_of(shape), candidates, repeats, config)
        for row in compare(times, 'float32'):
            rows.append({
                'shape': title_of(shape), 'precision': row['name'],
                'tokens/s': batch_size * shape.block_size / row['seconds'], 'ratio to float32': row['ratio'],
                'low': row['low'], 'high': row['high'], 'peak GB': peaks[row['name']]})
    report('amp', rows, config)


def supports(device, dtype):
    try:
        hardware.resolve(device, dtype)
        return True
    except UserError:
        return False


def compilation(config):
    """
    Training steps, eager and compiled, of each kind of block at the size of trix_tiny and at 6 x 256. `repaid after`:
    tokens of a run after which compiling has saved as much time as it took, or never.
    """
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = tempfile.mkdtemp()  # so that nothing is compiled already
    batch_size = 16
    repeats = 2 if config.quick else config.repeats
    rows = []
    for width, layers in ((128, 3),) if config.quick else ((128, 3), (256, 6)):
        shape = GPTConfig(n_embd=width, n_layer=layers, n_head=4, vocab_size=8192)
        tokens = batch_size * shape.block_size
        for block in ('dense', 'trix', 'bitnet', 'resonance'):
            candidates = {name: Candidate(variants(shape)[block], batch_size, compile=compile)
                          for name, compile in (('eager', 'false'), ('compiled', 'true'))}
            first, times, _ = side_by_side(f'{title_of(shape)}, {block}', candidates, repeats, config,
                                           ('first', 'train'))
            eager, compiled = compare(times, 'eager')
            compile_seconds = first['compiled'][0] - compiled['seconds']
            saved_per_token = (eager['seconds'] - compiled['seconds']) / tokens
            repaid = f'{compile_seconds / saved_per_token / 1e6:.1f}M tokens' if saved_per_token > 0 else 'never'
            rows.append({
                'shape': title_of(shape), 'block': block, 'eager tokens/s': tokens / eager['seconds'],
                'compiled tokens/s': tokens / compiled['seconds'], 'ratio': compiled['ratio'], 'low': compiled['low'],
                'high': compiled['high'], 'seconds to compile': compile_seconds, 'repaid after': repaid})
    report('compile', rows, config)


# ----------------------------------------------------------------------------------------------------------------------
# The loss

def head(config):
    """
    Forward and backward of the loss, for a shape in HEAD_SHAPES. On a GPU in bf16, and without the candidates that hold
    all logits.
    """
    device, dtype, description = hardware.resolve(config.device, 'float32')
    if device.type == 'cuda':
        device, dtype, description = hardware.resolve(config.device, 'bfloat16')
    N, C, V = HEAD_SHAPES.get(device.type, HEAD_SHAPES['cpu'])
    torch.manual_seed(0)
    x = torch.randn(N, C, device=device, dtype=dtype).requires_grad_()
    w = (0.02 * torch.randn(V, C, device=device)).requires_grad_()
    y = torch.randint(V, (N,), device=device)

    def ours(fused):
        (FUSED_DEVICES.add if fused else FUSED_DEVICES.discard)(device.type)
        with autocast(device, dtype):
            return chunked_cross_entropy(x, w, y)

    losses = {'chunked (ours)': partial(ours, False)}
    ours(True)  # compiles
    if device.type in FUSED_DEVICES:
        losses['chunked, compiled (ours)'] = partial(ours, True)
    if device.type != 'cuda':
        losses['plain'] = lambda: F.cross_entropy(x @ w.T, y)
        # Older versions of torch have no linear_cross_entropy.
        if hasattr(F, 'linear_cross_entropy') and hasattr(torch.nn, 'LinearCrossEntropyOptions'):
            options = torch.nn.LinearCrossEntropyOptions
            losses['torch fused'] = partial(F.linear_cross_entropy, x, w, y, options=options())
            losses['torch fused, chunks of 128'] = partial(
                F.linear_cross_entropy, x, w, y, options=options(batch_chunk_size=128, chunking_method=None))
    print(f'the loss of {N} tokens, width {C}, vocabulary {V} on {description}')

    def gradients(loss):
        torch.autograd.grad(loss(), (x, w))

    times = interleaved({name: partial(timed, partial(gradients, loss), device) for name, loss in losses.items()},
                        config.repeats)
    rows = compare(times, 'chunked (ours)')
    if device.type == 'cuda':
        for row in rows:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            gradients(losses[row['name']])
            row['peak GB'] = (torch.cuda.max_memory_allocated(device) - before) / 1e9  # without the inputs
    report('head', rows, config)
