"""What needs an NVIDIA GPU: `python -m pytest -m gpu`, at most five minutes. Without a GPU it skips.

Each test starts a process that uses the GPU: either a command of this project, or one of the jobs at the end of this file
(`python tests/test_gpu.py JOB ARGUMENTS`, which is also how to run one by hand). The tests themselves never touch CUDA.
"""
import fcntl
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEVICE = 'cuda'
FAMILIES = {  # two layers of each kind of model; widths are multiples of 16, as tensor cores and F.grouped_mm want them
    'gelu': dict(ffn='gelu', qk_norm=True, embed_taps=4, embed_norm=True),
    'gpt2': dict(ffn='gelu', norm='layernorm', positions='learned', bias=True, dropout=0.1),
    'llama': dict(ffn='swiglu', n_kv_head=2, tie_embeddings=False),
    'trix': dict(ffn='trix', qk_norm=True, embed_taps=4, embed_norm=True),
    'trix_int8': dict(ffn='trix', trix_shared=True, act_bits=8, trix_top_k=1),
    'bitnet': dict(ffn='swiglu', linear='bitnet', n_kv_head=2),
    'resonance': dict(mixer='resonance', ffn='swiglu', num_frequencies=16, chunk_size=32),
    'hybrid': dict(mixer='resonance', attention_every=2, ffn='trix', num_frequencies=16, chunk_size=64),
}
PRECISIONS = ('bfloat16', 'float16', 'tf32', 'float32')
MODEL = ['--n_layer=2', '--n_embd=64', '--n_head=4', '--vocab_size=300', '--block_size=128', '--batch_size=16', '--batch_tokens=4096']
RUN = [*MODEL, f'--device={DEVICE}', '--learning_rate=3e-3', '--max_steps=20', '--warmup_steps=2', '--log_interval=1', '--eval_interval=0',
       '--sample_interval=0', '--save_interval=5', '--sample_tokens=8', '--eval_tokens=1024']


def words(keys):
    return [f'--{key}={value}' for key, value in keys.items()]


def environment():
    from conftest import VISIBLE
    shown = {} if VISIBLE is None else {'CUDA_VISIBLE_DEVICES': VISIBLE}
    return {**{key: value for key, value in os.environ.items() if key != 'CUDA_VISIBLE_DEVICES'}, **shown}


def python(*arguments, codes=(0,), **options):
    """Run Python in the root of the project -> (exit code, all that it prints)."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=280, **options)
    assert done.returncode in codes, done.stdout[-4000:]
    return done.returncode, done.stdout


def job(name, *arguments):
    return json.loads(python('tests/test_gpu.py', name, *arguments)[1].splitlines()[-1])


@functools.cache
def gpu_is_there():
    return DEVICE == 'cpu' or python('-c', 'import torch; print(torch.cuda.is_available())')[1].split()[-1] == 'True'


@pytest.fixture(autouse=True)
def device(request):
    """The GPU, shared by the tests of several workers, but for the one that fills its memory."""
    if not gpu_is_there():
        pytest.skip('no NVIDIA GPU is here')
    with open(Path(tempfile.gettempdir()) / 'nanotrix-gpu-tests.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if request.node.get_closest_marker('alone') else fcntl.LOCK_SH)
        yield


pytestmark = pytest.mark.gpu
each_family = pytest.mark.parametrize('family', FAMILIES)


# ---- the same function everywhere

@each_family
def test_the_gpu_computes_the_loss_and_gradients_of_the_cpu(family):
    found = job('beside_the_cpu', family)
    assert found['loss'] < 1e-4 and found['gradient'] < 1e-3


@pytest.mark.parametrize('precision', ['bfloat16', 'float16', 'float32'])
def test_the_fused_loss_is_the_eager_loss(precision):
    found = job('fused_loss', precision)
    assert max(found.values()) < (1e-4 if precision == 'float32' else 0.02), found


@each_family
@pytest.mark.parametrize('precision', PRECISIONS)
def test_compiled_and_eager_agree(family, precision):
    if precision != 'bfloat16' and family not in ('gelu', 'trix', 'bitnet'):
        pytest.skip('compiled in bfloat16 alone')
    found = job('compiled_and_eager', family, precision)
    assert not found['problem'] and re.search('compared with eager execution', found['note']), found


@pytest.mark.parametrize('family', ['trix', 'hybrid', 'bitnet'])
def test_compiled_and_eager_agree_with_activation_checkpointing(family):
    found = job('compiled_and_eager', family, 'bfloat16', 'checkpointing')
    assert not found['problem'], found


@pytest.mark.parametrize('family', ['trix', 'trix_int8'])
def test_the_executions_of_tiles_agree(family):
    found = job('executions', family)
    assert max(found.values()) < (0.15 if 'int8' in family else 0.03), found  # rounding tips int8 codes over


# ---- runs

@each_family
@pytest.mark.parametrize('how', [['--compile=true'], ['--compile=false']], ids=['compiled', 'eager'])
def test_a_run_learns(corpus, tmp_path, family, how):
    _, said = python('train.py', *RUN, *words(FAMILIES[family]), *how, f'--dataset={corpus}', f'--out_dir={tmp_path}/run')
    assert ('compiled in' in said) == (how == ['--compile=true']), said
    lines = train_lines(tmp_path / 'run')
    assert lines[-1]['loss'] < lines[0]['loss'] - 0.3 and all(0 < line['grad_norm'] < 100 for line in lines)


@pytest.mark.parametrize('precision', PRECISIONS)
def test_a_run_learns_in_every_precision(corpus, tmp_path, precision):
    python('train.py', *RUN, *words(FAMILIES['trix']), '--compile=false', f'--dtype={precision}', '--optimizer=muon', f'--dataset={corpus}',
           f'--out_dir={tmp_path}/run')
    lines = train_lines(tmp_path / 'run')
    assert lines[-1]['loss'] < lines[0]['loss'] - 0.3 and all(0 < line['grad_norm'] < 100 for line in lines[2:])


@pytest.mark.parametrize('how', ['true', 'false'])
def test_a_run_resumes_exactly_after_a_kill(corpus, tmp_path, how):
    command = ['train.py', *RUN, *words(FAMILIES['trix']), '--dropout=0.1', f'--compile={how}', f'--dataset={corpus}']
    process = subprocess.Popen([sys.executable, *command, f'--out_dir={tmp_path}/run'], cwd=ROOT, env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / 'run/checkpoints/step_0000010.pt').exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    python(*command, f'--out_dir={tmp_path}/run', '--resume=auto')
    python(*command, f'--out_dir={tmp_path}/whole')
    a, b = ([(line['step'], line['loss'], line['grad_norm']) for line in train_lines(tmp_path / run)] for run in ('run', 'whole'))
    assert a == b and len(a) == 20


def test_one_process_under_torchrun(corpus, tmp_path):
    _, said = python('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1', 'train.py', *RUN, *words(FAMILIES['trix']),
                     f'--dataset={corpus}', f'--out_dir={tmp_path}/run')
    assert train_lines(tmp_path / 'run')[-1]['step'] == 20, said


def test_evaluation_samples_and_profile(corpus, tmp_path):
    python('train.py', *RUN, *words(FAMILIES['trix']), '--compile=false', '--profile', '--eval_interval=10', '--sample_interval=20',
           f'--dataset={corpus}', f'--out_dir={tmp_path}/run')
    table = (tmp_path / 'run/profile/table.txt').read_text()
    assert 'GPU time a step' in table and 'aten::' in table
    evals = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    again = json.loads(python('evaluate.py', tmp_path / 'run')[1].splitlines()[-1])
    assert again['loss'] == pytest.approx([line for line in evals if line['kind'] == 'eval'][-1]['loss'], rel=1e-6)
    _, text = python('sample.py', tmp_path / 'run', '--num=2', '--max_new_tokens=20', '--seed=3')
    assert text == python('sample.py', tmp_path / 'run', '--num=2', '--max_new_tokens=20', '--seed=3')[1]


def test_the_plan_is_near_what_a_run_takes(corpus, tmp_path):
    common = ['train.py', *RUN, *words(FAMILIES['gelu']), '--n_embd=512', '--compile=false', f'--dataset={corpus}', f'--out_dir={tmp_path}/run']
    _, plan = python(*common, '--plan')
    planned = float(re.search(r'total +([\d.]+) ([MG])B', plan)[1]) / (1 if re.search(r'total +[\d.]+ GB', plan) else 1000)
    python(*common)
    assert planned == pytest.approx(train_lines(tmp_path / 'run')[-1]['mem_gb'], rel=0.3)


@pytest.mark.alone
def test_out_of_memory_is_one_line_that_says_what_to_change(corpus, tmp_path):
    code, said = python('train.py', *RUN, *words(FAMILIES['llama']), '--n_embd=4096', '--n_layer=24', '--batch_size=4096', '--batch_tokens=524288',
                        '--compile=false', f'--dataset={corpus}', f'--out_dir={tmp_path}/run', codes=(2,))
    assert 'Traceback' not in said and re.search('out of memory: .*--activation_checkpointing=true .* saves', said.splitlines()[-1]), said


# ---- packed models

@pytest.mark.parametrize('compile', ['compiled', 'eager'])
@pytest.mark.parametrize('packs', ['packed', 'trained'])
@pytest.mark.parametrize('name', ['bitnet', 'trix', 'trix, int8, shared', 'trix, cut', 'resonance', 'hybrid'])
def test_models_decode_by_a_cuda_graph(name, packs, compile):
    found = job('graph', name, packs, compile)
    assert found['graph'] and found['apart'] < 1e-3, found


def test_a_graph_that_cannot_be_recorded_leaves_the_stream_and_random_numbers():
    found = job('failed_recording')
    assert 'captur' in found['reason'] and found['same_stream'], found
    assert found['drawn'] == found['expected'] and found['sum'] == 2


def test_the_triton_kernel_is_the_plain_formula():
    from test_packed import TRITON
    products, _ = TRITON.split('assert packed.check_triton')  # the models behind it are on the CPU
    python('-c', products.replace('ternary_triton.product(', 'on_gpu(').replace(
        'import ternary_triton', 'import ternary_triton\n\ndef on_gpu(*inputs):\n    return ternary_triton.product(*('
        'x if x is None else x.cuda() for x in inputs)).cpu()\n'), input='')


def train_lines(run):
    return [line for line in map(json.loads, (run / 'metrics.jsonl').read_text().splitlines()) if line['kind'] == 'train']


# ----------------------------------------------------------------------------------------------------------------------
# Jobs, each in a process of its own: they print one JSON object

def a_model(family, **changes):
    import torch

    import train
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(train.load([*MODEL, *words({**FAMILIES[family], **changes})]).pick(GPTConfig))
    idx = torch.randint(300, (16, 129), generator=torch.Generator().manual_seed(1))
    return model, idx


def beside_the_cpu(family):
    import torch

    from runtime import device as hardware
    hardware.resolve(DEVICE, 'float32')
    model, idx = a_model(family, dropout=0.0)
    found = {}
    for device in ('cpu', DEVICE):
        model.to(device)
        loss = model(idx[:, :-1].to(device), idx[:, 1:].to(device))
        loss.backward()
        found[device] = loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    (a, g), (b, h) = found['cpu'], found[DEVICE]
    return {'loss': abs(a - b) / a, 'gradient': ((g - h).norm() / g.norm()).item()}


def compiled_and_eager(family, precision, checkpointing=''):
    import contextlib

    import torch

    from runtime import compile_check, compiler
    from runtime import device as hardware
    from kernels import autocast
    device, dtype, _ = hardware.resolve(DEVICE, precision)
    model, idx = a_model(family)
    model.to(device).activation_checkpointing = bool(checkpointing)
    idx, scale = idx.to(device), 1024 if dtype == torch.float16 else 1

    def compute(module):
        torch.manual_seed(5)
        with autocast(device, dtype):
            return scale * module(idx[:, :-1], idx[:, 1:])
    problem, note = compile_check.check(model, compiler.compiled(model), compute, device, dtype, contextlib.nullcontext(),
                                        lambda *numbers: numbers, lambda error: False)
    return {'problem': problem, 'note': note}


def fused_loss(precision):
    import torch

    import kernels
    low, worst = getattr(torch, precision), {'loss': 0, 'x': 0, 'weight': 0}
    for V, cap, share in ((5003, 0.0, 0.0), (5056, 5.0, 0.0), (5003, 5.0, 0.4)):
        torch.manual_seed(0)
        x, w = torch.randn(9000, 64), torch.randn(V, 64) / 8  # two chunks
        teacher = (torch.randn(9000, 32), torch.randn(V, 32) / 8, 3.0, share) if share else (None, None, 0.0, 0.0)
        targets = torch.randint(-1, V, (9000,))
        arguments = [t.to(DEVICE) if torch.is_tensor(t) else t for t in (x, w, targets, cap, *teacher, low, True)]
        kernels.FUSED_DEVICES = {torch.device(DEVICE).type}
        ours, expected = kernels.loss_and_gradients(*arguments), kernels.eager_loss(*arguments)
        assert kernels.FUSED_DEVICES, 'no compilation'
        for name, a, b in zip(worst, ours, expected):
            worst[name] = max(worst[name], ((a - b).norm() / b.norm()).item())
    return worst


def executions(family):
    import torch

    from runtime import device as hardware
    from kernels import autocast
    device, dtype, _ = hardware.resolve(DEVICE, 'bfloat16')
    model, idx = a_model(family)
    model, idx, found = model.to(device), idx.to(device), {}
    names = ['loop', 'dense', 'grouped']
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0):
        names.append('triton')
        with autocast(device, dtype):
            assert (model.blocks[0].ffn.fastest(torch.randn(9, 64, device=device)) == 'triton') == (family == 'trix')
    for execution in names:
        for trix in model.trix_layers():
            trix.execution = execution
        with autocast(device, dtype):
            model(idx[:, :-1], idx[:, 1:]).backward()
        found[execution] = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    return {how: ((g - found['loop']).norm() / found['loop'].norm()).item() for how, g in found.items()}


def graph(name, packs, compile):
    import torch

    from deploy import packed
    from runtime.generation import decoder_for
    from test_packed import VARIANTS, ids, opened, trained
    if packs == 'packed':
        config, state, where, _ = opened(trained(**VARIANTS[name]))
        model = packed.build(config, state, where, torch.device(DEVICE))
    else:
        model = trained(**VARIANTS[name]).to(DEVICE)
    whole, idx = trained(**VARIANTS[name])(ids(rows=1)), ids(rows=1).to(DEVICE)
    decoder, apart = decoder_for(model, compile=compile == 'compiled'), 0
    for first in (5, 9):  # two texts
        decoder.start(1)
        parts = torch.stack([decoder(part) for part in idx.split([first, *[1] * (20 - first)], 1)], 1)
        apart = max(apart, (parts.cpu() - whole[:, first - 1:]).abs().max().item())
    return {'graph': decoder.current.step != decoder.current.plain, 'apart': apart}


def failed_recording():
    import torch

    from runtime import decoding
    torch.manual_seed(0)
    expected = torch.rand(2, device=DEVICE).tolist()
    x, stream, reason = torch.ones(2, device=DEVICE), torch.cuda.current_stream(), ''
    torch.manual_seed(0)
    try:
        decoding.record(lambda: x.sum().item())
    except RuntimeError as error:
        reason = str(error)
    drawn = torch.rand(2, device=DEVICE).tolist()
    return {'reason': reason, 'same_stream': torch.cuda.current_stream() == stream, 'drawn': drawn, 'expected': expected,
            'sum': x.sum().item()}


if __name__ == '__main__':
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
