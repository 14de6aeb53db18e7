"""Vocabularies over 65,536 ids, and Hugging Face's tokenizers with such vocabularies."""
import hashlib
import json
import random
import shutil
import unicodedata
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import checkpoint
from runtime import plan
import prepare
import sample
import tokenizer
import train
from corpora import preparation, vocabulary
from configurator import UserError
from data import TokenData
from corpora.shards import open_data, pack, validate
from corpora.vocabulary import from_file
from corpora.workspace import Bins
from test_tokenizer import CODE, TEXTS, sentences
from tokenizer import id_dtype, load_tokenizer, normalized, token_bytes

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
FLAGS = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
ACCENTS = ['e\u0301', '\u212b', 'a\u0300\u0327', '\u1100\u1161', 'ﬁ', '\u0301', '<think>\u0338', 'n\u0303\n\n']


def added(content, token, special):
    return {'id': token, 'content': content, **FLAGS, 'normalized': False, 'special': special}


def byte_level(normalizer, ignore_merges, specials, texts=()):
    """A byte-level BPE with the split of Llama-3. Behind its tokens come `specials`, then `texts`."""
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bpe.normalizer = normalizer
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), 'isolated'),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([CODE, *sentences(100)], trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    content = json.loads(bpe.to_str())
    vocab = content['model']['vocab']
    if ignore_merges:  # a whole word that no merge makes
        vocab['Ġgradientwise'] = len(vocab)
    content['added_tokens'] = [added(text, len(vocab) + i, text in specials)
                               for i, text in enumerate([*specials, *texts])]
    return content


@cache
def llama3():
    return byte_level(None, True, ['<|begin_of_text|>', '<|end_of_text|>'])


@cache
def qwen():
    return byte_level(normalizers.NFC(), False, ['<|endoftext|>', '<|im_start|>'], ['<think>', '</think>'])


@cache
def gemma(high=None):
    """A BPE of SentencePiece with byte fallback. Line ends and a tag are added as text. high: its last id."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(' ', '▁')
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex('▁*[^▁]*'), 'isolated')
    bpe.train_from_iterator([CODE, *sentences(100)], trainers.BpeTrainer(
        vocab_size=600, limit_alphabet=80, show_progress=False))
    trained = json.loads(bpe.to_str())['model']
    tokens = ['<pad>', '<eos>', '<bos>', '<unk>', *(f'<0x{byte:02X}>' for byte in range(256)), '<table>', '\n\n',
              *sorted({*trained['vocab']} - {'\n\n'}, key=lambda token: (len(token) == 1, trained['vocab'][token]))]
    vocab = {token: i for i, token in enumerate(tokens)}
    if high:
        vocab['<unused>'] = high  # the ids between are padding
    return {
        'version': '1.0', 'truncation': None, 'padding': None,
        'added_tokens': [added(text, vocab[text], text[:1] == '<' and text != '<table>')
                         for text in ('<pad>', '<eos>', '<bos>', '<unk>', '<table>', '\n\n', '▁▁')],
        'normalizer': {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'},
        'pre_tokenizer': {'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious',
                          'invert': False},
        'post_processor': None, 'decoder': None,
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': '<unk>', 'continuing_subword_prefix': None,
                  'end_of_word_suffix': None, 'fuse_unk': True, 'byte_fallback': True, 'vocab': vocab,
                  'merges': [merge if isinstance(merge, list) else merge.split(' ') for merge in trained['merges']]}}


KINDS = {'llama3': llama3, 'qwen': qwen, 'gemma': gemma}


def saved(content, path):
    path.write_text(json.dumps(content, ensure_ascii=False))
    return path


@pytest.mark.parametrize('kind', KINDS)
def test_ids_equal_the_library_and_decoding_gives_the_text(tmp_path, kind):
    content = KINDS[kind]()
    theirs = Tokenizer.from_str(json.dumps(content))
    ours = load_tokenizer(from_file(saved(content, tmp_path / 'tokenizer.json')))
    # These are text for us, on purpose.
    differing = [token['content'] for token in content['added_tokens'] if token['special']] + ['▁', '<0x']

    def check(text):
        if any(sign in text for sign in differing):
            return
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        if kind != 'qwen':
            assert normalized(ours, text) == text == ours.decode(ids)
        elif '<think>\u0338' in text:  # a mark does not join with an added token, but with the same characters
            assert unicodedata.normalize('NFC', ours.decode(ids)) == normalized(ours, text)
        else:
            assert unicodedata.normalize('NFC', text) == normalized(ours, text) == ours.decode(ids)
    for text in (CODE[:20_000], *ACCENTS, 'a\n\n\nb <table>\n\n<table> c', ' gradientwise', '<think>x</think>',
                 '   a    b  '):
        check(text)

    @settings(max_examples=60, deadline=None)
    @given(TEXTS)
    def check_any(text):
        check(text)
    check_any()


def test_nfc_in_slices_equals_nfc_of_the_whole_text(tmp_path, monkeypatch):
    ours = load_tokenizer(from_file(saved(qwen(), tmp_path / 'tokenizer.json')))
    text = 'a' + '\u0300\u0327' * 9 + ' ' + 'e\u0301' * 30 + 'x\u0323\u0307 '
    whole = ours.normalize(text)
    assert whole == unicodedata.normalize('NFC', text)
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(tokenizer, 'SLICE', size)
        assert ours.normalize(text) == whole == ours.decode(ours.encode_ordinary(text))


def normalizer(value):
    return lambda content: content.update(normalizer=value)


def ambiguous(content):
    content['added_tokens'].append(added('Ġé', 9999, False))
    content['model']['vocab']['Ġé'] = 9999


@pytest.mark.parametrize('edit, message', [
    (normalizer({'type': 'NFD'}), 'NFD before the BPE can change a text: expected no normalizer except NFC'),
    (normalizer({'type': 'Sequence', 'normalizers': [{'type': 'NFC'}, {'type': 'Lowercase'}]}), 'NFC'),
    (ambiguous, "the added token 'Ġé' is also in the vocabulary, where it stands for other bytes"),
])
def test_what_cannot_be_encoded_exactly_is_refused_by_name(tmp_path, edit, message):
    content = json.loads(json.dumps(qwen()))
    edit(content)
    with pytest.raises(UserError) as error:
        from_file(saved(content, tmp_path / 'tokenizer.json'))
    assert message in str(error.value) and '\n' not in str(error.value)


def test_an_added_token_with_a_space_is_refused_for_sentencepiece(tmp_path):
    content = json.loads(json.dumps(gemma()))
    content['added_tokens'].append(added('a b', 5000, False))
    with pytest.raises(UserError, match="the added token 'a b' has a space, which this kind of BPE writes as ▁"):
        from_file(saved(content, tmp_path / 'tokenizer.json'))


def test_ids_take_16_bits_up_to_65536_and_32_beyond():
    assert [id_dtype(n).str for n in (257, 2**16, 2**16 + 1, 2**20)] == ['<u2', '<u2', '<u4', '<u4']


@pytest.fixture(scope='module')
def wide(tmp_path_factory):
    """(a tokenizer.json of 70,001 ids, a corpus prepared with it)"""
    folder, draw = tmp_path_factory.mktemp('wide'), random.Random(0)
    file = saved(gemma(70_000), folder / 'tokenizer.json')
    for i in range(30):
        (folder / f'{i:02d}.txt').write_text('\n\n'.join(draw.choice(sentences(20)) for _ in range(10)))
    prepare.main([f'--dataset=text:{folder}/*.txt', f'--tokenizer={file}', '--val_ratio=0.3', '--num_proc=1',
                  f'--out={folder}/out'])
    return file, folder / 'out'


def test_bins_of_a_large_vocabulary_hold_32_bits_and_every_document(wide, capsys):
    file, out = wide
    meta, encoding = json.loads((out / 'meta.json').read_text()), load_tokenizer(out)
    assert (meta['dtype'], meta['vocab_size'], meta['eot_id']) == ('uint32', 70_001, 1)
    documents = set()
    for split in ('train', 'val'):
        ids, (entry,) = np.fromfile(out / f'{split}.bin', '<u4'), meta['files'][split]
        assert (len(ids), ids.max()) == (entry['tokens'], entry['max_id'])
        assert token_bytes(encoding)[ids].sum() == entry['bytes']
        ends = np.flatnonzero(ids == 1)
        documents |= {encoding.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]}
    assert documents == {path.read_text() for path in out.parent.glob('*.txt')}
    found = validate(out)
    tokens = sum(entry['tokens'] for part in meta['files'].values() for entry in part)
    assert (found['dtype'], found['tokens']) == ('uint32', tokens)
    assert 'uint32' in capsys.readouterr().out


def test_ids_beyond_16_bits_reach_a_batch(wide, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(wide[1], out)
    ids, meta = np.fromfile(out / 'train.bin', '<u4'), json.loads((out / 'meta.json').read_text())
    ids[5] = 70_000
    ids.tofile(out / 'train.bin')
    meta['files']['train'][0]['sha256'] = hashlib.sha256(ids.tobytes()).hexdigest()
    (out / 'meta.json').write_text(json.dumps(meta))
    data = TokenData(out, 16, 70_001)
    x, y = data.gather('train', np.array([0]))
    assert x.dtype == np.int64 and x[0, 5] == y[0, 4] == 70_000
    assert (x[0] == ids[:16]).all() and (y[0] == ids[1:17]).all()
    rows = pack(out, 32, tmp_path / 'rows', say=lambda line: None)
    loader = open_data(tmp_path / 'rows', 31, 70_001)
    assert rows['files']['train'][0]['max_id'] == 70_000
    assert (loader.gather('train', np.array([0]))[0][0] == ids[:31]).all()


def test_bins_of_32_bits_resume_after_the_recorded_part(tmp_path):
    lengths = np.ones(70_001, np.int32)
    bins = Bins(tmp_path, 'train', lengths, np.dtype('<u4'), [])
    bins.append(np.array([70_000, 1, 2], '<u4'))
    entries = json.loads(json.dumps(bins.sync()))
    bins.append(np.array([3, 4], '<u4'))  # never recorded
    bins.file.close()
    bins = Bins(tmp_path, 'train', lengths, np.dtype('<u4'), entries)
    bins.append(np.array([69_999], '<u4'))
    entry, = bins.close()
    ids = np.fromfile(tmp_path / 'train.bin', '<u4')
    assert ids.tolist() == [70_000, 1, 2, 69_999]
    assert (entry['tokens'], entry['max_id'], entry['sha256']) == (4, 70_000, hashlib.sha256(ids.tobytes()).hexdigest())


def test_a_model_with_a_large_vocabulary_trains_and_samples(wide, tmp_path, capsys):
    train.main([f'--dataset={wide[1]}', '--vocab_size=70001', '--block_size=16', '--n_layer=1', '--n_head=2',
                '--n_embd=8', '--device=cpu', '--batch_size=2', '--max_steps=2', '--eval_interval=2', '--eval_tokens=32',
                '--sample_interval=0', '--compile=false', f'--out_dir={tmp_path}/run'])
    _, state = checkpoint.find(tmp_path / 'run')
    assert state['step'] == 2 and state['model']['wte.weight'].shape == (70_001, 8)
    capsys.readouterr()
    sample.main([f'{tmp_path}/run', '--prompt=the of', '--num=1', '--max_new_tokens=4', '--temperature=0',
                 '--device=cpu'])
    assert 'the of' in capsys.readouterr().out


def test_normalisation_is_printed_and_recorded(tmp_path, capsys):
    for i in range(12):
        (tmp_path / f'{i}.txt').write_text(f're\u0301sume\u0301 {i} ' * 30)
    file = saved(qwen(), tmp_path / 'q.json')
    prepare.main([f'--dataset=text:{tmp_path}/*.txt', f'--tokenizer={file}', '--val_ratio=0.4', '--num_proc=1',
                  f'--out={tmp_path}/out'])
    assert 'this tokenizer normalises all text to the Unicode form NFC' in capsys.readouterr().out
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert meta['normalizer'] == 'NFC' and 'dtype' not in meta
    ids = np.fromfile(tmp_path / 'out' / 'train.bin', '<u2')
    assert load_tokenizer(tmp_path / 'out').decode(ids[:20].tolist()).startswith('r\xe9sum\xe9 ')


def test_a_bpe_of_more_than_65536_tokens_can_be_trained():
    draw = random.Random(0)
    words = [''.join(draw.choices('abcdefghijklmnopqrstuvwxyz', k=8)) for _ in range(30_000)]
    content = vocabulary.train_bpe([' '.join(words)] * 2, 70_000)
    ids = tokenizer.encode(load_tokenizer(content), ' '.join(words[:1000]))
    assert ids.dtype == '<u4' and ids.max() > 2**16
    assert load_tokenizer(content).decode(ids.tolist()) == ' '.join(words[:1000])
    prepare.load(['--vocab_size=70000'], preparation.PrepareConfig)
    with pytest.raises(UserError, match='expected 257 .* to 1048576'):
        prepare.load([f'--vocab_size={2**20 + 1}'], preparation.PrepareConfig)


def test_plan_counts_four_bytes_a_token(tmp_path):
    config = train.load(['--dataset=fineweb_edu', '--vocab_size=70000', f'--out_dir={tmp_path}', '--max_steps=1000',
                         '--batch_size=10', '--block_size=100'])
    assert '4.0 MB of data are to be prepared' in plan.disk_lines(config, None)[0]
