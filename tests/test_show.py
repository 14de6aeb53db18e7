"""show: every figure is right to the token."""
import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from corpora import show
from configurator import UserError
from tokenizer import load_tokenizer

VOCAB, EOT = 300, 299


def tokenizer():
    """256 bytes, then 'a' and one more byte each, then the end of text."""
    ranks = [bytes([byte]) for byte in range(256)] + [bytes([97, byte]) for byte in range(VOCAB - 257)]
    return {'format': 'nanotrix-tokenizer', 'version': 1, 'name': 'test', 'pattern': r'\p{L}+|\P{L}',
            'special_tokens': {'<|endoftext|>': EOT}, 'ranks': [base64.b64encode(rank).decode() for rank in ranks]}


def entry(path, name, ids, **more):
    (path / name).write_bytes(raw := np.asarray(ids, '<u2').tobytes())
    return {'name': name, 'tokens': len(ids), 'sha256': hashlib.sha256(raw).hexdigest(), **more}


def bins(path, train_files, val=range(256), **more):
    """A prepared directory: the train split in as many files as there are lists of ids."""
    path.mkdir()
    (path / 'tokenizer.json').write_text(json.dumps(tokenizer()))
    files = {'train': [entry(path, f'train-{k}.bin', ids) for k, ids in enumerate(train_files)],
             'val': [entry(path, 'val.bin', val)]}
    meta = {'version': 1, 'source': {'dataset': 'test'}, 'filter': 'none', 'seed': 1337, 'vocab_size': VOCAB, 'eot_id': EOT,
            'documents': {'read': 9, 'train': 7, 'val': 2}, 'files': files, 'created': '2026-01-02T03:04:05+00:00'}
    (path / 'meta.json').write_text(json.dumps(meta | more))
    return path


def shards(path, parts, **more):
    """A directory of kind 'shards' without a tokenizer: {'train': [(rows, L) ids, ...], 'val': [...]}."""
    files = {}
    for split, arrays in parts.items():
        (path / split).mkdir(parents=True)
        files[split] = []
        for k, rows in enumerate(arrays):
            np.save(file := path / split / f'{k}.npy', np.asarray(rows, np.uint16))
            files[split].append({'name': f'{split}/{k}.npy', 'first': 0, 'rows': len(rows), 'tokens': int(rows.size),
                                 'max_id': int(rows.max()), 'bytes': file.stat().st_size,
                                 'sha256': hashlib.sha256(file.read_bytes()).hexdigest()})
    meta = {'version': 1, 'kind': 'shards', 'source': {'dataset': 'shards:x'}, 'seed': 1337, 'val_ratio': 0.01, 'vocab_size': VOCAB,
            'row': parts['train'][0].shape[1], 'eot_id': EOT, 'created': '2026-01-02T03:04:05+00:00', 'files': files}
    (path / 'meta.json').write_text(json.dumps(meta | more))
    return path


def said(function, *args, **kwargs):
    lines = []
    result = function(*args, say=lines.append, **kwargs)
    return '\n'.join(lines), result


def documents(*lengths):
    return [token for n in lengths for token in [*([98] * n), EOT]]


@pytest.fixture
def undrawn(monkeypatch):
    """A picture takes a second: most tests do without."""
    monkeypatch.setattr(show, 'draw', lambda *_: None)


def test_counts_and_document_lengths_are_exact_over_chunks_and_files(tmp_path, monkeypatch):
    ids = documents(3, 0, 25, 1, 3, 14)
    path = bins(tmp_path / 'd', [ids[:2], ids[2:11], ids[11:]])  # the files end inside documents
    for chunk in (1, 2, 4, 5, 7, 10, 1000):
        monkeypatch.setattr(show, 'CHUNK', chunk)
        counts, lengths, tail = show.survey(show.open_whole(path))
        assert counts.shape == (VOCAB,) and (counts[98], counts[EOT], counts.sum()) == (46, 6, 52)
        assert lengths == {0: 1, 1: 1, 3: 2, 14: 1, 25: 1} and tail == 0


def test_an_unfinished_document_is_not_counted_but_reported(tmp_path, monkeypatch):
    path = bins(tmp_path / 'd', [documents(3, 2) + [98] * 9])
    for chunk in (4, 1000):
        monkeypatch.setattr(show, 'CHUNK', chunk)
        counts, lengths, tail = show.survey(show.open_whole(path))
        assert (lengths, tail, counts[98]) == ({3: 1, 2: 1}, 9, 14)
    assert '2, and 9 tokens of an unfinished one' in show.document_rows(lengths, tail, EOT)[0]


def test_large_data_are_sampled_in_evenly_spread_chunks_with_a_message(tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(show, 'CHUNK', 10)
    monkeypatch.setattr(show, 'LIMIT', 40)
    ids = np.repeat(np.arange(10), 10)  # chunk k holds k alone
    path = bins(tmp_path / 'd', [ids])
    counts, _, tail = show.survey(show.open_whole(path))
    assert np.flatnonzero(counts).tolist() == [0, 2, 5, 7] and set(counts[counts > 0]) == {10} and tail is None
    assert 'a sample: 40 of 100 train tokens' in said(show.show, path, out=f'{tmp_path}/p.png')[0]


def test_a_sample_counts_only_documents_that_were_read_completely(tmp_path, monkeypatch):
    monkeypatch.setattr(show, 'CHUNK', 10)
    monkeypatch.setattr(show, 'LIMIT', 30)
    ids = documents(4, 2) + [98, 98] + [98] * 10 + documents(1, 5) + [98, 98] + documents(8, 0)  # chunks 0 and 2 are read, and 1
    path = bins(tmp_path / 'd', [ids + [98] * 20])
    assert show.survey(show.open_whole(path))[1] == {4: 1, 2: 1, 5: 1}


def test_the_token_figures_equal_the_hand_computation(tmp_path, undrawn):
    ids = [98] * 4 + [97] * 2 + [258, EOT]  # b x 4, a x 2, one token of 2 bytes, the end: p 1/2, 1/4, 1/8, 1/8
    path = bins(tmp_path / 'd', [ids])
    text, _ = said(show.show, path, n=0, out=f'{tmp_path}/p.png')
    rows = dict(re.split(r'  +', line, maxsplit=1) for line in text.splitlines() if '  ' in line)
    assert rows['tokens that occur'] == '4 of 300, 296 never'
    assert rows['most common'].split() == ['50.000%', '98', "'b'"]
    assert "25.000%      97  'a'" in text and "12.500%     299  '<|endoftext|>'" in text and "12.500%     258  'a\\x02'" in text
    assert rows['the 100 most common'] == '100.00% of all tokens'
    assert rows['entropy of a token'] == '1.750 bits'  # 1/2 + 2/4 + 3/8 + 3/8
    assert rows['coded by frequency alone'] == '1.750 bits per byte of text, 21.9% of its size'  # 8 tokens, 8 bytes
    assert rows['documents'].startswith('1') and 'mean 7.0, median 7' in rows['tokens, without the end of text']


def test_the_share_of_the_top_tokens_counts_only_them():
    counts = np.r_[np.full(100, 3), np.full(900, 1), np.full(500, 1), 0]
    rows = dict(show.token_rows(counts, None))
    assert rows['the 100 most common'] == f'{300 / 1700:.2%} of all tokens'
    assert rows['the 1,000 most common'] == f'{1200 / 1700:.2%} of all tokens'


def test_the_document_figures_equal_the_hand_computation():
    rows = dict(show.document_rows({10: 5, 256: 3, 1025: 1, 40_000: 1}, 0, EOT))
    assert rows['documents'] == '10'
    assert rows['tokens, without the end of text'] == ('mean 4,184.3, median 10, 10 % have at most 10, 90 % have at most 1,025, '
                                                     'longest 40,000')
    assert [rows[f'longer than {edge}'] for edge in ('256', '1,024', '4,096', '32,768')] == ['20.00%', '20.00%', '10.00%', '10.00%']


def test_the_meta_data_are_shown(tmp_path, undrawn):
    path = bins(tmp_path / 'd', [documents(10), documents(20, 5)])
    text, _ = said(show.show, path, n=0, out=f'{tmp_path}/p.png')
    digest = hashlib.sha256((path / 'train-0.bin').read_bytes()).hexdigest()[:12]
    for pattern in (r'source +dataset test', r'filter +none', r'seed +1337', r'vocabulary +300', r'created +2026-01-02T03:04:05',
                    rf'train +7 +38 +- +- +2 +{digest} and 1 more', r'val +2 +256 +-'):
        assert re.search(pattern, text), pattern


def test_bytes_per_token_count_the_text_and_not_the_file(tmp_path, undrawn):
    path = bins(tmp_path / 'd', [documents(10)])
    meta = json.loads((path / 'meta.json').read_text())
    meta['files']['train'][0]['bytes'] = 33
    (path / 'meta.json').write_text(json.dumps(meta))
    assert re.search(r'train +7 +11 +33 +3\.00 +1', said(show.show, path, n=0, out=f'{tmp_path}/p.png')[0])


def test_windows_are_chosen_by_the_seed_and_spread_over_the_split(tmp_path):
    ids = np.arange(10_000) % 256
    data = show.open_whole(bins(tmp_path / 'd', [ids[:777], ids[777:]]))

    def starts(n, seed):
        found = [(int(where.split()[1].replace(',', '')), part) for where, part in show.windows(data, n, seed)]
        assert all(np.array_equal(part, ids[start:start + 80]) and len(part) == 80 for start, part in found)
        return [start for start, _ in found]
    assert starts(4, 1) == starts(4, 1) != starts(4, 2)
    assert [start * 4 // (10_000 - 79) for start in starts(4, 3)] == [0, 1, 2, 3]
    assert starts(0, 1) == []


def test_windows_of_shards_stay_inside_a_row(tmp_path):
    rows = np.arange(40)[:, None] + np.zeros((1, 100), int)  # row k holds k alone
    data = show.open_whole(shards(tmp_path / 's', {'train': [rows[:15], rows[15:]], 'val': [rows[:2]]}))
    for where, ids in show.windows(data, 40, 5):
        row, token = re.fullmatch(r'row (\d+), token (\d+) of the train split', where).groups()
        assert len(ids) == 80 and set(ids.tolist()) == {int(row)} and int(token) <= 20


def test_shown_text_is_readable_and_cannot_control_the_terminal(tmp_path):
    data = list('Grüße\n\t'.encode()) + [EOT, 27, ord('['), 0x85, 0xc3]
    assert show.readable_text(np.array(data), load_tokenizer(tokenizer())) == 'Grüße\n\t<|endoftext|>\ufffd[\ufffd\ufffd'
    assert show.readable_text(np.array([7, 300_000]), None) == '7 300000'


def test_shards_without_a_tokenizer_show_ids_and_the_same_figures(tmp_path, undrawn):
    ids = documents(3, 30, 0, 60, 2)
    rows = np.array(ids).reshape(10, 10)
    path = shards(tmp_path / 's', {'train': [rows[:3], rows[3:]], 'val': [rows[:1]]})
    counts, lengths, tail = show.survey(show.open_whole(path))
    assert (counts[98], counts[EOT], counts.sum(), tail) == (95, 5, 100, 0) and lengths == dict.fromkeys((3, 30, 0, 60, 2), 1)
    text, _ = said(show.show, path, n=1, out=f'{tmp_path}/p.png')
    window = text[text.index('---'):].splitlines()[1]
    assert len(window.split()) == 10 and set(window.split()) <= {'98', '299'}
    assert re.search(r'tokens per row +10', text) and re.search(r'train +- +100 +[\d,]+ +- +2', text)


def test_rows_are_read_exactly_wherever_a_chunk_begins(tmp_path):
    for row in (2, 3, 7):
        rows = (np.arange(6 * row) % 256).reshape(6, row)
        data = show.open_whole(shards(tmp_path / f's{row}', {'train': [rows[:1], rows[1:]], 'val': [rows[:1]]}))
        for start in range(6 * row):
            for stop in range(start + 1, 6 * row + 1):
                assert show.read(data, start, stop).tolist() == list(range(start, stop))


def test_the_picture_is_a_separate_file_and_the_data_do_not_change(tmp_path, monkeypatch):
    path = bins(tmp_path / 'my$data', [documents(0, 10, 300)])
    before = {file: file.read_bytes() for file in path.iterdir()}
    monkeypatch.chdir(tmp_path)
    text, out = said(show.show, path, n=1)
    assert out == Path('runs/data_my$data.png') and out.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    assert text.endswith('picture: runs/data_my$data.png')
    (path / '.verified.json').unlink()  # says that the bins were read and found right
    assert {file: file.read_bytes() for file in path.iterdir()} == before and not list(tmp_path.glob('*.tmp'))


def test_data_with_one_kind_of_token_or_no_end_of_text_can_be_shown(tmp_path):
    path = bins(tmp_path / 'd', [[98] * 50], eot_id=None)
    text, _ = said(show.show, path, out=f'{tmp_path}/p.png')
    assert re.search(r'documents +no end-of-text id', text) and re.search(r'entropy of a token +0.000 bits', text)
    assert show.document_rows({}, 50, EOT) == [('documents', 'no end-of-text token (id 299) occurs')]


def test_the_slope_of_a_zipf_law_is_found():
    slope, first = show.zipf_fit(1e6 / np.arange(1, 5001) ** 1.2)
    assert (slope, math.exp(first)) == (pytest.approx(-1.2), pytest.approx(1e6))


def test_show_starts_without_torch():
    code = 'import sys; from corpora import show; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], cwd=Path(show.__file__).parent.parent, check=True)


def test_a_problem_of_the_data_is_one_line(tmp_path, monkeypatch):
    good = bins(tmp_path / 'd', [documents(10)])
    for path, kwargs, message in ((tmp_path / 'none', {}, 'no meta.json'), (good, {'n': -1}, '--n=-1'),
                                  (good, {'out': f'{good}/meta.json/p.png'}, 'p.png: File exists'),
                                  (bins(tmp_path / 'e', [documents(10)], documents=5), {}, 'meta.json: broken')):
        with pytest.raises(UserError, match=message) as error:
            show.show(path, say=lambda _: None, **kwargs)
        assert '\n' not in str(error.value)
    beyond = bins(tmp_path / 'f', [[98] * 20 + [VOCAB]])
    with pytest.raises(UserError, match='id 300 at position 20 is outside the vocabulary of 300'):
        show.show(beyond, n=0, say=lambda _: None)
