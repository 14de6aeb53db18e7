"""What a step is said to take is what it takes; advice is about options that help; a profile can be opened."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from runtime import plan, profiling
from runtime.device import is_out_of_memory
from model import GPT, BitLinear, GPTConfig
from settings import load as train_options
from optim import Muon
from runtime.profiling import (Profile, advice, breakdown_table, counted, memory_breakdown, operator_table, readable)

CPU, FP32, BF16 = torch.device('cpu'), torch.float32, torch.bfloat16
ROOT = Path(__file__).parent.parent
MODELS = [{}, {'positions': 'learned', 'norm': 'layernorm', 'bias': True, 'dropout': 0.1}, {'ffn': 'swiglu', 'n_kv_head': 2},
          {'ffn': 'trix'}, {'ffn': 'trix', 'trix_shared': True, 'trix_router': 'hash', 'act_bits': 8},
          {'ffn': 'bitnet', 'linear': 'bitnet'}, {'mixer': 'resonance', 'chunk_size': 16},
          {'mixer': 'resonance', 'ffn': 'resonance', 'attention_every': 2}]


def gpt(**keys):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{'block_size': 64, 'n_embd': 64, 'vocab_size': 256, 'num_frequencies': 16, **keys}))


def tokens(model, rows):
    return torch.randint(model.config.vocab_size, (rows, model.config.block_size))


class Alive(TorchDispatchMode):
    """Bytes of the storages that operators have made and that still live: now, and at most."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.sizes, self.peak = {StorageWeakRef(t.untyped_storage()) for t in known}, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = {StorageWeakRef(t.untyped_storage()): t.untyped_storage().nbytes() for t in tree_iter(out) if torch.is_tensor(t)}
        if made.keys() - self.known - self.sizes.keys():
            self.sizes |= {ref: size for ref, size in made.items() if ref not in self.known}
            self.peak = max(self.peak, self.now())
        return out

    def now(self):
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        return sum(self.sizes.values())


def really(rows, dtype=FP32, checkpointing=False, **keys):
    """-> bytes that live when a forward ends, the most during the forward, the most during forward and backward; all beside
    parameters, buffers and the gradients of the micro-step before."""
    model = gpt(**keys)
    model.activation_checkpointing, idx = checkpointing, tokens(model, rows)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    known = *model.parameters(), *model.buffers(), idx, *(p.grad for p in model.parameters())
    with model.fixed_weights(), Alive(*known) as alive:  # as a training step does it
        with torch.autocast('cpu', BF16, enabled=dtype == BF16):
            loss = model(idx, idx)
        now, peak = alive.now(), alive.peak
        loss.backward()
    return now, peak, alive.peak


def parts(rows):
    return {kind: size for kind, size, _ in rows}


# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('keys, dtype', [(keys, FP32) for keys in MODELS] + [(keys, BF16) for keys in MODELS[3:6]], ids=str)
def test_the_estimate_is_what_lives_after_a_forward(keys, dtype):
    model = gpt(**keys)
    a_row, _, copies = profiling.measured(model, CPU, dtype)
    assert profiling.kept(model, 5, CPU, dtype)[0] == 5 * a_row + copies  # linear, to the byte
    assert 5 * a_row + copies == pytest.approx(really(5, dtype, **keys)[0], rel=0.03)


def test_the_estimate_of_a_plain_model_by_hand():
    layers, heads, C, T = 3, 4, 64, 64
    mixer = C + 1 + C + 3 * C + 2 * C + heads  # norm and its divisor, its product, q k v, y in two layouts, a logsumexp a head
    ffn = C + 1 + C + 4 * C + 4 * C  # norm and its divisor, its product, both sides of gelu
    outside = C + 1 + C + 2  # the last norm, the gradient of the loss, idx in int64
    assert profiling.measured(gpt(), CPU, FP32)[0] == pytest.approx(4 * T * (layers * (mixer + ffn) + outside), rel=0.01)


@pytest.mark.parametrize('keys', [{}, {'ffn': 'trix'}], ids=str)
def test_checkpointing_is_estimated_from_the_peak_of_eight_layers(keys):
    model = gpt(n_layer=8, **keys)
    plain, checkpointed = (8 * a_row for a_row in profiling.measured(model, CPU, FP32)[:2])
    model.activation_checkpointing = True
    found = parts(memory_breakdown(model, [], 8, CPU, FP32))
    inputs = 8 * 8 * 64 * 64 * 4  # layers x rows x T x C in fp32
    assert inputs < found['activations'] == checkpointed < plain / 3
    peak = really(8, checkpointing=True, n_layer=8, **keys)[2]
    assert found['copies'] + found['activations'] + found['loss'] == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('keys', [
    {'block_size': 256, 'dropout': 0.1, 'norm': 'layernorm', 'positions': 'learned'}, {'ffn': 'swiglu', 'vocab_size': 8192},
    {'ffn': 'trix'}, {'mixer': 'resonance', 'ffn': 'swiglu', 'attention_every': 2}], ids=str)
def test_the_memory_that_a_plan_estimates_is_the_peak_of_a_step(keys, checkpointing):
    keys = {'n_layer': 6, **keys}
    options = train_options(['--batch_size=4', *(f'--{key}={value}' for key, value in vars(gpt(**keys).config).items())])
    estimated = plan.estimate(options, 'cpu', FP32)(4, checkpointing)
    found = sum(estimated[kind] for kind in ('copies', 'activations', 'workspace'))
    assert found == pytest.approx(really(4, checkpointing=checkpointing, **keys)[2], rel=0.15)


def test_checkpointing_keeps_the_inputs_and_one_block_each_once():
    keys = {'n_layer': 4, 'norm': 'layernorm'}  # which saves its input, too
    plain, checkpointed = (really(4, checkpointing=on, **keys)[0] for on in (False, True))  # the latter: without any block's own
    assert profiling.kept(gpt(**keys), 4, CPU, FP32)[1] == pytest.approx(checkpointed + (plain - checkpointed) / 4, rel=0.01)


@pytest.mark.parametrize('dtype', [FP32, BF16], ids=str)
def test_the_chunks_of_logits_are_part_of_the_peak(dtype):
    keys = {'n_layer': 1, 'n_embd': 16, 'vocab_size': 8192}
    found = parts(memory_breakdown(gpt(**keys), [], 8, CPU, dtype))
    assert found['loss'] > 0.5 * found['total']
    assert found['copies'] + found['activations'] + found['loss'] == pytest.approx(really(8, dtype, **keys)[1], rel=0.1)


# ----------------------------------------------------------------------------------------------------------------------

def test_parameters_gradients_and_optimizer_are_counted_exactly():
    model = gpt(ffn='trix')
    model.wte.weight.requires_grad_(False)
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.requires_grad]
    ids = {id(p) for p in matrices}
    optimizers = [Muon(matrices, lr=1e-3), torch.optim.AdamW([p for p in model.parameters() if id(p) not in ids])]
    before = parts(counted(model, optimizers))
    idx = tokens(model, 2)
    model(idx, idx).backward()
    for optimizer in optimizers:
        optimizer.step()
    after = parts(counted(model, optimizers))
    states = [t for o in optimizers for state in o.state_dict()['state'].values() for t in state.values() if torch.is_tensor(t)]
    assert after['parameters'] == sum(p.numel() * 4 for p in model.parameters())
    assert after['gradients'] == sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None)
    assert after['optimizer'] == sum(t.numel() * t.element_size() for t in states)
    assert after['buffers'] == sum(b.numel() * b.element_size() for b in model.buffers())
    steps = 4 * sum(t.numel() == 1 for t in states)  # AdamW counts its steps
    assert before == {**after, 'optimizer': after['optimizer'] - steps}


def test_of_what_fsdp_splits_the_local_part_counts():
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    model, kinds = gpt(vocab_size=512), ('parameters', 'gradients', 'optimizer')
    whole = parts(counted(model, [torch.optim.AdamW(model.parameters())]))
    assumed = parts(counted(model, [torch.optim.AdamW(model.parameters())], world=4, sharded=True))
    assert all(assumed[kind] == whole[kind] / 4 for kind in kinds)
    plain = profiling.measured(model, CPU, FP32)
    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=4)  # three that say nothing
    try:
        mesh = dist.init_device_mesh('cpu', (4,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        assert parts(counted(model, [optimizer])) == assumed
        assert profiling.measured(model, CPU, FP32) == plain  # weights that are whole for a moment are not activations
        found = parts(memory_breakdown(model, [optimizer], 4, CPU, FP32))
        assert all(found[kind] == assumed[kind] for kind in kinds) and parts(counted(model, [optimizer])) == assumed
        line = advice(model, [optimizer], config(parallel='fsdp'), CPU, FP32, world=4)
        assert 'not be measured: try --batch_size=8' in line and 'fsdp' not in line  # a forward would wait for the other processes
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('keys', [MODELS[1], *MODELS[3:]], ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_measuring_changes_nothing(keys, training):
    model = gpt(**keys)
    idx = tokens(model, 2)
    model(idx, idx)  # so that counters, and the tokens kept for the statistics, are not empty
    model.train(training)
    model.activation_checkpointing = True

    def state():
        layers = [(t.counts, t.idx) for t in model.trix_layers()] + [m.use for m in model.modules() if isinstance(m, BitLinear)]
        return [list(tree_iter(layers)), [t.clone() for t in (*model.buffers(), *model.parameters())], [torch.get_rng_state()]]
    before, attributes = state(), [set(vars(m)) for m in model.modules()]
    memory_breakdown(model, [], 4, CPU, FP32)
    for old, new in zip(before, state(), strict=True):
        assert all(a is b or torch.equal(a, b) for a, b in zip(old, new, strict=True))
    assert model.training == training and all(m.training == training for m in model.modules()) and model.activation_checkpointing
    assert all(p.grad is None for p in model.parameters()) and [set(vars(m)) for m in model.modules()] == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_table_adds_up_and_ends_with_the_peak():
    model = gpt()
    rows = memory_breakdown(model, [torch.optim.AdamW(model.parameters())], 4, CPU, FP32)
    assert rows[-1][1] == sum(size for _, size, _ in rows[:-1])
    lines = breakdown_table(rows, CPU).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ['parameters', 'buffers', 'gradients', 'optimizer', 'copies', 'activations', 'loss',
                                                      'total', 'peak']
    assert '100.0%' in lines[-2] and len({line.index('%') for line in lines[1:-1]}) == 1
    assert '%' not in lines[-1] and 'measured so far' in lines[-1]  # the peak is no part of the total
    assert [readable(n) for n in (1234, 999_000, 1e6, 6.14e9, 0)] == ['1.2 kB', '999.0 kB', '1.0 MB', '6.1 GB', '0.0 kB']


# ----------------------------------------------------------------------------------------------------------------------

def config(**keys):
    return SimpleNamespace(**{'batch_size': 16, 'block_size': 64, 'batch_tokens': 4096, 'activation_checkpointing': False,
                              'optimizer': 'adamw', 'parallel': 'ddp', **keys})


def test_advice_names_what_helps_and_how_much(monkeypatch):
    monkeypatch.setattr(profiling, 'has_bfloat16', lambda device: True)
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    line = advice(model, [optimizer], config(), CPU, FP32, world=2)
    assert line.startswith('out of memory: parameters ') and 'for 16 x 64 tokens: ' in line and '\n' not in line
    found = {option.split('=')[0]: option.split('saves ')[1] for option in line.split(' tokens: --')[1].split(', --')}
    assert '--batch_size=8 --batch_tokens=4096 (same results) saves' in line
    whole, half = (parts(memory_breakdown(model, [], rows, CPU, FP32)) for rows in (16, 8))
    assert found['batch_size'] == readable(whole['total'] - half['total'])
    state = sum(parts(counted(model, [optimizer]))[kind] for kind in ('parameters', 'gradients', 'optimizer'))
    assert found['parallel'] == readable(state / 2)
    model.activation_checkpointing = True
    assert found['activation_checkpointing'] == readable(whole['total'] - parts(memory_breakdown(model, [], 16, CPU, FP32))['total'])
    model.activation_checkpointing = False
    assert found['dtype'] == readable(whole['total'] - parts(memory_breakdown(model, [], 16, CPU, BF16))['total'])
    saved = [float(text.split()[0]) * {'kB': 1e3, 'MB': 1e6}[text.split()[1]] for text in found.values()]
    assert len(saved) == 4 and saved == sorted(saved, reverse=True)


def test_advice_leaves_out_what_is_in_use_or_does_not_help(monkeypatch):
    model = gpt()
    line = advice(model, [], config(activation_checkpointing=True), CPU, FP32)
    assert '--batch_size=8' in line and not any(word in line for word in ('checkpointing', 'dtype', 'parallel', 'block_size'))
    assert '--batch_size=4 ' in advice(model, [], config(batch_size=6, batch_tokens=64 * 2 * 12), CPU, FP32, world=2)  # 5 does not divide
    line = advice(model, [], config(batch_tokens=1024), CPU, FP32, world=4)
    assert 'for 4 x 64 tokens' in line and '--batch_size=2 ' in line  # there are no more for a process
    assert 'fsdp' in line
    monkeypatch.setattr(profiling, 'has_bfloat16', lambda device: True)
    last = advice(model, [], config(batch_size=1, activation_checkpointing=True, parallel='fsdp'), CPU, BF16, world=2)
    assert 'all memory options are already on' in last and '--block_size' in last and '--dtype' not in last


def test_advice_without_the_memory_to_measure_has_no_figures_for_it(monkeypatch):
    model = gpt(ffn='trix')
    monkeypatch.setattr(model.norm, 'forward', lambda x: torch.empty(2 ** 50, dtype=torch.uint8))
    line = advice(model, [], config(), CPU, FP32)
    assert 'not be measured: try --batch_size=8 --batch_tokens=4096 (same results), --activation_checkpointing' in line and 'saves' not in line
    assert not model.blocks[0]._forward_hooks and model.trix_layers()[0].counts is None
    model.blocks[0].ffn.up = torch.nn.Parameter(model.blocks[0].ffn.up.to('meta'))  # as when memory ran out on the way to the device
    assert 'not be measured' in advice(model, [], config(), CPU, FP32)
    model = gpt()
    monkeypatch.setattr(model.norm, 'forward', lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug is no lack of memory
        advice(model, [], config(), CPU, FP32)


def test_out_of_memory_is_told_from_other_errors():
    def fails(make):
        try:
            make()
        except Exception as error:
            return error

    def wrapped():
        try:
            torch.empty(2 ** 50, dtype=torch.uint8)
        except RuntimeError as error:
            raise ValueError('the loader failed') from error

    def unrelated():
        try:
            bytearray(2 ** 50)
        except MemoryError:
            raise ValueError('too long') from None
    for make in (lambda: torch.zeros(1).expand(2 ** 48) + 1, lambda: bytearray(2 ** 50), wrapped):
        assert is_out_of_memory(fails(make))
    assert is_out_of_memory(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'))
    assert is_out_of_memory(RuntimeError('MPS backend out of memory (MPS allocated: 8.00 GB)'))
    for make in (unrelated, lambda: torch.ones(2) @ torch.ones(3), lambda: {}['out of memory']):
        assert not is_out_of_memory(fails(make))


@pytest.mark.skipif(sys.platform != 'linux', reason='needs a limit on the memory of a process')
def test_the_advice_makes_a_step_fit_that_ran_out_of_memory():
    code = """if True:
        import re, resource, sys, torch
        from types import SimpleNamespace
        from model import GPT, GPTConfig
        from runtime.device import is_out_of_memory
        from runtime.profiling import advice
        torch.set_num_threads(1)
        model = GPT(GPTConfig(n_layer=6, n_embd=64, block_size=128, vocab_size=256))
        config = SimpleNamespace(batch_size=64, block_size=128, batch_tokens=64 * 128, activation_checkpointing=False, optimizer='adamw',
                                 parallel='ddp')

        def step(rows):
            idx = torch.randint(256, (rows, 128))
            model(idx, idx).backward()

        step(1)
        pages = int(open('/proc/self/statm').read().split()[0])
        limit = pages * resource.getpagesize() + 190_000_000  # 64 rows keep 220 MB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        ran_out = None
        try:
            step(64)
        except Exception as error:
            ran_out = is_out_of_memory(error)
        print(ran_out)
        print(line := advice(model, [], config, torch.device('cpu'), torch.float32))
        step(int(re.search('--batch_size=([0-9]+)', line)[1]))
        print('fits')
    """
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    ran_out, line, fits = out.stdout.splitlines()
    assert ran_out == 'True' and '--batch_size=32' in line and fits == 'fits'


# ----------------------------------------------------------------------------------------------------------------------

def train(profile, steps):
    model = gpt(n_layer=1, block_size=16)
    optimizer, idx = torch.optim.SGD(model.parameters()), tokens(model, 2)
    for _ in range(steps):
        model(idx, idx).backward()
        optimizer.step()
        profile.step()


def recorded(path):
    events = json.loads((path / 'profile/trace.json').read_text())['traceEvents']
    return sorted({e['name'] for e in events if e['name'].startswith('ProfilerStep')}), {e['name'] for e in events}


def test_a_profile_records_its_window_can_be_opened_and_leaks_no_lines_of_libraries(tmp_path, capfd):
    said = []
    profile = Profile(tmp_path, CPU, first=2, steps=2, say=said.append)
    train(profile, 3)
    assert not said and not (tmp_path / 'profile').exists()
    train(profile, 4)
    steps, names = recorded(tmp_path)
    assert steps == ['ProfilerStep#2', 'ProfilerStep#3'] and {'aten::mm', 'aten::gelu'} <= names
    table = (tmp_path / 'profile/table.txt').read_text()
    assert len(said) == 1 and said[0].startswith(table) and 'steps 3 to 4' in said[0] and 'ui.perfetto.dev' in said[0]
    assert 'aten::mm ' in table and len(table.splitlines()) == 17 and max(map(len, table.splitlines())) < 104
    assert sorted(p.name for p in (tmp_path / 'profile').iterdir()) == ['table.txt', 'trace.json']
    profile.close()
    assert len(said) == 1 and capfd.readouterr().err == ''
    os.write(2, b'seen')
    assert capfd.readouterr().err == 'seen'  # as before


def test_long_names_of_operators_stay_different():
    kernels = [f'void gemm<{"float, " * 9}{tail}>(long)' for tail in ('128, 64', '64, 128')]
    same = [f'{"a" * 30}{middle}{"b" * 30}' for middle in 'xy']
    short = profiling.shortened([*kernels, *same, 'aten::mm'])
    assert len(set(short)) == 5 and max(map(len, short)) <= 44 and short[-1] == 'aten::mm'
    assert short[0].startswith('void gemm<') and '128, 64' in short[0] and short[2].endswith(' #1')


def test_a_run_that_ends_early_writes_what_there_is_or_says_so(tmp_path):
    said = []
    profile = Profile(tmp_path, CPU, first=1, steps=5, say=said.append)
    train(profile, 3)
    profile.close()
    assert {'ProfilerStep#1', 'ProfilerStep#2'} <= set(recorded(tmp_path)[0]) and 'steps 2 to 3' in said[0]
    profile = Profile(tmp_path / 'ends', CPU, first=1, steps=5, say=said.append)
    train(profile, 2)
    profile.step(last=True)
    torch.ones(3).cosh()  # a validation at the end of the run
    profile.close()
    assert 'steps 2 to 3' in said.pop() and 'aten::cosh' not in recorded(tmp_path / 'ends')[1]
    profile = Profile(tmp_path / 'short', CPU, say=said.append)
    train(profile, 3)
    profile.close()
    assert said[1] == '--profile has recorded nothing: it begins with step 4, and the run ended after step 3'
    assert not (tmp_path / 'short').exists()


def test_on_a_gpu_operators_are_ranked_by_what_their_kernels_take():
    kinds = torch.autograd.DeviceType

    def event(key, cpu, gpu, kind=kinds.CPU):
        return SimpleNamespace(key=key, count=6, device_type=kind, self_cpu_time_total=cpu, self_device_time_total=gpu,
                               self_cpu_memory_usage=0, self_device_memory_usage=3e6)
    table = operator_table([event('aten::copy_', 9000, 1000), event('aten::mm', 3000, 3000), event('ProfilerStep*', 5000, 0),
                            event('gemm_kernel', 0, 3000, kinds.CUDA)], torch.device('cuda'), steps=3).splitlines()
    assert table[0] == '1.3 ms of GPU time a step:'  # a kernel is not counted twice
    assert table[2].split() == ['aten::mm', '2', '1.00', '1.00', '75.0%', '1.00']
    assert [line.split()[0] for line in table[2:]] == ['aten::mm', 'aten::copy_', 'Python']
