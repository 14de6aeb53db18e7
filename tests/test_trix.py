"""The promises of TriX beyond those of every block."""
import contextlib
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import schedule
import train
from configurator import UserError
from kernels import int8, ternary_codes, tile_codes
from model import GPT, BitLinear, GPTConfig, TriX


def trix(tiles=6, k=2, d=16, h=12, **keys):
    torch.manual_seed(0)
    layer = TriX(GPTConfig(n_embd=d, trix_tiles=tiles, trix_top_k=k, trix_hidden=h, ffn='trix', **keys))
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer


def routing(layer):
    up, _, signature = layer.weights()
    return up, signature


def by_hand(layer, x):
    """The block's formula, one token and one tile at a time."""
    out = torch.zeros_like(x)
    up, a_up = ternary_codes(layer.up, (1, 2))
    down, a_down = ternary_codes(layer.down, (1, 2))
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            v = x[b, t]
            scores = torch.stack([v @ up[e].sum(0).sign() for e in range(layer.n_routed)]) / math.sqrt(len(v))
            chosen = (scores + layer.balance).topk(layer.k).indices.tolist()
            tiles = [(e, 2 * scores[e].sigmoid() / layer.k) for e in chosen] + ([(layer.n_routed, 1.0)] if layer.shared else [])
            for e, gate in tiles:
                hidden = (a_up[e] * up[e] @ v).relu() ** 2
                hidden = hidden / (hidden.square().mean() + 1e-6).sqrt()
                out[b, t] += gate * (a_down[e] * down[e] @ hidden)
    return out


@pytest.mark.parametrize('keys', [{}, {'k': 1}, {'k': 6}, {'trix_shared': True}], ids=str)
@pytest.mark.parametrize('execution', ['dense', 'loop', 'grouped'])
def test_all_executions_equal_the_formula(keys, execution):
    layer, x = trix(**keys), torch.randn(2, 7, 16)
    layer.balance += torch.linspace(-1, 1, 6)
    layer.execution = execution
    torch.testing.assert_close(layer(x), by_hand(layer, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('keys', [{}, {'k': 1}, {'trix_shared': True, 'act_bits': 8}], ids=str)
def test_gradients_of_all_executions_agree(keys):
    grads = []
    for execution in ('dense', 'loop', 'grouped'):
        layer, x = trix(**keys), torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer.execution = execution
        layer(x).square().sum().backward()
        grads.append((x.grad, layer.up.grad, layer.down.grad))
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_codes_are_ternary_with_one_scale_a_tile():
    w = torch.randn(3, 40, 30) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    codes, scale = ternary_codes(w, (1, 2))
    assert set(codes.unique().tolist()) == {-1, 0, 1}
    torch.testing.assert_close(scale.flatten(), w.abs().mean((1, 2)))
    torch.testing.assert_close(codes, torch.where(w.abs() > scale / 2, w.sign(), 0.0))
    assert abs((codes == 0).float().mean() - 0.31) < 0.02  # a Gaussian gives 31 % zeros, at any scale


def test_weights_learn_straight_through_the_ternary_codes():
    layer = trix()
    x = torch.randn(2, 30, 16)
    layer(x).sum().backward()
    with torch.no_grad():
        assert (layer.down.grad != 0).float().mean() > 0.99  # no mask: weights with code 0 learn, too


@pytest.mark.parametrize('execution', ['dense', 'loop', 'grouped'])
def test_only_tiles_that_got_tokens_learn(execution):
    layer = trix()
    layer.balance[4] -= 100.0
    layer.execution = execution
    layer(torch.randn(4, 40, 16)).square().sum().backward()
    got = layer.counts > 0
    assert got.tolist() == [True] * 4 + [False, True]
    assert ((layer.up.grad.abs().amax((1, 2)) > 0) == got).all() and ((layer.down.grad.abs().amax((1, 2)) > 0) == got).all()


def test_up_learns_only_through_the_gate():
    layer, x = trix(), torch.randn(1, 64, 16).flatten(0, 1)
    tiles, gates = layer.route(x, *routing(layer))
    gates.sum().backward()
    got = torch.zeros(6, dtype=torch.bool).scatter(0, tiles.flatten(), True)
    assert ((layer.up.grad.abs().amax((1, 2)) > 0) == got).all()


def test_the_gate_gradient_equals_the_scaled_mean():
    layer, x = trix(k=6), torch.randn(5, 16)
    _, gates = layer.route(x, *routing(layer))
    gates.sum().backward()
    latent = ternary_codes(layer.up, (1, 2))[0].requires_grad_()
    mean, a = latent.mean(1), ternary_codes(layer.up, (1, 2))[1]
    scaled = mean / mean.detach().abs().mean(-1, keepdim=True)
    slope = 2 / 6 * torch.sigmoid(x @ mean.sign().T / 4) * (1 - torch.sigmoid(x @ mean.sign().T / 4))
    (slope.detach() * (x @ scaled.T / 4)).sum().backward()
    torch.testing.assert_close(layer.up.grad * a, latent.grad)


def test_the_balance_affects_the_choice_of_tiles_but_not_the_gates():
    layer, x = trix(tiles=2, k=1), torch.randn(200, 16)
    tiles, gates = layer.route(x, *routing(layer))
    layer.balance[:] = torch.tensor([50.0, -50.0])
    forced, weights = layer.route(x, *routing(layer))
    assert (forced == 0).all() and (tiles == 1).any()
    score = x @ ternary_codes(layer.up, (1, 2))[0][0].sum(0).sign() / 4
    torch.testing.assert_close(weights[:, 0], 2 * score.sigmoid())


def test_balancing_evens_out_a_skewed_load():
    layer, x = trix(tiles=8, k=2), torch.randn(4, 256, 16) + 1.0  # a mean that some signatures like
    overload = []
    for _ in range(400):
        layer(x)
        layer.load += layer.counts
        overload.append((layer.load.max() / layer.load.mean() - 1).item())
        layer.update_balance(1e-2)
    assert overload[0] > 1.0 and overload[-1] < 0.1
    assert abs(layer.balance.mean()) < 1e-5


def test_no_token_is_ever_dropped():
    layer = trix(tiles=6, k=2)
    layer.balance[:2] += 1000.0  # all tokens to two tiles
    layer(torch.randn(8, 64, 16))
    assert layer.counts.tolist() == [512, 512, 0, 0, 0, 0]


def test_load_is_summed_over_micro_steps_and_cleared_by_the_update():
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_embd=32, ffn='trix'))
    idx = torch.randint(50, (2, 16))
    for _ in range(3):
        model(idx, idx).backward()
    with torch.no_grad():
        model(idx, idx)  # without a gradient nothing counts
    model.eval()(idx, idx)
    assert [layer.load.sum().item() for layer in model.trix_layers()] == [3 * 32 * 2] * 2
    model.update_balance(1e-3)
    assert model.statistics()['trix_overload'] >= 0
    assert all(layer.load.sum() == 0 for layer in model.trix_layers())
    assert all(layer.balance.abs().max() > 0 for layer in model.trix_layers())


def test_statistics_of_a_known_load():
    layer = trix(tiles=4, k=1)
    for load in ([50.0, 20.0, 10.0, 0.0], [10.0, 0.0, 10.0, 0.0]):  # two steps
        layer.load[:] = torch.tensor(load)
        layer.update_balance(0.0)
    s = layer.statistics()
    assert layer.statistics()['trix_overload'] == -1, 'nothing since the last look'
    assert s['trix_overload'] == pytest.approx(1.4) and s['trix_dead'] == 0.25
    assert s['trix_entropy'] == pytest.approx((0.6 * math.log(1 / 0.6) + 0.4 * math.log(5)) / math.log(4))
    assert s['ternary_minus'] + s['ternary_zero'] + s['ternary_plus'] == pytest.approx(1)


def test_int8_rounds_to_127_levels_of_the_largest_magnitude_and_passes_the_gradient():
    x = torch.tensor([[1.0, -0.5, 0.003, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    y = int8(x)
    torch.testing.assert_close(y.detach()[0] * 127, torch.tensor([127.0, -64.0, 0.0, 0.0]))
    assert y[1].abs().max() == 0
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 4))


def test_under_autocast_codes_and_routes_equal_fp32():
    layer, x = trix(d=64, h=32), torch.randn(1, 100, 64)
    seen = []
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            y = layer(x)
        seen.append((layer.counts, y.float()))
    assert torch.equal(seen[0][0], seen[1][0])
    assert (seen[0][1] - seen[1][1]).abs().max() < 0.05 * seen[0][1].abs().max()


# ---- routing baselines

def test_the_first_router_is_a_dense_ffn_of_the_first_tiles():
    layer, x = trix(trix_router='first'), torch.randn(2, 7, 16)
    layer(x)
    assert layer.counts.tolist() == [14, 14, 0, 0, 0, 0]


def test_the_hash_router_sends_a_token_always_to_the_same_tiles_and_spreads_tokens_evenly():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=2000, block_size=64, n_layer=2, n_embd=32, ffn='trix', trix_router='hash'))
    layer = model.trix_layers()[0]
    assert (layer.table.sort(-1).values.diff() > 0).all(), 'k different tiles'
    idx = torch.randint(2000, (8, 64))
    model(idx, idx).backward()
    assert torch.equal(layer.counts, torch.bincount(layer.table[idx].flatten(), minlength=8).float())
    assert layer.counts.max() / layer.counts.mean() < 1.3
    again = GPT(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.trix_layers()[0].table, layer.table) and torch.equal(again(idx), model(idx))


def test_gates_use_the_signatures_with_every_router():
    layer, x = trix(k=6, trix_router='first'), torch.randn(1, 5, 16)
    other = trix(k=6)
    torch.testing.assert_close(layer(x), other(x))


# ---- several processes, several micro-steps

def two_steps(micro_steps, rank, world, wrap=lambda model: model, no_sync=False):
    """Two optimizer steps on the part of the batches that is this rank's -> the model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_embd=32, ffn='trix'))
    wrapped = wrap(model)
    for step in range(2):
        idx = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step))
        parts = idx.chunk(micro_steps * world)[rank * micro_steps:(rank + 1) * micro_steps]
        for micro, part in enumerate(parts):
            with wrapped.no_sync() if no_sync and micro + 1 < micro_steps else contextlib.nullcontext():
                (wrapped(part[:, :-1], part[:, 1:]) / micro_steps).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
                p.grad = None
        model.update_balance(0.1)
    return model


def as_rank(rank, out):  # the body of each process of the next test
    dist.init_process_group('gloo', rank=rank, world_size=2)
    for no_sync in (True, False):
        model = two_steps(2, rank, 2, torch.nn.parallel.DistributedDataParallel, no_sync)
        torch.save({**model.state_dict(), **{f'seen{i}': t.seen for i, t in enumerate(model.trix_layers())}}, f'{out}/{rank}{no_sync}.pt')
    dist.destroy_process_group()  # gloo's threads must not outlive the interpreter


def test_two_processes_with_two_micro_steps_train_and_balance_as_one_process(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'OMP_NUM_THREADS': '1',
           'PYTHONPATH': os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parent.parent)))}
    ranks = [subprocess.Popen([sys.executable, '-c', f'import test_trix; test_trix.as_rank({rank}, {str(tmp_path)!r})'], env=env)
             for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    expected = two_steps(1, 0, 1)
    for no_sync in (True, False):
        for rank in (0, 1):
            got = torch.load(tmp_path / f'{rank}{no_sync}.pt', weights_only=True)
            for name, value in expected.state_dict().items():
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=lambda m: f'{name} {rank} {no_sync}: {m}')
            for i, layer in enumerate(expected.trix_layers()):
                assert torch.equal(got[f'seen{i}'], layer.seen) and layer.seen.sum() == 2 * 128 * 2, 'every token counts once'


def test_weights_become_ternary_over_the_warm_up():
    config = train.load(['--ffn=trix', '--ternary_warmup=0.5', '--max_steps=100'])
    assert [schedule.ternary_share(step, config) for step in (0, 25, 50, 99)] == [0, 0.5, 1, 1]
    assert schedule.ternary_share(0, train.load(['--ffn=trix'])) == 1
    assert 50 in schedule.corners(config)


@pytest.mark.parametrize('options', [dict(ffn='trix', trix_tiles=4), dict(ffn='relu2', linear='bitnet')])
def test_a_model_in_the_ternary_warm_up_has_weights_between_latent_and_ternary(options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64, **options))
    layer = next(module for module in model.modules() if isinstance(module, (TriX, BitLinear)))
    weight = layer.up if isinstance(layer, TriX) else layer.weight
    x = torch.randn(2, 8, 32)
    ternary = layer(x)
    results = {}
    for share in (0.0, 0.5, 1.0):
        model.set_ternary(share)
        results[share] = layer(x)
        weight.grad = None
        results[share].square().mean().backward()
        assert weight.grad.abs().sum() > 0
    assert torch.equal(results[1.0], ternary) and layer.share is None
    if isinstance(layer, BitLinear):
        assert torch.allclose(results[0.0], F.linear(int8(x), weight))
        assert torch.allclose(results[0.5], (results[0.0] + results[1.0]) / 2, atol=1e-5)
    else:
        model.set_ternary(0.5)
        up, _, signature = layer.weights()
        codes, same = tile_codes(weight)
        assert torch.allclose(up, (weight + codes) / 2) and torch.equal(signature, same)
        assert not torch.equal(results[0.5], results[1.0])


@pytest.mark.parametrize('words, message', [
    (['--ffn=gelu', '--ternary_warmup=0.5'], 'ternary_warmup=0.5 needs ternary weights'),
    (['--ffn=trix', '--ternary_warmup=1'], 'ternary_warmup=1 must lie between 0 and 0.9')])
def test_a_ternary_warm_up_that_cannot_be_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        train.load(words)


def test_a_compiled_model_follows_the_ternary_warm_up_without_compiling_anew(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=32, ffn='trix', trix_tiles=2,
                          linear='bitnet'))
    compilations, idx = [], torch.randint(32, (2, 8))

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward
    fast = torch.compile(model, backend=backend)
    losses = []
    for share in (0.0, 0.3, 0.6, 0.9):
        model.set_ternary(share)
        losses.append(model(idx, idx).item())
        assert fast(idx, idx).item() == pytest.approx(losses[-1], rel=1e-5)
    in_the_warm_up = len(compilations)
    model.set_ternary(1.0)
    assert fast(idx, idx).item() == pytest.approx(model(idx, idx).item(), rel=1e-5)
    assert len(set(losses)) == 4 and in_the_warm_up == 1 and len(compilations) == 2
