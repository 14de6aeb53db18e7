"""Decoding with fixed addresses, as a CUDA graph needs them, equals the full forward. Without a GPU: a fake records the graph."""
import contextlib
import types

import pytest
import torch
import test_documents
from test_blocks import VARIANTS, T, V, assert_close, build, each_part, tolerance, tokens  # noqa: F401
from test_packed import VARIANTS as PACKED
from test_packed import ids, opened, trained
from torch.fx.experimental.proxy_tensor import make_fx

from deploy import packed
from runtime import compiler, decoding, generation


class Graphs:
    """A fake of CUDA graphs. Recording computes nothing, and every replay writes to the same output."""

    def __init__(self):
        self.recorded = self.replayed = 0
        self.sequences = []

    def record(self, function):
        sequences = self.sequences[-1]
        saved = [tensor.clone() for tensor in sequences.cache.tensors()], sequences.position.clone()
        output = function()
        for tensor, value in zip((*sequences.cache.tensors(), sequences.position), (*saved[0], saved[1])):
            tensor.copy_(value)
        self.recorded += 1

        def replay():
            self.replayed += 1
            with sequences.context(), sequences.cache.at(sequences.position):
                output.copy_(function())
        return replay, output


@pytest.fixture
def graphs(monkeypatch):
    """The decoder of a GPU on the CPU."""
    found, start = Graphs(), decoding.Sequences.__init__

    def init(self, *arguments):
        start(self, *arguments)
        found.sequences.append(self)
    monkeypatch.setattr(decoding.Sequences, '__init__', init)
    monkeypatch.setattr(decoding, 'record', found.record)
    monkeypatch.setattr(generation, 'GRAPH_DEVICES', {'cpu'})
    torch._dynamo.reset()
    return found


def decoded(decoder, idx, *parts):
    """Logits at the end of each part of idx, which is read in these parts and then token by token -> (B, parts, V)"""
    decoder.start(len(idx))
    parts = [*parts, *[1] * (idx.size(1) - sum(parts))]
    return torch.stack([decoder(part) for part in idx.split(parts, 1)], 1)


@each_part
@torch.no_grad()
def test_steps_of_a_graph_equal_the_full_forward(name, tolerance, graphs, capsys):  # noqa: F811
    model, idx = build(name).eval(), tokens(2, T)
    decoder, expected = generation.decoder_for(model), model(idx)
    for _ in range(2):  # the second text uses the same graph
        assert_close(decoded(decoder, idx, 7), expected[:, 6:], tolerance)
    assert (graphs.recorded, graphs.replayed) == (1, 2 + 2 * (T - 7)) and capsys.readouterr().err == ''


@pytest.mark.parametrize('name', ['grouped', 'learned', 'taps', 'hash', 'chunks', 'hybrid'])
@torch.no_grad()
def test_steps_of_a_graph_keep_to_the_document(name, graphs, monkeypatch, capsys):
    monkeypatch.setitem(VARIANTS, name, test_documents.KINDS[name])
    model, idx = build(name, **test_documents.MASK).eval(), test_documents.packed()
    decoder, expected = generation.decoder_for(model), model(idx)
    for first in (3, 9):  # a document that the prompt begins, and one that ends in it
        assert_close(decoded(decoder, idx, first), expected[:, first - 1:])
    assert graphs.recorded == 1 and capsys.readouterr().err == ''


@pytest.mark.parametrize('name', PACKED)
@torch.no_grad()
def test_steps_of_a_packed_model_equal_its_full_forward(name, graphs, capsys):
    model = packed.build(*opened(trained(**PACKED[name])))
    expected = model(ids(rows=3))
    with torch.autocast('cpu', torch.bfloat16):  # a packed model decodes in fp32
        found = decoded(generation.decoder_for(model), ids(rows=3), 5)
    assert torch.allclose(found, expected[:, 4:], rtol=0, atol=2e-5)
    assert graphs.recorded == 1 and capsys.readouterr().err == ''


COMPILED = {'gelu': {}, 'trix': {}, 'bitnet_all': {}, 'resonance': {}, 'hybrid_trix': {}}


@pytest.mark.parametrize('name, backend', [
    *[(name, 'aot_eager') for name in COMPILED],
    *[pytest.param(name, 'inductor', marks=pytest.mark.slow) for name in COMPILED]])
@torch.no_grad()
def test_a_compiled_step_and_prompts_equal_the_full_forward(name, backend, graphs, monkeypatch, capsys):
    monkeypatch.setattr(compiler, 'BACKEND', backend)
    model, idx = build(name).eval(), tokens(2, T)
    expected, decoder, loose = model(idx), generation.decoder_for(model, compile=True), 0.05 if 'bitnet' in name else 1e-5
    for first in (7, 20):  # one compilation reads prompts of all lengths
        assert_close(decoded(decoder, idx, first), expected[:, first - 1:], loose)
    sequences, = graphs.sequences
    assert graphs.recorded == 1 and capsys.readouterr().err == ''
    assert (sequences.read != sequences.plain) == ('resonance' not in name and 'hybrid' not in name)


@pytest.mark.slow
@pytest.mark.parametrize('keys, embeddings', [(dict(ffn='bitnet', linear='bitnet'), 'int8'), (dict(ffn='trix', act_bits=8), 'int8')], ids=str)
@torch.no_grad()
def test_a_compiled_step_of_a_packed_model_equals_its_full_forward(keys, embeddings, graphs, capsys):
    model = packed.build(*opened(trained(**keys), embeddings))
    expected = model(ids())
    found = decoded(generation.decoder_for(model, compile=True), ids(), 5)
    assert (found - expected[:, 4:]).abs().max() < 1e-3
    assert graphs.recorded == 1 and capsys.readouterr().err == ''


@torch.no_grad()
def test_under_autocast_the_matrices_are_converted_once_and_values_stay(graphs):
    model, idx = build('swiglu').eval(), tokens(2, T)
    decoder = generation.decoder_for(model)
    with torch.autocast('cpu', torch.bfloat16):
        expected = model(idx)
        found = decoded(decoder, idx, 7)
    assert (found - expected[:, 6:]).norm() <= 0.02 * expected[:, 6:].norm()
    copy = graphs.sequences[0].model
    assert copy.lm_head.weight.dtype == copy.blocks[0].mixer.q_proj.weight.dtype == torch.bfloat16
    assert copy.wte.weight is model.wte.weight and model.lm_head.weight.dtype == torch.float32


# ---- what fails

def failing(function):
    raise RuntimeError('operation not permitted when stream is capturing\nmore')


@pytest.mark.parametrize('name', ['gelu', 'hybrid_trix'])
@torch.no_grad()
def test_where_no_graph_can_be_recorded_plain_steps_go_on_after_one_line(name, graphs, monkeypatch, capsys):
    monkeypatch.setattr(decoding, 'record', failing)
    model, idx = build(name).eval(), tokens(2, T)
    assert_close(decoded(generation.decoder_for(model), idx, 7), model(idx)[:, 6:])
    assert capsys.readouterr().err == ('decoding without a CUDA graph, which is slower: RuntimeError: operation not permitted '
                                       'when stream is capturing\n')


@pytest.mark.parametrize('fails', [True, False])
def test_recording_puts_the_stream_and_the_random_state_back(monkeypatch, fails):
    """Fakes of torch.cuda, which fail as torch does: the end of a failed recording raises, and leaves all as it is."""
    run, recording = types.SimpleNamespace(device=torch.device('cuda', 0)), types.SimpleNamespace()
    current = [run]
    generator = types.SimpleNamespace(state='state of the run', clone_state=lambda: 'copy', graphsafe_get_state=lambda: generator.state,
                                      graphsafe_set_state=lambda state: setattr(generator, 'state', state))

    @contextlib.contextmanager
    def graph(graph, capture_error_mode):
        current[0] = recording
        assert generator.state == 'copy'
        try:
            yield
        except RuntimeError:
            raise RuntimeError('operation failed due to a previous error during capture')
        current[0] = run
    fakes = {'CUDAGraph': lambda: types.SimpleNamespace(replay='replay'), 'graph': graph, 'default_generators': [generator],
             'current_stream': lambda: current[0], 'set_stream': lambda stream: current.__setitem__(0, stream)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    if fails:
        with pytest.raises(RuntimeError, match='operation not permitted when stream is capturing'):
            decoding.record(lambda: failing(None))
    else:
        assert decoding.record(lambda: 'output') == ('replay', 'output')
    assert current == [run] and generator.state == 'state of the run'


@torch.no_grad()
def test_a_graph_with_other_results_is_not_used(graphs, monkeypatch, capsys):
    record = decoding.record

    def wrong(function):
        replay, output = record(function)
        return lambda: (replay(), output.mul_(1.5)), output
    monkeypatch.setattr(decoding, 'record', wrong)
    model, idx = build('gelu').eval(), tokens(2, T)
    assert_close(decoded(generation.decoder_for(model), idx, 7), model(idx)[:, 6:])
    assert capsys.readouterr().err == 'decoding without a CUDA graph, which is slower: its results are 0.5 apart from plain steps\n'


@torch.no_grad()
def test_without_a_compiler_steps_are_recorded_uncompiled_and_prompts_are_read_plainly(graphs, monkeypatch, capsys):
    monkeypatch.setattr(decoding, 'compiled', failing)
    model, idx = build('gelu').eval(), tokens(2, T)
    assert_close(decoded(generation.decoder_for(model, compile=True), idx, 7), model(idx)[:, 6:])
    reading, decode = capsys.readouterr().err.splitlines()
    assert reading.startswith('prompts are not compiled, which is slower: RuntimeError')
    assert decode.startswith('decoding without a compiled step, which is slower: RuntimeError') and graphs.recorded == 1


def test_weights_that_fsdp_shards_are_decoded_by_plain_steps(graphs):
    model = build('gelu')
    assert isinstance(generation.decoder_for(model), decoding.GraphDecoder)
    model.unshard = None
    assert isinstance(generation.decoder_for(model), generation.Decoder)


# ---- generation

@pytest.mark.parametrize('name', ['gelu', 'hybrid_trix'])
def test_texts_equal_those_of_plain_steps_beyond_the_context_too(name, graphs, monkeypatch):
    model, idx = build(name), tokens(2, 5)
    keys = dict(n_vocab=V, max_new_tokens=2 * T, temperature=1.0)
    found = list(generation.generate(model, idx, **keys))
    assert graphs.recorded == 1
    monkeypatch.setattr(generation, 'GRAPH_DEVICES', set())
    assert torch.equal(torch.stack(found), torch.stack(list(generation.generate(model, idx, **keys))))


def test_a_decoder_serves_several_texts_with_one_graph_per_batch_size(graphs):
    model = build('gelu')
    decoder = generation.decoder_for(model)
    texts = [torch.stack(list(generation.generate(model, tokens(rows, 5), V, 9, decoder=decoder))) for rows in (1, 2, 1, 2)]
    assert graphs.recorded == 2 and torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[3])


@pytest.mark.parametrize('top_k', [0, 7])
def test_tokens_are_those_that_multinomial_draws(top_k):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    drawn, expected = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for _ in range(20):
        p, order = logits.softmax(-1).topk(top_k or 40)
        pick = order.gather(-1, torch.multinomial(p, 1, generator=expected)).squeeze(-1)
        assert torch.equal(generation.choose(logits, 1.0, top_k, 1.0, drawn), pick)


def test_inside_a_fixed_position_the_cache_keeps_its_own(graphs):
    model, cache = build('gelu'), build('gelu').new_cache(1)
    model(tokens(1, 3), cache=cache)
    with contextlib.suppress(ZeroDivisionError), cache.at(torch.tensor([3])):
        1 / 0
    assert cache.pos == cache.layers[0][0].pos == 3


def test_a_packed_product_is_traced_for_any_number_of_rows():
    """Otherwise the prompts of a packed model on a GPU could not be compiled once for all lengths."""
    codes = packed.pack_codes(torch.zeros(2, 8, 16, dtype=torch.int64))
    inputs = torch.zeros(5, 16), codes, torch.ones(2), torch.zeros(5, dtype=torch.int64)

    def product(x, codes, scale, chosen):
        return packed.ternary_product(x, None, codes, scale, chosen)
    graph = make_fx(product, tracing_mode='symbolic')(*inputs).graph
    rows = next(node for node in graph.nodes if 'ternary_product' in str(node.target)).meta['val'].size(0)
    assert isinstance(rows, torch.SymInt)
