import base64
import hashlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from configurator import UserError
from data import Prefetcher, TokenData, data_dir, permute

VOCAB = 300


def tokenizer():
    tokens = [bytes([byte]) for byte in range(256)] + [bytes([97, byte]) for byte in range(VOCAB - 257)]
    return {'format': 'nanotrix-tokenizer', 'version': 1, 'name': 'test', 'pattern': r'\p{L}+|\P{L}',
            'special_tokens': {'<|endoftext|>': VOCAB - 1}, 'ranks': [base64.b64encode(token).decode() for token in tokens]}


def write(path, shards, seconds=1):
    """A prepared directory with the given ids: {'train': [ids of a shard, ...], 'val': [...]}."""
    path.mkdir(exist_ok=True)
    files = {}
    for split in shards:
        files[split] = []
        for k, ids in enumerate(shards[split]):
            raw = np.asarray(ids, '<u2').tobytes()
            name = f'{split}.bin' if len(shards[split]) == 1 else f'{split}-{k:05d}-of-{len(shards[split]):05d}.bin'
            (path / name).write_bytes(raw)
            files[split].append({'name': name, 'tokens': len(ids), 'sha256': hashlib.sha256(raw).hexdigest()})
    (path / 'tokenizer.json').write_text(json.dumps(tokenizer()))
    (path / 'meta.json').write_text(json.dumps(
        {'version': 1, 'source': {'dataset': 'test'}, 'vocab_size': VOCAB, 'files': files, 'seconds': seconds}))
    return path


def counting(n):
    return np.arange(n) % (VOCAB - 1)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / 'd', {'train': [counting(1000)], 'val': [counting(500)]})


def edit_meta(path, **changes):
    meta = json.loads((path / 'meta.json').read_text())
    (path / 'meta.json').write_text(json.dumps(meta | changes))


# The order of the windows

@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 97, 1009, 4095, 4096, 4097, 65537])
def test_permute_is_a_bijection(n):
    for key in (0, 1, 2**63 + 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_takes_a_key_for_every_element_and_no_memory_for_n():
    i = np.arange(20)
    mixed = permute(i, 1000, np.repeat([5, 6], 10))
    assert mixed.tolist() == permute(i, 1000, 5)[:10].tolist() + permute(i, 1000, 6)[10:].tolist()
    assert permute(i, 10**15, 7).max() > 10**14


def test_permute_never_changes():
    assert permute(np.arange(10), 100, 7).tolist() == [38, 96, 65, 93, 33, 61, 85, 27, 79, 82]


def test_permute_mixes_well():
    n = 2000
    orders = np.array([permute(np.arange(n), n, key) for key in range(60)])
    correlation = np.abs(np.corrcoef(np.vstack([np.arange(n), orders])))[np.triu_indices(61, 1)]
    assert correlation.mean() < 1.2 * 0.8 / np.sqrt(n) and correlation.max() < 5 / np.sqrt(n)  # 0.8: E|x| of a normal x
    for lag in (1, 2, 16, 1000):  # no offset between neighbours is common, nor between two orders
        _, counts = np.unique((orders[:, lag:] - orders[:, :-lag]) % n, return_counts=True)
        assert counts.max() < 2.2 * counts.mean()
    _, counts = np.unique((orders[1:] - orders[:-1]) % n, return_counts=True)
    assert counts.max() < 2.2 * counts.mean()


def test_every_order_of_three_is_equally_likely():
    orders = [tuple(permute(np.arange(3), 3, key).tolist()) for key in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and 150 < min(counts) and max(counts) < 250


# Batches

def test_batch_is_the_window_and_its_successors(path):
    loader = TokenData(path, 16, VOCAB)
    rows = loader.rows(3, 1, 4, 8, seed=5)
    x, y = loader.batch(3, 1, 4, 8, seed=5)
    assert x.dtype == y.dtype == np.int64 and x.flags.c_contiguous and y.flags.c_contiguous
    assert x.tolist() == [counting(1000)[w * 16:w * 16 + 16].tolist() for w in rows]
    assert y.tolist() == [counting(1000)[w * 16 + 1:w * 16 + 17].tolist() for w in rows]


def test_last_window_is_the_last_that_fits(tmp_path):
    for tokens, windows in ((33, 2), (48, 2), (49, 3)):
        loader = TokenData(write(tmp_path / str(tokens), {'train': [counting(tokens)], 'val': [counting(17)]}), 16, VOCAB)
        assert (loader.train_tokens, loader.n_windows) == (tokens, windows)


def test_every_epoch_visits_every_window_once_in_its_own_order(path):
    loader = TokenData(path, 16, VOCAB)  # 62 windows: with 8 rows a step an epoch ends inside step 7
    assert loader.n_windows == 62
    rows = np.concatenate([loader.rows(step, 0, 8, 8, seed=1) for step in range(31)])
    epochs = rows.reshape(4, 62)
    assert all(sorted(epoch) == list(range(62)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert epochs[0].tolist() != np.concatenate([loader.rows(step, 0, 8, 8, seed=2) for step in range(8)])[:62].tolist()
    x, _ = loader.batch(7, 0, 8, 8, seed=1)
    assert x[:, 0].tolist() == (np.concatenate([epochs[0, 56:], epochs[1, :2]]) * 16 % (VOCAB - 1)).tolist()


def test_every_number_of_processes_sees_the_same_global_batch(path):
    loader = TokenData(path, 16, VOCAB)
    for step in (0, 2, 1000):
        expected = sorted(loader.rows(step, 0, 24, 24, seed=3).tolist())
        for world in (1, 2, 3, 4):
            for batch_size in (1, 2, 24 // world):
                micros = 24 // (world * batch_size)
                got = [loader.rows(step, micro, batch_size, 24, rank, world, 3)
                       for micro in range(micros) for rank in range(world)]
                assert sorted(np.concatenate(got).tolist()) == expected


def test_windows_span_shards(tmp_path):
    ids = counting(400)
    whole = TokenData(write(tmp_path / 'whole', {'train': [ids], 'val': [ids]}), 16, VOCAB)
    cuts = [5, 6, 50, 50, 64, 300]  # shards of one token and of none; a window over three shards; a cut at a window's start
    shards = TokenData(write(tmp_path / 'shards', {'train': np.split(ids, cuts), 'val': np.split(ids, [100])}), 16, VOCAB)
    for step in range(5):
        assert np.array_equal(whole.batch(step, 0, 8, 8), shards.batch(step, 0, 8, 8))
    assert np.array_equal(whole.val_batch(whole.val_windows()), shards.val_batch(shards.val_windows()))


def test_validation_windows_are_fixed_and_spread_evenly(path):
    loader = TokenData(path, 16, VOCAB)  # 31 windows
    assert loader.val_windows(0).tolist() == loader.val_windows(10**9).tolist() == list(range(31))
    assert loader.val_windows(16 * 4 + 15).tolist() == [0, 7, 15, 23]
    assert loader.val_windows(1).tolist() == [0]
    x, y = loader.val_batch(np.array([30]))
    assert x.tolist() == [counting(500)[480:496].tolist()] and y.tolist() == [counting(500)[481:497].tolist()]


def test_fingerprint_is_the_content_and_nothing_else(path, tmp_path):
    same = write(tmp_path / 'same', {'train': [counting(1000)], 'val': [counting(500)]}, seconds=2)
    assert TokenData(path, 16, VOCAB).fingerprint == TokenData(same, 32, 512).fingerprint
    fingerprints = {TokenData(path, 16, VOCAB).fingerprint}
    edit_meta(same, source={'dataset': 'other'})
    fingerprints.add(TokenData(same, 16, VOCAB).fingerprint)
    write(same, {'train': [counting(1000)], 'val': [counting(501)]})
    fingerprints.add(TokenData(same, 16, VOCAB).fingerprint)
    write(same, {'train': [counting(1000)], 'val': [counting(500)]})
    (same / 'tokenizer.json').write_text(json.dumps(tokenizer() | {'pattern': '(?s:.)'}))
    fingerprints.add(TokenData(same, 16, VOCAB).fingerprint)
    assert len(fingerprints) == 4


# What is refused

def corrupt(path, position, value):
    ids = np.fromfile(path, '<u2')
    ids[position] = value
    ids.tofile(path)


def break_meta(path):
    meta = json.loads((path / 'meta.json').read_text())
    del meta['files']['val']
    (path / 'meta.json').write_text(json.dumps(meta))


@pytest.mark.parametrize('damage, message', [
    (lambda path: (path / 'meta.json').unlink(), '{path}: no prepared data (no meta.json): make it with python prepare.py'),
    (lambda path: (path / 'meta.json').write_text('{"version": 1'), '{path}/meta.json: broken (Expecting'),
    (lambda path: (path / 'meta.json').write_text('[]'), '{path}/meta.json: broken (no JSON object)'),
    (break_meta, "{path}/meta.json: broken (KeyError('val')): remove {path} and prepare it again"),
    (lambda path: edit_meta(path, version=9), '{path}/meta.json: version 9, expected 1: remove {path}'),
    (lambda path: edit_meta(path, vocab_size=299), '{path}/tokenizer.json: 300 tokens, but meta.json says 299'),
    (lambda path: edit_meta(path, vocab_size=301), '{path} has a vocabulary of 301, the model only 300: use --vocab_size=301'),
    (lambda path: (path / 'val.bin').unlink(), '{path}/val.bin: No such file or directory: remove {path}'),
    (lambda path: (path / 'tokenizer.json').unlink(), '{path}/tokenizer.json: No such file'),
    (lambda path: (path / 'train.bin').write_bytes(b'abc'), '{path}/train.bin: 3 bytes, but meta.json says 2000'),
    (lambda path: corrupt(path / 'train.bin', 700, 1), '{path}/train.bin: damaged: its sha256 differs from meta.json'),
    (lambda path: corrupt(path / 'val.bin', 123, 300), '{path}/val.bin: id 300 at position 123 is outside the vocabulary of 300'),
])
def test_damaged_directory_is_refused_in_one_line(path, damage, message):
    damage(path)
    with pytest.raises(UserError) as error:
        TokenData(path, 16, VOCAB)
    assert str(error.value).startswith(message.format(path=path)) and '\n' not in str(error.value)


def test_path_that_is_no_directory_is_refused(path):
    for wrong in (path / 'none', path / 'train.bin'):
        with pytest.raises(UserError, match='no prepared data'):
            TokenData(wrong, 16, VOCAB)


def test_split_shorter_than_a_window_is_refused(path):
    assert TokenData(path, 499, VOCAB).n_val_windows == 1
    with pytest.raises(UserError, match='the val split has 500 tokens, fewer than one window .* = 501: .*val_ratio'):
        TokenData(path, 500, VOCAB)
    with pytest.raises(UserError, match='the train split has 1000 tokens'):
        TokenData(path, 1000, VOCAB)


def test_ids_that_changed_unseen_since_they_were_verified_are_refused_in_a_batch(path):
    corrupt(path / 'train.bin', 700, 300)
    corrupt(path / 'val.bin', 496, 65535)
    loader = TokenData(path, 16, VOCAB, verify='never')
    with pytest.raises(UserError, match='id 300 at position 700 of the train split is outside the vocabulary of 300'):
        loader.batch(0, 0, 62, 62)
    loader.val_batch(np.arange(30))
    with pytest.raises(UserError, match='id 65535 at position 496 of the val split'):
        loader.val_batch(np.array([30]))


# Prefetching

def test_prefetcher_makes_the_next_batch_while_the_current_batch_is_used():
    made = []
    batches = Prefetcher(lambda step, micro: made.append((step, micro)) or time.sleep(0.02) or 10 * step + micro,
                         ((step, micro) for step in range(2) for micro in range(2)))
    assert next(batches) == 0
    time.sleep(0.2)
    assert made == [(0, 0), (0, 1)]  # one ahead, not more
    waited = batches.wait
    assert 0.01 < waited and next(batches) == 1 and batches.wait - waited < 0.01
    assert list(batches) == [10, 11] and list(batches) == []


def test_an_exception_of_the_loader_reaches_the_consumer():
    batches = Prefetcher(lambda step: 1 // step, ((1,), (0,)))
    assert next(batches) == 1
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_a_consumer_that_raises_ends_the_program():
    program = 'import data\nfor i in data.Prefetcher(lambda i: i, ((i,) for i in range(10**9))):\n    assert i < 3, "enough"'
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=20)
    assert result.returncode == 1 and 'enough' in result.stderr


def test_data_dir_is_readable_and_never_shared():
    assert str(data_dir('pylib')) == 'data/pylib'
    assert str(data_dir('pylib', 'gpt2', 'elsewhere')) == 'elsewhere/pylib-gpt2'
    assert str(data_dir('data/mine')) == 'data/mine'
    assert str(data_dir('text:../my notes/*.txt')).startswith('data/text-my-notes-.txt-')
    assert data_dir('text:a/b') != data_dir('text:a-b')
    assert data_dir('pylib', 'a/tokenizer.json') != data_dir('pylib', 'b/tokenizer.json')
