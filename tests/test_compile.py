"""torch.compile computes what eager execution computes: the loss to 1e-5, every gradient to 1e-4, the same tiles.

`python -m pytest` traces every block and compiles one of each kind by inductor; `-m slow` has the rest.
"""
import contextlib
import os
import re
import signal
import time

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from test_blocks import VARIANTS, T, V, build, tokens

from runtime import compile_check, compiler
import runs
from configurator import UserError
from model import GPT, GPTConfig, Resonance

SLOW = pytest.mark.slow
SHORT = ('relu2', 'trix-loop', 'bitnet_ffn', 'resonance')  # of each kind, what inductor compiles in seconds


def cases():  # (variant, how TriX is executed)
    for name, keys in VARIANTS.items():
        for execution in ('loop', 'dense', 'grouped') if keys['ffn'] == 'trix' else ('',):
            yield name, execution


def label(case):
    return '-'.join(filter(None, case))


ALL = [pytest.param(*case, id=label(case)) for case in cases() if case[1] != 'grouped']  # which takes only bf16 there
BY_INDUCTOR = [pytest.param(*case, id=label(case), marks=[] if label(case) in SHORT else SLOW) for case in cases() if case[1] != 'grouped']
CHECKPOINTED = [pytest.param(*case, id=label(case), marks=[] if case in (('trix', 'dense'), ('bitnet_all', ''), ('hybrid_trix', 'loop')) else SLOW)
                for case in cases() if case[1] != 'grouped']
WITH_BF16 = [pytest.param(*case, id=label(case), marks=[] if case in (('trix', 'grouped'), ('bitnet_all', ''), ('resonance_chunks', '')) else SLOW)
             for case in cases() if case[0] in (
    'gelu', 'softcap', 'trix', 'trix_all', 'trix_cut', 'bitnet_all', 'bitnet_llama', 'resonance', 'resonance_chunks', 'hybrid_trix')]


def compare(monkeypatch, name, execution, backend, tolerance=(1e-5, 1e-4), bf16=False, distil=False, **changes):
    """A forward and backward of two equal models, one of them compiled."""
    saving, flex_devices = changes.pop('activation_checkpointing', False), changes.pop('flex_devices', ())
    layers = 2 if 'hybrid' in name else 1  # a second layer like the first would be compiled alike
    plain, other = build(name, n_layer=layers, **changes), build(name, n_layer=layers, **changes)
    for trix in (*plain.trix_layers(), *other.trix_layers()):
        trix.execution = execution or 'auto'
    plain.activation_checkpointing = other.activation_checkpointing = saving
    plain.flex_devices = other.flex_devices = flex_devices
    idx = tokens(2, T + 1)
    teacher = build('gelu', seed=5).soft_targets(idx[:, :-1], 0.4) if distil else None
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiler, 'BACKEND', backend)
    losses = []
    for model in (plain, compiler.compiled(other)):
        with torch.autocast('cpu', torch.bfloat16) if bf16 else contextlib.nullcontext():
            losses.append(model(idx[:, :-1], idx[:, 1:], teacher=teacher))
        losses[-1].backward()
    assert not torch._dynamo.utils.counters['graph_break'], 'a break would leave parts of the model uncompiled'
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=tolerance[0])
    scale = max(p.grad.abs().max() for p in plain.parameters())
    for (key, p), q in zip(plain.named_parameters(), other.parameters()):
        size = max(p.grad.abs().max(), 1e-4 * scale)  # the gradient of a key's bias is 0 but for rounding
        assert (p.grad - q.grad).abs().max() <= tolerance[1] * size, key
    for a, b in zip(plain.trix_layers(), other.trix_layers()):
        assert a.load.sum() == b.load.sum() == 2 * T * a.k, 'tokens count once'
        assert (a.load - b.load).abs().sum() <= (4 if bf16 else 0), 'in bf16 a token or two may go to another tile'


@pytest.mark.parametrize('name, execution', ALL)
def test_every_block_traced(monkeypatch, name, execution):
    compare(monkeypatch, name, execution, 'aot_eager')


@pytest.mark.parametrize('name, execution', CHECKPOINTED)
def test_every_block_traced_with_activation_checkpointing(monkeypatch, name, execution):
    compare(monkeypatch, name, execution, 'aot_eager', activation_checkpointing=True)


@pytest.mark.parametrize('name, execution', BY_INDUCTOR)
def test_every_block_by_inductor(monkeypatch, name, execution):
    compare(monkeypatch, name, execution, 'inductor')


@pytest.mark.parametrize('name', ['gelu', 'trix', *(pytest.param(name, marks=SLOW) for name in ('bitnet_all', 'resonance_chunks', 'hybrid_trix'))])
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=SLOW)])
@pytest.mark.parametrize('changes', [
    dict(distil=True), dict(embed_taps=4, embed_norm=True), dict(logit_softcap=5.0, distil=True), dict(zero_init=True, embed_taps=2),
    dict(embed_taps=4, activation_checkpointing=True)], ids=lambda changes: '-'.join(changes))
def test_embeddings_taps_norms_and_head(monkeypatch, name, backend, changes):
    compare(monkeypatch, name, 'loop' if 'trix' in name else '', backend, **changes)


@pytest.mark.parametrize('name, execution', WITH_BF16)
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=SLOW)])
def test_under_bf16_autocast(monkeypatch, name, execution, backend):
    """bf16 has 8 bits: sums in another order differ by 2^-8, and where that tips an int8 code over, by a 127th of the largest one."""
    compare(monkeypatch, name, execution, backend, bf16=True, tolerance=(2e-3, 0.06))


def saved_activations(monkeypatch, **keys):
    """{dtype: bytes} of the activations that a compiled forward in bf16 saves for backward."""
    model, idx, saved = GPT(GPTConfig(n_layer=1, n_head=4, n_embd=64, vocab_size=128, block_size=64, **keys)), tokens(4, 64), {}

    def partition(joint, inputs, num_fwd_outputs, **options):
        forward, backward = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)
        for node in forward.graph.output_node().args[0][num_fwd_outputs:]:
            value = getattr(node, 'meta', {}).get('val')
            if torch.is_tensor(value) and node.op != 'placeholder' and value.numel() >= idx.numel() * 64 and value.shape[0] in (4, 256):
                saved[value.dtype] = saved.get(value.dtype, 0) + value.nbytes
        return forward, backward

    torch._dynamo.reset()
    monkeypatch.setattr(compiler, 'BACKEND', aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), partition_fn=partition))
    with torch.autocast('cpu', torch.bfloat16):
        compiler.compiled(model)(idx, idx).backward()
    return saved


@SLOW
def test_a_compiled_bitnet_saves_hardly_more_for_backward_than_its_dense_twin(monkeypatch):
    """Its codes of activations and weights are saved in bf16. In fp32 there is the residual stream, as in the twin."""
    dense, bitnet = (saved_activations(monkeypatch, ffn='swiglu', linear=linear) for linear in ('dense', 'bitnet'))
    assert set(dense) == set(bitnet) == {torch.float32, torch.bfloat16}
    assert bitnet[torch.float32] == dense[torch.float32]
    assert sum(bitnet.values()) <= 1.15 * sum(dense.values())


# ---- resonance

def test_chunks_of_256_change_nothing_at_32k_eager_and_traced():
    torch.manual_seed(0)
    T, found = 32_768, []
    u, grad = torch.randn(1, T, 4), torch.randn(1, T, 4)
    for chunk_size, traced in ((T, False), (256, False), (256, True)):
        torch.manual_seed(1)
        layer = Resonance(GPTConfig(block_size=T, n_embd=4, num_frequencies=6, mixer='resonance', chunk_size=chunk_size))
        layer.init_weights()
        convolve = torch.compile(layer.convolve, backend='aot_eager') if traced else layer.convolve
        x = u.clone().requires_grad_()
        y = convolve(x)
        y.backward(grad)
        found.append([y.detach(), x.grad, *(p.grad for p in (layer.nu, layer.theta, layer.magnitude, layer.phase))])
    for other in found[1:]:
        for i, (a, b) in enumerate(zip(other, found[0])):
            assert (a - b).abs().max() <= (1e-4 if i else 1e-5) * b.abs().max(), i


def test_the_graph_does_not_grow_with_the_number_of_chunks():
    sizes = []

    def counting(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward
    for T in (32, 512):
        torch._dynamo.reset()
        model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=8, mixer='resonance', ffn='none', num_frequencies=4,
                              chunk_size=8))
        torch.compile(model, backend=counting)(tokens(1, T), tokens(1, T))
    assert len(sizes) == 2 and sizes[0] == sizes[1] < 200


# ---- a run checks the compiled model before it trusts it

@pytest.mark.parametrize('name', ['trix', 'bitnet_all'])
def test_the_check_leaves_the_model_as_it_was(monkeypatch, name):
    monkeypatch.setattr(compiler, 'BACKEND', 'aot_eager')
    model, idx, cpu = build(name, n_layer=1, dropout=0.1 if name == 'trix' else 0.0), tokens(2, T + 1), torch.device('cpu')
    model(idx[:, :-1], idx[:, 1:])  # so that there are loads and statistics
    before = {key: value.clone() for key, value in model.state_dict(keep_vars=False).items()}
    loads = [(trix.load.clone(), trix.counts.clone()) for trix in model.trix_layers()]
    used, state = [m.use for m in model.modules() if hasattr(m, 'use')], torch.get_rng_state()

    def compute(module):
        torch.manual_seed(3)
        return module(idx[:, :-1], idx[:, 1:])
    problem, note = compile_check.check(model, compiler.compiled(model), compute, cpu, torch.float32, contextlib.nullcontext(),
                                        lambda *numbers: numbers, lambda error: False)
    assert not problem and 'compared with eager execution' in note
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(trix.load, load) and torch.equal(trix.counts, counts) for trix, (load, counts) in zip(model.trix_layers(), loads))
    assert all(m is n for m, n in zip(used, [m.use for m in model.modules() if hasattr(m, 'use')]))
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


def by(backend):
    """What to call in the process of a run, so that it compiles by another backend."""
    def before():
        compiler.BACKEND = backend
    return before


def wrong_gradients(change):
    def eager(graph, inputs):
        return compiler.torch._functorch.aot_autograd.make_boxed_func(graph.forward)

    def spoilt(graph, inputs):
        def backward(arguments):
            return [change(g) if torch.is_tensor(g) and g.is_floating_point() else g for g in graph(*arguments)]
        backward._boxed_call = True
        return backward
    return aot_autograd(fw_compiler=eager, bw_compiler=spoilt)


def fails(graph, inputs):
    raise RuntimeError('this backend is broken\nin many lines')


def never_ends(graph, inputs):
    time.sleep(60)


SMALL = ['--compile=true', '--max_steps=12', '--sample_interval=0', '--dropout=0']


@pytest.mark.parametrize('backend, words, says', [
    ('aot_eager', ['--dropout=0.1'], r'compiled in \d+ s; one micro-batch compared with eager execution: gradients [0-9.e-]+ apart'),
    (wrong_gradients(torch.zeros_like), [], 'compile off: the norm of the gradient is 0, in eager execution'),
    (wrong_gradients(lambda g: -g), [], r'compile off: \d+ of \d+ gradients are wrong \(wte.weight is the first'),
    (fails, [], 'compile off: BackendCompilerFailed: .*this backend is broken'),
    (never_ends, ['--compile_timeout=2'], r'compile off: it took over 2 s \(--compile_timeout\)'),
], ids=['right', 'zero', 'wrong', 'fails', 'never_ends'])
def test_a_run_names_the_fault_of_a_compiled_model_and_continues_without(corpus, tmp_path, backend, words, says):
    code, said = runs.finish(runs.arguments(corpus, tmp_path / 'run', *SMALL, *words), by(backend))
    assert code == 0, said
    line, = [line for line in said.splitlines() if line.startswith('on cpu')]
    assert re.search(says, line), line
    assert 'Traceback' not in said
    code, said = runs.finish(runs.arguments(corpus, tmp_path / 'eager', *SMALL, *words, '--compile=false'))
    assert code == 0, said
    same, tolerance = runs.losses(tmp_path / 'eager'), 0 if 'off' in says else 1e-4
    for a, b in zip(runs.losses(tmp_path / 'run'), same, strict=True):
        assert a[:2] == b[:2] and [x for x in a[2:] if x] == pytest.approx([x for x in b[2:] if x], rel=tolerance), 'the check leaves no trace'
    assert runs.losses(tmp_path / 'run')[-1][2] < 0.97 * same[0][2]


def test_two_processes_agree_to_continue_without_the_compiler(corpus, tmp_path):
    def before():
        compiler.BACKEND = fails if os.environ['RANK'] == '1' else 'aot_eager'
    codes, said = runs.finish_ranks(runs.arguments(corpus, tmp_path / 'run', *SMALL), 2, before)
    assert codes == [0, 0], said
    assert 'compile off: another process says why' in said[0] and 'rank 1: compile off: BackendCompilerFailed' in said[1]


def test_a_compiled_run_resumes_exactly_after_a_kill(corpus, tmp_path):
    words = [word for word in SMALL if 'max_steps' not in word]
    process = runs.start(runs.arguments(corpus, tmp_path / 'run', *words), by('aot_eager'))
    while not (tmp_path / 'run/checkpoints/step_0000008.pt').exists() and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for out, more in (('run', ['--resume=auto']), ('whole', [])):
        code, said = runs.finish(runs.arguments(corpus, tmp_path / out, *words, *more), by('aot_eager'))
        assert code == 0 and 'compiled in' in said, said
    assert runs.losses(tmp_path / 'run') == runs.losses(tmp_path / 'whole')


def test_the_model_is_compiled_once(corpus, tmp_path):
    def before():
        def counting(graph, inputs):
            print('a graph is compiled')
            return graph.forward
        compiler.BACKEND = counting
    code, said = runs.finish(runs.arguments(corpus, tmp_path / 'run', *SMALL), before)
    assert code == 0 and said.count('a graph is compiled') == 1, said


def test_compile_is_refused_where_it_cannot_work(monkeypatch):
    cpu = torch.device('cpu')
    assert compiler.choose('false', cpu) == (False, 'compile off, as asked')
    with pytest.raises(UserError, match='--compile=maybe: expected auto, true or false'):
        compiler.choose('maybe', cpu)
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler
    monkeypatch.setattr(cpp_builder, 'get_cpp_compiler', missing)
    with pytest.raises(UserError, match='--compile=true: no C\\+\\+ compiler is installed; use --compile=false'):
        compiler.choose('true', cpu)
    assert compiler.choose('auto', cpu, 10_000_000) == (False, 'compile off: no C++ compiler is installed')
    assert compiler.choose('auto', cpu, 9_999_999) == (False, 'compile off: it pays from 10M tokens on (--compile=true to try)')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (6, 1))
    with pytest.raises(UserError, match='--compile=true: the GPU is older than Triton supports'):
        compiler.choose('true', torch.device('cuda'))


# ---- a run that learns nothing says so

def test_a_gradient_of_zero_ends_the_run_with_exit_code_3(corpus, tmp_path):
    def before():
        forward = GPT.forward
        GPT.forward = lambda model, *inputs, **words: forward(model, *inputs, **words) * (0.0 if model.training else 1.0)
    for words, steps in (([], 5), (['--max_skipped=100'], 10)):
        out = tmp_path / f'run{steps}'
        code, said = runs.finish(runs.arguments(corpus, out, *words), before)
        assert code == 3 and f'the gradient was exactly zero in {steps} steps: the model learns nothing' in said.splitlines()[-1], said
        assert [event['event'] for event in runs.lines(out, 'event')] == ['zero_gradient'] * steps


def test_a_parameter_without_a_gradient_is_named_once(corpus, tmp_path):
    def before():
        forward = GPT.forward

        def detached(model, *inputs, **words):
            for block in model.blocks:
                block.mixer.q_proj.weight.requires_grad_(True)
            block.mixer.q_proj.forward = lambda x: x.detach() @ block.mixer.q_proj.weight.detach().T
            return forward(model, *inputs, **words)
        GPT.forward = detached
    code, said = runs.finish(runs.arguments(corpus, tmp_path / 'run'), before)
    assert code == 0, said
    line, = [line for line in said.splitlines() if 'no gradient in any of the first 10 steps' in line]
    assert line.endswith('these parameters learn nothing: blocks.0.mixer.q_proj.weight')
    event, = runs.lines(tmp_path / 'run', 'event')
    assert event['first_of_them'] == ['blocks.0.mixer.q_proj.weight']


@pytest.mark.parametrize('words', [['--zero_init=true'], ['--zero_init=true', '--ffn=gelu', '--bias=true', '--norm=layernorm'],
                                   ['--trix_tiles=8', '--trix_top_k=1'], ['--mixer=resonance', '--dropout=0', '--zero_init=true']], ids=' '.join)
def test_gradients_that_are_zero_by_design_are_not_reported(corpus, tmp_path, words):
    code, said = runs.finish(runs.arguments(corpus, tmp_path / 'run', *words, '--max_steps=12'))
    assert code == 0 and 'no gradient' not in said and not runs.lines(tmp_path / 'run', 'event'), said


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_several_processes_train_alike_compiled_and_eager(corpus, tmp_path, parallel):
    for out in ('true', 'false'):
        codes, said = runs.finish_ranks(runs.arguments(corpus, tmp_path / out, *SMALL, f'--compile={out}', f'--parallel={parallel}'), 2, by('aot_eager'))
        assert codes == [0, 0], said
        assert ('compiled in' in said[0]) == (out == 'true'), said[0]
    for a, b in zip(runs.losses(tmp_path / 'true'), runs.losses(tmp_path / 'false'), strict=True):
        assert [x for x in a[2:] if x] == pytest.approx([x for x in b[2:] if x], rel=1e-4)


def test_a_cache_that_cannot_be_written_switches_compilation_off_and_names_itself(monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', '/proc/nowhere')
    says = "/proc/nowhere cannot be written (No such file or directory), set TORCHINDUCTOR_CACHE_DIR to another directory"
    assert compiler.choose('auto', torch.device('cpu'), 10**9) == (False, f'compile off: {says}')
    with pytest.raises(UserError, match=re.escape(f'--compile=true: {says}; use --compile=false')):
        compiler.choose('true', torch.device('cpu'))
