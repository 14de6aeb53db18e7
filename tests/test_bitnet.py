"""What BitNet promises beyond what every block does, and that ternary codes are made once an optimizer step."""
import copy

import pytest
import torch
import torch.nn.functional as F

import model as module
from model import GPT, BitLinear, GPTConfig, OncePerStep, TriX, int8_codes, ternary_codes


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


# ---- codes once an optimizer step

@pytest.fixture
def made(monkeypatch):
    """Counts the calls of ternary_codes."""
    calls, real = [], module.ternary_codes

    def counted(weight, dims=None):
        calls.append(weight.shape)
        return real(weight, dims)
    monkeypatch.setattr(module, 'ternary_codes', counted)
    return calls


@pytest.mark.parametrize('keys, matrices', [(dict(ffn='swiglu', linear='bitnet'), 14), (dict(ffn='trix'), 4)], ids=['bitnet', 'trix'])
@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'foreach'])
def test_codes_are_made_once_an_optimizer_step(made, keys, matrices, fused):
    model = GPT(GPTConfig(n_layer=2, n_embd=32, vocab_size=50, block_size=16, **keys))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    idx = torch.randint(50, (2, 17))
    for step in range(3):
        for micro in range(4):
            model(idx[:, :-1], idx[:, 1:]).backward()
        assert len(made) == matrices * (step + 1)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        cache = model.new_cache(2)
        for t in range(16):
            model(idx[:, t:t + 1], cache=cache)
    assert len(made) == matrices * 4


def changes():
    def fused_step(layer):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()

    def in_place(layer):
        with torch.no_grad():
            layer.weight.normal_()

    def load(layer):
        layer.load_state_dict({'weight': torch.randn(16, 24)})

    def through_data(layer):
        layer.weight.data.normal_()

    def new_data(layer):
        layer.weight.data = torch.randn(16, 24)

    def half_and_back(layer):
        layer.half().float()
        layer.weight.data += 1

    def new_parameter(layer):
        layer.weight = torch.nn.Parameter(torch.randn(16, 24))
    return [fused_step, in_place, load, through_data, new_data, half_and_back, new_parameter]


@pytest.mark.parametrize('change', changes(), ids=lambda f: f.__name__)
def test_any_change_of_the_weights_is_seen_at_once(change):
    layer, x = bitlinear(), torch.randn(3, 24)
    before = layer(x)
    change(layer)
    assert (layer(x) - before).abs().max() > 1e-3
    torch.testing.assert_close(layer(x).double(), by_hand(layer, x), rtol=1e-5, atol=1e-6)


def test_a_copy_of_a_model_has_codes_of_its_own():
    layer, x = bitlinear(), torch.randn(3, 24)
    layer(x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.normal_()
    torch.testing.assert_close(other(x).double(), by_hand(other, x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x).double(), by_hand(layer, x), rtol=1e-5, atol=1e-6)


def test_inference_mode_and_training_do_not_disturb_each_other():
    layer, x = bitlinear(), torch.randn(3, 24)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().max() > 0


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
    assert dense.packed_bytes() == 2 * sum(p.numel() for p in dense.parameters())
    matrices = 4 * 32 * 32 + 3 * 32 * 96
    assert GPT(GPTConfig(**config, ffn='swiglu', d_ff=96, linear='bitnet')).packed_bytes() == dense.packed_bytes() - 2 * matrices + matrices // 4 + 7 * 4
    trix = GPT(GPTConfig(**config, ffn='trix', trix_tiles=4, trix_hidden=32))
    tiles = sum(p.numel() for m in trix.modules() if isinstance(m, TriX) for p in (m.up, m.down))
    rest = sum(p.numel() for p in trix.parameters()) - tiles
    assert trix.packed_bytes() == 2 * rest + tiles // 4 + 2 * 4 * 4


def test_a_step_of_another_optimizer_costs_at_most_new_codes():
    seen, once = [], OncePerStep(lambda w: seen.append(1) or ternary_codes(w))
    w = torch.nn.Parameter(torch.randn(4, 4))
    once(w), once(w)
    other = torch.nn.Parameter(torch.zeros(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=1.0).step()
    assert F.mse_loss(once(w)[0], ternary_codes(w)[0]) == 0 and len(seen) == 2
