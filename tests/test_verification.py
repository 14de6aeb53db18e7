import json
import os
import shutil
import threading
import time

import numpy as np
import pytest

import evaluate
import prepare
import train
import verification
from corpora import building
from corpora import opening
from configurator import UserError
from data import TokenData
from corpora.shards import open_data, split, validate
from runs import arguments, finish
from test_data import VOCAB, counting, edit_meta, write


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / 'd', {'train': [counting(1000), counting(700)], 'val': [counting(500)]})


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are read as a whole."""
    names, scan = [], verification.scan
    monkeypatch.setattr(verification, 'scan', lambda file, *rest: names.append(file.name) or scan(file, *rest))
    return names


def flip(file, later=0):
    """Change a byte, keeping the size, and set the modification time `later` seconds behind what it was."""
    before = file.stat()
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1
    with open(file, 'r+b') as target:  # the same inode
        target.write(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + later * 10**9))


def test_files_are_read_at_the_first_start_only(path, reads):
    TokenData(path, 16, VOCAB)
    assert sorted(reads) == ['train-00000-of-00002.bin', 'train-00001-of-00002.bin', 'val.bin']
    reads.clear()
    TokenData(path, 16, VOCAB)
    TokenData(path, 32, VOCAB + 5)
    assert reads == []


def test_twenty_gigabytes_on_record_open_at_once(tmp_path, monkeypatch):
    path = write(tmp_path / 'd', {'train': [counting(1000)] * 10, 'val': [counting(500)]})
    meta = json.loads((path / 'meta.json').read_text())
    for entry in meta['files']['train']:
        entry['tokens'] = 10**9
        os.truncate(path / entry['name'], 2 * 10**9)  # the disk has none of it
    (path / 'meta.json').write_text(json.dumps(meta))
    verification.remember(path, building.hashes_of(meta['files']), VOCAB)
    monkeypatch.setattr(verification, 'scan', None)  # reading would raise
    start = time.process_time()
    assert TokenData(path, 16, VOCAB).train_tokens == 10**10
    assert time.process_time() - start < 0.2


def test_a_fresh_preparation_is_never_read(tmp_path, reads):
    for k in range(12):
        (tmp_path / f'{k}.txt').write_text(f'some words {k} ' * 100)
    for shard in ('', '0/2', '1/2'):
        prepare.main([f'--dataset=text:{tmp_path}/*.txt', '--vocab_size=257', f'--out={tmp_path}/out{len(shard)}',
                      f'--shard={shard}', '--val_ratio=0.5', '--num_proc=1'])
    for name in ('out0', 'out3'):
        TokenData(tmp_path / name, 16, 257)
    assert reads == []


@pytest.mark.parametrize('change', ['copy', 'touch', 'vocabulary', 'hash'])
def test_a_changed_file_is_read_again(path, reads, tmp_path, change):
    TokenData(path, 16, VOCAB)
    reads.clear()
    if change == 'copy':
        shutil.copytree(path, tmp_path / 'copy')  # keeps times and the record
        TokenData(tmp_path / 'copy', 16, VOCAB)
        assert len(reads) == 3
    elif change == 'touch':
        flip(path / 'val.bin', later=1)
        with pytest.raises(UserError, match='val.bin: damaged: its sha256 differs from meta.json'):
            TokenData(path, 16, VOCAB)
        assert reads == ['val.bin']
        with pytest.raises(UserError, match='val.bin: damaged'):  # and again: damage is never put on record
            TokenData(path, 16, VOCAB)
    elif change == 'vocabulary':
        verification.verify(path, TokenData(path, 16, VOCAB).bins, VOCAB - 1, 'prepare it again')
        assert len(reads) == 3
    else:
        edit_meta(path, files={part: [entry | {'sha256': 64 * '0'} for entry in entries]
                               for part, entries in json.loads((path / 'meta.json').read_text())['files'].items()})
        with pytest.raises(UserError, match='damaged'):
            TokenData(path, 16, VOCAB)


def test_change_that_keeps_size_and_time_is_found_by_verify_and_by_validate(path):
    TokenData(path, 16, VOCAB)
    flip(path / 'val.bin')
    TokenData(path, 16, VOCAB)  # as it was, for all that a start can know
    with pytest.raises(UserError, match='val.bin: damaged'):
        TokenData(path, 16, VOCAB, verify='always')
    with pytest.raises(UserError, match='val.bin: damaged'):
        validate(path, say=lambda line: None)
    config = train.load([f'--dataset={path}', f'--vocab_size={VOCAB}', '--block_size=16', '--verify'])
    with pytest.raises(UserError, match='val.bin: damaged'):
        opening.open_dataset(config, verify='always' if config.verify else 'once')


def test_evaluation_with_verify_reads_all_files_again(path, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, 'open_data', lambda *arguments: asked.append(arguments[-1]) or TokenData(*arguments))

    class Model:
        config = type('Config', (), {'block_size': 16, 'vocab_size': VOCAB})
    for verify in (False, True):
        config = evaluate.EvaluateConfig(run='x', data=str(path), verify=verify)
        evaluate.open_validation(config, Model, {'data': {}, 'tokenizer': TokenData(path, 16, VOCAB).tokenizer})
    assert asked == ['once', 'always']


def test_validate_records_the_files_that_it_has_read(path, reads):
    validate(path, say=lambda line: None)
    assert len(reads) == 3
    TokenData(path, 16, VOCAB)
    assert len(reads) == 3


def test_shards_are_read_as_a_whole_by_verify_alone(tmp_path):
    for k in range(4):
        (tmp_path / 'in').mkdir(exist_ok=True)
        np.save(tmp_path / 'in' / f'{k}.npy', counting(330).reshape(10, 33).astype(np.uint16))
    split(tmp_path / 'in', tmp_path / 'out', say=lambda line: None)
    flip(tmp_path / 'in' / '2.npy')
    open_data(tmp_path / 'out', 32, VOCAB)
    with pytest.raises(UserError, match='2.npy'):
        open_data(tmp_path / 'out', 32, VOCAB, 'always')


def test_directory_that_cannot_be_written_is_remembered_in_the_users_cache(path, reads, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (path / verification.RECORD).mkdir()  # can't be written, not even by root
    for _ in range(2):
        TokenData(path, 16, VOCAB)
    assert len(reads) == 3 and len(list((tmp_path / 'cache' / 'nanotrix').glob('verified-*.json'))) == 1
    assert capsys.readouterr().out == ''
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    for _ in range(2):
        TokenData(path, 16, VOCAB)
        assert f'neither this directory nor {tmp_path}/file/nanotrix can be written' in capsys.readouterr().out
    assert len(reads) == 9


@pytest.mark.parametrize('text', ['', '[]', '{"files": 5}', '{"files": {"val.bin": null}}', '\xff'])
def test_a_broken_record_is_ignored(path, reads, text):
    (path / verification.RECORD).write_bytes(text.encode('latin-1'))
    TokenData(path, 16, VOCAB)
    assert len(reads) == 3


def test_processes_that_start_together_read_the_files_once(path, reads, monkeypatch):
    scan = verification.scan
    monkeypatch.setattr(verification, 'scan', lambda *arguments: time.sleep(0.1) or scan(*arguments))
    threads = [threading.Thread(target=TokenData, args=(path, 16, VOCAB)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 3


def test_long_verification_says_what_it_does(path, monkeypatch, capsys):
    monkeypatch.setattr(verification, 'LONG', 4400)
    TokenData(path, 16, VOCAB)
    TokenData(path, 16, VOCAB, verify='always')
    once, again = capsys.readouterr().out.splitlines()
    assert (once, again) == (f'{path}: verifying 0.0 GB of tokens, once', f'{path}: verifying 0.0 GB of tokens')


def test_a_run_with_verify_ends_at_a_changed_byte(corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / 'tokens')
    TokenData(copy, 16, 300)
    flip(copy / 'train.bin')
    words = arguments(copy, tmp_path / 'run', '--max_steps=1', '--warmup_steps=1', '--sample_interval=0')
    assert finish(words)[0] == 0
    code, said = finish([*words, '--verify'])
    assert code == 2, said
    assert 'train.bin: damaged: its sha256 differs from meta.json' in said.splitlines()[-1]
