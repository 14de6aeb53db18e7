import base64
import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import prepare
import sample
import train
import watch
from corpora import opening, shards, workspace
from checkpoint import load, save
from configurator import UserError
from data import TokenData
from runs import SMALL, finish, lines
from corpora.vocabulary import named, native
from corpora.shards import ShardData, check, find_shards, inspect, open_data, pack, split, validate

ROOT, VOCAB = Path(shards.__file__).parent.parent, 257


def silent(line):
    pass


def rows(count, length, start=0, vocab=1000):
    return (np.arange(start * length, (start + count) * length) % vocab).reshape(count, length).astype('u2')


def tokenizer():
    return {'format': 'nanotrix-tokenizer', 'version': 1, 'name': 'test', 'pattern': r'\p{L}+|\P{L}',
            'special_tokens': {'<|endoftext|>': 256}, 'ranks': [base64.b64encode(bytes([i])).decode() for i in range(256)]}


def counting(n):
    return np.arange(n) % (VOCAB - 1)


def write(path, files, content=None):
    """A prepared directory of bins with the given ids: {'train': [ids of a file, ...], 'val': [...]}."""
    path.mkdir()
    content, entries = content or tokenizer(), {'train': [], 'val': []}
    for part in files:
        for k, ids in enumerate(files[part]):
            raw = np.asarray(ids, '<u2').tobytes()
            (path / f'{part}-{k}.bin').write_bytes(raw)
            entries[part].append({'name': f'{part}-{k}.bin', 'tokens': len(ids), 'sha256': hashlib.sha256(raw).hexdigest()})
    (path / 'tokenizer.json').write_text(json.dumps(content))
    (path / 'meta.json').write_text(json.dumps({
        'version': 1, 'source': {'dataset': 'test'}, 'vocab_size': content['special_tokens']['<|endoftext|>'] + 1,
        'documents': {'train': 5, 'val': 2}, 'files': entries}))
    return path


def save_shard(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == '.pt':
        torch.save(array if isinstance(array, torch.Tensor) else torch.from_numpy(array), file)
    else:
        np.save(file, array)
    return file


@pytest.fixture
def folder(tmp_path):
    """Four .npy and two .pt of (5, 33): row r of all begins with token 33 * r."""
    for k in range(6):
        save_shard(tmp_path / 'in' / f'{k}.{"pt" if k > 3 else "npy"}', rows(5, 33, 5 * k))
    return tmp_path / 'in'


def refused(function, *arguments, **more):
    with pytest.raises(UserError) as error:
        function(*arguments, **more)
    assert all('\n' not in problem for problem in error.value.args)
    return str(error.value)


# Reading

@pytest.mark.parametrize('dtype', ['u1', 'i1', 'u2', 'i2', 'u4', 'i4', 'u8', 'i8'])
@pytest.mark.parametrize('ending', ['npy', 'pt'])
def test_every_integer_type_is_read_at_the_offset_of_its_header(tmp_path, dtype, ending):
    ids = rows(3, 5, vocab=100).astype(dtype)
    file = save_shard(tmp_path / f'a.{ending}', ids)
    count, length, found, offset = inspect(file)
    assert (count, length, found) == (3, 5, ids.dtype)
    assert np.fromfile(file, found, 15, offset=offset).tolist() == list(range(15))
    result = check(file)
    assert np.flatnonzero(result.pop('seen')).tolist() == list(range(15))
    assert result == {'file': file, 'rows': 3, 'length': 5, 'dtype': ids.dtype.name, 'tokens': 15, 'min_id': 0, 'max_id': 14,
                      'bytes': file.stat().st_size, 'sha256': hashlib.sha256(file.read_bytes()).hexdigest()}


def test_rows_of_a_larger_tensor_are_read_in_place(tmp_path):
    file = save_shard(tmp_path / 'a.pt', torch.arange(60).view(12, 5)[7:10])
    count, length, dtype, offset = inspect(file)
    assert (count, length) == (3, 5) and np.fromfile(file, dtype, 15, offset=offset).tolist() == list(range(35, 50))
    assert (check(file)['min_id'], check(file)['max_id']) == (35, 49)


def test_figures_of_a_large_file_cover_all_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, 'BLOCK', 64)
    good = np.random.default_rng(0).permutation(np.arange(70_000, 71_000, dtype='u4')).reshape(20, 50)
    bad = good.copy()
    bad[13, 7] = 2**24
    for ending in ('npy', 'pt'):
        file = save_shard(tmp_path / f'a.{ending}', good)
        found = check(file)
        assert (found['min_id'], found['max_id'], found['tokens']) == (70_000, 70_999, 1000)
        assert np.flatnonzero(found['seen']).tolist() == list(range(70_000, 71_000))
        assert found['sha256'] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert 'id 16777216 at position 657 ' in refused(check, save_shard(file, bad))


def test_flipped_id_of_a_pt_fails_its_checksum(tmp_path):
    file = save_shard(tmp_path / 'a.pt', rows(3, 5))
    content, at = bytearray(file.read_bytes()), inspect(file)[3]
    content[at] ^= 1
    file.write_bytes(content)
    assert refused(check, file) == f'{file}: damaged (the checksum of a/data/0 is wrong)'


def test_find_shards_takes_a_file_a_directory_tree_or_a_glob(tmp_path):
    names = ['a.npy', 'b.pt', 'train/c.npy', 'val/d.npy', 'val/deep/e.pt', '.hidden/f.npy', '.g.npy', 'h.txt']
    for name in names:
        (tmp_path / 'x' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'x' / name).touch()
    assert find_shards(tmp_path / 'x') == [tmp_path / 'x' / name for name in names[:5]]
    assert find_shards(f'{tmp_path}/x/*.npy') == [tmp_path / 'x' / 'a.npy']
    assert find_shards(f'{tmp_path}/x/**/*.pt') == [tmp_path / 'x' / 'b.pt', tmp_path / 'x' / 'val/deep/e.pt']
    assert find_shards(tmp_path / 'x' / 'b.pt') == [tmp_path / 'x' / 'b.pt']
    (tmp_path / 'x' / 'circle').symlink_to(tmp_path / 'x')
    assert find_shards(tmp_path / 'x') == [tmp_path / 'x' / name for name in names[:5]]
    assert 'not a shard: shards end in .npy or .pt' in refused(find_shards, tmp_path / 'x' / 'h.txt')
    assert 'no such file, directory or glob' in refused(find_shards, tmp_path / 'none')
    (tmp_path / 'empty').mkdir()
    assert refused(find_shards, tmp_path / 'empty') == f'{tmp_path}/empty: no .npy or .pt files in it'


class Evil:
    """What a pickle would run: make a directory."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def npy(file, descr="'<u2'", fortran=False, shape='(2, 3)', body=bytes(12), version=1):
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".ljust(117) + '\n'
    file.write_bytes(b'\x93NUMPY' + bytes([version, 0]) + struct.pack('<H', len(header)) + header.encode() + body)


def evil_zip(file, folder):
    """A .pt whose pickle makes a directory, in a zip that is whole in every other way."""
    torch.save(torch.zeros(2, 3, dtype=torch.int32), file)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, 'w') as archive:
        for name, content in records.items():
            archive.writestr(name, pickle.dumps(Evil(folder), 2) if name.endswith('data.pkl') else content)


def compressed(file):
    torch.save(torch.zeros(2, 3, dtype=torch.int32), file)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def legacy(file):
    torch.save(torch.zeros(2, 3, dtype=torch.int32), file, _use_new_zipfile_serialization=False)


def meta_tensor(file):
    torch.save(torch.zeros(2, 3, dtype=torch.int32, device='meta'), file)


def quantised(file):
    torch.save(torch.quantize_per_tensor(torch.zeros(2, 3), 1.0, 0, torch.qint8), file)


BAD = [
    ('a.npy', lambda file: file.touch(), 'empty'),
    ('a.pt', lambda file: file.touch(), 'empty'),
    ('a.npy', lambda file: npy(file, body=bytes(11)), 'truncated, 1 bytes are missing'),
    ('a.npy', lambda file: npy(file, body=bytes(13)), '1 bytes too many'),
    ('a.npy', lambda file: file.write_bytes(b'\x93NUMPY\1\0\x76'), 'EOF'),
    ('a.npy', lambda file: npy(file, shape='(10**15, 3)'), 'damaged, or not what numpy.save writes'),
    ('a.npy', lambda file: npy(file, shape=f'({10**15}, 3)'), 'truncated, 5,999,999,999,999,988 bytes are missing'),
    ('a.npy', lambda file: npy(file, shape='(-2, -3)'), 'shape (-2, -3), expected (rows, tokens per row)'),
    ('a.npy', lambda file: npy(file, shape='(6,)'), 'shape (6,), expected (rows, tokens per row)'),
    ('a.npy', lambda file: npy(file, shape='(1, 2, 3)'), 'shape (1, 2, 3), expected'),
    ('a.npy', lambda file: npy(file, shape='(0, 3)', body=b''), 'shape (0, 3), expected'),
    ('a.npy', lambda file: npy(file, descr="'>u2'"), 'ids of type >u2, expected little-endian whole numbers'),
    ('a.npy', lambda file: npy(file, descr="'<f2'"), 'ids of type float16'),
    ('a.npy', lambda file: npy(file, descr="'|b1'", body=bytes(6)), 'ids of type bool'),
    ('a.npy', lambda file: npy(file, descr="'<c8'", body=bytes(48)), 'ids of type complex64'),
    ('a.npy', lambda file: npy(file, descr="[('a', '<u2')]"), "ids of type [('a', '<u2')]"),
    ('a.npy', lambda file: npy(file, descr="'|O'"), 'not opened: an array of Python objects is a pickle'),
    ('a.npy', lambda file: npy(file, fortran=True), 'in Fortran order'),
    ('a.npy', lambda file: npy(file, version=9), 'damaged, or not what numpy.save writes (KeyError: (9, 0))'),
    ('a.npy', lambda file: file.write_bytes(pickle.dumps(Evil(file.parent / 'ran'))), 'magic string'),
    ('a.npy', lambda file: np.save(file, np.array([[Evil(file.parent / 'ran')]], object), allow_pickle=True), 'Python objects'),
    ('a.npy', lambda file: file.mkdir() or os.rename(file, file.with_name('b')) or os.mkfifo(file), 'not a regular file'),
    ('a.npy', lambda file: file.symlink_to('gone.npy'), 'broken symbolic link to gone.npy'),
    ('a.npy', lambda file: np.save(file, np.array([[1, -2, 3]])), 'id -2 at position 1 is outside the vocabulary'),
    ('a.npy', lambda file: np.save(file, np.array([[1, 2], [3, 2**24]])), 'id 16777216 at position 3 is outside'),
    ('a.npy', lambda file: np.save(file, np.array([[1, 2**63]], 'u8')), 'id 9223372036854775808 at position 1'),
    ('a.pt', lambda file: file.write_bytes(pickle.dumps(Evil(file.parent / 'ran'))), 'damaged, or not what torch.save'),
    ('a.pt', lambda file: evil_zip(file, file.parent / 'ran'), f'its pickle names {os.mkdir.__module__}.mkdir'),
    ('a.pt', legacy, 'damaged, or not what torch.save since version 1.6 writes'),
    ('a.pt', compressed, 'compressed'),
    ('a.pt', lambda file: torch.save({'a': torch.zeros(2, 3, dtype=torch.int)}, file), 'it holds a dict, expected one tensor'),
    ('a.pt', lambda file: torch.save([torch.zeros(2, 3, dtype=torch.int)], file), 'it holds a list, expected one tensor'),
    ('a.pt', lambda file: torch.save([torch.zeros(2, 3), torch.ones(2, 3)], file), 'it holds 2 tensors or other objects'),
    ('a.pt', lambda file: torch.save(5, file), 'it holds 0 tensors'),
    ('a.pt', lambda file: torch.save(torch.zeros(2, 3, dtype=torch.int).to_sparse(), file), 'tensors'),
    ('a.pt', quantised, 'torch._utils._rebuild_qtensor, expected one plain tensor'),
    ('a.pt', meta_tensor, 'tensors'),
    ('a.pt', lambda file: torch.save(torch.nn.Parameter(torch.zeros(2, 3)), file), 'expected one plain tensor'),
    ('a.pt', lambda file: torch.save(torch.zeros(2, 3), file), 'ids of type float32'),
    ('a.pt', lambda file: torch.save(torch.zeros(2, 3, dtype=torch.bool), file), 'bool'),
    ('a.pt', lambda file: torch.save(torch.zeros(6, dtype=torch.int), file), 'shape (6,), expected'),
    ('a.pt', lambda file: torch.save(torch.zeros(0, 3, dtype=torch.int), file), 'shape (0, 3), expected'),
    ('a.pt', lambda file: torch.save(torch.arange(6).view(2, 3).t(), file), 'save tensor.contiguous()'),
    ('a.pt', lambda file: torch.save(torch.zeros(1, 1, dtype=torch.int).expand(2, 3), file), 'save tensor.contiguous()'),
    ('a.pt', lambda file: file.write_bytes(save_shard(file, rows(2, 3)).read_bytes() + b'more'), 'other bytes follow its end'),
    ('a.pt', lambda file: file.write_bytes(save_shard(file, rows(2, 3)).read_bytes()[:-30]), 'damaged, or not what'),
    ('a.pt', lambda file: save_shard(file, -rows(2, 3).astype('i4')), 'id -1 at position 1'),
]


@pytest.mark.filterwarnings('ignore')  # torch finds quantised tensors old-fashioned
@pytest.mark.parametrize('name, make, reason', BAD, ids=[f'{name} {reason[:40]}' for name, _, reason in BAD])
def test_bad_shard_is_refused_by_name_and_reason_and_runs_nothing(tmp_path, name, make, reason):
    make(tmp_path / name)
    said = refused(validate, tmp_path / name, say=silent)
    assert said.startswith(f'{tmp_path / name}: ') and reason in said
    assert not (tmp_path / 'ran').exists()


def test_the_evil_pickles_would_run_if_they_were_opened(tmp_path):
    evil_zip(tmp_path / 'a.pt', tmp_path / 'ran')
    torch.load(tmp_path / 'a.pt', weights_only=False)
    assert (tmp_path / 'ran').is_dir()


def test_unreadable_shard_is_refused(folder, monkeypatch):
    def deny(file, mode):
        if file == folder / '0.npy':
            raise PermissionError(13, 'Permission denied', str(file))
        return open(file, mode)
    monkeypatch.setattr(shards, 'open', deny, raising=False)
    assert refused(validate, folder, say=silent) == f'{folder}/0.npy: Permission denied'


PLAIN = {}


def plain(ending):
    """The bytes of a good shard."""
    if ending not in PLAIN:
        file = Path(os.environ.get('TMPDIR', '/tmp')) / f'plain-{os.getpid()}.{ending}'
        PLAIN[ending] = save_shard(file, rows(4, 9).astype('i4')).read_bytes()
        file.unlink()
    return PLAIN[ending]


CHANGES = st.lists(st.tuples(st.sampled_from(['flip', 'cut', 'insert', 'digit']), st.integers(0, 2**16),
                             st.binary(min_size=1, max_size=9)), min_size=1, max_size=3)


def damage(content, changes):
    content = bytearray(content)
    for kind, at, extra in changes:
        at %= max(1, min(len(content), 256 if at % 2 else len(content)))  # half of them in the header
        if kind == 'flip' and content:
            content[at] ^= 1 << extra[0] % 8
        elif kind == 'cut':
            del content[at:at + (extra[0] if len(extra) > 1 else len(content))]
        elif kind == 'insert':
            content[at:at] = extra
        elif digits := [i for i, byte in enumerate(content[:256]) if chr(byte).isdigit()]:  # of the header: shape, type
            content[digits[at % len(digits)]] = ord('0') + extra[0] % 10
    return bytes(content)


@pytest.mark.filterwarnings('ignore')  # of numpy about headers of Python 2
@pytest.mark.parametrize('ending', ['npy', 'pt'])
def test_damaged_shard_is_read_as_numpy_and_torch_do_or_refused(tmp_path, ending):
    file, outcomes = tmp_path / f'a.{ending}', {True: 0, False: 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=300, deadline=2000, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(CHANGES)
    def attempt(changes):
        file.write_bytes(damage(plain(ending), changes))
        try:
            result = validate(file, say=silent)
        except UserError as error:
            assert str(error).startswith(str(file)) and len(error.args) == 1
            outcomes[False] += 1
            return
        outcomes[True] += 1
        count, length, dtype, offset = inspect(file)
        ids = np.load(file) if ending == 'npy' else torch.load(file, weights_only=True).numpy()
        assert ids.shape == (count, length) and ids.dtype == dtype
        assert np.array_equal(np.fromfile(file, dtype, count * length, offset=offset).reshape(count, length), ids)
        assert (result['min_id'], result['max_id'], result['unique']) == (ids.min(), ids.max(), len(np.unique(ids)))
        assert result['min_id'] >= 0 and result['max_id'] < 2**24
    attempt()
    assert min(outcomes.values()) > 10 and sum(outcomes.values()) >= 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


# Validate

def test_validate_prints_a_summary(folder):
    said = []
    result = validate(folder, say=said.append)
    expected = {'format': 'npy+pt', 'files': 6, 'rows': 30, 'length': 33, 'dtype': 'uint16', 'tokens': 990, 'min_id': 0,
                'max_id': 989, 'vocab_size': 990, 'unique': 990}
    assert {key: result[key] for key in expected} == expected
    assert result['bytes'] == sum(file.stat().st_size for file in folder.iterdir())
    for line in ('format npy+pt', 'shape (5, 33)', 'dtype uint16', 'ids 0 to 989', 'sequences 30', 'tokens 990',
                 'vocabulary 990 (the highest id + 1)', 'unique tokens 990 (100.0% of the vocabulary)'):
        assert line in ' '.join(said[-1].split())
    assert validate(folder, 2000, say=silent)['vocab_size'] == 2000


def test_validate_names_every_bad_file(folder):
    (folder / '1.npy').write_bytes(b'')
    (folder / '4.pt').write_bytes(b'PK')
    np.save(folder / '2.npy', rows(5, 34))
    said = refused(validate, folder, 900, say=silent).splitlines()
    assert [line.partition(': ')[0] for line in said] == [f'{folder}/{name}' for name in ('1.npy', '4.pt', '5.pt', '2.npy')]
    assert 'id 900 at position 75' in said[2] and 'rows of 34 tokens, where most files have 33' in said[3]


def test_validate_reads_prepared_bins_with_the_same_figures(tmp_path):
    path = write(tmp_path / 'd', {'train': [counting(1000), counting(10)], 'val': [counting(50)]})
    said = []
    result = validate(path, say=said.append)
    assert 'sequences 7 ' in ' '.join(said[-1].split())  # documents
    expected = {'format': 'bin', 'files': 3, 'tokens': 1060, 'max_id': VOCAB - 2, 'unique': VOCAB - 1, 'vocab_size': VOCAB}
    assert {key: result[key] for key in expected} == expected
    (path / 'val-0.bin').write_bytes(bytes(100))
    assert 'val-0.bin: damaged' in refused(validate, path, say=silent)


def test_validate_of_a_split_finds_a_changed_file(folder, tmp_path):
    split(folder, tmp_path / 'out', say=silent)
    assert validate(tmp_path / 'out', say=silent)['rows'] == 30
    np.save(folder / '0.npy', rows(5, 33, 1))
    assert '0.npy: not the file that meta.json describes' in refused(validate, tmp_path / 'out', say=silent)


def test_memory_of_a_check_is_bounded_whatever_the_size_of_the_file(tmp_path):
    file = tmp_path / 'a.npy'
    npy(file, shape='(10, 10000000)', body=b'')
    os.truncate(file, 128 + 2 * 10**8)  # 200 MB, of which the disk has none
    program = (f'import resource\nfrom corpora import shards\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
               f'assert shards.check("{file}", 10)["tokens"] == 10**8\n'
               'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)')
    result = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert int(result.stdout) < 60_000, result.stderr  # kB


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(folder, monkeypatch):
    rows_of = inspect(folder / '0.npy')
    os.truncate(folder / '0.npy', 201)
    monkeypatch.setattr(shards, 'inspect', lambda file: rows_of)
    assert refused(check, folder / '0.npy') == f'{folder}/0.npy: the file became shorter while it was read'


def test_torch_is_not_imported_for_npy(folder):
    for file in folder.glob('*.pt'):
        file.unlink()
    program = f'import sys\nfrom corpora import shards\nshards.validate("{folder}")\nassert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True, capture_output=True)


# Split

def names(meta, part):
    return [entry['name'] for entry in meta['files'][part]]


def test_split_makes_links_and_a_complete_meta_json(folder, tmp_path):
    meta = split(folder, tmp_path / 'out', 0.3, seed=5, say=silent)
    assert meta == json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert (len(meta['files']['train']), len(meta['files']['val'])) == (4, 2)
    assert sorted(Path(name).name for part in ('train', 'val') for name in names(meta, part)) == sorted(os.listdir(folder))
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert meta['source'] == {'dataset': f'shards:{folder}', 'files': 6, 'bytes': size}
    assert {key: meta[key] for key in ('version', 'kind', 'seed', 'val_ratio', 'vocab_size', 'row', 'eot_id')} == {
        'version': 1, 'kind': 'shards', 'seed': 5, 'val_ratio': 0.3, 'vocab_size': 990, 'row': 33, 'eot_id': None}
    for part in ('train', 'val'):
        for entry in meta['files'][part]:
            link = tmp_path / 'out' / entry['name']
            assert link.is_symlink() and link.resolve() == folder / link.name
            assert entry == {'name': f'{part}/{link.name}', 'first': 0, 'rows': 5, 'tokens': 165, 'bytes': link.stat().st_size,
                             'max_id': check(link)['max_id'], 'sha256': check(link)['sha256']}
    assert sorted(os.listdir(tmp_path)) == ['in', 'out']  # nothing hidden is left


def test_the_files_of_val_depend_only_on_seed_and_name(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / 'elsewhere' / 'copy')
    np.save(copy / '0.npy', rows(7, 33))  # other content
    chosen = {}
    for seed in range(8):
        chosen[seed] = names(split(folder, tmp_path / f'a{seed}', 0.3, seed=seed, say=silent), 'val')
        assert names(split(copy, tmp_path / f'b{seed}', 0.3, seed=seed, say=silent), 'val') == chosen[seed]
    assert len(set(map(tuple, chosen.values()))) > 3


@pytest.mark.parametrize('ratio, expected', [(1e-9, 1), (0.1, 1), (0.4, 2), (0.5, 3), (0.99, 5)])
def test_the_number_of_val_files_is_rounded_and_both_splits_get_one(folder, tmp_path, ratio, expected):
    meta = split(folder, tmp_path / 'out', ratio, say=silent)
    assert (len(meta['files']['val']), len(meta['files']['train'])) == (expected, 6 - expected)


@pytest.mark.parametrize('ratio, line', [(0.01, 'val gets 25 % of the rows instead of 1 %'), (0.25, '')])
def test_a_val_split_of_whole_files_that_misses_val_ratio_says_its_share(tmp_path, ratio, line):
    for i in range(4):
        save_shard(tmp_path / 'in' / f'{i}.npy', rows(5, 33))
    said = []
    split(tmp_path / 'in', tmp_path / 'out', ratio, say=said.append)
    assert [text for text in said if 'instead of' in text][:1] == [text for text in said if line and line in text]
    assert said[-1].endswith('15 train rows from 3 files, 5 val rows from 1 file')


def test_a_single_file_gives_its_last_rows_to_val(tmp_path):
    save_shard(tmp_path / 'in' / 'a.npy', rows(10, 33))
    meta = split(tmp_path / 'in' / 'a.npy', tmp_path / 'out', 0.25, say=silent)
    assert [(entry['name'], entry['first'], entry['rows']) for part in ('train', 'val') for entry in meta['files'][part]] == [
        ('train/a.npy', 0, 8), ('val/a.npy', 8, 2)]
    data = open_data(tmp_path / 'out', 32, 1000)
    assert (data.n_windows, data.n_val_windows) == (8, 2)
    assert data.val_batch(np.arange(2))[0].tolist() == rows(10, 33)[8:, :32].tolist()
    assert data.gather('train', np.arange(8))[0].tolist() == rows(10, 33)[:8, :32].tolist()
    assert validate(tmp_path / 'out', say=silent)['rows'] == 10
    save_shard(tmp_path / 'one' / 'a.npy', rows(1, 33))
    assert 'a single row' in refused(split, tmp_path / 'one', tmp_path / 'out1', say=silent)


def test_existing_train_and_val_directories_are_the_splits(folder, tmp_path):
    for name in ('train/a.npy', 'train/deep/a.npy', 'val/a.npy', 'test/a.npy'):
        save_shard(tmp_path / 'own' / name, rows(2, 33))
    said = []
    meta = split(tmp_path / 'own', tmp_path / 'out', 0.9, say=said.append)
    assert names(meta, 'train') == ['train/a.npy', 'train/deep/a.npy'] and names(meta, 'val') == ['val/a.npy']
    assert any('1 other files are left out' in line for line in said)


def test_same_names_in_different_directories_do_not_collide(tmp_path):
    for k, name in enumerate(['a/x.npy', 'b/x.npy', 'a-x.npy', 'b/c/x.npy']):
        save_shard(tmp_path / 'in' / name, rows(1, 33, k))
    meta = split(f'{tmp_path}/in/**/*.npy', tmp_path / 'out', 0.5, say=silent)
    data = open_data(tmp_path / 'out', 32, 1000)
    assert data.n_windows == data.n_val_windows == 2
    firsts = [data.gather(part, np.arange(2))[0][:, 0].tolist() for part in ('train', 'val')]
    assert sorted([*firsts[0], *firsts[1]]) == [0, 33, 66, 99]
    linked = [name.partition('/')[2] for part in ('train', 'val') for name in names(meta, part)]
    assert sorted(linked) == ['a-x.npy', 'a/x.npy', 'b/c/x.npy', 'b/x.npy']


def test_the_same_split_again_is_accepted_and_another_is_refused(folder, tmp_path):
    split(folder, tmp_path / 'out', 0.3, say=silent)
    made, said = (tmp_path / 'out' / 'meta.json').stat().st_mtime_ns, []
    split(folder, tmp_path / 'out', 0.3, say=said.append)
    assert said == [f'{tmp_path}/out is already prepared: nothing to do'] and (tmp_path / 'out' / 'meta.json').stat().st_mtime_ns == made
    assert 'was prepared with val_ratio 0.3, not 0.4' in refused(split, folder, tmp_path / 'out', 0.4, say=silent)
    assert 'was prepared with given_vocab_size 0, not 1000' in refused(split, folder, tmp_path / 'out', 0.3, 1000, say=silent)
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer()))
    assert 'was prepared with tokenizer None, not' in refused(split, folder, tmp_path / 'out', 0.3, say=silent)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'letters.txt').touch()
    assert 'exists but is not a prepared' in refused(split, folder, tmp_path / 'other', say=silent)
    assert 'inside' in refused(split, folder, folder / 'out', say=silent)
    assert 'is already prepared' in refused(split, tmp_path / 'out', tmp_path / 'again', say=silent)
    for ratio in (0, 1, -0.1, 2, float('nan')):
        assert 'val_ratio' in refused(split, folder, tmp_path / 'new', ratio, say=silent)
    assert not (tmp_path / 'new').exists()


def test_split_of_a_bad_shard_makes_nothing(folder, tmp_path):
    (folder / '1.npy').write_bytes(b'')
    (folder / '2.npy').unlink()
    (folder / '2.npy').symlink_to('gone')
    assert len(refused(split, folder, tmp_path / 'deep' / 'out', say=silent).splitlines()) == 2
    assert os.listdir(tmp_path) == ['in']


@pytest.mark.parametrize('owner, name', [(workspace, 'fsync'), (shards, 'finish'), (shards, 'publish')])
def test_killed_split_leaves_nothing_that_looks_finished_and_the_next_one_cleans_up(folder, tmp_path, monkeypatch, owner, name):
    def child():
        monkeypatch.setattr(owner, name, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
        split(folder, tmp_path / 'out', say=silent)
    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2 and not (tmp_path / 'out').exists()  # the hidden directory
    split(folder, tmp_path / 'out', say=silent)
    assert sorted(os.listdir(tmp_path)) == ['in', 'out'] and open_data(tmp_path / 'out', 32, 1000).n_windows == 25


def test_the_tokenizer_beside_the_shards_is_copied_and_sets_the_vocabulary(folder, tmp_path):
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer()))
    said = refused(split, folder, tmp_path / 'out', say=silent)
    assert re.fullmatch(r'.*/5.pt: id 989 is outside the vocabulary of 257 tokens of .*/tokenizer.json: replace this file with the tokenizer .*', said)
    for file in find_shards(folder):
        save_shard(file, rows(5, 33, vocab=200))
    meta = split(folder, tmp_path / 'out', vocab_size=1000, say=silent)
    assert (meta['vocab_size'], meta['eot_id']) == (257, 256)
    data = open_data(tmp_path / 'out', 32, 257)
    assert data.tokenizer == tokenizer() and data.n_vocab == 257
    (folder / 'tokenizer.json').write_text('{}')
    assert f'{folder}/tokenizer.json' in refused(split, folder, tmp_path / 'out2', say=silent)


def test_tokenizer_of_hugging_face_is_converted(folder, tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.train_from_iterator(['a'], tokenizers.trainers.BpeTrainer(
        special_tokens=['<|endoftext|>'], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    for file in find_shards(folder):
        save_shard(file, rows(5, 33, vocab=200))
    model.save(str(folder / 'tokenizer.json'))
    meta = split(folder, tmp_path / 'out', say=silent)
    data = open_data(tmp_path / 'out', 32, 1000)
    assert meta['vocab_size'] == data.n_vocab == 257 and data.tokenizer['format'] == 'nanotrix-tokenizer'
    assert split(folder, tmp_path / 'out', say=silent) == meta


# Pack

def test_pack_writes_the_tokens_in_order_and_says_what_it_leaves_out(tmp_path):
    train, val = [counting(700), counting(400)], [counting(150)]
    path, said = write(tmp_path / 'd', {'train': train, 'val': val}), []
    meta = pack(path, 100, tmp_path / 'out', rows_per_shard=4, say=said.append)
    assert 'train: 11 rows of 100 tokens; the last 0 tokens do not fill a row and are left out' in said
    assert 'val: 1 rows of 100 tokens; the last 50 tokens do not fill a row and are left out' in said
    arrays = [np.load(tmp_path / 'out' / 'train' / f'shard_{k:05d}.npy') for k in range(3)]
    assert [array.shape for array in arrays] == [(4, 100), (4, 100), (3, 100)] and all(array.dtype == '<u2' for array in arrays)
    assert np.concatenate(arrays).reshape(-1).tolist() == np.concatenate(train).tolist()
    assert np.load(tmp_path / 'out' / 'val' / 'shard_00000.npy').tolist() == [counting(100).tolist()]
    assert (meta['kind'], meta['row'], meta['vocab_size'], meta['source']) == ('shards', 100, VOCAB, {'dataset': 'test'})
    data = open_data(tmp_path / 'out', 50, VOCAB)
    assert data.tokenizer == TokenData(path, 16, VOCAB).tokenizer and (data.n_windows, data.train_tokens) == (22, 1100)
    assert validate(tmp_path / 'out', say=silent)['tokens'] == 1200
    assert pack(path, 100, tmp_path / 'out', rows_per_shard=4, say=silent) == meta
    assert 'was prepared with row 100, not 50' in refused(pack, path, 50, tmp_path / 'out', say=silent)
    assert 'already holds shards' in refused(pack, tmp_path / 'out', 50, tmp_path / 'out2', say=silent)


def test_pack_refuses_impossible_requests_and_makes_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / 'd', {'train': [counting(700)], 'val': [counting(50)]})
    said = refused(pack, path, 100, tmp_path / 'out', say=silent)
    assert 'the val split has 50 tokens, fewer than one row of 100: use --row=50 or less, or prepare more text' in said
    assert 'row=1' in refused(pack, path, 1, tmp_path / 'out', say=silent)
    assert 'exists but is not a prepared' in refused(pack, path, 50, tmp_path, say=silent)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000))
    assert 'do not fit on the disk' in refused(pack, path, 50, tmp_path / 'out', say=silent)
    assert os.listdir(tmp_path) == ['d']


# Batches

def test_windows_with_a_token_to_spare_have_a_target_everywhere(folder, tmp_path):
    split(folder, tmp_path / 'out', 0.3, say=silent)
    data = open_data(tmp_path / 'out', 16, 1000)
    assert isinstance(data, ShardData) and data.per_row == 2 and data.n_windows == 40 and data.n_val_windows == 20
    assert data.train_tokens == 20 * 33 and data.tokenizer is None and data.n_vocab == 990
    x, y = data.gather('train', np.array([0, 1, 39]))
    assert x.shape == (3, 16) and x.dtype == y.dtype == np.int64 and x.flags.c_contiguous and y.flags.c_contiguous
    assert (np.diff(x) == 1).all() and (y == x + 1).all()
    assert x[1, 0] == x[0, 0] + 16 and x[0, 0] % 33 == 0 and x[2, 0] % 33 == 16


def test_windows_that_fill_a_row_ignore_the_last_target_of_every_window(folder, tmp_path):
    split(folder, tmp_path / 'out', 0.3, say=silent)
    data = open_data(tmp_path / 'out', 11, 1000)
    assert data.per_row == 3 and data.n_windows == 60
    x, y = data.batch(3, 0, 60, 60)
    assert (y[:, -1] == -1).all() and (y[:, :-1] == x[:, 1:]).all() and (np.diff(x) == 1).all()
    assert sorted(x[:, 0] % 33) == sorted([0, 11, 22] * 20)
    assert open_data(tmp_path / 'out', 33, 1000).per_row == 1


@pytest.mark.parametrize('dtype', ['u1', 'i4', 'u8'])
def test_windows_are_correct_for_ids_of_any_width(tmp_path, dtype):
    for k in range(2):
        save_shard(tmp_path / 'in' / f'{k}.npy', rows(5, 33, vocab=199).astype(dtype))
    split(tmp_path / 'in', tmp_path / 'out', 0.5, say=silent)
    x, y = open_data(tmp_path / 'out', 16, 199).gather('train', np.array([3, 8]))
    assert x[:, 0].tolist() == [33 + 16, 132] and (np.diff(x) == 1).all() and (y == x + 1).all()


@pytest.mark.parametrize('row, size, expected', [
    (33, 10, '--block_size=8 or --block_size=11'), (33, 12, '--block_size=11 or --block_size=16'), (33, 34, '32: use --block_size=33'),
    (32768, 1000, '--block_size=512 or --block_size=1024')])
def test_a_block_size_that_does_not_divide_is_refused_with_the_nearest(tmp_path, row, size, expected):
    save_shard(tmp_path / 'in' / 'a.npy', rows(2, row))
    split(tmp_path / 'in', tmp_path / 'out', say=silent)
    assert expected in refused(open_data, tmp_path / 'out', size, 1000)


def starts(loader, world, steps, batch_rows=24, seed=3):
    """The first tokens of what all processes are given, by batch()."""
    size = batch_rows // world
    return [loader.batch(step, 0, size, batch_rows, rank, world, seed)[0][:, 0] for step in steps for rank in range(world)]


@pytest.mark.parametrize('kind', ['shards', 'bins'])
def test_an_epoch_has_every_window_once_even_if_the_number_of_processes_changes(tmp_path, kind):
    if kind == 'shards':
        for k in range(10):
            save_shard(tmp_path / 'in' / f'{k}.{"pt" if k % 3 == 0 else "npy"}', rows(4, 37, 4 * k, 2**16))
        split(tmp_path / 'in', tmp_path / 'out', 0.1, say=silent)
        loader = open_data(tmp_path / 'out', 9, 2**16)
        here = [check(tmp_path / 'out' / name)['seen'].nonzero()[0] for name in names(loader.meta, 'train')]
        expected = sorted(start for start in np.concatenate(here) if start % 37 in (0, 9, 18, 27))
    else:
        loader = open_data(write(tmp_path / 'out', {'train': [np.arange(1297)], 'val': [counting(500)]}, wide()), 9, 2**16)
        expected = list(range(0, 1296, 9))
    assert type(loader) is (ShardData if kind == 'shards' else TokenData)
    assert loader.n_windows == len(expected) == 144  # 6 steps of 24
    whole = starts(loader, 1, range(6))
    assert sorted(np.concatenate(whole)) == expected
    for change in range(7):  # from 2 to 3 processes
        assert sorted(np.concatenate(starts(loader, 2, range(change)) + starts(loader, 3, range(change, 6)))) == expected
    for step in range(6):
        assert sorted(np.concatenate(starts(loader, 3, [step]))) == sorted(whole[step])
    assert sorted(np.concatenate(starts(loader, 2, range(6, 12)))) == expected  # the next epoch
    assert np.concatenate(starts(loader, 1, range(6, 12))).tolist() != np.concatenate(whole).tolist()


def wide():
    """A tokenizer of 65,536 tokens."""
    return tokenizer() | {'special_tokens': {'<|endoftext|>': 2**16 - 1}, 'ranks': [base64.b64encode(raw).decode() for raw in (
        *(bytes([i]) for i in range(256)), *(b'%06d' % i for i in range(2**16 - 257)))]}


def test_the_fingerprint_depends_on_content_and_names_not_on_the_path(folder, tmp_path):
    def fingerprint(source, out, **more):
        split(source, tmp_path / out, say=silent, **more)
        return open_data(tmp_path / out, 16, 2000).fingerprint
    shutil.copytree(folder, tmp_path / 'copy')
    first = fingerprint(folder, 'a')
    assert first == fingerprint(tmp_path / 'copy', 'b') == open_data(tmp_path / 'a', 32, 1000).fingerprint
    found = {first, fingerprint(folder, 'c', seed=1), fingerprint(folder, 'd', vocab_size=1500)}
    np.save(tmp_path / 'copy' / '0.npy', rows(5, 33, 1))
    found.add(fingerprint(tmp_path / 'copy', 'e'))
    os.rename(folder / '0.npy', folder / '00.npy')
    found.add(fingerprint(folder, 'f'))
    assert len(found) == 5


def change_meta(out, **changes):
    meta = json.loads((out / 'meta.json').read_text())
    (out / 'meta.json').write_text(json.dumps(meta | changes))


@pytest.mark.parametrize('damage, message', [
    (lambda folder, out: (folder / '0.npy').unlink(), '0.npy: broken symbolic link to '),
    (lambda folder, out: np.save(folder / '0.npy', rows(4, 33)), '4 rows of 33 tokens in 392 bytes, but meta.json says 5 rows'),
    (lambda folder, out: (folder / '0.npy').write_bytes((folder / '0.npy').read_bytes()[:-1]), '0.npy: truncated, 1 bytes'),
    (lambda folder, out: (out / 'meta.json').write_text('{'), 'meta.json: broken'),
    (lambda folder, out: change_meta(out, version=9), 'meta.json: broken (ValueError(\'version 9, expected 1\''),
    (lambda folder, out: change_meta(out, files={'train': [], 'val': []}), 'a split without files'),
    (lambda folder, out: change_meta(out, files={'train': [{'name': 'x'}], 'val': []}), "meta.json: broken (KeyError('first'))"),
    (lambda folder, out: change_meta(out, files=5), 'meta.json: broken (TypeError'),
    (lambda folder, out: change_meta(out, row=1), 'no row or no vocab_size'),
    (lambda folder, out: change_meta(out, vocab_size=1001), 'a vocabulary of 1001, the model only 1000: use --vocab_size=1001'),
    (lambda folder, out: (out / 'tokenizer.json').write_text(json.dumps(tokenizer())), '257 tokens, but meta.json says 990'),
    (lambda folder, out: (out / 'tokenizer.json').write_text('{}'), 'tokenizer.json: broken tokenizer'),
])
def test_damaged_directory_of_shards_is_refused_in_one_line(folder, tmp_path, damage, message):
    split(folder, tmp_path / 'out', 0.3, say=silent)
    damage(folder, tmp_path / 'out')
    assert message in refused(open_data, tmp_path / 'out', 16, 1000)


def test_ids_are_checked_in_every_batch(folder, tmp_path):
    split(folder, tmp_path / 'out', 0.3, say=silent)
    file = folder / '0.npy'
    ids = np.load(file).astype('u2')
    for value in (990, 65535):
        ids[2, 20] = value
        np.save(file, ids)
        data = open_data(tmp_path / 'out', 16, 1000)
        part = 'train' if (tmp_path / 'out' / 'train' / '0.npy').exists() else 'val'
        said = refused(data.gather, part, np.arange(10))
        assert '0.npy: id ' + str(value) + ' at position 86 of its' in said and 'outside the vocabulary of 990' in said
    with open(file, 'r+b') as target:
        target.truncate(300)
    assert '0.npy: the file became shorter' in refused(data.gather, part, np.arange(10))
    file.unlink()
    assert '0.npy: No such file' in refused(data.gather, part, np.arange(10))


def test_negative_ids_are_refused_in_a_batch(tmp_path):
    for k in range(2):
        save_shard(tmp_path / 'in' / f'{k}.pt', rows(2, 33).astype('i8'))
    split(tmp_path / 'in', tmp_path / 'out', 0.5, say=silent)
    for k in range(2):
        save_shard(tmp_path / 'in' / f'{k}.pt', -rows(2, 33).astype('i8'))
    assert 'id -1 at position 1' in refused(open_data(tmp_path / 'out', 32, 1000).gather, 'train', np.arange(2))


def test_a_thousand_shards_need_few_files_little_time_and_no_memory(tmp_path):
    (tmp_path / 'out' / 'train').mkdir(parents=True)
    entries, size = [], 128 + 2 * 100 * 32768
    for k in range(1000):
        file = tmp_path / 'out' / 'train' / f'{k:04d}.npy'
        npy(file, shape='(100, 32768)', body=b'')
        os.truncate(file, size)
        entries.append({'name': f'train/{k:04d}.npy', 'first': 0, 'rows': 100, 'bytes': size, 'sha256': ''})
    meta = {'version': 1, 'kind': 'shards', 'source': {}, 'vocab_size': 300, 'row': 32768,
            'files': {'train': entries[1:], 'val': entries[:1]}}
    (tmp_path / 'out' / 'meta.json').write_text(json.dumps(meta))
    program = f'''
import resource, sys, time
import numpy as np
from corpora import shards
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
data = shards.open_data('{tmp_path}/out', 1024, 300)
opened = time.perf_counter() - start
for step in range(300):
    x, y = data.batch(step, 0, 4, 4)
    assert x.shape == (4, 1024) and not x.any() and (y[:, -1] == -1).all()
assert data.n_windows == 999 * 100 * 32
print(opened, (time.perf_counter() - start - opened) / 300, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)'''
    result = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    opened, batch, memory = map(float, result.stdout.split() or [9, 9, 9])
    assert opened < 5 and batch < 0.1 and memory < 30_000, (result.stdout, result.stderr)


# Training on shards without a tokenizer

def test_ignored_targets_are_not_counted_in_a_validation(folder, tmp_path):
    split(folder, tmp_path / 'out', 0.3, say=silent)
    data = open_data(tmp_path / 'out', 11, 1000)

    class Model(torch.nn.Module):
        def forward(self, x, targets):
            return (x[:, 1:] * 1.0).mean()  # a mean over the targets that count, which are x + 1 here

        def fixed_weights(self):
            return contextlib.nullcontext()

    lengths, windows, rest = np.arange(1, 1001), data.val_windows(), (4, torch.device('cpu'), torch.float32)
    result = evaluate.validate(Model(), data, lengths, windows, *rest)
    x, y = data.val_batch(windows)
    assert result['tokens'] == len(windows) * 10 and result['loss'] == pytest.approx(x[:, 1:].mean())
    bits = x[:, 1:].sum() / np.log(2) / lengths[y[:, :-1]].sum()
    assert result['bits_per_byte'] == pytest.approx(bits)
    assert evaluate.validate(Model(), data, None, windows, *rest) == result | {'bits_per_byte': None}


def save_countable_rows(folder, vocab_size):
    """Four shards of rows that a model learns soon: every id is one or two more than the id before."""
    draw = np.random.default_rng(0)
    for k in range(4):
        save_shard(folder / f'{k}.npy', (draw.integers(1, 3, (8, 65)).cumsum(1) % vocab_size).astype('u2'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run on shards without a tokenizer, and what it said."""
    folder = tmp_path_factory.mktemp('trained')
    save_countable_rows(folder / 'in', 300)
    split(folder / 'in', folder / 'out', 0.3, vocab_size=300, say=silent)
    argv = [*SMALL, f'--dataset={folder}/out/', f'--out_dir={folder}/run', '--max_steps=10', '--eval_interval=5']
    code, said = finish(argv)
    assert code == 0, said
    return folder, argv, said


def test_a_run_on_shards_without_a_tokenizer_says_so_once_and_trains(trained):
    folder, _, said = trained
    assert said.count('no tokenizer.json beside the shards: no samples and no bits per byte') == 1
    evals = lines(folder / 'run', 'eval')
    assert [line['bits_per_byte'] for line in evals] == [None] * 3 and evals[-1]['loss'] < evals[0]['loss']
    assert not (folder / 'run' / 'samples.jsonl').exists() or not (folder / 'run' / 'samples.jsonl').read_text()
    assert 'sample from it' not in said and 'bits per byte' not in said.replace('no samples and no bits per byte', '')


def test_a_run_without_a_tokenizer_is_resumed_evaluated_and_watched_but_not_sampled(trained, capsys):
    folder, argv, _ = trained
    code, said = finish([*argv, '--max_steps=12', '--resume=auto'])
    assert code == 0 and 'resuming from' in said

    capsys.readouterr()
    evaluate.main([str(folder / 'run'), '--device=cpu'])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['bits_per_byte'] is None
    watch.main([str(folder / 'run')])
    said = capsys.readouterr().out
    assert 'perplexity' in said and 'bits per byte' not in said
    assert 'no tokenizer in this file' in refused(sample.main, [str(folder / 'run'), '--device=cpu'])


def test_a_checkpoint_without_the_key_of_the_tokenizer_is_broken(tmp_path):
    state = {'model': {}, 'optimizer': {}, 'step': 1, 'config': {}, 'tokenizer': None, 'data': {}}
    save(tmp_path / 'a.pt', state)
    assert load(tmp_path / 'a.pt')['tokenizer'] is None
    save(tmp_path / 'b.pt', {key: value for key, value in state.items() if key != 'tokenizer'})
    assert 'no valid tokenizer' in refused(load, tmp_path / 'b.pt')


# Rows whose tokenizer is named

@pytest.fixture(scope='module')
def speaking(tmp_path_factory):
    """A run on rows whose tokenizer is named on the command line, and what it said. It was started in `folder`."""
    folder = tmp_path_factory.mktemp('speaking')
    save_countable_rows(folder / 'rows', 250)
    (folder / 'byte.json').write_text(json.dumps(tokenizer()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, said = finish([*SMALL, '--dataset=shards:rows', '--tokenizer=byte.json', '--out_dir=run', '--max_steps=10'])
    assert code == 0, said
    return folder, said


def test_a_tokenizer_for_rows_gives_samples_and_bits_per_byte(speaking, monkeypatch, capsys):
    folder, said = speaking
    monkeypatch.chdir(folder)
    assert 'no tokenizer' not in said and all(line['bits_per_byte'] > 0 for line in lines(folder / 'run', 'eval'))
    assert (folder / 'run' / 'samples.jsonl').read_text()
    prepared, = Path('data').iterdir()
    assert json.loads((prepared / 'tokenizer.json').read_text()) == tokenizer()
    sample.main(['run', '--device=cpu', '--max_new_tokens=5'])
    assert len(capsys.readouterr().out) > 1


@pytest.mark.parametrize('data', ['shards:rows', 'rows'])
def test_the_rows_a_run_was_trained_on_are_evaluated_on_its_own_split(speaking, monkeypatch, capsys, data):
    folder, _ = speaking
    monkeypatch.chdir(folder)
    evaluate.main(['run', f'--data={data}', '--device=cpu'])
    said = capsys.readouterr().out
    assert "same as the run's own loss at step 10: yes" in said and json.loads(said.splitlines()[-1])['bits_per_byte'] > 0


def test_other_rows_are_split_and_evaluated_with_the_tokenizer_of_the_run(speaking, monkeypatch, capsys, tmp_path):
    folder, _ = speaking
    save_shard(tmp_path / 'other' / '0.npy', rows(9, 65, vocab=200))
    save_shard(tmp_path / 'large' / '0.npy', rows(9, 65, vocab=290))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening.subprocess, 'run', lambda command: prepare.main(command[2:]) or SimpleNamespace(returncode=0))
    evaluate.main([f'{folder}/run', '--data=other', '--device=cpu'])
    said = capsys.readouterr().out
    assert "other: no tokenizer.json beside these rows: read as ids of the run's tokenizer" in said
    assert json.loads(said.splitlines()[-1])['bits_per_byte'] > 0
    said = refused(evaluate.main, [f'{folder}/run', '--data=shards:large', '--device=cpu'])
    assert re.search('large/0.npy: id 257 at position .* is outside the vocabulary of 257', said)


def test_ids_and_a_named_tokenizer_must_fit(folder, tmp_path):
    said = []
    arguments = folder, tmp_path / 'out', 0.3, 0, 1, said.append
    assert re.fullmatch(r'\S+5.pt: id 989 is outside the vocabulary of 257 tokens of byte: give the tokenizer that made .*',
                        refused(split, *arguments, content=named('byte')))
    wide = native('wide', [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(7) for j in range(256)])
    meta = split(*arguments, content=wide)
    assert any(line.startswith('the highest id is 989, but the tokenizer wide-') for line in said)
    assert (meta['vocab_size'], meta['eot_id']) == (2049, 2048)
    assert 'was prepared with tokenizer' in refused(split, *arguments)
    (folder / 'tokenizer.json').write_text(json.dumps(wide))
    assert split(folder, tmp_path / 'out2', say=said.append, content=named('byte'))['vocab_size'] == 2049
    assert f'{folder}/tokenizer.json is the tokenizer of these rows: --tokenizer (byte) is not used' in said


def test_a_tokenizer_that_is_not_used_is_named(folder, tmp_path, capsys, monkeypatch):
    split(folder, tmp_path / 'silent', say=silent)
    write(tmp_path / 'bins', {'train': [counting(700)], 'val': [counting(150)]})
    monkeypatch.chdir(tmp_path)

    def said(*words):
        opening.open_dataset(train.load([*SMALL, '--vocab_size=1000', '--block_size=32', *words]))
        return capsys.readouterr().out
    line = 'silent was prepared without a tokenizer: tokenizer=gpt2 is not used'
    assert line in said('--dataset=./silent', '--tokenizer=gpt2')
    assert 'bins has its own tokenizer, test: tokenizer=byte is not used' in said('--dataset=./bins', '--tokenizer=byte')
    assert said('--dataset=./silent', '--tokenizer=none') == ''
    assert 'bins has a vocabulary of 257, the model has 1,000: --vocab_size=257 makes the model' in said('--dataset=./bins')


def test_an_unprepared_directory_is_refused_with_what_it_holds(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'a.txt').write_text('a')
    for name in ('in', './in'):
        assert refused(opening.open_dataset, train.load([*SMALL, f'--dataset={name}'])).endswith('holds rows of token ids: use --dataset=shards:in')
    assert refused(open_data, 'notes', 8, 300) == 'notes is not prepared data (no meta.json). It holds text (a.txt): use --dataset=text:notes'
