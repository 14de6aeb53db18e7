"""
How fast and how large models are once they are deployed: the commands `convert` and `peers --llama_cpp` of bench.py.
"""
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from runtime import device as hardware
from deploy import convert as conversion
from deploy import gguf, packed
import settings
from deploy.packed import load_model
from configurator import UserError
from data import TokenData
from benchmarks.measure import ROOT, compare, interleaved, report
from model import GPT, GPTConfig
from benchmarks.quality import TWIN, trained
from tokenizer import load_tokenizer, token_bytes, train_bpe
from training import validate

PROMPT, NEW = 128, 32  # tokens that are read at once, and that follow one by one


# ----------------------------------------------------------------------------------------------------------------------
# In the process of a candidate

def opened(kind, path, threads):
    """Make read.once of this process: it reads PROMPT tokens, adds NEW one by one -> (seconds of the first, seconds of one of the others)."""
    torch.set_num_threads(threads)
    ids = torch.randint(256, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    if kind == 'llama.cpp':
        llama = gguf.Llama(path, 2 * (PROMPT + NEW), threads)

        def once():
            times = llama.complete(ids[0].tolist(), NEW + 1, ignore_eos=True)['timings']
            return PROMPT / times['prompt_per_second'], 1 / times['predicted_per_second']
    else:
        model = made(path).eval().requires_grad_(False) if kind == 'fp32' else load_model(path, torch.device('cpu'))[0]

        def once():
            return decoded(model, ids)
    read.once = once


@torch.no_grad()
def decoded(model, ids, new=NEW):
    """(seconds to read ids, seconds of one of `new` tokens after them)"""
    cache, start = model.new_cache(1), time.perf_counter()
    logits = model(ids, cache=cache, last=True)
    middle = time.perf_counter()
    for _ in range(new):
        logits = model(logits[:, -1:].argmax(-1), cache=cache, last=True)
    return middle - start, (time.perf_counter() - middle) / new


def read():
    time.sleep(0.02)  # the threads of the process that was at work before spin for a few ms
    return read.once()


def peak():
    return hardware.peak_memory_gb(torch.device('cpu'))


# ----------------------------------------------------------------------------------------------------------------------
# llama.cpp beside ours

def shapes():
    """{name: GPTConfig}: the 95M BitNet, and TriX in place of its FFN with as many hidden units for a token, or as many weights."""
    bitnet = settings.load([str(ROOT / 'config' / 'bitnet_95m.py')]).pick(GPTConfig)
    trix = replace(bitnet, ffn='trix', trix_tiles=8, trix_top_k=2, act_bits=8)
    return {'BitNet': bitnet, 'TriX, as wide': replace(trix, trix_hidden=bitnet.d_ff // 2),
            'TriX, as many weights': replace(trix, trix_hidden=3 * bitnet.d_ff // 4)}


def made(shape):
    torch.manual_seed(0)
    return GPT(shape)


def write(folder, name, shape):
    """Files of a model with randomly initialised weights, in a process that gives its memory back. -> their paths"""
    model, paths = made(shape).eval(), [folder / f'{name}.safetensors']
    packed.write(paths[0], packed.pack(model, 'int8'), 'int8', {'config': asdict(shape), 'tokenizer': None, 'step': 0, 'data': {}})
    if name == 'BitNet':
        tokenizer = train_bpe([(ROOT / 'README.md').read_text()], 512)
        for matrices, embeddings in (('TQ2_0', 'Q8_0'), ('F16', 'F16')):
            paths.append(folder / f'{matrices}.gguf')
            gguf.write(paths[-1], model, tokenizer, matrices, embeddings)
    return paths


def llama_cpp(config):
    """
    Decoding on the CPU of one sequence with the shape of config/bitnet_95m.py: a prompt of 128 tokens at once, then 32 one by one,
    each candidate in a process of its own, in turn. All have the same randomly initialised weights. Embeddings are int8 where it
    says packed or TQ2_0. TriX: 8 tiles of which a token uses 2, with as many hidden units for a token as BitNet's FFN has, or with as
    many weights. `peak GB`: of the whole process, Python and torch included.
    """
    if missing := [name for name in ('gguf', 'xllamacpp') if not find_spec(name)]:
        raise UserError(f'--llama_cpp needs {" and ".join(missing)}: pip install -r requirements-dev.txt')
    server, threads = multiprocessing.get_context('forkserver'), torch.get_num_threads()
    server.set_forkserver_preload(['benchmarks.deployed'])  # imported once for all
    with tempfile.TemporaryDirectory() as folder:
        candidates, reference = {}, 'llama.cpp TQ2_0'
        for name, shape in shapes().items():
            with ProcessPoolExecutor(1, server) as pool:
                own, *others = pool.submit(write, Path(folder), name, shape).result()
            candidates |= {'BitNet fp32': ('fp32', shape)} if others else {}
            candidates |= {f'{name} packed': ('packed', own), **{f'llama.cpp {path.stem}': ('llama.cpp', path) for path in others}}
        pools = {name: ProcessPoolExecutor(1, server, opened, (*which, threads)) for name, which in candidates.items()}
        try:
            times = interleaved({name: lambda pool=pool: pool.submit(read).result() for name, pool in pools.items()}, config.repeats)
            peaks = {name: pool.submit(peak).result() for name, pool in pools.items()}
        finally:
            for pool in pools.values():
                pool.shutdown(cancel_futures=True)
        megabytes = {name: '' if kind == 'fp32' else path.stat().st_size / 1e6 for name, (kind, path) in candidates.items()}
    first, one = ({name: [pair[i] for pair in pairs] for name, pairs in times.items()} for i in (0, 1))
    rows = [{'model': b['name'], 'file MB': megabytes[b['name']], 'prompt tokens/s': PROMPT / a['seconds'], 'to llama.cpp TQ2_0': a['ratio'],
             'tokens/s': 1 / b['seconds'], 'low': b['low'], 'ratio': b['ratio'], 'high': b['high'], 'peak GB': peaks[b['name']]}
            for a, b in zip(compare(first, reference), compare(one, reference))]
    report('peers', rows, config, ' --llama_cpp', name='peers_llama_cpp',
           to_fp32={row['name']: row['ratio'] for row in compare(one, 'BitNet fp32')},
           to_bitnet={row['name']: [row['low'], row['ratio'], row['high']] for row in compare(one, 'BitNet packed')})


# ----------------------------------------------------------------------------------------------------------------------
# A dense model as a ternary one

def convert(config):
    """
    config/dense_tiny.py trained, converted by export.py convert (8 tiles of which a token uses 6; FFNs or every matrix ternary), and trained
    on for a tenth of its steps with the dense model as the teacher. `loss`: nats a token on all of the validation split. `MB`: weights
    in fp32, with ternary ones in 2 bits and a scale. `tokens/s`: one sequence, one token at a time, in turn, from the packed model
    where it is ternary.
    """
    dense = 'runs/quality/tiny/dense_tiny_1337'
    trained([str(ROOT / 'config' / TWIN), '--seed=1337', f'--out_dir={dense}', '--resume=auto', f'--device={config.device}',
             f'--dtype={config.dtype}'])
    device = torch.device('cpu')
    model, state = load_model(dense, device)
    data = TokenData(state['data']['path'], model.config.block_size, model.config.vocab_size)
    lengths, found = token_bytes(load_tokenizer(data.tokenizer)), {'dense': model}
    for to in ('trix', 'bitnet_ffn', 'bitnet'):
        out = Path('runs/convert', to)
        if not out.exists():
            conversion.convert(dense, model, state, out, to)
        trained([str(out / 'recover.py'), '--resume=auto', f'--device={config.device}', f'--dtype={config.dtype}'])
        found |= {f'{to}: {name}': stage for name, stage in conversion.stages_of(model, to).items()}
        found[f'{to}: recovered'] = load_model(out / 'recovered', device)[0]
    rows, runners = [], {}
    for name, other in found.items():
        ternary = conversion.is_ternary(other)
        loss = validate(other, data, lengths, data.val_windows(), 16, device, torch.float32)['loss']
        tensors = packed.pack(other) if ternary else other.state_dict()
        if not ternary and other.config.tie_embeddings:
            tensors.pop('lm_head.weight')
        runners[name] = other
        if ternary:
            runners[name] = packed.build(other.config, {'packed': tensors, 'embeddings': 'float32'}, name, device)
        rows.append({'model': name, 'loss': loss, 'to dense': loss - rows[0]['loss'] if rows else 0.0,
                     'MB': sum(tensor.nbytes for tensor in tensors.values()) / 1e6})
        print(f'{name}: {loss:.4f}', flush=True)
    half = model.config.block_size // 2

    def speed(runner):
        return decoded(runner, torch.zeros(1, min(PROMPT, half), dtype=torch.int64), min(NEW, half))[1]
    times = interleaved({name: lambda runner=runner: speed(runner) for name, runner in runners.items()}, config.repeats)
    for row, one in zip(rows, compare(times, 'dense')):
        row |= {'tokens/s': 1 / one['seconds'], 'speed': one['ratio']}
    report('convert', rows, config)
