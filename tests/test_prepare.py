import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
import prepare
from corpora import building, preparation, workspace
from configurator import UserError
from data import TokenData
from tokenizer import load_tokenizer

ROOT = Path(prepare.__file__).parent
WORDS = 'the of model token byte window train while gradient descent loss layer attention résumé 数据 return def self'.split()


def texts(n, seed=0):
    """n different documents of about 300 bytes."""
    rng = random.Random(seed)
    return [' '.join(rng.choices(WORDS, k=50)) + f' {seed}.{i}\n' for i in range(n)]


def write_jsonl(path, documents):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
    return path


def arguments(corpus, out, **changes):
    options = {'dataset': f'text:{corpus}', 'out': out, 'vocab_size': 300, 'val_ratio': 0.2, 'num_proc': 1} | changes
    return [f'--{key}={value}' for key, value in options.items()]


def prepared(corpus, out, **options):
    prepare.main(arguments(corpus, out, **options))
    return out


def start(code, *argv):
    """`code` in a new Python, which stands for prepare.py with something in it replaced."""
    return subprocess.Popen([sys.executable, '-c', code, *map(str, argv)], cwd=ROOT, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def command(*argv):
    return subprocess.run([sys.executable, ROOT / 'prepare.py', *map(str, argv)], capture_output=True, text=True, timeout=60)


def bins(out):
    return {name: (out / name).read_bytes() for name in ('train.bin', 'val.bin', 'tokenizer.json')}


def meta(out):
    return json.loads((out / 'meta.json').read_text())


def documents(out, split):
    encoding = load_tokenizer(out)
    ids = np.fromfile(out / f'{split}.bin', '<u2')
    assert ids[-1] == encoding.n_vocab - 1
    ends = np.flatnonzero(ids == encoding.n_vocab - 1)
    return [encoding.decode(part[part != encoding.n_vocab - 1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith('.'))


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / 'corpus.jsonl', texts(150))


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    """A corpus of several batches, and what one process makes of it."""
    folder = tmp_path_factory.mktemp('large')
    corpus = write_jsonl(folder / 'corpus.jsonl', texts(9000))
    return corpus, prepared(corpus, folder / 'out')


# What is written

def test_bins_hold_every_document_and_meta_describes_them(corpus, tmp_path, capsys):
    out = prepared(corpus, tmp_path / 'deep' / 'out')
    split = {name: documents(out, name) for name in ('train', 'val')}
    assert sorted(split['train'] + split['val']) == sorted(texts(150)) and len(split['val']) > 15
    described = meta(out)
    assert described['source'] == {'dataset': f'text:{corpus}', 'files': 1, 'bytes': corpus.stat().st_size, 'text_field': 'text'}
    assert (described['version'], described['vocab_size'], described['eot_id'], described['seed']) == (1, 300, 299, 1337)
    assert described['documents'] == {'read': 150, 'unreadable': 0, 'empty': 0, 'duplicates': 0,
                                      'train': len(split['train']), 'val': len(split['val'])}
    for name in split:
        (file,) = described['files'][name]
        ids = np.fromfile(out / file['name'], '<u2')
        assert (file['tokens'], file['max_id']) == (len(ids), ids.max())
        assert file['bytes'] == sum(len(text.encode()) for text in split[name])
    assert sorted(path.name for path in out.iterdir()) == ['.verified.json', 'meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    assert leftovers(out.parent) == []
    data = TokenData(out, 8, 300)  # which checks sizes, hashes and ids
    assert data.train_tokens == described['files']['train'][0]['tokens']
    summary = capsys.readouterr().out.splitlines()[-1]
    assert f'{data.train_tokens:,} train' in summary and 'bytes per token' in summary


def test_bins_are_the_same_for_any_number_of_processes(large, tmp_path):
    corpus, out = large
    result = command(*arguments(corpus, tmp_path / 'two', num_proc=2))
    assert result.returncode == 0 and result.stderr == ''
    assert bins(tmp_path / 'two') == bins(out)
    assert {**meta(tmp_path / 'two'), 'created': 0, 'seconds': 0} == {**meta(out), 'created': 0, 'seconds': 0}


def test_batches_are_encoded_in_order_with_a_bounded_number_in_flight(large, tmp_path, monkeypatch):
    _, out = large
    taken = []

    def stream():
        for i in range(20):
            taken.append(i)
            yield building.Batch(i, (i, None), {}, {'train': [f'{i} ' * 50], 'val': []})

    class Pool(building.ProcessPoolExecutor):
        def __init__(self, num_proc, context, initializer, initargs):
            building.open_tokenizer(*initargs)

        def submit(self, function, texts):
            return type('Future', (), {'result': lambda _: function(texts)})()

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(building, 'ProcessPoolExecutor', Pool)
    for i, (batch, ids) in enumerate(building.encoded(stream(), out, 3)):
        assert batch.number == i and batch.texts is None  # texts in flight are held once, by the pool
        assert load_tokenizer(out).decode(ids['train'].tolist()) == f'{i} ' * 50 + '<|endoftext|>'
        assert len(taken) == min(20, i + 6)


def test_max_tokens_is_the_train_budget(large, tmp_path):
    corpus, out = large
    short = prepared(corpus, tmp_path / 'short', max_tokens='2e5', num_proc=1)
    ids, all_ids = np.fromfile(short / 'train.bin', '<u2'), np.fromfile(out / 'train.bin', '<u2')
    assert len(ids) == 200_000 and ids[-1] == 299 and np.array_equal(ids[:-1], all_ids[:199_999])
    assert meta(short)['documents']['train'] == len(documents(short, 'train')) < meta(out)['documents']['train']


def test_literal_end_of_text_in_a_document_is_text(tmp_path):
    odd = [f'before <|endoftext|> after {i}' for i in range(30)]
    out = prepared(write_jsonl(tmp_path / 'c.jsonl', odd), tmp_path / 'out', vocab_size=270)
    assert sorted(documents(out, 'train') + documents(out, 'val')) == sorted(odd)


def test_exact_duplicates_and_empty_documents_are_dropped(tmp_path):
    rows = texts(100)
    write_jsonl(tmp_path / 'c.jsonl', [*rows, rows[3], '', ' \n\u3000', *rows[:10]])
    out = prepared(tmp_path / 'c.jsonl', tmp_path / 'out')
    assert sorted(documents(out, 'train') + documents(out, 'val')) == sorted(rows)
    counts = meta(out)['documents']
    assert (counts['read'], counts['empty'], counts['duplicates'], counts['train'] + counts['val']) == (113, 2, 11, 100)


def test_growing_the_corpus_never_moves_a_document_between_splits(corpus, tmp_path):
    small = prepared(corpus, tmp_path / 'small')
    grown = random.Random(1).sample(texts(150) + texts(150, seed=1), 300)
    large = prepared(write_jsonl(tmp_path / 'grown.jsonl', grown), tmp_path / 'large', vocab_size=310)
    for split in ('train', 'val'):
        assert set(documents(small, split)) == set(documents(large, split)) & set(texts(150))
    other = prepared(corpus, tmp_path / 'other', seed=2)
    assert set(documents(other, 'val')) != set(documents(small, 'val'))


def test_max_documents_is_a_limit_on_what_is_read(corpus, tmp_path):
    out = prepared(corpus, tmp_path / 'out', max_documents=60)
    assert sorted(documents(out, 'train') + documents(out, 'val')) == sorted(texts(150)[:60])
    assert meta(out)['documents']['read'] == 60 and meta(out)['max_documents'] == 60


def test_large_splits_are_several_files_and_read_as_one(large, tmp_path, monkeypatch):
    corpus, out = large
    monkeypatch.setattr(workspace, 'BIN_TOKENS', 400_000)
    files = prepared(corpus, tmp_path / 'files')
    names = [file['name'] for file in meta(files)['files']['train']]
    n = -(-len(np.fromfile(out / 'train.bin', '<u2')) // 400_000)
    assert names == [f'train-{i:05d}-of-{n:05d}.bin' for i in range(n)] and n > 1
    assert b''.join((files / name).read_bytes() for name in names) == (out / 'train.bin').read_bytes()
    assert [file['tokens'] for file in meta(files)['files']['train']][:-1] == [400_000] * (n - 1)
    one, many = TokenData(out, 64, 300), TokenData(files, 64, 300)
    assert np.array_equal(one.batch(0, 0, 64, 64), many.batch(0, 0, 64, 64))
    assert sum(file['bytes'] for file in meta(files)['files']['train']) == meta(out)['files']['train'][0]['bytes']


def test_an_existing_tokenizer_is_used(corpus, large, tmp_path):
    out = prepared(corpus, tmp_path / 'out', tokenizer=large[1] / 'tokenizer.json')
    assert (out / 'tokenizer.json').read_bytes() == (large[1] / 'tokenizer.json').read_bytes()
    assert sorted(documents(out, 'train') + documents(out, 'val')) == sorted(texts(150))
    assert meta(out)['tokenizer'] != 'bpe' and meta(out)['vocab_size'] == 300


# Shards: machines that know nothing of each other

@pytest.mark.parametrize('n', [1, 2, 5])
def test_shards_together_equal_a_single_preparation(tmp_path, n):
    rows = texts(400)
    corpus = write_jsonl(tmp_path / 'c.jsonl', [*rows, *rows[50:90], '', ' '])  # duplicates far from their originals
    whole = prepared(corpus, tmp_path / 'whole')
    for i in random.Random(n).sample(range(n), n):
        prepared(corpus, tmp_path / 'parts', shard=f'{i}/{n}')
        assert (tmp_path / 'parts' / 'meta.json').exists() == (len(list((tmp_path / 'parts').glob('shard-*'))) == n)
    for split in ('train', 'val'):
        parts = [documents(folder, split) for folder in sorted((tmp_path / 'parts').glob('shard-*'))]
        assert sorted(sum(parts, [])) == sorted(documents(whole, split))
        assert n == 1 or max(map(len, parts)) < len(documents(whole, split))
    described, expected = meta(tmp_path / 'parts'), meta(whole)
    assert described['documents'] == expected['documents']
    assert {key: described[key] for key in ('source', 'filter', 'val_ratio', 'vocab_size', 'eot_id')} == \
           {key: expected[key] for key in ('source', 'filter', 'val_ratio', 'vocab_size', 'eot_id')}
    assert (tmp_path / 'parts' / 'tokenizer.json').read_bytes() == (whole / 'tokenizer.json').read_bytes()
    assert TokenData(tmp_path / 'parts', 16, 300).train_tokens == TokenData(whole, 16, 300).train_tokens


def test_join_is_a_command_and_names_what_is_missing(corpus, tmp_path, capsys):
    for i in (0, 2):
        prepared(corpus, tmp_path / 'out', shard=f'{i}/3')
    assert '1 of 3 shards are missing (1). Copy them here, then run: python prepare.py join' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'1 of 3 shards are missing \(1\): copy their directories here'):
        prepare.main(['join', str(tmp_path / 'out')])
    prepared(corpus, tmp_path / 'elsewhere', shard='1/3')
    (tmp_path / 'elsewhere' / 'shard-00001-of-00003').rename(tmp_path / 'out' / 'shard-00001-of-00003')
    prepare.main(['join', str(tmp_path / 'out')])
    assert TokenData(tmp_path / 'out', 8, 300).train_tokens > 0


def test_shards_of_another_corpus_are_refused(corpus, tmp_path):
    prepared(corpus, tmp_path / 'out', shard='0/2')
    for change, said in (({'shard': '1/3'}, "shard '0/2', not '0/3'"), ({'shard': '1/2', 'seed': 5}, 'seed 1337, not 5')):
        with pytest.raises(UserError, match=f'shard-00000-of-00002 was prepared with {said}'):
            prepared(corpus, tmp_path / 'out', **change)
    with pytest.raises(UserError, match='exists but is not a prepared dataset'):
        prepared(corpus, tmp_path / 'out')
    prepared(corpus, tmp_path / 'other', shard='1/2', val_ratio=0.3)
    (tmp_path / 'other' / 'shard-00001-of-00002').rename(tmp_path / 'out' / 'shard-00001-of-00002')
    with pytest.raises(UserError, match='shard-00001-of-00002 was prepared with val_ratio 0.3, not 0.2'):
        prepare.main(['join', str(tmp_path / 'out')])
    assert not (tmp_path / 'out' / 'meta.json').exists()


# Encoding

def test_long_runs_of_spaces_are_encoded(large):
    building.open_tokenizer(large[1])
    text = ' \t' * 600_000 + 'x'
    ids = building.encode({'train': [text], 'val': []})
    assert building.encoding.decode(ids['train'].tolist()) == text + '<|endoftext|>'


# Refusals

@pytest.mark.parametrize('options, message', [
    ({'dataset': 'nolib'}, '--dataset=nolib: unknown, expected pylib, '),
    ({'source': 'x'}, '--source=x: --dataset=text:{tmp}/c.jsonl has no such option'),
    ({'bad_text': 'keep'}, '--bad_text=keep: expected refuse, skip or replace'),
    ({'shard': '2/2'}, '--shard=2/2: expected i/n with 0 <= i < n'),
    ({'shard': '0/2', 'max_tokens': 5}, '--max_tokens=5: with --shard, a machine cannot count'),
    ({'tokenizer': '{tmp}/none.json'}, '--tokenizer={tmp}/none.json: no such file'),
    ({'dataset': 'text:'}, '--dataset=text:: unknown'),
    ({'dataset': 'text:{tmp}/none'}, '{tmp}/none: no such file'),
    ({'dataset': 'text:{tmp}/*.none'}, '{tmp}/*.none: no such file'),
    ({'dataset': 'text:{tmp}/empty'}, '{tmp}/empty: no such file'),
    ({'dataset': 'text:{tmp}/blank.txt'}, 'text:{tmp}/blank.txt: the corpus is empty'),
    ({'dataset': 'text:{tmp}/broken.jsonl'}, '{tmp}/broken.jsonl:2: broken line: Expecting'),
    ({'dataset': 'text:{tmp}/list.jsonl'}, "{tmp}/list.jsonl:1: broken line: no text in the field 'text' (--text_field)"),
    ({'dataset': 'text:{tmp}/surrogate.jsonl'}, '{tmp}/surrogate.jsonl:1: broken line:'),
    ({'text_field': 'body'}, "{tmp}/c.jsonl: none of its first lines has a text in the field 'body'"),
    ({'dataset': 'text:{tmp}/latin.txt'}, '{tmp}/latin.txt: not UTF-8 at byte 20006'),
    ({'vocab_size': 256}, '--vocab_size=256: expected 257'),
    ({'vocab_size': 1048577}, '--vocab_size=1048577: expected 257'),
    ({'vocab_size': 60000}, '--vocab_size=60000: this corpus is too small for so many tokens: '),
    ({'val_ratio': 0}, '--val_ratio=0.0: expected a fraction'),
    ({'max_tokens': -1}, '--max_tokens=-1: must not be negative'),
    ({'out': '{tmp}/c.jsonl/out'}, '{tmp}/c.jsonl: '),
    ({'out': '{tmp}/c.jsonl'}, '{tmp}/c.jsonl exists but is not a prepared dataset'),
    ({'out': '{tmp}/foreign'}, '{tmp}/foreign exists but is not a prepared dataset (no meta.json): choose another --out'),
])
def test_mistakes_are_refused_in_one_line_and_leave_nothing(tmp_path, options, message):
    write_jsonl(tmp_path / 'c.jsonl', texts(150))
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'foreign').mkdir()
    (tmp_path / 'foreign' / 'notes').touch()
    (tmp_path / 'blank.txt').write_text('\n \n')
    (tmp_path / 'broken.jsonl').write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / 'list.jsonl').write_text('[1]\n')
    (tmp_path / 'surrogate.jsonl').write_text(r'{"text": "\ud800"}')
    (tmp_path / 'latin.txt').write_bytes(b'\xef\xbb\xbf' + b'line\n' * 4000 + b'abc\xe9def')
    before = sorted(tmp_path.rglob('*'))
    options = {'out': '{tmp}/data/out'} | options
    options = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UserError) as error:
        prepare.main(arguments(tmp_path / 'c.jsonl', **options))
    assert str(error.value).startswith(message.format(tmp=tmp_path)) and '\n' not in str(error.value)
    assert sorted(tmp_path.rglob('*')) == before


def test_the_largest_vocabulary_that_the_error_names_works(corpus, tmp_path):
    with pytest.raises(UserError) as error:
        prepared(corpus, tmp_path / 'out', vocab_size=60000)
    largest = str(error.value).split('use --vocab_size=')[1].split()[0]
    assert meta(prepared(corpus, tmp_path / 'out', vocab_size=largest))['vocab_size'] == int(largest)


def test_mistakes_end_the_program_with_exit_code_2_and_no_traceback(corpus, tmp_path):
    result = command('--vocab_size=1', '--val_ratio=2', '--seeed=1')
    assert result.returncode == 2 and result.stdout == ''
    assert result.stderr.count('\n') == 3
    assert all(part in result.stderr for part in ('--vocab_size=1:', '--val_ratio=2.0:', "'seeed'"))
    result = command(*arguments(tmp_path / 'none', tmp_path / 'out'))
    assert (result.returncode, result.stderr.count('\n'), result.stdout) == (2, 1, '')


def test_full_disk_is_one_line_and_leaves_nothing(corpus, tmp_path):
    code = ('import resource, sys, configurator, prepare\n'
            'resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n'
            'configurator.run(prepare.main)')
    process = start(code, *arguments(corpus, tmp_path / 'out'))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and re.fullmatch(f'{tmp_path}/.*: (File too large|disk I/O error.*|database or disk is full.*)\n', stderr)
    assert sorted(tmp_path.iterdir()) == [corpus]


# Finished, interrupted and killed preparations

def test_finished_preparation_is_left_alone(corpus, tmp_path, capsys):
    out = prepared(corpus, tmp_path / 'out')
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    prepared(corpus, out)
    assert capsys.readouterr().out == f'{out} is already prepared: nothing to do\n'
    for change in ({'vocab_size': 310}, {'seed': 2}, {'val_ratio': 0.3}, {'max_tokens': 1000}):
        (key, value), = change.items()
        with pytest.raises(UserError, match=f'was prepared with {key} .*, not {value}: remove it, or choose another --out'):
            prepared(corpus, out, **change)
    write_jsonl(corpus, texts(151))
    with pytest.raises(UserError, match='was prepared with source .*not'):
        prepared(corpus, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_empty_directory_and_link_to_one_are_filled(corpus, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'elsewhere')
    assert bins(prepared(corpus, tmp_path / 'empty')) == bins(prepared(corpus, tmp_path / 'link'))
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'elsewhere' / 'meta.json').is_file()


SMALL = 'from corpora import building, preparation\nbuilding.BATCH, building.SAMPLE, building.PART = 20_000, 200_000, 3\n'  # so that a small corpus has many parts


@pytest.fixture(scope='module')
def parts(tmp_path_factory, large):
    """What many parts make of the corpus when nobody interrupts them."""
    out = tmp_path_factory.mktemp('parts') / 'out'
    process = start(f'import prepare, sys\n{SMALL}prepare.main(sys.argv[1:])', *arguments(large[0], out))
    assert process.communicate(timeout=60)[1] == ''
    return out


KILLED = """
import os, prepare, sys
{small}
owner, name = eval({owner!r}), {name!r}
original, calls = getattr(owner, name), []
def kill(*arguments, **options):
    calls.append(1) or len(calls) == {call} and os.kill(os.getpid(), 9)
    result = original(*arguments, **options)
    len(calls) == -{call} and os.kill(os.getpid(), 9)  # afterwards
    return result
setattr(owner, name, kill)
prepare.main(sys.argv[1:])
"""


@pytest.mark.parametrize('owner, name, call', [
    ('building.vocabulary', 'train_bpe', 1), ('building', 'encode', 1), ('building', 'encode', 77), ('building.Bins', 'sync', 4),
    ('building.Bins', 'sync', -5), ('building.Seen', 'commit', 9), ('building.Seen', 'commit', -9), ('building', 'write_json', 5), ('building', 'write_json', -5), ('building.Bins', 'close', 1),
    ('building.Bins', 'close', -1), ('building.Bins', 'close', -2), ('preparation', 'publish', 1), ('preparation.Path', 'unlink', -1),
    ('preparation.Path', 'unlink', -2), ('preparation', 'publish', -1)])
def test_a_preparation_killed_at_any_point_resumes_to_the_same_bins(large, parts, tmp_path, owner, name, call):
    process = start(KILLED.format(small=SMALL, owner=owner, name=name, call=call), *arguments(large[0], tmp_path / 'out'))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    finished = (name, call) == ('publish', -1)
    assert finished == (tmp_path / 'out').exists() and leftovers(tmp_path) == ([] if finished else ['.out.tmp'])
    process = start(f'import prepare, sys\n{SMALL}prepare.main(sys.argv[1:])', *arguments(large[0], tmp_path / 'out'))
    said, errors = process.communicate(timeout=60)
    assert errors == '' and bins(tmp_path / 'out') == bins(parts) and leftovers(tmp_path) == []
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['.verified.json', 'meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    assert {**meta(tmp_path / 'out'), 'created': 0, 'seconds': 0} == {**meta(parts), 'created': 0, 'seconds': 0}
    if (name, call) in (('encode', 77), ('commit', -9), ('sync', 4)):
        assert 'continuing after' in said


def test_ten_kills_at_random_moments_change_no_bit(large, parts, tmp_path):
    slow = ('import prepare, sys, time\n' + SMALL + 'original = building.encode\n'
            'building.encode = lambda texts: time.sleep(0.01) or original(texts)\n'
            "prepare.main(sys.argv[1:])\n")
    draw, kills, resumed = random.Random(7), 0, 0
    for attempt in range(40):
        process = start(slow, *arguments(large[0], tmp_path / 'out'))
        assert process.stdout.readline().endswith(': reading 1 .jsonl file\n')
        try:
            said, _ = process.communicate(timeout=draw.uniform(0, 0.35) if kills < 10 else 60)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        resumed += 'continuing after' in said
    assert kills == 10 and resumed >= 3
    assert bins(tmp_path / 'out') == bins(parts) and meta(tmp_path / 'out')['documents'] == meta(parts)['documents']


def test_finished_parts_are_neither_encoded_nor_read_again(large, parts, tmp_path):
    kill = KILLED.format(small=SMALL, owner='building', name='write_json', call=-31)
    assert start(kill, *arguments(large[0], tmp_path / 'out')).wait(60) == -signal.SIGKILL
    code = ('import prepare, sys\n' + SMALL + 'count = [0, 0]\noriginal, jsonl = building.encode, preparation.open_corpus\n'
            'def encode(texts):\n    count[0] += sum(map(len, texts.values()))\n    return original(texts)\n'
            'building.encode = encode\nprepare.main(sys.argv[1:])\nprint(count[0])')
    said = start(code, *arguments(large[0], tmp_path / 'out')).communicate(timeout=60)[0].splitlines()
    behind = int(next(line for line in said if line.startswith('continuing after')).split()[2].replace(',', ''))
    assert behind > 4000 and int(said[-1]) == 9000 - behind


def test_unfinished_work_of_another_request_is_neither_used_nor_lost(large, tmp_path):
    kill = KILLED.format(small=SMALL, owner='building', name='write_json', call=-4)
    start(kill, *arguments(large[0], tmp_path / 'out')).wait(60)
    before = {path: path.read_bytes() for path in (tmp_path / '.out.tmp').iterdir() if 'seen' not in path.name}
    with pytest.raises(UserError, match=r'.out.tmp holds an unfinished preparation with seed 1337, not 2: finish it with its own options, or'):
        prepared(large[0], tmp_path / 'out', seed=2)
    assert before == {path: path.read_bytes() for path in (tmp_path / '.out.tmp').iterdir() if 'seen' not in path.name}


def test_damage_to_unfinished_work_is_named(large, tmp_path):
    kill = KILLED.format(small=SMALL, owner='building', name='write_json', call=-4)
    for name, said in (('train-00000.bin', 'damaged since it was written'), ('seen.sqlite', 'file is not a database'),
                       ('state.json', 'broken')):
        out = tmp_path / name
        start(kill, *arguments(large[0], out)).wait(60)
        file = tmp_path / f'.{name}.tmp' / name
        file.write_bytes(b'x' * file.stat().st_size)
        file.with_name(f'{name}-wal').unlink(missing_ok=True)
        with pytest.raises(UserError, match=f'{name}: {said}.* remove '):
            prepared(large[0], out)


def test_a_second_preparation_waits_for_the_first(large, tmp_path):
    code = ('import prepare, sys, time\nfrom corpora import building\noriginal = building.encode_corpus\n'
            'building.encode_corpus = lambda *a: (print("here", flush=True), sys.stdin.readline(), original(*a))[2]\n'
            'prepare.main(sys.argv[1:])')
    first = start(code, *arguments(large[0], tmp_path / 'out'))
    for line in first.stdout:
        if line == 'here\n':
            break
    second = start('import prepare, sys; prepare.main(sys.argv[1:])', *arguments(large[0], tmp_path / 'out'))
    assert second.stdout.readline() == f'{tmp_path}/.out.tmp: waiting for another process that uses this directory\n'
    first.communicate('\n', timeout=60)
    said, errors = second.communicate(timeout=60)
    assert (first.returncode, second.returncode, errors) == (0, 0, '') and f'{tmp_path}/out: ' in said
    assert leftovers(tmp_path) == [] and TokenData(tmp_path / 'out', 8, 300).train_tokens > 0


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_preparation_keeps_its_parts_and_nothing_else(large, parts, tmp_path, number, code):
    program = ('import configurator, prepare, signal, sys\n' + SMALL +
               'for n in (2, 15):\n    signal.signal(n, lambda n, frame: sys.exit(128 + n))\n'
               'original, calls = building.{name}, []\n'
               'def wait(*arguments):\n    calls.append(1)\n    if len(calls) == {call}:\n'
               '        print("now", flush=True)\n        signal.pause()\n    return original(*arguments)\n'
               'building.{name} = wait\nconfigurator.run(prepare.main)')
    for name, call, kept in (('read_sample', 1, []), ('encode', 40, ['.out.tmp'])):
        process = start(program.format(name=name, call=call), *arguments(large[0], tmp_path / 'out'))
        for line in process.stdout:
            if line == 'now\n':
                break
        process.send_signal(number)
        assert process.communicate(timeout=60)[1] == '' and process.returncode == code
        assert [path.name for path in tmp_path.iterdir()] == kept
    assert bins(prepared(large[0], tmp_path / 'out')) == bins(parts)


def test_a_disk_without_room_is_refused_before_the_work(large, tmp_path, monkeypatch):
    monkeypatch.setattr(building.shutil, 'disk_usage', lambda path: type('', (), {'free': 10**6})())
    with pytest.raises(UserError, match=r'about 0.003 GB of tokens, but only 0.001 GB are free: free some space, choose another --out, or'):
        prepared(large[0], tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []


def test_bad_text_may_be_skipped_after_it_stopped_a_preparation(large, tmp_path):
    lines = large[0].read_bytes().splitlines(keepends=True)
    (tmp_path / 'c.jsonl').write_bytes(b''.join([*lines[:6000], b'{broken\n', *lines[6000:]]))
    code = f'import configurator, prepare, sys\n{SMALL}configurator.run(prepare.main)'
    process = start(code, *arguments(tmp_path / 'c.jsonl', tmp_path / 'out'))
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and errors.startswith(f'{tmp_path}/c.jsonl:6001: ') and errors.count('\n') == 1
    process = start(code, *arguments(tmp_path / 'c.jsonl', tmp_path / 'out', bad_text='skip'))
    said, errors = process.communicate(timeout=60)
    assert errors == '' and 'continuing after' in said
    assert meta(tmp_path / 'out')['documents'] == meta(large[1])['documents'] | {'read': 9001, 'not_json': 1}
    assert sorted(documents(tmp_path / 'out', 'val')) == sorted(documents(large[1], 'val'))


WITH_WORKERS = '''
import multiprocessing, os, prepare, signal, sys, time, configurator
from corpora import building
if __name__ == '__main__':
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has us ignore it
    building.BATCH, building.SAMPLE = 3000, 9000
    original = building.batches
    def batches(*arguments):
        for batch in original(*arguments):
            yield batch
            if workers := multiprocessing.active_children():
                {action}
    building.batches = batches
    configurator.run(prepare.main)
'''


def test_a_dead_worker_ends_the_preparation(corpus, tmp_path):
    process = start(WITH_WORKERS.format(action='workers[0].kill()'), *arguments(corpus, tmp_path / 'out', num_proc=2))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert stderr == 'one of the 2 encoding processes died (out of memory?): use a smaller --num_proc\n'
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_pool_that_breaks_at_its_start_is_reported_as_a_dead_process(monkeypatch):
    class Breaking(building.ProcessPoolExecutor):
        raised = [building.BrokenProcessPool('broken'), ValueError('bad value(s) in fds_to_keep')]

        def submit(self, *words):
            raise self.raised.pop()
    monkeypatch.setattr(building, 'ProcessPoolExecutor', Breaking)
    with pytest.raises(UserError, match='one of the 2 encoding processes died'):
        list(building.encoded([SimpleNamespace(texts=['a'])], None, 2))
    assert not Breaking.raised


def test_workers_do_not_outlive_a_killed_preparation(corpus, tmp_path):
    process = start(WITH_WORKERS.format(action='os.kill(os.getpid(), 9)'), *arguments(corpus, tmp_path / 'out', num_proc=2))
    process.communicate(timeout=20)  # returns when the last of them has closed the pipe
    assert process.returncode == -signal.SIGKILL


def test_ctrl_c_reaches_the_parent_alone(corpus, tmp_path):
    action = 'time.sleep(0.1); os.killpg(0, 2)'  # while a worker imports, where it would die with a traceback
    process = start(WITH_WORKERS.format(action=action), *arguments(corpus, tmp_path / 'out', num_proc=2))
    assert process.communicate(timeout=60)[1] == '' and process.returncode == 130
    assert list(tmp_path.iterdir()) == [corpus]


def test_prepare_starts_without_torch():
    process = start('import prepare, sys; print("torch" in sys.modules)')
    assert process.communicate()[0] == 'False\n'


# A directory holds exactly what is asked for

def asked(**options):
    """What train.py asks for."""
    return preparation.PrepareConfig(**{'vocab_size': 300, **options})


def test_every_option_that_changes_the_result_is_in_the_name_of_its_directory():
    ignored = {'out', 'num_proc', 'shard', 'bad_rows'}
    other = {'dataset': 'wikitext2', 'tokenizer': 'gpt2', 'bad_text': 'skip', 'source': 'some/where', 'subset': 'x', 'text_field': 'y'}
    names = {preparation.directory(preparation.PrepareConfig())}
    assert names == {Path('data/pylib')}
    options = [field for field in dataclasses.fields(preparation.PrepareConfig) if field.name not in ignored]
    for field in options:
        value = other.get(field.name) or (field.default + 1 if isinstance(field.default, int) else
                                          field.default / 2 if isinstance(field.default, float) else 'utf-16')
        names.add(preparation.directory(preparation.PrepareConfig(**{field.name: value})))
    assert len(names) == 1 + len(options) and not [name for name in names if len(name.parts) != 2]
    assert preparation.directory(asked(dataset='fineweb_edu', vocab_size=32_000, max_tokens=500_000_000)) == Path('data/fineweb_edu-500M-32000')
    assert preparation.directory(asked(vocab_size=4096, val_ratio=0.1)) == Path('data/pylib-4096-val_ratio-0.1')
    assert [data.short_number(n) for n in (2_500_000, 1_234_567, 3_000_000_000, 7)] == ['2500k', '1234567', '3B', '7']


@pytest.mark.parametrize('change', ['edited', 'touched', 'added', 'same size'])
def test_a_corpus_that_changed_since_it_was_prepared_is_refused(tmp_path, change):
    files = tmp_path / 'files'
    files.mkdir()
    write_jsonl(files / 'a.jsonl', texts(150))
    out = prepared(files, tmp_path / 'out')
    preparation.check_prepared(asked(dataset=f'text:{files}', val_ratio=0.2), out)
    if change == 'added':
        write_jsonl(files / 'b.jsonl', ['more'])
    elif change == 'touched':
        os.utime(files / 'a.jsonl', ns=(0, 0))
    elif change == 'edited':
        write_jsonl(files / 'a.jsonl', texts(151))
    else:
        text = (files / 'a.jsonl').read_text()
        (files / 'a.jsonl').write_text(text.replace('e', 'f'))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
    with pytest.raises(UserError, match=f"{out} was prepared (with source|before its source files were changed).*: remove it to prepare it "
                                        f"again, or use it as it is with --dataset={out}"):
        preparation.check_prepared(asked(dataset=f'text:{files}', val_ratio=0.2), out)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir()) == before


def test_prepared_data_are_used_with_a_message_if_the_corpus_is_gone(corpus, tmp_path, capsys):
    out = prepared(corpus, tmp_path / 'out')
    corpus.unlink()
    preparation.check_prepared(asked(dataset=f'text:{corpus}', val_ratio=0.2), out)
    assert f'{corpus}: no such file' in (said := capsys.readouterr().out) and f'Using the data in {out}, which were prepared' in said


def test_another_tokenizer_under_the_same_path_is_refused(corpus, tmp_path):
    first, second = (prepared(corpus, tmp_path / str(n), vocab_size=n) for n in (300, 310))
    path = shutil.copy(first / 'tokenizer.json', tmp_path)
    out = prepared(corpus, tmp_path / 'out', tokenizer=path, vocab_size=300)
    wanted = asked(dataset=f'text:{corpus}', tokenizer=str(path), val_ratio=0.2)
    preparation.check_prepared(wanted, out)
    shutil.copy(second / 'tokenizer.json', tmp_path)
    with pytest.raises(UserError, match='was prepared with tokenizer .*, not .*remove it to prepare it again'):
        preparation.check_prepared(wanted, out)


def test_directories_without_recorded_file_times_are_used(corpus, tmp_path):
    out = prepared(corpus, tmp_path / 'out')
    content = meta(out)
    del content['inputs']
    (out / 'meta.json').write_text(json.dumps(content))
    os.utime(corpus, ns=(0, 0))
    preparation.check_prepared(asked(dataset=f'text:{corpus}', val_ratio=0.2), out)


def test_pylib_of_another_python_is_refused(tmp_path):
    request = preparation.make_request(asked(), preparation.open_corpus(asked()), {'tokenizer': 'bpe', 'vocab_size': 300})
    (tmp_path / 'meta.json').write_text(json.dumps(request | {'source': {'dataset': 'pylib', 'python': 'CPython 3.1.4'}}))
    with pytest.raises(UserError, match="was prepared with source {'python': 'CPython 3.1.4'}, not {'python': 'CPython 3"):
        preparation.check_prepared(asked(), tmp_path)


@pytest.mark.parametrize('name, size', [('byte', 257), ('char', None)])
def test_bytes_and_characters_are_tokenizers_of_any_text(tmp_path, name, size):
    documents = [f'{text} é数\n' for text in texts(150)]
    path = write_jsonl(tmp_path / 'c.jsonl', documents)
    characters = sorted(set(''.join(documents)))
    size = size or len(characters) + 1
    words = [f'--dataset=text:{path}', f'--tokenizer={name}', f'--out={tmp_path}/out', '--num_proc=1']
    with pytest.raises(UserError, match='--vocab_size=300: --tokenizer='):
        prepare.main([*words, '--vocab_size=300'])
    prepare.main(words)
    prepare.main(words)  # nothing to do
    data = TokenData(tmp_path / 'out', 16, 300)
    encoding = load_tokenizer(data.tokenizer)
    assert (data.n_vocab, data.meta['tokenizer'], encoding.eot_token) == (size, name, size - 1)
    ids = data.read('train', 0, data.train_tokens)
    found = {encoding.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == size - 1) + 1)[:-1]}
    assert {text.removesuffix('<|endoftext|>') for text in found} <= set(documents) and len(found) > 100


def test_a_new_character_after_the_sample_ends_the_preparation(tmp_path, monkeypatch):
    monkeypatch.setattr(building, 'SAMPLE', 2000)
    monkeypatch.setattr(building, 'BATCH', 1000)
    write_jsonl(tmp_path / 'c.jsonl', ['abc' * 500, 'cab' * 500, 'bca' * 500, *texts(20), 'ab~'])
    with pytest.raises(UserError, match='the character .* is not among the .* characters of the tokenizer'):
        prepare.main([f'--dataset=text:{tmp_path}/c.jsonl', '--tokenizer=char', f'--out={tmp_path}/out', '--num_proc=1'])
    assert not (tmp_path / 'out').exists()
