"""Exports for other programs: these programs compute the same outputs, and models that they can't express are refused."""
import base64
import math
import random
from importlib.util import find_spec

import pytest
import torch

import checkpoint
import export
from runtime import generation
from configurator import UserError
from corpora.vocabulary import train_bpe
from deploy import packed
from deploy.gguf import Llama, compare_with_llama_cpp, matrix_weight, merges, vocabulary, write
from deploy.huggingface import to_tokenizers
from deploy.parity import without_int8
from model import GPT, GPTConfig
from test_packed import ids, trained
from tokenizer import HARD, load_tokenizer

gguf = pytest.importorskip('gguf', reason='a development requirement')
needs_llama = pytest.mark.skipif(not find_spec('xllamacpp'), reason='a development requirement')
LLAMA = dict(block_size=64, vocab_size=320, n_layer=2, n_head=4, n_embd=64, ffn='swiglu', d_ff=96)
MODELS = {
    'llama': dict(LLAMA, n_kv_head=2),
    'llama, untied': dict(LLAMA, tie_embeddings=False),
    'llama, ternary': dict(LLAMA, linear='bitnet', sub_norm=False),
    'bitnet': dict(LLAMA, linear='bitnet', n_kv_head=2),
}


@pytest.fixture(scope='module')
def tokenizer():
    """The content of a BPE of 300 tokens."""
    draw = random.Random(0)
    words = [''.join(draw.choices('abcdefghij', k=draw.randint(2, 7))) for _ in range(80)]
    return train_bpe([' '.join(draw.choices(words, k=3000))], 300)


def read(path):
    """(metadata, {name: (type, fp32 values)}) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(map(int, reversed(t.shape)))))
               for t in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


# ---- the file

def test_merges_are_those_that_made_the_tokens(tokenizer):
    ranks = [base64.b64decode(rank) for rank in tokenizer['ranks']]
    pairs = merges(ranks)
    assert len(pairs) == 300 - 1 - 256 and len(set(pairs)) == len(pairs)
    assert [pair.replace(' ', '') for pair in pairs] == vocabulary(tokenizer, 300)[0][256:299]


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('matrices, embeddings', [('F32', 'F32'), ('Q8_0', 'Q8_0'), ('', '')])
def test_a_gguf_file_holds_the_weights(name, matrices, embeddings, tokenizer, tmp_path):
    if not matrices and 'linear' in MODELS[name]:
        matrices = 'F16'  # TQ2_0, the default, needs rows of 256
    model = trained(**MODELS[name])
    said = write(tmp_path / 'x.gguf', model, tokenizer, matrices, embeddings)
    metadata, tensors = read(tmp_path / 'x.gguf')
    assert metadata['general.architecture'] == said.split(',')[0] == name.split(',')[0]
    assert len(metadata['tokenizer.ggml.tokens']) == 320 and metadata['tokenizer.ggml.eos_token_id'] == 299
    assert tensors['blk.1.ffn_up.weight'][0] == (matrices or 'F16') and tensors['blk.1.attn_norm.weight'][0] == 'F32'
    tolerance = {'F32': 0, 'F16': 1e-3, '': 1e-3, 'Q8_0': 1e-2}[matrices]
    weight = matrix_weight(model.blocks[1].ffn.up_proj).numpy()
    assert abs(tensors['blk.1.ffn_up.weight'][1] - weight).max() <= tolerance * abs(weight).max()
    assert ('output.weight' in tensors) == (not model.config.tie_embeddings)
    assert not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize('kind', ['TQ2_0', 'TQ1_0'])
def test_ternary_types_hold_the_codes_exactly(kind, tokenizer, tmp_path):
    model = trained(**{**MODELS['bitnet'], 'n_embd': 256, 'd_ff': 512})
    write(tmp_path / 'x.gguf', model, tokenizer, kind)
    _, tensors = read(tmp_path / 'x.gguf')
    for part, key in ((model.blocks[0].mixer.q_proj, 'attn_q'), (model.blocks[1].ffn.down_proj, 'ffn_down')):
        exact = matrix_weight(part)
        found = torch.tensor(tensors[f'blk.{0 if key == "attn_q" else 1}.{key}.weight'][1])
        assert torch.equal(found.sign(), exact.sign()) and (found - exact).abs().max() <= 5e-4 * exact.abs().max()  # the scale is in fp16


# ---- in llama.cpp

@pytest.fixture(scope='module')
def opened(tokenizer, tmp_path_factory):
    """name -> (model, llama.cpp on its F32 file), each opened once."""
    known = {}

    def open_one(name):
        if name not in known:
            model, path = trained(**MODELS[name]), tmp_path_factory.mktemp('gguf') / 'x.gguf'
            write(path, model, tokenizer, 'F32', 'F32')
            known[name] = model, Llama(path, 64, threads=1)
        return known[name]
    return open_one


@needs_llama
@pytest.mark.parametrize('name', MODELS)
def test_llama_cpp_computes_the_same(name, opened):
    model, llama = opened(name)
    seen = 0
    for n in (1, 2, 3, 7, 10, 20, 30, 40):
        prompt = ids(n, 1)[0].tolist()
        with torch.no_grad(), without_int8(model):
            ours = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
        theirs = llama.next_token(prompt)
        if not theirs:  # the end of the text, or bytes that make no character
            assert ours.argmax() == 299 or 128 <= ours.argmax() < 256
            continue
        seen += 1
        assert len(theirs) == 10 and set(theirs) == set(ours.topk(10).indices.tolist())
        assert all(abs(ours[token].item() - value) < 1e-2 for token, value in theirs.items())
    assert seen >= 2


@needs_llama
def test_llama_cpp_reads_a_text_as_we_do(opened, tokenizer):
    _, llama = opened('llama')
    encoding, draw = load_tokenizer(tokenizer), random.Random(1)
    texts = ['abc def', "I'll  say\n\n 12ab", ' x', HARD.split('\0')[1][:30]] + [
        ''.join(chr(draw.choice((draw.randrange(32, 127), draw.randrange(160, 0x2000), draw.randrange(0x4e00, 0x9000)))) for _ in range(12))
        for _ in range(20)]
    for text in texts:
        by_text, by_ids = (llama.complete(prompt, 4, logprobs=10) for prompt in (text, [encoding.eot_token, *encoding.encode_ordinary(text)]))
        assert by_text['usage']['prompt_tokens'] == by_ids['usage']['prompt_tokens'], text
        assert by_text['choices'][0]['logprobs'] == by_ids['choices'][0]['logprobs'], text


@needs_llama
def test_llama_cpp_opens_a_vocabulary_of_bytes_and_reads_a_text_as_we_do(tmp_path):
    bytes_only = train_bpe(['abc def'], 257)
    write(tmp_path / 'x.gguf', trained(**dict(LLAMA, vocab_size=257)), bytes_only, 'F32', 'F32')
    llama, encoding = Llama(tmp_path / 'x.gguf', 64, threads=1), load_tokenizer(bytes_only)
    for text in ('abc def', " [none] [none]none] 'll\n\n", 'é→語'):
        by_text, by_ids = (llama.complete(prompt, 4, logprobs=10) for prompt in (text, [256, *encoding.encode_ordinary(text)]))
        assert by_text['usage']['prompt_tokens'] == by_ids['usage']['prompt_tokens'] == 1 + len(text.encode()), text
        assert by_text['choices'][0]['logprobs'] == by_ids['choices'][0]['logprobs'], text


@needs_llama
def test_a_model_with_a_short_context_is_compared_within_it(tokenizer, tmp_path, capsys):
    model = trained(**dict(LLAMA, block_size=16))
    write(tmp_path / 'x.gguf', model, tokenizer, 'F32', 'F32')
    top, apart = compare_with_llama_cpp(tmp_path / 'x.gguf', model, {'data': {}, 'tokenizer': tokenizer})
    assert apart < 1e-2 and 'compared with the trained model after 50 texts of README.md' in capsys.readouterr().out


@needs_llama
def test_an_error_of_llama_cpp_is_one_line(opened, tmp_path, tokenizer):
    with pytest.raises(UserError, match='llama.cpp: request .* exceeds the available context size'):
        opened('llama')[1].next_token([1] * 100)
    (tmp_path / 'x.gguf').write_bytes(b'no model')
    with pytest.raises(UserError, match='x.gguf: llama.cpp cannot load it'):
        compare_with_llama_cpp(tmp_path / 'x.gguf', trained(**MODELS['llama']), {'data': {}, 'tokenizer': tokenizer})


# ---- in transformers

GPT2 = dict(LLAMA, norm='layernorm', positions='learned', ffn='gelu')
THEIRS = {**MODELS, 'gpt2': dict(GPT2, bias=True), 'gpt2, without biases': GPT2}


@pytest.mark.parametrize('name', THEIRS)
def test_transformers_computes_the_same(name, tokenizer, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip('transformers', reason='a development requirement')
    model = trained(**THEIRS[name])
    state = {'config': {}, 'data': {}, 'tokenizer': tokenizer}
    monkeypatch.setattr(packed, 'load_model', lambda run, device: (model, state))
    export.main(['hf', 'run', str(tmp_path / 'hf'), '--device=cpu'])
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    assert other.config.model_type == name.split(',')[0] and other.dtype == torch.float32
    with torch.no_grad(), without_int8(model):
        assert (other(ids()).logits.log_softmax(-1) - model(ids()).log_softmax(-1)).abs().max() < 1e-4
    assert 'same most likely token for 100.00 %' in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(UserError, match='hf already exists'):
        export.main(['hf', 'run', str(tmp_path / 'hf'), '--device=cpu'])
    assert [path.name for path in tmp_path.iterdir()] == ['hf']


@pytest.mark.parametrize('name', ['llama, untied', 'gpt2'])
@torch.no_grad()
def test_a_document_mask_is_left_out_and_a_document_alone_has_the_same_logits(name, tokenizer, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip('transformers', reason='a development requirement')
    end = load_tokenizer(tokenizer).eot_token
    model, state = trained(**THEIRS[name], document_mask=True, eot_id=end), {'config': {}, 'data': {}, 'tokenizer': tokenizer}
    document = model(ids())
    monkeypatch.setattr(packed, 'load_model', lambda run, device: (model, state))
    export.main(['hf', 'run', str(tmp_path / 'hf'), '--device=cpu'])
    said = capsys.readouterr().out
    assert 'other programs do not reset at an end of text' in said and 'same most likely token for 100.00 %' in said.splitlines()[-1]
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    assert (other(ids()).logits.log_softmax(-1) - document.log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize('mask', [False, True])
def test_a_gguf_text_starts_as_in_training(mask, tokenizer, tmp_path):
    keys = dict(document_mask=True, eot_id=load_tokenizer(tokenizer).eot_token) if mask else {}
    write(tmp_path / 'x.gguf', trained(**MODELS['llama'], **keys), tokenizer, 'F32', 'F32')
    assert read(tmp_path / 'x.gguf')[0]['tokenizer.ggml.add_bos_token'] is not mask


@pytest.mark.parametrize('name', ['llama, untied', 'bitnet', 'gpt2'])
@torch.no_grad()
def test_transformers_stops_where_a_text_ends(name, tokenizer, tmp_path, monkeypatch):
    transformers = pytest.importorskip('transformers', reason='a development requirement')
    model, end = trained(**THEIRS[name]), load_tokenizer(tokenizer).eot_token

    def greedy(prompt):
        with without_int8(model):
            return [token.item() for token in generation.generate(model, torch.tensor([prompt]), model.config.vocab_size, 20, temperature=0)]
    prompt, often = next((prompt, token) for prompt in ids()[:, :8].tolist() for token in greedy(prompt)[:-1] if token not in [*prompt, end])
    rows = model.lm_head.weight.data  # the token and the end of a text change names
    rows[[often, end]] = rows[[end, often]].clone()
    state = {'config': {}, 'data': {}, 'tokenizer': tokenizer}
    monkeypatch.setattr(packed, 'load_model', lambda run, device: (model, state))
    export.main(['hf', 'run', str(tmp_path / 'hf'), '--device=cpu'])
    ours = greedy(prompt)
    assert end in ours[:-1]
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    theirs = other.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
    assert theirs == prompt + ours[:ours.index(end) + 1]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf').eos_token_id == end


def test_transformers_reads_a_text_as_we_do(tokenizer, tmp_path):
    transformers = pytest.importorskip('transformers', reason='a development requirement')
    to_tokenizers(tokenizer).save(str(tmp_path / 'tokenizer.json'))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'))
    ours, draw = load_tokenizer(tokenizer), random.Random(2)
    for _ in range(1000):
        low, high = draw.choice(((9, 127), (32, 127), (160, 0x3000), (0x4e00, 0xa000), (0x1f300, 0x1f700), (9, 0xd800)))
        text = ''.join(chr(draw.choice((32, draw.randrange(low, high)))) for _ in range(draw.randrange(20)))
        assert theirs.encode(text, add_special_tokens=False) == ours.encode_ordinary(text), repr(text)
        assert theirs.decode(ours.encode_ordinary(text), clean_up_tokenization_spaces=False) == text
    assert theirs.convert_tokens_to_ids('<|endoftext|>') == ours.eot_token


@pytest.mark.parametrize('keys, what', [
    (dict(ffn='trix'), 'ffn=trix: the llama and bitnet models of transformers have no such part'), (dict(GPT2, positions='rotary'), 'positions=rotary: GPT-2 has no such part'),
    (dict(GPT2, linear='bitnet'), 'linear=bitnet: GPT-2 has no such part'), (dict(GPT2, n_kv_head=1), 'n_kv_head=1: GPT-2 has no such part'),
    (dict(GPT2, tie_embeddings=False), 'tie_embeddings=False: GPT-2 has no such part')])
def test_what_transformers_cannot_express_is_refused(keys, what, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip('transformers', reason='a development requirement')
    monkeypatch.setattr(packed, 'load_model', lambda run, device: (
        GPT(GPTConfig(**{**LLAMA, **keys})), {'config': {}, 'data': {}, 'tokenizer': tokenizer}))
    with pytest.raises(UserError, match=what):
        export.main(['hf', 'run', str(tmp_path / 'hf'), '--device=cpu'])
    assert not list(tmp_path.iterdir())


# ---- refusals

@pytest.mark.parametrize('keys, what', [
    (dict(ffn='trix'), 'ffn=trix: the llama and bitnet models of llama.cpp have no such part'), (dict(ffn='relu2'), 'ffn=relu2: the llama and bitnet models of llama.cpp have'),
    (dict(mixer='resonance'), 'mixer=resonance'), (dict(norm='layernorm'), 'norm=layernorm'), (dict(positions='learned'), 'positions=learned'),
    (dict(qk_norm=True), 'qk_norm=True'), (dict(embed_norm=True), 'embed_norm=True'), (dict(embed_taps=2), 'embed_taps=2'),
    (dict(logit_softcap=30.0), 'logit_softcap=30.0'), (dict(bias=True), 'bias=True'), (dict(ffn='bitnet'), 'ffn=bitnet with linear=dense'),
    (dict(linear='bitnet', tie_embeddings=False), 'the head tied to the embedding'),
    (dict(linear='bitnet'), 'blk.0.attn_q: its rows of 64 weights do not divide into the blocks of 256 that TQ2_0 has: choose another type, such as --matrices=F16')])
def test_what_llama_cpp_cannot_express_is_refused(keys, what, tokenizer, tmp_path):
    model = GPT(GPTConfig(**{**LLAMA, **keys}))
    with pytest.raises(UserError, match=what):
        write(tmp_path / 'x.gguf', model, tokenizer)
    assert not list(tmp_path.iterdir())


def test_unsupported_types_and_tokenizers_are_refused(tokenizer, tmp_path):
    model = GPT(GPTConfig(**LLAMA))
    for arguments, what in (((tokenizer, 'TQ2_0'), 'this model has no ternary matrix'), ((None,), 'the model has no tokenizer'),
                            (({'name': 'llama', 'huggingface': {}},), 'its tokenizer, llama, came from Hugging Face')):
        with pytest.raises(UserError, match=what):
            write(tmp_path / 'x.gguf', model, *arguments)
    assert not list(tmp_path.iterdir())


def test_rounding_is_on_again_after_a_comparison():
    model, other = trained(**MODELS['bitnet']), trained(**MODELS['bitnet'])
    before = model(ids())
    with pytest.raises(ZeroDivisionError), without_int8(model):
        assert not torch.equal(model(ids()), before)
        assert torch.equal(other(ids()), before), 'another model rounds meanwhile'
        raise ZeroDivisionError
    assert torch.equal(model(ids()), before)


# ---- weights that are no numbers

@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_wherever_a_model_is_loaded(value, tmp_path):
    model = trained(**MODELS['llama'])
    model.blocks[1].ffn.up_proj.weight.data[3, 4] = value
    other = GPT(model.config)
    with pytest.raises(UserError, match='x.pt: 1 of its .* tensors hold numbers that are not finite .blocks.1.ffn.up_proj.weight is the first'):
        checkpoint.load_weights(other, {'model': model.state_dict()}, 'x.pt')
    assert all(p.isfinite().all() for p in other.parameters())


def test_weights_beyond_f16_are_refused_before_a_gguf_file_is_begun(tokenizer, tmp_path):
    pytest.importorskip('gguf', reason='a development requirement')
    model = trained(**MODELS['llama'])
    model.blocks[0].ffn.up_proj.weight.data[0, 0] = 70_000
    with pytest.raises(UserError, match='blk.0.ffn_up and 0 more tensors have weights over 65,504, the largest number of F16: use --matrices=F32'):
        write(tmp_path / 'x.gguf', model, tokenizer)
    assert not list(tmp_path.iterdir())
    write(tmp_path / 'x.gguf', model, tokenizer, 'F32', 'F32')


@pytest.mark.parametrize('words, owner, comparison', [
    (['pack', 'x.safetensors'], export.parity, 'compare'), (['gguf', 'x.gguf'], export.gguf, 'compare_with_llama_cpp'),
    (['hf', 'hf'], export.huggingface, 'compare_with_transformers')], ids=['pack', 'gguf', 'hf'])
@pytest.mark.parametrize('fails', [True, False])
def test_an_export_gets_its_name_after_it_was_compared(words, owner, comparison, fails, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip('transformers', reason='a development requirement')
    model, out = trained(**THEIRS['bitnet']), tmp_path / words[1]
    checkpoint.save(tmp_path / 'run.pt', {'model': model.state_dict(), 'optimizer': {}, 'step': 1, 'config': vars(model.config),
                                          'tokenizer': tokenizer, 'data': {}})
    names, original = [], getattr(owner, comparison)

    def compare(*arguments):
        names.append([path.name for path in tmp_path.iterdir()])
        original(*arguments)
        if fails:
            raise UserError(f'{tmp_path}/.{out.name}.tmp/{out.name}: not the same')
    monkeypatch.setattr(owner, comparison, compare)
    argv = [words[0], str(tmp_path / 'run.pt'), str(out), '--device=cpu', *(['--matrices=F16'] if words[0] == 'gguf' else [])]
    if fails:
        with pytest.raises(UserError, match=f'^{out}: not the same$'):
            export.main(argv)
    else:
        export.main(argv)
    assert names == [['run.pt', f'.{out.name}.tmp']] or names == [[f'.{out.name}.tmp', 'run.pt']]
    assert {path.name for path in tmp_path.iterdir()} == {'run.pt', *([] if fails else [out.name])}
