"""The promises of BitNet beyond those of every block, and when ternary codes are made."""
import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

import kernels
import model as model_file
import settings
from benchmarks.measure import packed_bytes
from kernels import int8_codes, ternary_codes
from model import GPT, BitLinear, GPTConfig, TriX
from optim import make_optimizers
from runtime.generation import generate, sample_grid
from runtime.parallel import OneProcess
from training import TrainStep, validate


def bitlinear(n_in=24, n_out=16, sub_norm=False, bias=False):
    torch.manual_seed(0)
    layer = BitLinear(n_in, n_out, bias=bias, sub_norm=sub_norm)
    torch.nn.init.normal_(layer.weight, std=0.02)
    return layer


def by_hand(layer, x):
    """W1.58A8 as the paper states it, with fake quantisation in fp64."""
    w, x = layer.weight.double(), x.double()
    if layer.sub_norm:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    a = w.abs().mean().clamp(min=1e-5)
    s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    y = ((x * s).round().clamp(-128, 127) / s) @ (a * (w / a).round().clamp(-1, 1)).T
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize('sub_norm', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_the_layer_equals_its_formula(sub_norm, bias):
    layer, x = bitlinear(sub_norm=sub_norm, bias=bias), 3 * torch.randn(5, 7, 24)
    torch.testing.assert_close(layer(x).double(), by_hand(layer, x), rtol=1e-5, atol=1e-6)


def test_gradients_go_straight_through():
    layer, x, g = bitlinear(), torch.randn(5, 7, 24).requires_grad_(), torch.randn(5, 7, 16)
    dx, dw = torch.autograd.grad(layer(x), (x, layer.weight), g)
    codes, a = ternary_codes(layer.weight)
    q, s = int8_codes(x.detach())
    torch.testing.assert_close(dx, g @ (a * codes))
    torch.testing.assert_close(dw, g.flatten(0, 1).T @ (q / s).flatten(0, 1))
    assert (dw != 0).all(), 'weights with code 0 learn, too'


@pytest.mark.parametrize('low', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_product_of_the_codes_is_exact(low):
    layer = bitlinear(n_in=3000, n_out=8)
    x = torch.randn(4, 3000)
    x[0], layer.weight.data[0] = 1.0, 0.02  # the largest sum that there can be: 127 x 3000
    with torch.autocast('cpu', low, enabled=low != torch.float32):
        y = layer(x)
    assert y.dtype == low
    codes, a = ternary_codes(layer.weight)
    q, s = int8_codes(x)
    whole = (q.long() @ codes.long().T)
    torch.testing.assert_close(y.float(), (whole * (a / s)), rtol={torch.float32: 1e-6, torch.bfloat16: 2 ** -8, torch.float16: 2 ** -10}[low], atol=1e-7)


def test_every_matrix_of_the_blocks_and_no_other_is_ternary():
    config = dict(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, vocab_size=50)
    ternary = lambda **keys: {name for name, m in GPT(GPTConfig(**config, **keys)).named_modules() if isinstance(m, BitLinear)}
    every = ternary(linear='bitnet', ffn='swiglu')
    assert every == {f'blocks.{i}.{m}' for i in (0, 1) for m in ('mixer.q_proj', 'mixer.k_proj', 'mixer.v_proj', 'mixer.o_proj',
                                                                'ffn.gate_proj', 'ffn.up_proj', 'ffn.down_proj')}
    assert ternary(ffn='bitnet') == {name for name in every if 'ffn' in name}
    assert ternary(linear='dense', ffn='swiglu') == set()
    model = GPT(GPTConfig(**config, linear='bitnet', ffn='swiglu'))
    assert {name for name, m in model.named_modules() if isinstance(m, BitLinear) and m.sub_norm} == {
        name for name in every if name.endswith(('o_proj', 'down_proj'))}
    assert not any(m.sub_norm for m in GPT(GPTConfig(**config, linear='bitnet', sub_norm=False)).modules() if isinstance(m, BitLinear))


def test_the_dense_twin_has_the_same_parameters():
    shapes = [{name: p.shape for name, p in GPT(GPTConfig(ffn='swiglu', linear=linear)).named_parameters()} for linear in ('bitnet', 'dense')]
    assert shapes[0] == shapes[1]


# ---- codes once per weight while the weights are fixed, and never stale

TINY = dict(n_layer=2, n_embd=16, n_head=2, vocab_size=50, block_size=16)
TERNARY = {'bitnet': (dict(ffn='swiglu', linear='bitnet', d_ff=24), 14), 'trix': (dict(ffn='trix', trix_tiles=3), 4)}  # options, matrices
each_ternary = pytest.mark.parametrize('kind', TERNARY)


def tiny(kind, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**TINY, **TERNARY[kind][0]))


@pytest.fixture
def made(monkeypatch):
    """The weights whose codes are made, one entry per call."""
    calls, real = [], kernels.ternary_codes

    def counted(weight, dims=None):
        calls.append(weight.shape)
        return real(weight, dims)
    for place in (kernels, model_file):
        monkeypatch.setattr(place, 'ternary_codes', counted)
    return calls


@each_ternary
@pytest.mark.parametrize('checkpointing', [False, True])
def test_an_optimizer_step_makes_the_codes_of_each_weight_once(made, kind, checkpointing):
    model, teacher, matrices = tiny(kind), tiny(kind, seed=1).eval(), TERNARY[kind][1]
    model.activation_checkpointing = checkpointing
    device, config = torch.device('cpu'), settings.load([])
    step = TrainStep(model, make_optimizers(model, config, device), config, device, torch.float32, OneProcess())
    idx = torch.randint(50, (2, 17))
    batches = itertools.repeat((idx[:, :-1], idx[:, 1:]))
    for done in range(1, 4):
        step.update(step.judge(step.backward(0, batches, 4)))
        assert len(made) == matrices * done
    step.teacher = teacher
    step.backward(0, batches, 4)
    assert len(made) == matrices * 5
    loss = model(idx[:, :-1], idx[:, 1:])
    assert len(made) == matrices * 6, 'elsewhere, every forward makes them'
    loss.backward()
    assert len(made) == matrices * (7 if checkpointing else 6), 'and every recomputation'


class SomeData:
    def val_batch(self, windows):
        return (np.zeros((len(windows), 16), np.int64),) * 2


class SomeEncoding:
    eot_token, n_vocab = 0, 50

    def encode_ordinary(self, text):
        return [1, 2, 3]

    def decode(self, ids):
        return ''


@each_ternary
@pytest.mark.parametrize('use', [
    lambda model: [*generate(model, torch.ones(1, 3, dtype=torch.int64), 50, max_new_tokens=30)],  # the context fills up twice
    lambda model: sample_grid(model, SomeEncoding(), ['a', 'b'], max_new_tokens=20, seed=0),
    lambda model: validate(model, SomeData(), None, range(6), 2, torch.device('cpu'), torch.float32)],
    ids=['generate', 'sample_grid', 'validate'])
def test_sampling_and_validation_make_the_codes_of_each_weight_once(made, kind, use):
    use(tiny(kind))
    assert len(made) == TERNARY[kind][1]


class ForeignSGD:
    """An optimizer that is none of torch.optim."""

    def __init__(self, params):
        self.params = list(params)

    def step(self):
        for p in self.params:
            p.data.sub_(p.grad, alpha=0.5)


def fused_step(layer, weight, at):
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()


def foreign_step(layer, weight, at):
    weight.grad = torch.ones_like(weight)
    ForeignSGD([weight]).step()


def swap_averages(layer, weight, at):
    weight.average = -weight.data
    weight.data, weight.average = weight.average, weight.data


def set_one_in_place(layer, weight, at):
    with torch.no_grad():
        weight[at] = 3.0


def load(layer, weight, at, **keys):
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    next(value for name, value in state.items() if value.shape == weight.shape)[at] = 3.0
    layer.load_state_dict(state, **keys)


def replace_parameter(layer, weight, at):
    name = next(name for name, p in layer.named_parameters() if p is weight)
    setattr(layer, name, torch.nn.Parameter(weight.detach().neg()))


CHANGES = {
    'one weight through data': lambda layer, weight, at: weight.data.__setitem__(at, 3.0),
    'one weight through detach': lambda layer, weight, at: weight.detach().__setitem__(at, 3.0),
    'one weight through numpy': lambda layer, weight, at: weight.detach().numpy().__setitem__(at, 3.0),
    'one weight in place': set_one_in_place,
    'sign through data': lambda layer, weight, at: weight.data.mul_(-1),
    'other data': lambda layer, weight, at: setattr(weight, 'data', weight.data.neg()),
    'fused optimizer': fused_step,
    'foreign optimizer': foreign_step,
    'averages swapped in': swap_averages,
    'load_state_dict': load,
    'load_state_dict by assignment': lambda *where: load(*where, assign=True),
    'another parameter': replace_parameter,
}


def forward(model, idx):
    return model(idx)


def forward_with_fixed_weights(model, idx):
    with model.fixed_weights():
        return model(idx)


def inference(model, idx):
    with torch.inference_mode(), model.fixed_weights():
        return model(idx).clone()


def training_step(model, idx):
    device, config = torch.device('cpu'), settings.load([])
    TrainStep(model, {}, config, device, torch.float32, OneProcess()).backward(0, iter([(idx, idx)]), 1)
    model.zero_grad()
    return model(idx)


def half_a_text(model, idx):
    model.text = generate(model, idx, 50, max_new_tokens=5)  # stays suspended after its first token
    next(model.text)
    return model(idx)


@settings_of_hypothesis(max_examples=50, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(TERNARY)), st.sampled_from(sorted(CHANGES)), st.data(),
       st.sampled_from([forward, forward_with_fixed_weights, inference, training_step, half_a_text]))
def test_any_change_of_a_weight_takes_effect_in_the_next_forward(kind, change, data, use):
    model, fresh, idx = tiny(kind).eval(), tiny(kind, seed=1).eval(), torch.randint(50, (2, 7))
    before = use(model, idx)
    layers = [m for m in model.modules() if isinstance(m, (BitLinear, TriX))]
    layer = layers[data.draw(st.integers(0, len(layers) - 1))]
    names = [name for name, p in layer.named_parameters() if p.dim() > 1]
    weight = getattr(layer, names[data.draw(st.integers(0, len(names) - 1))])
    at = tuple(data.draw(st.integers(0, size - 1)) for size in weight.shape)
    CHANGES[change](layer, weight, at)
    fresh.load_state_dict(model.state_dict())
    after = model(idx)
    assert torch.equal(after, fresh(idx)) and not torch.equal(after, before)


def test_a_copy_of_a_model_with_fixed_weights_makes_codes_of_its_own():
    model, idx = tiny('bitnet'), torch.randint(50, (2, 7))
    with model.fixed_weights():
        before = model(idx)
        other = copy.deepcopy(model)
        for p in other.parameters():
            p.data.neg_()
        after = other(idx)
        assert torch.equal(model(idx), before)
    fresh = tiny('bitnet')
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(after, fresh(idx)) and not torch.equal(after, before)


def test_codes_of_inference_mode_serve_training():
    model, idx = tiny('trix'), torch.randint(50, (2, 7))
    with model.fixed_weights():
        with torch.inference_mode():
            model(idx)
        model(idx, idx).backward()
    assert all(p.grad.abs().max() > 0 for trix in model.trix_layers() for p in (trix.up, trix.down))


def test_contexts_of_two_threads_end_in_any_order(made):
    model, idx = tiny('bitnet'), torch.randint(50, (2, 7))
    first, second = model.fixed_weights(), model.fixed_weights()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    model(idx), model(idx)
    assert len(made) == 14
    second.__exit__()
    model(idx)
    assert len(made) == 28
    assert not any(layer.codes.contexts for layer in model.modules() if isinstance(layer, BitLinear))


def test_sharded_weights_get_no_cached_codes(made):
    model, idx = tiny('bitnet'), torch.randint(50, (2, 7))
    model.unshard = None  # FSDP2 gives a model this method
    with model.fixed_weights() as fixed:
        model(idx), model(idx)
    assert len(made) == 28 and fixed.tensors() == []


# ---- statistics

def test_statistics_of_known_weights():
    layer = bitlinear(n_in=4, n_out=2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.1, 0.1], [2.0, -2.0, 0.9, 0.9]]))  # a = 1: codes + - 0 0, + - + +
    layer.train()(torch.tensor([[1.0, 0.5, 0.0, -0.5]]))
    s = layer.statistics()
    assert s['ternary_plus'] == 0.5 and s['ternary_minus'] == 0.25 and s['ternary_zero'] == 0.25
    assert s['ternary_scale'] == pytest.approx(1) and s['ternary_fence'] == 0 and s['ternary_flips'] is None
    assert s['act_utilisation'] == pytest.approx((127 + 64 + 64) / 4 / 127)
    with torch.no_grad():
        layer.weight[0, 2], layer.weight[0, 3] = 0.52, -0.55  # two of eight codes change, two thresholds are near; a = 1.109
        layer.weight[1, 2:] = 0.9
    s = layer.statistics()
    assert s['ternary_flips'] == 0.0 and s['ternary_fence'] == 0.25
    with torch.no_grad():
        layer.weight[0, 2] = -2.0
    assert layer.statistics()['ternary_flips'] == pytest.approx(1 / 8)


def test_a_model_reports_the_mean_over_its_matrices():
    model = GPT(GPTConfig(n_layer=2, n_embd=64, vocab_size=50, block_size=16, ffn='swiglu', linear='bitnet'))
    idx = torch.randint(50, (2, 16))
    model(idx, idx)
    s = model.statistics()
    assert set(s) == {'ternary_minus', 'ternary_zero', 'ternary_plus', 'ternary_scale', 'ternary_flips', 'ternary_fence', 'act_utilisation'}
    layers = [m for m in model.modules() if isinstance(m, BitLinear)]
    assert s['ternary_scale'] == pytest.approx(sum(m.weight.abs().mean().item() for m in layers) / 14)
    assert abs(s['ternary_zero'] - 0.31) < 0.02 and 0.1 < s['act_utilisation'] < 0.5
    torch.optim.SGD(model.parameters(), lr=1.0)
    assert model.statistics()['ternary_flips'] == 0
    with torch.no_grad():
        for m in layers:
            m.weight.neg_()
    assert model.statistics()['ternary_flips'] == pytest.approx(1 - s['ternary_zero'])


def test_packed_bytes_count_two_bits_a_ternary_weight():
    config = dict(n_layer=1, n_embd=32, n_head=4, vocab_size=50, block_size=16)
    dense = GPT(GPTConfig(**config, ffn='swiglu', d_ff=96))
    assert packed_bytes(dense) == 2 * sum(p.numel() for p in dense.parameters())
    matrices = 4 * 32 * 32 + 3 * 32 * 96
    assert packed_bytes(GPT(GPTConfig(**config, ffn='swiglu', d_ff=96, linear='bitnet'))) == packed_bytes(dense) - 2 * matrices + matrices // 4 + 7 * 4
    trix = GPT(GPTConfig(**config, ffn='trix', trix_tiles=4, trix_hidden=32))
    tiles = sum(p.numel() for m in trix.modules() if isinstance(m, TriX) for p in (m.up, m.down))
    rest = sum(p.numel() for p in trix.parameters()) - tiles
    assert packed_bytes(trix) == 2 * rest + tiles // 4 + 2 * 4 * 4
