"""The promises of resonance beyond those of every block: exact filters, chunks that change nothing, decoding at 32k."""
import math

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import causal_convolution, fft_size, mode_powers
from model import GPT, GPTConfig, Resonance


def resonance(T=64, C=6, K=5, **keys):
    torch.manual_seed(0)
    layer = Resonance(GPTConfig(block_size=T, n_embd=C, num_frequencies=K, mixer='resonance', **keys))
    layer.init_weights()
    torch.nn.init.normal_(layer.out_proj.weight, std=C ** -0.5)
    return layer


def filter_by_hand(layer, T):
    """h (T, C) = Re sum over k of a_kc lambda_k^t, in complex128, power by power."""
    nu, theta, magnitude, phase = (p.detach().double() for p in (layer.nu, layer.theta, layer.magnitude, layer.phase))
    modes, a = torch.complex(-nu.exp(), theta), magnitude * torch.exp(1j * phase)
    return torch.stack([((modes * t).exp()[:, None] * a).sum(0).real for t in range(T)])


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def test_the_block_equals_its_formula_one_position_at_a_time():
    layer, x = resonance(), torch.randn(2, 20, 6)
    h, z, w = filter_by_hand(layer, 20), layer.in_proj(x).double(), layer.short.double()
    z = torch.stack([sum(w[j] * z[:, t - j] for j in range(4) if t >= j) for t in range(20)], 1)
    q, k, v = z.chunk(3, -1)
    u = k * v
    y = torch.stack([q[:, t] * (sum(h[t - s] * u[:, s] for s in range(t + 1)) + layer.D * u[:, t]) for t in range(20)], 1)
    assert close(layer(x), y @ layer.out_proj.weight.double().T)


def test_powers_are_right_to_1e_7_at_32k():
    layer = resonance(T=32_768, K=16)
    with torch.no_grad():
        layer.theta.uniform_(0, math.pi)  # as it may be learnt: fast oscillations that last
    t = torch.arange(32_768, dtype=torch.float64)[:, None]
    exact = (t * torch.complex(-layer.nu.detach().double().exp(), layer.theta.detach().double())).exp()
    assert (mode_powers(layer.nu, layer.theta, 0, 32_768) - exact).abs().max() < 5e-7
    assert (mode_powers(layer.nu, layer.theta, 1000, 50) - exact[1000:1050]).abs().max() < 5e-7
    naive = torch.polar((-t.float() * layer.nu.exp()).exp(), t.float() * layer.theta)
    assert (naive - exact).abs().max() > 1e-4, 'in fp32 exponents the phase is lost'


@torch.no_grad()
def test_oscillators_start_with_log_spaced_time_constants_and_energy_one_half():
    layer = resonance(T=4096, C=400, K=32)
    tau = (-layer.nu).exp()
    torch.testing.assert_close(tau[[0, -1]], torch.tensor([2.0, 4096.0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(tau[1:] / tau[:-1], torch.full((31,), 2048 ** (1 / 31)), rtol=1e-3, atol=0)
    torch.testing.assert_close(layer.theta, 2 * math.pi / tau)
    assert mode_powers(layer.nu, layer.theta, 1, 1).abs().max() < 1
    assert filter_by_hand(layer, 4096).square().sum(0).mean() == pytest.approx(0.5, rel=0.25)


def test_every_mode_decays_for_any_weights():
    layer = resonance()
    with torch.no_grad():
        layer.nu.normal_(std=3)
        layer.theta.normal_(std=30)
    assert (mode_powers(layer.nu, layer.theta, 0, 2)[1].abs() < 1).all()


@pytest.mark.parametrize('T, S', [(64, 16), (61, 16), (64, 1), (37, 36), (64, 63), (5, 7)])
def test_chunks_change_neither_the_function_nor_its_gradients(T, S):
    whole, parts = resonance(), resonance(chunk_size=S)
    xs = [torch.randn(3, T, 6, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in 'ab']
    ys = [layer(x) for layer, x in zip((whole, parts), xs)]
    assert close(ys[1], ys[0])
    for y in ys:
        y.square().sum().backward()
    assert close(xs[1].grad, xs[0].grad, 1e-4)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters()):
        assert b.grad.abs().max() > 0 and close(b.grad, a.grad, 1e-4), name


def test_gradients_equal_those_of_the_direct_sum():
    torch.manual_seed(0)
    u, h = torch.randn(2, 13, 3).requires_grad_(), torch.randn(13, 3).requires_grad_()
    fast = causal_convolution(u, h)
    slow = torch.stack([sum(h[t - s] * u[:, s] for s in range(t + 1)) for t in range(13)], 1)
    weight = torch.randn_like(slow)
    assert close(fast, slow)
    for a, b in zip(torch.autograd.grad((fast * weight).sum(), (u, h)), torch.autograd.grad((slow * weight).sum(), (u, h))):
        assert close(a, b)


# ---- matrix products, as on a GPU

@pytest.fixture
def products(monkeypatch):
    """Convolutions as on a GPU: product_convolution, after its check."""
    monkeypatch.setattr(kernels, 'PRODUCT_DEVICES', {'cpu'})
    kernels.product_problem.cache_clear()
    yield
    kernels.product_problem.cache_clear()


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize('T, S', [(64, 16), (61, 16), (37, 5), (20, 20), (5, 1), (1, 1), (300, 64)])
def test_matrix_products_equal_the_direct_sum_in_fp64(T, S, dtype, tolerance):
    layer, u, weight = resonance(T=T), torch.randn(2, T, 6), torch.randn(2, T, 6).bfloat16().double()
    parameters = [p.detach() for p in (u, layer.nu, layer.theta, *layer.amplitudes())]

    def direct(u, nu, theta, re, im):
        t = torch.arange(T, dtype=torch.float64)[:, None]
        powers = (t * torch.complex(-nu.exp(), theta)).exp()
        h = (powers @ torch.complex(re, im)).real
        return torch.stack([(h[:n + 1].flip(0) * u[:, :n + 1]).sum(1) for n in range(T)], 1)
    exact, rounded = [p.double().requires_grad_() for p in parameters], [p.clone().requires_grad_() for p in parameters]
    y, z = direct(*exact), kernels.product_convolution(*rounded, S, dtype)
    assert z.dtype == torch.float32 and close(z, y, tolerance)
    expected, found = (torch.autograd.grad((x * weight).sum(), p, allow_unused=True) for x, p in ((y, exact), (z, rounded)))
    for a, b in zip(expected, found):
        assert (a - b).norm() <= tolerance * a.norm()


@pytest.mark.parametrize('T, chunk_size', [(64, 2048), (61, 7), (61, 16)])
def test_a_layer_with_matrix_products_equals_one_with_ffts_whatever_the_chunk_size(products, monkeypatch, T, chunk_size):
    found = []
    for devices, limit in (({'cpu'}, chunk_size), (set(), 2048)):
        monkeypatch.setattr(kernels, 'PRODUCT_DEVICES', devices)
        layer, x = resonance(chunk_size=limit), torch.randn(3, T, 6, generator=torch.Generator().manual_seed(1))
        y = layer(x)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in layer.parameters())])
    assert kernels.product_problem.cache_info().misses == 1, 'checked once'
    assert all(close(a, b, 1e-4) for a, b in zip(*found)) and not torch.equal(found[0][0], found[1][0])


def test_the_check_of_the_products_does_not_disturb_activation_checkpointing(products):
    found = []
    for forward in (lambda layer, x: checkpoint(layer, x, use_reentrant=False), lambda layer, x: layer(x)):
        layer, x = resonance(chunk_size=16), torch.randn(1, 64, 6, generator=torch.Generator().manual_seed(1))
        forward(layer, x).square().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    assert kernels.product_problem.cache_info().misses == 1, 'checked in the first forward, not in its repetition'
    assert all(map(torch.equal, *found))


@torch.no_grad()
def test_decoding_equals_the_full_forward_with_matrix_products(products):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=120, vocab_size=64, n_layer=2, n_embd=16, num_frequencies=8, mixer='resonance', chunk_size=16)).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(3)
    idx = torch.randint(64, (2, 119))
    cache = model.new_cache(2)
    got = torch.cat([model(part, cache=cache) for part in idx.split([70, 1, 37, *[1] * 11], 1)], 1)
    assert close(got, model(idx))


def test_a_compiled_model_with_matrix_products_has_no_complex_numbers_and_equals_eager_execution(products):
    complex_nodes, graphs = [], []

    def inspect(graph, inputs):
        graphs.append(graph)
        values = [node.meta.get('val') for node in graph.graph.nodes]
        complex_nodes.extend(value for value in values if torch.is_tensor(value) and value.is_complex())
        return make_boxed_func(graph.forward)
    torch._dynamo.reset()
    model = GPT(GPTConfig(block_size=61, vocab_size=50, n_layer=1, n_embd=16, n_head=2, num_frequencies=4, mixer='resonance', ffn='none',
                          chunk_size=16))
    fast = torch.compile(model, backend=aot_autograd(fw_compiler=inspect), fullgraph=True)
    idx, found = torch.randint(50, (2, 62)), []
    for module in (fast, model):
        with torch.autocast('cpu', torch.bfloat16):
            loss = module(idx[:, :-1], idx[:, 1:])
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        assert kernels.product_problem.cache_info().misses == 1, 'checked while tracing'
    assert all((a - b).norm() <= 0.05 * b.norm() for a, b in zip(*found))
    assert len(graphs) == 2 and not complex_nodes


def test_no_length_is_variable_in_a_compiled_graph_because_inductor_would_take_minutes(products):
    layer, inputs = resonance(chunk_size=16), []

    def record(graph, arguments):
        inputs.extend(arguments)
        return graph.forward
    torch._dynamo.reset()
    convolve = torch.compile(layer.convolve, backend=record, fullgraph=True)
    for T in (64, 61, 50):
        u = torch.randn(2, T, 6)
        assert close(convolve(u), layer.convolve(u))
    assert inputs and not any(isinstance(value, torch.SymInt) for value in inputs)


@pytest.mark.parametrize('failure', ['raises', 'is wrong'])
def test_matrix_products_that_fail_their_check_are_replaced_by_ffts_with_one_line(products, monkeypatch, capsys, failure):
    product = kernels.product_convolution

    def broken(u, *arguments, **options):
        if failure == 'raises':
            raise RuntimeError('no such instruction\nsecond line')
        return 1.1 * product(u, *arguments, **options)
    monkeypatch.setattr(kernels, 'product_convolution', broken)
    layer, x = resonance(), torch.randn(2, 64, 6)
    ys = [layer(x), layer(x)]
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('resonance uses FFTs, which are slower: its matrix products in float32 fail on cpu: '
                           + {'raises': 'RuntimeError: no such instruction', 'is wrong': 'relative error 0.1'}[failure])
    monkeypatch.setattr(kernels, 'PRODUCT_DEVICES', set())
    assert all(torch.equal(y, layer(x)) for y in ys)


def test_the_chunk_length_is_chosen_from_the_shape_and_chunk_size_only_limits_it():
    assert kernels.product_chunk(32_768, 32_768, 128, limit=2048) == 256
    assert kernels.product_chunk(32_768, 32_768, 128, limit=128) == 128
    assert kernels.product_chunk(64 * 48, 48, 64, limit=48) == 48, 'no states'
    assert kernels.product_chunk(30, 30, 8, limit=5) == 5


def test_fft_sizes_are_enough_and_fast():
    for n in range(1, 3000):
        size = fft_size(n)
        assert n <= size <= max(1.34 * n, n + 1)
        while size % 2 == 0:
            size //= 2
        assert size in (1, 3, 5)


def test_only_real_parameters_and_no_weight_decay_on_oscillators():
    model = GPT(GPTConfig(n_embd=32, vocab_size=50, mixer='resonance', ffn='resonance', num_frequencies=4))
    assert not any(p.is_complex() for p in [*model.parameters(), *model.buffers()])
    kept = {id(p) for p in model.decay_params()}
    without = {name.rsplit('.')[-1] for name, p in model.named_parameters() if id(p) not in kept}
    assert without == {'nu', 'theta', 'magnitude', 'phase', 'D', 'weight'}  # weight: of the norms
    assert all(p.dim() == 1 for name, p in model.named_parameters() if id(p) not in kept and name.endswith('weight'))


@pytest.mark.parametrize('chunk_size', [65_536, 2048])
@torch.no_grad()
def test_at_32k_tokens_nothing_leaks_and_decoding_equals_the_full_forward(chunk_size):
    torch.manual_seed(0)
    T = 32_768
    model = GPT(GPTConfig(block_size=T, vocab_size=64, n_layer=2, n_embd=16, num_frequencies=8, mixer='resonance', ffn='swiglu',
                          chunk_size=chunk_size)).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(3)  # logits that depend on everything
    idx = torch.randint(64, (1, T))
    full = model(idx)
    changed = idx.clone()
    changed[:, 20_000:] = (changed[:, 20_000:] + 1) % 64
    other = model(changed)
    assert close(other[:, :20_000], full[:, :20_000])
    assert (other - full)[:, 20_000:].abs().max() > 0.1 * full.abs().max()

    cache, parts = model.new_cache(1), [30_000, 1, 2700, *[1] * 67]
    got = torch.cat([model(part, cache=cache) for part in idx.split(parts, 1)], 1)
    assert close(got, full)
    assert close(got[:, -67:], full[:, -67:])


@torch.no_grad()
def test_the_cache_does_not_grow_with_the_context():
    model = GPT(GPTConfig(block_size=4096, vocab_size=64, n_layer=1, n_embd=16, num_frequencies=8, mixer='resonance', ffn='none')).eval()
    cache, sizes = model.new_cache(2), []
    for n in (1, 10, 4000):
        model(torch.randint(64, (2, n)), cache=cache)
        state = cache.layers[0][0]
        sizes.append(sum(t.numel() * t.element_size() for t in vars(state).values() if torch.is_tensor(t)))
    assert len(set(sizes)) == 1 and cache.pos == 4011


def test_a_cache_for_another_batch_is_refused():
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_embd=16, mixer='resonance', ffn='none'))
    with pytest.raises(AssertionError, match='3 sequences, but the cache was made for 2'):
        model(torch.zeros(3, 4, dtype=torch.long), cache=model.new_cache(2))


def test_hybrids_have_attention_in_every_nth_layer():
    assert GPTConfig(mixer='resonance', attention_every=3, n_layer=7).mixers() == [
        'resonance', 'resonance', 'attention', 'resonance', 'resonance', 'attention', 'resonance']


@pytest.mark.parametrize('keys, problem', [
    (dict(chunk_size=0), 'chunk_size=0 must be at least 1'),
    (dict(num_frequencies=0), 'num_frequencies=0 must be at least 1'),
    (dict(dropout=0.1), "dropout=0.1 with resonance"),
    (dict(dropout=0.1, mixer='attention', ffn='resonance'), 'dropout=0.1 with resonance'),
    (dict(attention_every=2, mixer='attention'), 'attention_every=2 is for mixer=resonance'),
    (dict(attention_every=9, n_layer=8), 'attention_every=9 is more than n_layer=8'),
    (dict(attention_every=-1), 'attention_every=-1 must not be negative'),
    (dict(attention_every=2, n_embd=30, n_head=4), 'n_embd=30 is not divisible by n_head=4'),
    (dict(mixer='attention', n_head=4, n_kv_head=3), 'n_head=4 is not divisible by n_kv_head=3'),
    (dict(linear='ternary'), "linear='ternary' is not one of dense, bitnet"),
    (dict(ffn='trix', trix_top_k=9), 'trix_top_k=9 is more than trix_tiles=8'),
    (dict(ffn='trix', trix_router='learned'), "trix_router='learned' is not one of signature, hash, first"),
    (dict(act_bits=8, ffn='gelu'), 'act_bits=8 needs a ternary block'),
])
def test_invalid_options_are_refused_by_name(keys, problem):
    found = GPTConfig(**{**dict(mixer='resonance'), **keys}).problems()
    assert len(found) == 1 and problem in found[0]


def test_learned_positions_shorter_than_the_context_are_refused():
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_embd=16, mixer='resonance', ffn='none', positions='learned'))
    with pytest.raises(AssertionError, match='17 positions, but block_size is 16'):
        model(torch.zeros(1, 17, dtype=torch.long))
