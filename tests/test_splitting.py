"""Corpora of any size, with any line ends, give both splits or one clear error, and no text is lost."""
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from corpora import building
from corpora import preparation
from configurator import UserError
from corpora.corpus import Corpus, Document
from data import TokenData
from corpora.splitting import Cut, find_cut, is_lopsided
from tokenizer import load_tokenizer

LINE_ENDS = {'newline': '\n', 'crlf': '\r\n', 'return': '\r', 'separator': '\u2028', 'none': ''}


def text_of(size, line_end='\n', seed=0):
    """About `size` bytes, cut at a character, in lines of 12 words."""
    rng, lines, length = random.Random(seed), [], 0
    while length < size:
        words = rng.choices(['window', 'token', 'résumé', '数据', 'the', 'of', 'loss', '🙂'], k=12)
        lines.append(' '.join(words) + f' {rng.random()}{line_end}')
        length += len(lines[-1].encode())
    return ''.join(lines).encode()[:size].decode(errors='ignore') or 'x' * size


def written(tmp_path, text):
    (tmp_path / 'c.txt').write_bytes(text.encode())
    return tmp_path / 'c.txt'


def written_rows(tmp_path, texts):
    (tmp_path / 'c.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return tmp_path / 'c.jsonl'


def prepared(corpus, out, **options):
    options = {'dataset': f'text:{corpus}', 'out': out, 'vocab_size': 259, 'num_proc': 1} | options
    prepare.main([f'--{key}={value}' for key, value in options.items()])
    return out


def meta(out):
    return json.loads((out / 'meta.json').read_text())


def documents(out, split):
    encoding = load_tokenizer(out)
    ids = np.fromfile(out / f'{split}.bin', '<u2')
    ends = np.flatnonzero(ids == encoding.eot_token)
    assert ids[-1] == encoding.eot_token
    return [encoding.decode(part[part != encoding.eot_token].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def both(out):
    return documents(out, 'train'), documents(out, 'val')


def val_share(out):
    sizes = {split: sum(file['bytes'] for file in files) for split, files in meta(out)['files'].items()}
    return sizes['val'] / sum(sizes.values())


# Text of any size and line ends

@pytest.mark.parametrize('line_end', LINE_ENDS)
@pytest.mark.parametrize('size, val_ratio', [
    (1, 0.05), (2, 0.5), (3, 0.05), (80, 0.2), (300, 0.05), (1000, 0.3), (8191, 0.05), (8193, 0.05), (30_000, 0.1),
    (95_000, 0.05), (140_000, 0.02)])
def test_a_small_text_gives_both_splits_and_every_byte_back(tmp_path, capsys, line_end, size, val_ratio):
    text = text_of(size, LINE_ENDS[line_end])
    corpus = written(tmp_path, text)
    if size < 40:  # not enough to train a tokenizer of two merges
        expected = 'a single character of text' if size == 1 else '--vocab_size=259: this corpus is too small for so many tokens: use --vocab_size=257'
        with pytest.raises(UserError, match=expected) as error:
            prepared(corpus, tmp_path / 'out', val_ratio=val_ratio)
        assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()
        return
    out = prepared(corpus, tmp_path / 'out', val_ratio=val_ratio)
    train, val = both(out)
    assert train and val and 0.5 * val_ratio <= val_share(out) <= 1.5 * val_ratio
    said = capsys.readouterr().out
    if meta(out).get('split') == 'position':
        assert ''.join(train + val) == text and said.count('split by position: ') == 1
    else:
        assert sorted(train + val) == sorted(row.text for row in preparation.open_corpus(
            preparation.PrepareConfig(dataset=f'text:{corpus}')).documents()) and 'position' not in said


def test_two_characters_are_enough_with_bytes_for_tokens(tmp_path):
    out = prepared(written(tmp_path, 'é🙂'), tmp_path / 'out', vocab_size=257)
    assert both(out) == (['é'], ['🙂']) and meta(out)['split'] == 'position'


def test_one_line_explains_the_split_by_position(tmp_path, capsys):
    out = prepared(written(tmp_path, text_of(95_000, '\r')), tmp_path / 'out')
    output = capsys.readouterr().out
    assert '1 documents read, 1 kept (one is cut, and counts in train and in val)\n' in output
    line, = [line for line in output.splitlines() if line.startswith('split by position')]
    assert line == ('split by position: val is the last part of the text, because a split of 1 document by hash '
                    'puts 0.0% of the text into val')
    assert documents(out, 'val')[0] in text_of(95_000, '\r')


# Documents

def lopsided_rows(n, val_ratio=0.05):
    """n documents of which the hash puts none into val."""
    for seed in range(1000):
        rows = [f'document {seed} {i} ' + 'window token loss ' * 10 + '\n' for i in range(n)]
        if not hash_val(rows, val_ratio):
            return rows
    raise AssertionError('the hash puts something into val every time')


def hash_val(rows, val_ratio):
    corpus = corpus_of(rows)
    config = preparation.PrepareConfig(val_ratio=val_ratio)
    return [text for batch in building.batches(corpus, config, lambda *_: True) for text in batch.texts['val']]


def corpus_of(texts):
    return Corpus({}, '', lambda position=None: (Document(text, '', None, i) for i, text in enumerate(texts)))


def test_the_cut_is_between_documents_if_that_is_near_the_ratio(tmp_path):
    rows = lopsided_rows(20)
    out = prepared(written_rows(tmp_path, rows), tmp_path / 'out')
    assert both(out) == (rows[:19], rows[19:]) and meta(out)['documents']['train'] == 19


def test_duplicates_and_empty_documents_are_dropped_before_the_cut(tmp_path):
    rows = lopsided_rows(20)
    corpus = written_rows(tmp_path, [rows[0], '', *rows[:10], ' ', *rows[5:], rows[3], rows[3]])
    out = prepared(corpus, tmp_path / 'out')
    assert both(out) == (rows[:19], rows[19:])
    assert meta(out)['documents'] == {'read': 30, 'unreadable': 0, 'empty': 2, 'duplicates': 8, 'train': 19, 'val': 1}


def test_the_cut_applies_to_max_documents(tmp_path):
    rows = lopsided_rows(20)
    corpus = written_rows(tmp_path, [*rows, *(f'more {i} of the loss' for i in range(300))])
    out = prepared(corpus, tmp_path / 'out', max_documents=20)
    assert both(out) == (rows[:19], rows[19:]) and meta(out)['documents']['read'] == 20


def test_max_tokens_that_the_hash_fills_with_train_alone_takes_both_splits_by_position(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(building, 'BATCH', 100)  # otherwise the val documents of the first megabyte are kept
    rows = [f'document {i} ' + 'window token loss ' * 10 for i in range(400)]
    assert not is_lopsided({'train': 400 - len(hash_val(rows, 0.05)), 'val': len(hash_val(rows, 0.05))}, 0.05)
    first = next(i for i, row in enumerate(rows) if row in hash_val(rows, 0.05))
    assert first > 1
    out = prepared(written_rows(tmp_path, rows), tmp_path / 'out', max_tokens=80)
    train, val = (np.fromfile(out / f'{split}.bin', '<u2') for split in ('train', 'val'))
    assert (len(train), len(val), train[-1], val[-1]) == (80, 4, 258, 258) and meta(out)['split'] == 'position'
    assert rows[0].startswith(documents(out, 'train')[0]) and rows[380].startswith(documents(out, 'val')[0])
    assert capsys.readouterr().out.count('because a split of 1 document by hash puts 0.0% of the text into val') == 1


def test_max_tokens_beyond_a_corpus_split_by_position_changes_nothing(tmp_path):
    corpus = written_rows(tmp_path, lopsided_rows(20))
    assert both(prepared(corpus, tmp_path / 'all')) == both(prepared(corpus, tmp_path / 'budget', max_tokens=10**6))


def test_splits_within_half_of_the_ratio_stay_split_by_hash(tmp_path):
    rows = [f'document {i} ' + 'window token loss ' * 10 for i in range(200)]
    val = hash_val(rows, 0.2)
    out = prepared(written_rows(tmp_path, rows), tmp_path / 'out', val_ratio=0.2)
    assert both(out) == ([row for row in rows if row not in val], val) and 'split' not in meta(out)


@pytest.mark.parametrize('val_ratio, message', [
    (1e-9, 'none of 150 documents fell into the val split: use more documents, or a larger --val_ratio'),
    (1 - 1e-9, 'none of 150 documents fell into the train split: use more documents, or a smaller --val_ratio')])
def test_large_corpora_are_never_split_by_position(tmp_path, monkeypatch, val_ratio, message):
    monkeypatch.setattr(building, 'SAMPLE', 10_000)
    monkeypatch.setattr(building, 'BATCH', 3000)
    corpus = written_rows(tmp_path, [f'document {i} ' + 'window token loss ' * 10 for i in range(150)])
    with pytest.raises(UserError, match=message):
        prepared(corpus, tmp_path / 'out', val_ratio=val_ratio)
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_shard_is_split_by_hash_and_a_small_corpus_needs_no_shard(tmp_path):
    corpus = written_rows(tmp_path, lopsided_rows(20))
    with pytest.raises(UserError, match='none of .* documents fell into the val split: leave --shard out for so small a corpus'):
        prepared(corpus, tmp_path / 'out', shard='0/2')


def test_own_splits_of_a_corpus_are_kept(tmp_path):
    for split, rows in {'train': 3, 'valid': 4, 'test': 1}.items():
        (tmp_path / f'wiki.{split}.raw').write_text(f' = {split} = \n \n Some text of the loss . \n \n' * rows)
    out = prepared(tmp_path, tmp_path / 'out', dataset='wikitext2', source=tmp_path, val_ratio=0.05)
    assert [len(documents(out, split)) for split in ('train', 'val')] == [3, 4] and 'split' not in meta(out)


# Killed

@pytest.mark.parametrize('module, name, call', [
    (building, 'write_tokenizer', 1), (building, 'encode', 1), (building, 'encode', 30), (preparation, 'publish', 1)])
def test_a_killed_preparation_by_position_resumes_to_the_same_bins(tmp_path, monkeypatch, capsys, module, name, call):
    for key, value in (('BATCH', 1000), ('SAMPLE', 200_000), ('PART', 3)):
        monkeypatch.setattr(building, key, value)
    corpus = written_rows(tmp_path, [text_of(1500, seed=i) for i in range(60)])
    whole = prepared(corpus, tmp_path / 'whole', val_ratio=0.003)
    original, calls = getattr(module, name), []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(KeyboardInterrupt):
            prepared(corpus, tmp_path / 'out', val_ratio=0.003)
    out = prepared(corpus, tmp_path / 'out', val_ratio=0.003)
    assert both(out) == both(whole) and meta(out)['split'] == 'position'
    assert ('continuing after 27 documents' in capsys.readouterr().out) == (call == 30)
    assert {path.name for path in out.iterdir()} == {'.verified.json', 'meta.json', 'tokenizer.json', 'train.bin', 'val.bin'}


# The cut

@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.sampled_from('ab \r\n\u2028é🙂'), min_size=1, max_size=30), min_size=1, max_size=12),
       st.floats(0.001, 0.999))
def test_a_cut_loses_no_text_and_leaves_no_split_empty(rows, val_ratio):
    config, texts = preparation.PrepareConfig(val_ratio=val_ratio), [text for text in dict.fromkeys(rows) if not text.isspace()]
    if not texts:
        return
    if len(texts) == 1 and len(texts[0]) == 1:
        with pytest.raises(UserError, match='a single character of text'):
            find_cut(corpus_of(rows), config, 10**6)
        return
    cut = find_cut(corpus_of(rows), config, 10**6)
    batch, = building.batches(corpus_of(rows), config, unseen(), cut)
    train, val = batch.texts['train'], batch.texts['val']
    assert ''.join(train + val) == ''.join(texts) and train and val
    cuts = [len(''.join(texts[:k])) for k in range(1, len(texts))]
    near = [end for end in cuts if not lopsided_at(texts, end, val_ratio)]
    assert not near or len(''.join(train)) in near  # whole documents wherever possible


def unseen():
    seen = set()
    return lambda digest, _: digest not in seen and not seen.add(digest)


def lopsided_at(texts, end, val_ratio):
    text = ''.join(texts)
    return is_lopsided({'train': len(text[:end].encode()), 'val': len(text[end:].encode())}, val_ratio)


@pytest.mark.parametrize('line_end', [end for end in LINE_ENDS.values() if end])
def test_a_document_is_cut_at_the_line_end_nearest_to_the_ratio(line_end):
    text = line_end.join(['abcdefgh'] * 100)
    cut = find_cut(corpus_of([text]), preparation.PrepareConfig(val_ratio=0.1), 10**6)
    assert cut == Cut(1, 90 * (8 + len(line_end)))


def test_a_corpus_of_the_limit_is_not_small():
    rows = ['a' * 50, 'b' * 50]
    assert find_cut(corpus_of(rows), preparation.PrepareConfig(), 100) is None
    assert find_cut(corpus_of(rows), preparation.PrepareConfig(), 101) == Cut(2, 45)


# A split shorter than a window

def test_a_split_shorter_than_a_window_is_refused_with_the_needed_text(tmp_path):
    out = prepared(written(tmp_path, text_of(3000)), tmp_path / 'out')
    with pytest.raises(UserError) as error:
        TokenData(out, 1000, 259)
    files = meta(out)['files']
    tokens = files['val'][0]['tokens']
    rate = sum(files[split][0]['bytes'] for split in files) / sum(files[split][0]['tokens'] for split in files)
    assert str(error.value) == (
        f'{out}: the val split has {tokens} tokens, fewer than one window of block_size + 1 = 1001, '
        f'about {1001 * rate / 1000:.1f} kB of text: use --block_size={tokens - 1} or less, '
        f'prepare more text (about {1001 * rate / 0.05 / 1000:.1f} kB), or a larger --val_ratio')
