"""Dense matrices of the blocks: joined products on a GPU, and --dtype=fp8. Here the CPU stands in for the GPU."""
import pytest
import torch
import torch.nn.functional as F
from test_blocks import build, tokens

import kernels
import settings
from configurator import UserError
from runtime import compiler, fp8
from runtime import device as hardware
from runtime.fp8 import Fp8Linear, fp8_codes, fp8_linear

CPU = torch.device('cpu')


def gradients(module, model, idx):
    """-> loss, {name: gradient}, in bf16."""
    with torch.autocast('cpu', torch.bfloat16):
        loss = module(idx[:, :-1], idx[:, 1:])
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def same_up_to_rounding(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=2e-3)
    assert found[1].keys() == expected[1].keys()
    scale = max(grad.norm() for grad in expected[1].values())
    for name, grad in expected[1].items():  # the gradient of a key's bias is 0 but for rounding
        assert (found[1][name] - grad).norm() <= tolerance * max(grad.norm(), 0.01 * scale), name


def linears(graph):
    return sum(node.op == 'call_function' and node.target is F.linear for node in graph.graph.nodes)


# ---- joined products

def test_a_compiled_training_step_on_a_gpu_joins_matrices_that_share_their_input(monkeypatch):
    """q, k and v are one product, and so are gate and up. Every matrix keeps a gradient of its own, for Muon."""
    monkeypatch.setattr(kernels, 'JOINT_DEVICES', {'cpu'})
    model, idx, graphs = build('swiglu', n_layer=1, bias=True), tokens(2, 17), []
    torch._dynamo.reset()
    traced = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    same_up_to_rounding(gradients(traced, model, idx), gradients(model, model, idx), 0.02)
    with torch.no_grad():  # joining would copy every weight for each decoded token
        traced(idx, idx)
    assert [linears(graph) for graph in graphs] == [4, 7]


def test_eager_execution_joins_nothing(monkeypatch):
    monkeypatch.setattr(kernels, 'JOINT_DEVICES', {'cpu'})
    monkeypatch.setattr(torch, 'cat', None)
    q, k = torch.nn.Linear(4, 8), torch.nn.Linear(4, 8)
    x = torch.randn(3, 4)
    assert all(torch.equal(a, b) for a, b in zip(kernels.joint_linear(x, q, k), (q(x), k(x))))


# ---- fp8

@pytest.mark.parametrize('magnitude', [1e-30, 1e-6, 1.0, 1e6])
def test_fp8_codes_are_close_for_rows_of_any_magnitude(magnitude):
    torch.manual_seed(0)
    x = magnitude * torch.randn(8, 64) * torch.logspace(-3, 3, 8)[:, None]
    x[3] = 0
    codes, scale = fp8_codes(x.T.contiguous().T)  # as the transposed weight in backward
    assert codes.dtype == torch.float8_e4m3fn and codes.is_contiguous() and codes.float().isfinite().all()
    if magnitude > 1e-12:
        assert (codes.float() * scale - x).abs().max(1).values.le(2 ** -4 * x.abs().amax(1) + 1e-12).all()
    assert not codes[3].float().any()


def test_a_gradient_that_is_not_finite_stays_visible():
    assert not fp8_codes(torch.tensor([[1.0, float('nan')], [float('inf'), 1.0]]))[0].float()[:, 1:].isfinite().all()


@pytest.mark.parametrize('bias', [False, True])
def test_fp8_products_and_their_gradients_are_those_of_bf16_up_to_rounding(bias):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(2, 128, 64), 0.02 * torch.randn(48, 64), 1e-5 * torch.randn(2, 128, 48)
    inputs = [x.requires_grad_(), weight.requires_grad_()] + ([(0.05 * torch.randn(48)).requires_grad_()] if bias else [])
    y, expected = fp8_linear(*inputs), F.linear(*inputs)
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    assert 0.01 < distance(y, expected) < 0.04, 'rounded to three bits'
    found = torch.autograd.grad(y, inputs, grad.bfloat16())
    for i, (a, b) in enumerate(zip(found, torch.autograd.grad(expected, inputs, grad))):
        assert a.dtype == torch.float32
        assert distance(a, b) < (0.04 if i == 0 else 0.01), 'the gradients of weight and bias are those of bf16'


@pytest.mark.parametrize('rows, n_out, n_in', [(255, 16, 16), (256, 24, 16), (256, 16, 24)])
def test_sizes_that_fp8_kernels_do_not_take_and_evaluation_run_as_before(rows, n_out, n_in):
    x, weight = torch.randn(rows, n_in), torch.randn(n_out, n_in)
    assert torch.equal(fp8_linear(x, weight), F.linear(x, weight))
    with torch.no_grad():
        x, weight = torch.randn(256, 16), torch.randn(16, 16)
        assert torch.equal(fp8_linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_a_model_trains_in_fp8_compiled_and_joined_as_in_bf16(monkeypatch, backend):
    model, idx, products = build('swiglu', n_layer=1, bias=True), tokens(8, 33), []
    state, expected = set(model.state_dict()), gradients(model, model, idx)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        evaluated = model(idx[:, :-1])
    fp8.start(model, CPU)
    assert set(model.state_dict()) == state and type(model.lm_head) is torch.nn.Linear
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(model(idx[:, :-1]), evaluated)
    product = fp8.fp8_product
    monkeypatch.setattr(fp8, 'fp8_product', lambda a, b: products.append(len(b)) or product(a, b))
    eager = gradients(model, model, idx)
    assert len(products) == 14, 'a product and the gradient of its input for each of the seven matrices'
    same_up_to_rounding(eager, expected, 0.25)
    monkeypatch.setattr(fp8, 'fp8_product', product)
    monkeypatch.setattr(kernels, 'JOINT_DEVICES', {'cpu'})
    monkeypatch.setattr(compiler, 'BACKEND', backend)
    torch._dynamo.reset()
    same_up_to_rounding(gradients(compiler.compiled(model), model, idx), expected, 0.25)
    assert not torch._dynamo.utils.counters['graph_break']


def test_fp8_is_refused_where_it_cannot_run(monkeypatch):
    assert settings.load(['--dtype=fp8']).dtype == 'fp8'
    with pytest.raises(UserError, match='--dtype=fp8 needs an NVIDIA GPU of capability 8.9 .* on cpu use --dtype=float32'):
        hardware.resolve('cpu', 'fp8')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (8, 0))
    with pytest.raises(UserError, match='on cuda use --dtype=bfloat16'):
        hardware.resolve('cuda', 'fp8')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (9, 0))
    device, dtype, line = hardware.resolve('cuda', 'fp8')
    assert dtype == torch.bfloat16 and line.startswith('cuda (NVIDIA H200), fp8: for the training steps')
    torch.set_float32_matmul_precision('highest')  # resolve() allows TF32 on a GPU


def test_fp8_that_fails_or_miscomputes_ends_the_run_with_one_line(monkeypatch):
    model = build('swiglu', n_layer=1)
    assert 'fp8: 7 matrices of the blocks' in fp8.start(model, CPU)
    assert all(type(m) is Fp8Linear for block in model.blocks for m in block.modules() if isinstance(m, torch.nn.Linear))
    with pytest.raises(UserError, match='no dense matrix in its blocks'):
        fp8.start(build('bitnet_all', n_layer=1), CPU)
    monkeypatch.setattr(fp8, 'fp8_product', lambda a, b: torch.zeros(len(a), len(b)))
    with pytest.raises(UserError, match='--dtype=fp8: a product in fp8 differs from fp32 by 100 %: use --dtype=bfloat16'):
        fp8.start(model, CPU)

    def broken(a, b):
        raise RuntimeError('CUBLAS_STATUS_NOT_SUPPORTED\nmore')
    monkeypatch.setattr(fp8, 'fp8_product', broken)
    with pytest.raises(UserError, match='--dtype=fp8: CUBLAS_STATUS_NOT_SUPPORTED: use'):
        fp8.start(model, CPU)
