"""Documents that share a row: with document_mask, a token sees only its own document, in every block and execution."""
import math

import pytest
import torch
from test_blocks import VARIANTS, T, V, build, tokens
from test_compile import compare
from torch.nn.attention import flex_attention

import model as module
from kernels import document_ages
from model import GPT, GPTConfig

EOT = V - 1
MASK = dict(document_mask=True, eot_id=EOT)
KINDS = {
    'rotary': dict(ffn='gelu'),
    'grouped': dict(ffn='swiglu', n_kv_head=2, qk_norm=True),
    'learned': dict(ffn='gelu', norm='layernorm', positions='learned', bias=True),
    'none': dict(ffn='relu2', positions='none', n_kv_head=1),
    'taps': dict(ffn='relu2', embed_taps=3, embed_norm=True, logit_softcap=3.0),
    'trix': dict(ffn='trix', trix_shared=True),
    'hash': dict(ffn='trix', trix_router='hash', positions='learned'),
    'resonance': dict(mixer='resonance', ffn='swiglu', num_frequencies=8),
    'chunks': dict(mixer='resonance', ffn='none', num_frequencies=6, chunk_size=5, positions='learned', embed_taps=2),
    'resonance_ffn': dict(ffn='resonance', num_frequencies=8),
    'hybrid': dict(mixer='resonance', attention_every=2, ffn='swiglu', num_frequencies=8, n_kv_head=2),
}
LENGTHS = [(7, 1, 11, 5, 8), (32,), (3, 29), (1, 1, 1, 28, 1)]  # of the documents in each row of T, their end included; the last one is cut
every_kind = pytest.mark.parametrize('name', KINDS)


@pytest.fixture(autouse=True)
def more_variants(monkeypatch):
    for name, keys in KINDS.items():
        monkeypatch.setitem(VARIANTS, name, keys)


def packed(seed=1):
    """(4, T): rows of documents, each but a row's last one with its end."""
    idx = tokens(len(LENGTHS), T, seed=seed) % EOT
    for row, lengths in zip(idx, LENGTHS):
        row[torch.tensor(lengths[:-1], dtype=torch.int64).cumsum(0) - 1] = EOT
    return idx


def documents(x):  # (4, T) -> its parts (1, n), a document each
    return [part[None] for row, lengths in zip(x, LENGTHS) for part in row.split(lengths)]


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


# ---- alone and together

@every_kind
def test_a_row_of_documents_has_the_logits_of_each_document_alone(name):
    model, plain, idx = build(name, **MASK).eval(), build(name).eval(), packed()
    together = model(idx)
    for document, logits in zip(documents(idx), documents(together)):
        close(logits, model(document))
        close(logits, plain(document))
    assert (together - plain(idx)).abs().max() > 0.1, 'without the mask they see each other'


@every_kind
def test_loss_and_gradients_are_the_mean_over_the_tokens_of_each_document_alone(name):
    model, alone, idx, targets = build(name, **MASK), build(name), packed(), tokens(len(LENGTHS), T, seed=7)
    loss = model(idx, targets)
    loss.backward()
    total = sum(alone(x, y) * y.numel() for x, y in zip(documents(idx), documents(targets))) / targets.numel()
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    for (key, p), q in zip(model.named_parameters(), alone.named_parameters()):
        close(p.grad, q[1].grad, 1e-5 * max(1.0, q[1].grad.abs().max().item()))
    for a, b in zip(model.trix_layers(), alone.trix_layers()):
        assert torch.equal(a.load, b.load), 'the load of the tiles is counted as before'


@every_kind
def test_no_gradient_reaches_another_document(name):
    model, idx, seen = build(name, **MASK), packed(), {}
    model.wte.register_forward_hook(lambda module, inputs, output: seen.update(x=output))
    logits = model(idx)
    for row, first, last in ((0, 8, 18), (3, 3, 30)):
        grad, = torch.autograd.grad(logits[row, last].square().sum(), seen['x'], retain_graph=True)
        others = torch.ones(len(idx), T, dtype=torch.bool)
        others[row, first:last + 1] = False
        assert (grad[others] == 0).all(), 'exactly nothing'
        assert grad[row, first].abs().max() > 0


@every_kind
def test_without_documents_in_a_row_the_mask_changes_nothing(name):
    idx = packed() % EOT
    close(build(name, **MASK)(idx), build(name)(idx), 1e-6)
    config = GPTConfig(vocab_size=V, **KINDS[name])
    assert not config.document_mask and config.eot_id == -1


@every_kind
def test_the_loss_starts_at_ln_vocab_size(name):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=64, vocab_size=8192, n_layer=3, n_head=4, n_embd=128), **KINDS[name], **MASK}))
    idx = torch.randint(8192, (4, 65))
    idx[torch.rand(4, 65) < 0.1] = EOT
    assert abs(model(idx[:, :-1], idx[:, 1:]).item() - math.log(8192)) < 0.3


def test_the_age_of_a_token_counts_the_tokens_of_its_document_before_it():
    idx = torch.tensor([[5, EOT, 3, EOT, EOT, 1], [1, 2, 3, 4, 5, EOT]])
    assert document_ages(idx, EOT, torch.tensor([0, 0])).tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert document_ages(idx, EOT, torch.tensor([4, 2])).tolist() == [[4, 5, 0, 1, 0, 0], [2, 3, 4, 5, 6, 7]]


def test_a_mask_without_the_token_that_ends_a_document_is_refused():
    with pytest.raises(AssertionError, match='set eot_id to the id of the end-of-text token'):
        GPT(GPTConfig(document_mask=True))


# ---- in parts

@every_kind
@pytest.mark.parametrize('parts', [[1] * T, [7] + [1] * (T - 7), [5, 11, 1, T - 17], [T]], ids=['steps', 'prefill', 'chunks', 'whole'])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(name, parts):
    model, idx = build(name, **MASK).eval(), packed()
    cache = model.new_cache(len(idx))
    got = torch.cat([model(part, cache=cache) for part in idx.split(parts, 1)], 1)
    close(got, model(idx))


# ---- checkpointed, compiled, in bf16, distilled

@every_kind
def test_activation_checkpointing_changes_nothing(name):
    idx, losses, models = packed(), [], [build(name, **MASK), build(name, **MASK)]
    models[1].activation_checkpointing = True
    for model in models:
        losses.append(model(idx[:, :-1], idx[:, 1:]))
        losses[-1].backward()
    assert torch.equal(*losses)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(*(model.parameters() for model in models)))


@pytest.fixture
def with_documents(monkeypatch):
    """The batches of test_compile.compare consist of documents."""
    import test_compile
    monkeypatch.setattr(test_compile, 'tokens', lambda *shape: torch.cat((packed()[[0, 3]], tokens(2, 1)), 1))


SLOW = pytest.mark.slow
SAVING = dict(activation_checkpointing=True)
BF16 = dict(bf16=True, tolerance=(2e-3, 0.06))


@pytest.mark.parametrize('name, changes', [
    ('chunks', {}), ('hybrid', SAVING), pytest.param('learned', {}, marks=SLOW), pytest.param('taps', SAVING, marks=SLOW),
    pytest.param('trix', SAVING, marks=SLOW), pytest.param('grouped', BF16, marks=SLOW)])
def test_every_kind_traced(monkeypatch, with_documents, name, changes):
    compare(monkeypatch, name, 'loop' if name == 'trix' else '', 'aot_eager', **MASK, **changes)


@pytest.mark.parametrize('name, changes', [
    ('grouped', {}), pytest.param('hybrid', SAVING, marks=SLOW), pytest.param('rotary', BF16, marks=SLOW)])
def test_flex_attention_traced(monkeypatch, with_documents, name, changes):
    masks, make = [], module.flex_document_mask
    monkeypatch.setattr(module, 'flex_document_mask', lambda age: (masks.append(1), make(age))[1])
    monkeypatch.setattr(flex_attention, '_validate_device', lambda *qkv: None)  # it has gradients on a CPU, too, but no kernel for them
    compare(monkeypatch, name, '', 'aot_eager', **MASK, **changes, n_embd=64, flex_devices=('cpu',))
    assert masks, 'this is what the test is about'


@pytest.mark.slow
@pytest.mark.parametrize('name', ['grouped', 'learned', 'taps', 'trix', 'chunks', 'hybrid'])
def test_every_kind_by_inductor(monkeypatch, with_documents, name):
    compare(monkeypatch, name, 'loop' if name == 'trix' else '', 'inductor', **MASK)


@pytest.mark.parametrize('name', ['grouped', 'learned', 'chunks', 'hybrid'])
def test_under_autocast_the_loss_equals_fp32(name):
    idx, model = packed(), build(name, **MASK)
    expected = model(idx[:, :-1], idx[:, 1:]).item()
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.03)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_teacher_has_a_mask_of_its_own():
    student, idx = build('rotary', **MASK), packed()
    for changes in ({}, MASK):
        teacher = build('learned', seed=5, **changes)
        logits = teacher(idx)
        expected = torch.nn.functional.kl_div(student(idx).log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction='none').sum(-1).mean()
        assert student(idx, idx, teacher=teacher.soft_targets(idx, 1.0)).item() == pytest.approx(expected.item(), rel=1e-5)


# ---- packed

@pytest.mark.parametrize('changes', [dict(ffn='bitnet', n_kv_head=2), dict(ffn='relu2', linear='bitnet', positions='learned', embed_taps=3),
                                     dict(ffn='trix', positions='none'), dict(mixer='resonance', ffn='trix', attention_every=2)], ids=str)
@torch.no_grad()
def test_packed_decoding_keeps_to_the_document(monkeypatch, changes):
    from deploy import packed as deployed
    monkeypatch.setitem(VARIANTS, 'changed', changes)
    model, idx = build('changed', **MASK).eval(), packed()
    other = deployed.build(model.config, {'packed': deployed.pack(model), 'embeddings': 'float32'}, 'here', torch.device('cpu'))
    full = other(idx)
    for parts in ([1] * T, [13] + [1] * (T - 13)):
        cache = other.new_cache(len(idx))
        got = torch.cat([other(part, cache=cache) for part in idx.split(parts, 1)], 1)
        close(got, full, 0.02 if 'bitnet' in changes.values() else 1e-5)
    close(full, model(idx), 0.02 if 'bitnet' in changes.values() else 1e-5)
