"""
Speed and size of deployed models: the commands `decode`, `convert` and `peers --llama_cpp` of bench.py.
"""
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

import settings
from benchmarks.measure import ROOT, compare, interleaved, report
from benchmarks.quality import TWIN, ensure_trained
from configurator import UserError
from corpora.vocabulary import train_bpe
from data import TokenData
from deploy import convert as conversion
from deploy import gguf, packed
from deploy.packed import load_model
from kernels import autocast
from model import GPT, GPTConfig
from runtime import device as hardware
from runtime.generation import Decoder, choose, decoder_for
from tokenizer import load_tokenizer, token_bytes
from training import validate

PROMPT, NEW = 128, 32  # tokens that are read at once, and tokens that are then generated one by one


# ----------------------------------------------------------------------------------------------------------------------
# In the process of a candidate

def start(kind, source, threads):
    """
    Prepare this process for `read`: set read.once to a function that returns (seconds to read PROMPT tokens, seconds
    for each of the NEW tokens that follow). kind and source: 'fp32' and a GPTConfig, 'packed' or 'llama.cpp' and a
    file.
    """
    torch.set_num_threads(threads)
    ids = torch.randint(256, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    if kind == 'llama.cpp':
        llama = gguf.Llama(source, 2 * (PROMPT + NEW), threads)

        def once():
            times = llama.complete(ids[0].tolist(), NEW + 1, ignore_eos=True)['timings']
            return PROMPT / times['prompt_per_second'], 1 / times['predicted_per_second']
    else:
        if kind == 'fp32':
            model = new_model(source).eval().requires_grad_(False)
        else:
            model, _ = load_model(source, torch.device('cpu'))

        def once():
            return decoded(Decoder(model), ids)
    read.once = once


@torch.no_grad()
def decoded(decoder, ids, new=NEW):
    """(seconds to read ids, seconds for each of the `new` tokens that follow)

    The tokens are greedy. As in sample.py, each one comes to the CPU before the next step."""
    decoder.start(len(ids))
    start_time = time.perf_counter()
    token = choose(decoder(ids), 0, 0, 1.0, None)
    prompt_time = time.perf_counter()
    for _ in range(new):
        token = choose(decoder(token[:, None].to(ids.device)), 0, 0, 1.0, None)
    return prompt_time - start_time, (time.perf_counter() - prompt_time) / new


def seconds_per_token(model, prompt, new=NEW):
    return decoded(Decoder(model), prompt, new)[1]


def read():
    time.sleep(0.02)  # the threads of the previous process still spin for a few ms
    return read.once()


def peak():
    return hardware.peak_memory_gb(torch.device('cpu'))


# ----------------------------------------------------------------------------------------------------------------------
# Trained and packed models on this machine

BATCHES = 1, 16
SMALL = GPTConfig(vocab_size=32_000, n_embd=256, n_layer=6, n_head=8, ffn='swiglu')  # for a CPU


def decode(config):
    """
    A prompt of 128 tokens at once, then 32 greedy tokens one by one: trained models, and packed ones with int8
    embeddings. The shape is that of config/bitnet_95m.py on a GPU, where steps are compiled and recorded as CUDA graphs
    (the first round compiles), and SMALL elsewhere. Randomly initialised weights.
    """
    device, dtype, description = hardware.resolve(config.device, config.dtype)
    print(f'decoding on {description}', flush=True)
    bitnet = shapes()['BitNet'] if device.type == 'cuda' else replace(SMALL, linear='bitnet')
    trix = replace(bitnet, ffn='trix', trix_tiles=8, trix_top_k=2, act_bits=8)
    decoders = {}
    for name, shape in {'dense': replace(bitnet, linear='dense'), 'BitNet': bitnet, 'TriX': trix}.items():
        model = new_model(shape).to(device).eval().requires_grad_(False)
        decoders[name] = decoder_for(model, compile=device.type == 'cuda')
        if name != 'dense':
            content = {'packed': packed.pack(model, 'int8'), 'embeddings': 'int8'}
            other = packed.build(shape, content, name, device)
            decoders[f'{name} packed'] = decoder_for(other, compile=device.type == 'cuda')
    rows = []
    for batch_size in BATCHES:
        ids = torch.randint(256, (batch_size, PROMPT), device=device)
        times = {name: [] for name in decoders}

        def once(name):
            with autocast(device, dtype):
                times[name].append(decoded(decoders[name], ids))
            return times[name][-1][1]
        repeats = 2 if config.quick else config.repeats
        title = f'batch of {batch_size}'
        token_times = interleaved({name: partial(once, name) for name in decoders}, repeats, warmup=1, title=title)
        prompt_times = {name: [prompt for prompt, _ in pairs[1:]] for name, pairs in times.items()}
        for prompt, token in zip(compare(prompt_times, 'dense'), compare(token_times, 'dense')):
            rows.append({'model': token['name'], 'sequences': batch_size, 'prompt ms': 1000 * prompt['seconds'],
                         'tokens/s': batch_size / token['seconds'], 'ratio to dense': token['ratio'],
                         'low': token['low'], 'high': token['high']})
    report('decode', rows, config)


# ----------------------------------------------------------------------------------------------------------------------
# llama.cpp beside ours

def shapes():
    """
    {name: GPTConfig}: the 95M BitNet, and the same with TriX in place of its FFN: with as many hidden units for a
    token, or as many weights.
    """
    bitnet = settings.load([str(ROOT / 'config' / 'bitnet_95m.py')]).pick(GPTConfig)
    trix = replace(bitnet, ffn='trix', trix_tiles=8, trix_top_k=2, act_bits=8)
    return {'BitNet': bitnet, 'TriX, as wide': replace(trix, trix_hidden=bitnet.d_ff // 2),
            'TriX, as many weights': replace(trix, trix_hidden=3 * bitnet.d_ff // 4)}


def new_model(shape):
    torch.manual_seed(0)
    return GPT(shape)


def write(folder, name, shape):
    """
    Write a randomly initialised model as a packed file, and BitNet as GGUF files, too -> their paths. It runs in a
    process of its own, which returns its memory.
    """
    model, paths = new_model(shape).eval(), [folder / f'{name}.safetensors']
    metadata = {'config': asdict(shape), 'tokenizer': None, 'step': 0, 'data': {}}
    packed.write(paths[0], packed.pack(model, 'int8'), 'int8', metadata)
    if name == 'BitNet':
        tokenizer = train_bpe([(ROOT / 'README.md').read_text()], 512)
        for matrices, embeddings in (('TQ2_0', 'Q8_0'), ('F16', 'F16')):
            paths.append(folder / f'{matrices}.gguf')
            gguf.write(paths[-1], model, tokenizer, matrices, embeddings)
    return paths


def llama_cpp(config):
    """
    Decoding of one sequence on the CPU with the shape of config/bitnet_95m.py: a prompt of 128 tokens at once, then
    32 tokens one by one. Each candidate has a process of its own, in turn. All have the same randomly initialised
    weights. Embeddings are int8 in packed files and in TQ2_0. TriX has 8 tiles, 2 of them for a token, with as many
    hidden units for a token as BitNet's FFN, or as many weights. `peak GB`: of the whole process, Python and torch
    included.
    """
    missing = [name for name in ('gguf', 'xllamacpp') if not find_spec(name)]
    if missing:
        raise UserError(f'--llama_cpp needs {" and ".join(missing)}: pip install -r requirements-dev.txt')
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['benchmarks.deployed'])  # imported once for all
    with tempfile.TemporaryDirectory() as folder:
        candidates = {}  # {name: (kind, source)}, see `start`
        for name, shape in shapes().items():
            with ProcessPoolExecutor(1, server) as pool:
                packed_file, *gguf_files = pool.submit(write, Path(folder), name, shape).result()
            if gguf_files:
                candidates['BitNet fp32'] = 'fp32', shape
            candidates[f'{name} packed'] = 'packed', packed_file
            candidates |= {f'llama.cpp {path.stem}': ('llama.cpp', path) for path in gguf_files}
        times, peaks = decoded_in_turn(candidates, server, config.repeats)
        megabytes = {name: '' if kind == 'fp32' else source.stat().st_size / 1e6
                     for name, (kind, source) in candidates.items()}
    prompt_times = {name: [prompt for prompt, _ in pairs] for name, pairs in times.items()}
    token_times = {name: [token for _, token in pairs] for name, pairs in times.items()}
    reference = 'llama.cpp TQ2_0'
    rows = []
    for prompt, token in zip(compare(prompt_times, reference), compare(token_times, reference)):
        name = token['name']
        rows.append({
            'model': name, 'file MB': megabytes[name], 'prompt tokens/s': PROMPT / prompt['seconds'],
            'to llama.cpp TQ2_0': prompt['ratio'], 'tokens/s': 1 / token['seconds'], 'low': token['low'],
            'ratio': token['ratio'], 'high': token['high'], 'peak GB': peaks[name]})
    to_fp32 = {row['name']: row['ratio'] for row in compare(token_times, 'BitNet fp32')}
    to_bitnet = {row['name']: [row['low'], row['ratio'], row['high']] for row in compare(token_times, 'BitNet packed')}
    report('peers', rows, config, ' --llama_cpp', name='peers_llama_cpp', to_fp32=to_fp32, to_bitnet=to_bitnet)


def decoded_in_turn(candidates, server, repeats):
    """{name: (kind, source)} -> {name: (seconds of the prompt, seconds of a token) of each repeat}, {name: peak GB}"""
    threads = torch.get_num_threads()
    pools = {name: ProcessPoolExecutor(1, server, start, (kind, source, threads))
             for name, (kind, source) in candidates.items()}
    try:
        reads = {name: lambda pool=pool: pool.submit(read).result() for name, pool in pools.items()}
        times = interleaved(reads, repeats, title='decoding')
        return times, {name: pool.submit(peak).result() for name, pool in pools.items()}
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# A dense model as a ternary one

def convert(config):
    """
    config/dense_tiny.py trained, converted by export.py convert (8 tiles, 6 of them for a token; the FFNs or every
    matrix ternary), then trained for a tenth of its steps with the dense model as the teacher. `loss`: nats per token
    on the whole validation split. `MB`: the weights in fp32, ternary ones in 2 bits with a scale. `tokens/s`: one
    sequence, one token at a time, in turn, from the packed model where it is ternary.
    """
    dense = 'runs/quality/tiny/dense_tiny_1337'
    ensure_trained([str(ROOT / 'config' / TWIN), '--seed=1337', f'--out_dir={dense}', '--resume=auto',
                    f'--device={config.device}', f'--dtype={config.dtype}'])
    device = torch.device('cpu')
    model, state = load_model(dense, device)
    data = TokenData(state['data']['path'], model.config.block_size, model.config.vocab_size)
    n_bytes = token_bytes(load_tokenizer(data.tokenizer))
    rows, runners = [], {}
    for name, stage in stages(model, state, dense, device, config).items():
        ternary = conversion.is_ternary(stage)
        loss = validate(stage, data, n_bytes, data.val_windows(), 16, device, torch.float32)['loss']
        tensors = packed.pack(stage) if ternary else stage.state_dict()
        if not ternary and stage.config.tie_embeddings:
            tensors.pop('lm_head.weight')
        content = {'packed': tensors, 'embeddings': 'float32'}
        runners[name] = packed.build(stage.config, content, name, device) if ternary else stage
        rows.append({'model': name, 'loss': loss, 'to dense': loss - rows[0]['loss'] if rows else 0.0,
                     'MB': sum(tensor.nbytes for tensor in tensors.values()) / 1e6})
        print(f'{name}: {loss:.4f}', flush=True)
    half = model.config.block_size // 2
    prompt = torch.zeros(1, min(PROMPT, half), dtype=torch.int64)

    times = interleaved({name: partial(seconds_per_token, runner, prompt, min(NEW, half))
                         for name, runner in runners.items()}, config.repeats)
    for row, speed in zip(rows, compare(times, 'dense')):
        row |= {'tokens/s': 1 / speed['seconds'], 'speed': speed['ratio']}
    report('convert', rows, config)


def stages(model, state, dense, device, config):
    """{name: model} of each stage from the dense model, of the run `dense`, to the recovered ternary ones"""
    found = {'dense': model}
    for to in ('trix', 'bitnet_ffn', 'bitnet'):
        out = Path('runs/convert', to)
        if not out.exists():
            conversion.convert(dense, model, state, out, to)
        ensure_trained([str(out / 'recover.py'), '--resume=auto', f'--device={config.device}',
                        f'--dtype={config.dtype}'])
        found |= {f'{to}: {name}': stage for name, stage in conversion.stages_of(model, to).items()}
        found[f'{to}: recovered'] = load_model(out / 'recovered', device)[0]
    return found
