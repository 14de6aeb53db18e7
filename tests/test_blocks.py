"""What every block promises. A mixer or an FFN that VARIANTS does not name is tested with the default options, too."""
import argparse
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels
from model import FFNS, MIXERS, GPT, GPTConfig, Resonance

V, T = 61, 32  # vocabulary and context of the models in here
VARIANTS = {
    'gelu': dict(ffn='gelu'),
    'relu2': dict(ffn='relu2', qk_norm=True),
    'swiglu': dict(ffn='swiglu', n_kv_head=2, tie_embeddings=False),  # Llama
    'gpt2': dict(ffn='gelu', norm='layernorm', positions='learned', bias=True),
    'nope': dict(ffn='gelu', positions='none', n_kv_head=1),
    'softcap': dict(ffn='relu2', qk_norm=True, embed_norm=True, embed_taps=3, logit_softcap=3.0),
    'none': dict(ffn='none'),
    'trix': dict(ffn='trix'),
    'trix_top1': dict(ffn='trix', trix_top_k=1, trix_tiles=4),
    'trix_all': dict(ffn='trix', trix_shared=True, act_bits=8, bias=True),
    'bitnet_ffn': dict(ffn='gelu', linear='bitnet_ffn'),
    'trix_cut': dict(ffn='trix', trix_cut='swiglu', trix_hidden=16, bias=True),
    'trix_hash': dict(ffn='trix', trix_router='hash'),
    'bitnet': dict(ffn='bitnet', n_kv_head=2),
    'bitnet_all': dict(ffn='swiglu', linear='bitnet', n_kv_head=2),
    'bitnet_llama': dict(ffn='relu2', linear='bitnet', sub_norm=False, bias=True),
    'resonance': dict(mixer='resonance', ffn='swiglu', num_frequencies=8),
    'resonance_chunks': dict(mixer='resonance', ffn='none', num_frequencies=6, chunk_size=5, positions='learned'),
    'resonance_ffn': dict(mixer='attention', ffn='resonance', num_frequencies=8, chunk_size=8),
    'hybrid': dict(mixer='resonance', attention_every=2, linear='bitnet', ffn='swiglu', num_frequencies=8),
    'hybrid_trix': dict(mixer='resonance', attention_every=2, ffn='trix', num_frequencies=8, chunk_size=16),
}
for part, names in (('ffn', FFNS), ('mixer', MIXERS)):
    tested = {options.get(part, getattr(GPTConfig, part)) for options in VARIANTS.values()}
    VARIANTS |= {name: {part: name} for name in names if name not in tested}
every_block = pytest.mark.parametrize('name', VARIANTS)
# Those left out of the tests that train learn as others do.
each_kind = pytest.mark.parametrize('name', [name for name in VARIANTS if name not in (
    'gpt2', 'nope', 'softcap', 'trix_top1', 'trix_hash', 'bitnet', 'bitnet_ffn', 'bitnet_llama', 'hybrid_trix')])
each_part = pytest.mark.parametrize('name', [name for name in VARIANTS if name not in (
    'gpt2', 'nope', 'softcap', 'trix_top1', 'trix_all', 'trix_cut', 'trix_hash', 'bitnet', 'bitnet_ffn',
    'bitnet_llama', 'resonance_chunks', 'hybrid', 'hybrid_trix')])


def fresh(name, seed=0, **changes):
    """A model of a variant, as it is initialised."""
    torch.manual_seed(seed)
    small = dict(block_size=T, vocab_size=V, n_layer=2, n_head=4, n_embd=32)
    return GPT(GPTConfig(**{**small, **VARIANTS[name], **changes}))


def build(name, seed=0, **changes):
    model = fresh(name, seed, **changes)
    with torch.no_grad():  # as after some training: logits that depend on everything, by much more than rounding
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    return model


@pytest.fixture(params=['rounded', 'smooth'])
def tolerance(request, name, monkeypatch):
    """The error that rounding may make.

    Where activations are rounded to int8, noise of 1e-7 can change a code, which then shows at 1e-3. So those blocks
    are tested twice: strictly without the rounding, and loosely with it."""
    if not (VARIANTS[name].get('act_bits') or 'bitnet' in VARIANTS[name].values()):
        return 1e-5 if request.param == 'rounded' else pytest.skip('no activation is rounded')
    if request.param == 'rounded':
        return 0.05
    rounded = kernels.int8_codes
    monkeypatch.setattr(kernels, 'int8_codes', lambda x: (x.float() * rounded(x)[1], rounded(x)[1]))
    return 1e-5


def tokens(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tolerance=1e-5, advice=''):
    assert (a - b).abs().max().item() <= tolerance * b.abs().max().item(), advice


# ---- 1. causal

@every_block
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_tokens_from_t_on_never_change_logits_before_t(name, train, tolerance):
    model = build(name).train(train)
    for length in (32, 31, 27):  # a power of two, a prime, an odd number
        a = tokens(2, length)
        for t in (1, length // 2, length - 1):
            b = a.clone()
            b[:, t:] = (b[:, t:] + 1 + tokens(2, length - t, seed=2) % (V - 1)) % V
            with torch.no_grad():
                before, after = model(a), model(b)
            assert_close(after[:, :t], before[:, :t], tolerance)
            assert (after[:, t:] - before[:, t:]).abs().max() > 0.01, 'the change must show from t on'


@every_block
def test_gradient_of_a_logit_by_a_later_embedding_is_zero(name):
    model = build(name)
    seen = {}
    model.wte.register_forward_hook(lambda module, inputs, output: seen.update(x=output))
    logits = model(tokens(1, T))
    for i in (0, 7, T - 2):
        grad, = torch.autograd.grad(logits[0, i].square().sum(), seen['x'], retain_graph=True)
        has_fft = any(isinstance(module, Resonance) for module in model.modules())
        rounding = 1e-6 * grad[0, i].abs().max() if has_fft else 0
        assert grad[0, i + 1:].abs().max() <= rounding
        assert grad[0, i].abs().max() > 0


@each_kind
def test_fresh_random_tokens_are_never_predicted(name):
    model = build(name, vocab_size=16)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.div_(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(5)
    losses = []
    for _ in range(60):
        idx = torch.randint(16, (16, T + 1))
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses) > math.log(16) - 0.03  # a leak falls far below at once; sampling noise is about 0.01


# ---- 2. prefix and cache

@every_block
def test_logits_of_a_prefix_are_the_prefix_of_the_logits(name, tolerance):
    model, idx = build(name).eval(), tokens(2, T)
    full = model(idx)
    for t in (1, 5, 16, 31):
        assert_close(model(idx[:, :t]), full[:, :t], tolerance)


@every_block
@pytest.mark.parametrize('parts', [[1] * T, [7] + [1] * (T - 7), [5, 11, 1, T - 17], [T]],
                         ids=['steps', 'prefill', 'chunks', 'whole'])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(name, parts, tolerance):
    model, idx = build(name).eval(), tokens(3, T)
    cache = model.new_cache(3)
    got = torch.cat([model(part, cache=cache) for part in idx.split(parts, 1)], 1)
    assert_close(got, model(idx), tolerance, f'{name}: a block that looks at other positions needs new_cache(B), '
                 'and forward(x, cache) must go on from it (see Attention)')


def test_a_context_over_block_size_is_refused():
    model, cache = build('gelu'), build('gelu').new_cache(1)
    with pytest.raises(AssertionError, match='33 positions, but block_size is 32'):
        model(tokens(1, T + 1))
    model(tokens(1, T), cache=cache)
    with pytest.raises(AssertionError, match='33 positions'):
        model(tokens(1, 1), cache=cache)


# ---- 3. one function in train, eval, batches and after a reload

@every_block
def test_train_equals_eval_without_dropout(name):
    model, idx = build(name), tokens(2, T)
    assert torch.equal(model.train()(idx), model.eval()(idx))


def test_dropout_acts_in_train_and_not_in_eval():
    model, idx = build('gelu', dropout=0.5), tokens(2, T)
    assert (model(idx) - model(idx)).abs().max() > 0.1
    model.eval()
    assert torch.equal(model(idx), model(idx))


@every_block
def test_a_sequence_does_not_depend_on_its_batch_mates(name, tolerance):
    model, idx = build(name).eval(), tokens(8, T)
    full = model(idx)
    for row in (0, 3, 7):
        assert_close(model(idx[row:row + 1]), full[row:row + 1], tolerance)


@every_block
def test_a_strict_load_into_a_fresh_model_gives_the_same_logits(name):
    model, other, idx = build(name), build(name, seed=9), tokens(2, T)
    model(idx, idx).backward()
    model.update_balance(0.1)  # buffers are part of the function, too
    assert (model(idx) - other(idx)).abs().max() > 0.01
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(idx), other(idx))


# ---- 4. everything learns

@every_block
def test_every_parameter_gets_a_gradient_within_a_few_steps(name):
    model = build(name)
    missing = {key for key, p in model.named_parameters()}
    for step in range(4):
        idx = tokens(8, T + 1, seed=step)
        model(idx[:, :-1], idx[:, 1:]).backward()
        missing -= {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert not missing, f'{name}: these parameters never learn'


@pytest.mark.parametrize('name', ['gelu', 'swiglu', 'trix', 'bitnet_all', 'resonance', 'resonance_ffn'])
def test_with_zero_init_blocks_start_as_the_identity_and_learn_from_the_second_step_on(name):
    model = fresh(name, zero_init=True)
    idx, x = tokens(2, T + 1), torch.randn(2, T, 32)
    for block in model.blocks:
        assert torch.equal(block(x), x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_embed_norm_and_softcap_are_their_formulas():
    plain, other = build('gelu'), build('gelu', embed_norm=True, logit_softcap=3.0)
    with torch.no_grad():
        other.load_state_dict(plain.state_dict())
        idx, scale = tokens(2, T), plain.wte.weight.square().mean(1, keepdim=True).add(1e-6).sqrt()
        plain.lm_head.weight = torch.nn.Parameter(plain.wte.weight.clone())
        plain.wte.weight.div_(scale)
        assert_close(other(idx), 3 * torch.tanh(plain(idx) / 3))
        assert other(idx).abs().max() <= 3 < plain(idx).abs().max()


def test_taps_weigh_a_token_and_its_predecessors_by_channel():
    models = []
    for taps in (0, 3):
        torch.manual_seed(0)
        models.append(GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=16, embed_taps=taps)))
    plain, other = models
    assert torch.equal(plain(tokens(2, T)), other(tokens(2, T)))  # they start as if they weren't there
    with torch.no_grad():
        a, b, c = other.taps.copy_(torch.randn(3, plain.config.n_embd))
        idx, seen = tokens(1, 4), []
        other.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        other(idx)
        e = other.wte(idx[0])
        by_hand = [a * e[0], a * e[1] + b * e[0], a * e[2] + b * e[1] + c * e[0], a * e[3] + b * e[2] + c * e[1]]
        assert_close(seen[0][0], torch.stack(by_hand))


# ---- 5. it can learn

@each_kind
def test_a_model_can_memorise_one_batch(name):
    model = fresh(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    idx = tokens(4, T + 1)
    for step in range(400):
        for group in optimizer.param_groups:
            group['lr'] = 1e-2 * (1 - step / 450)
        loss = model(idx[:, :-1], idx[:, 1:])
        if loss < 0.1:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_balance(1e-3)
    pytest.fail(f'{name}: loss {loss.item():.3f} after {step + 1} steps on one batch')


@each_part
def test_bytes_are_predicted_better_than_by_a_bigram_table(name):
    text = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8).astype(np.int64)
    cut = len(text) * 9 // 10
    train, val = text[:cut], text[cut:]
    pairs, ones = np.full((256, 256), 1e-9), np.bincount(train, minlength=256) + 0.1
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    bigram = (pairs / pairs.sum(1, keepdims=True))[val[:-1], val[1:]]
    unigram = (ones / ones.sum())[val[1:]]
    best = min(-np.log(w * bigram + (1 - w) * unigram).mean() for w in (0.8, 0.9, 0.95, 0.98))

    model = fresh(name, block_size=64, vocab_size=256, n_embd=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    draw = np.random.default_rng(0)
    val = torch.from_numpy(val[:len(val) // 65 * 65].reshape(-1, 65))
    for step in range(1, 301):
        for group in optimizer.param_groups:
            group['lr'] = 1e-2 * min(step / 20, 1.05 - step / 300)
        idx = torch.from_numpy(np.stack([train[i:i + 65] for i in draw.integers(len(train) - 65, size=16)]))
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_balance(1e-3)
        if step % 50 == 0:
            with torch.no_grad():
                loss = model(val[:, :-1], val[:, 1:]).item()
            if loss < best:
                return
    pytest.fail(f'{name}: {loss:.3f} nats, the bigram table has {best:.3f}')


# ---- 6. start, exact variants of execution, counts

@every_block
def test_the_loss_starts_at_ln_vocab_size(name):
    model = fresh(name, block_size=64, vocab_size=8192, n_layer=3, n_embd=128)
    idx = torch.randint(8192, (4, 65))
    assert abs(model(idx[:, :-1], idx[:, 1:]).item() - math.log(8192)) < 0.3


@every_block
def test_activation_checkpointing_changes_nothing(name):
    idx = tokens(2, T + 1)
    plain, saving = build(name), build(name)
    saving.activation_checkpointing = True
    losses = [model(idx[:, :-1], idx[:, 1:]) for model in (plain, saving)]
    assert torch.equal(*losses)
    for model, loss in zip((plain, saving), losses):
        loss.backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(plain.trix_layers(), saving.trix_layers()):
        assert torch.equal(a.load, b.load)
        assert a.load.sum() == 2 * T * a.k, 'a token is counted once, although its block ran twice'


@pytest.mark.parametrize('name', [
    'gelu', 'swiglu', 'trix', 'trix_all', 'bitnet_all', 'resonance', 'resonance_chunks', 'hybrid'])
def test_under_autocast_the_loss_equals_fp32_and_every_parameter_learns(name):
    idx, model = tokens(4, T + 1), build(name)
    expected = model(idx[:, :-1], idx[:, 1:]).item()
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=0.03)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def fft_flops(n, shape):  # of real FFTs of n along one of the dimensions
    return 2.5 * n * math.log2(n) * math.prod(shape) / n


@every_block
def test_flops_per_token_equal_those_that_torch_counts(name):
    model, idx = build(name).eval(), tokens(2, T)
    aten = torch.ops.aten
    count_ffts = {aten._fft_r2c: lambda x, dim, *_, **__: fft_flops(x[dim[0]], x),
                  aten._fft_c2r: lambda x, dim, norm, n, out_shape=None, **__: fft_flops(n, out_shape)}
    with FlopCounterMode(display=False, custom_mapping=count_ffts) as counter, torch.no_grad(), \
            sdpa_kernel(SDPBackend.MATH):  # the others go uncounted
        model(idx)
    filters = 0  # made once for all sequences, so they don't count for a token
    for layer in model.modules():
        if isinstance(layer, Resonance):
            (K, C), S = layer.magnitude.shape, min(T, layer.chunk_size)
            n = min(base << a for base in (1, 3, 5) for a in range(9) if base << a >= 2 * S - 1)
            filters += 2 * S * 2 * K * C + fft_flops(n, (n, C))
    counted = 3 * (counter.get_total_flops() - filters) / idx.numel()
    assert model.flops_per_token(T) == pytest.approx(counted, rel=1e-6), (
        f'{name}: call its matrices *_proj, and count other products in its flops_per_token(T) (see Attention)')


@every_block
def test_parameter_table_adds_up(name):
    model = build(name)
    table = model.parameter_table()
    assert sum(total for _, total, _ in table) == sum(p.numel() for p in model.parameters())
    biases = {t: t.up[0].size(0) if t.up_bias is not None else 0 for t in model.trix_layers()}  # of a tile
    unused = sum((len(t.up) - t.k - t.shared) * (t.up[0].numel() + t.down[0].numel() + biases[t]) for t in biases)
    assert sum(total - used for _, total, used in table) == unused


def test_parameter_counts_of_known_models():
    count = lambda **keys: sum(p.numel() for p in GPT(GPTConfig(**keys)).parameters())
    with torch.device('meta'):
        assert count(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, ffn='gelu', norm='layernorm',
                     positions='learned', bias=True) == 124_439_808  # GPT-2 small as published by OpenAI
        assert count(vocab_size=32000, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, d_ff=5632, ffn='swiglu',
                     tie_embeddings=False) == 1_100_048_384  # TinyLlama 1.1B


# ---- the loss

@pytest.mark.parametrize('tie', [True, False])
def test_chunked_loss_equals_cross_entropy_of_all_logits(tie):
    a, b = (build('gelu', tie_embeddings=tie, vocab_size=4099) for _ in range(2))
    idx = tokens(9, T)  # 288 rows: a whole chunk of 256 and a part
    targets = tokens(9, T, seed=3)
    targets[0, 3:20] = -1  # ignored
    loss = a(idx, targets)
    expected = F.cross_entropy(b(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    assert_close(loss, expected)
    (3 * loss).backward(), (3 * expected).backward()
    for p, q in zip(a.parameters(), b.parameters()):
        assert_close(p.grad, q.grad)


def test_the_loss_never_holds_all_logits():
    model, idx = build('none', vocab_size=16_384, block_size=512), tokens(4, 512)
    logits = idx.numel() * 16_384
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.numel() != model.wte.weight.numel():
                    largest = max(largest, t.numel())
            return out
    with Watch():
        model(idx, idx).backward()
    assert 0 < largest <= logits / 8
