"""
Shards: .npy or .pt files with rows of token ids, made by another program.
Imported by prepare.py, and by corpora/prepared.py for runs on such data:

    validate('shards')                                    # reads everything, names every bad file, prints a summary
    split('shards', 'data/mine', content=named('gpt2'))   # -> data/mine: links to the shards, tokenizer.json, meta.json
    pack('data/pylib', row=32768, out='data/packed')      # bins of a prepared directory -> shards
    data = ShardData('data/mine', block_size=1024, vocab_size=50304)

A file is one integer array of shape (rows, L). All files have the same L. No code in a file is ever run: a .npy file is
parsed from its header, and a .pt file is loaded only if its pickle names just one plain tensor. No file stays open or
mapped, so the number of shards is not bounded by the limit on open files.
"""
import glob
import hashlib
import json
import math
import os
import pickletools
import re
import shutil
import stat
import struct
import zipfile
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Lock

import numpy as np

from configurator import UserError, columns, read_json
from files import fsync, sizes, stamp, write_json
from data import VERSION, TokenData
from tokenizer import load_tokenizer
from verification import BLOCK, scan
from corpora import vocabulary
from corpora.prepared import open_data
from corpora.workspace import clear, compare, is_prepared, now, publish, workspace

LARGEST_VOCAB = 2**24  # upper bound of the ids if no vocabulary is given; larger numbers are unlikely to be token ids
PARSER = Lock()  # numpy parses a header with `ast`, and Python 3.11 fails at times if several threads do that at once
DTYPES = [f'{kind}int{size}' for kind in ('', 'u') for size in (8, 16, 32, 64)]
# The names in the pickle of one plain tensor. Files with other names are never passed to torch: weights_only allows
# many more.
PICKLED = re.compile(r'torch\._utils _rebuild_tensor_v[23]|collections OrderedDict|torch (\w+Storage|u?int\d+)|'
                     r'torch\.storage UntypedStorage')


# ----------------------------------------------------------------------------------------------------------------------
# Files

def find_shards(path):
    """
    The sorted .npy and .pt files at `path`: a file, a glob, or a directory searched with its subdirectories. Hidden
    files are skipped. Raises UserError.
    """
    path = Path(path).expanduser()

    def fail(error):
        raise UserError(f'{error.filename}: {error.strerror}')
    if path.is_dir():
        found, seen = [], set()
        for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
            here = os.path.realpath(folder)
            folders[:] = [] if here in seen else [name for name in folders if name[0] != '.']  # links may form a loop
            found += [] if here in seen else [Path(folder, name) for name in names if name[0] != '.']
            seen.add(here)
    else:
        found = [path] if os.path.lexists(path) else [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = sorted(file for file in found if file.suffix in ('.npy', '.pt'))
    if not files:
        if path.is_dir():
            raise UserError(f'{path}: no .npy or .pt files in it')
        raise UserError(f'{path}: not a shard: shards end in .npy or .pt' if found else
                        f'{path}: no such file, directory or glob')
    return files


def inspect(file):
    """
    Returns (rows, L, dtype, offset) of a shard from its header. Row r starts at byte offset + r * L * itemsize.

    The file must be complete and hold a 2-D integer array in row-major order. Otherwise raises UserError with the file
    and the reason.
    """
    file = Path(file)
    header, maker = (pt_header, 'torch.save since version 1.6') if file.suffix == '.pt' else (npy_header, 'numpy.save')
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could block forever
            raise UserError('not a regular file')
        if not status.st_size:
            raise UserError('empty')
        with open(file, 'rb') as source:
            shape, dtype, offset = header(source, status.st_size)
        if dtype not in DTYPES:
            raise UserError(f'ids of type {dtype}, expected little-endian whole numbers of 1 to 8 bytes')
        if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
            raise UserError(f'shape {shape}, expected (rows, tokens per row), at least (1, 2)')
        missing = offset + math.prod(shape) * np.dtype(dtype).itemsize - status.st_size
        if missing > 0 or missing and header is npy_header:
            raise UserError(f'truncated, {missing:,} bytes are missing' if missing > 0 else
                            f'{-missing:,} bytes too many')
        return *shape, np.dtype(dtype), offset
    except OSError as error:
        if file.is_symlink() and not file.exists():
            raise UserError(f'{file}: broken symbolic link to {os.readlink(file)}')
        raise UserError(f'{file}: {error.strerror or error}')
    except UserError as error:
        raise UserError(f'{file}: {str(error)[:300]}')
    except Exception as error:  # numpy and zipfile raise many types for damaged files
        raise UserError(f'{file}: damaged, or not what {maker} writes ({type(error).__name__}: {str(error)[:300]})')


def npy_header(source, size):
    """(shape, name of the dtype, offset) of an open .npy file."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(source)
    with PARSER:
        shape, fortran, dtype = read[version](source)
    if dtype.hasobject:
        raise UserError('not opened: an array of Python objects is a pickle, which could run code')
    if fortran:
        raise UserError('the array is in Fortran order (column by column): save numpy.ascontiguousarray(array)')
    return tuple(map(int, shape)), str(dtype), source.tell()


def pt_header(source, size):
    """(shape, name of the dtype, offset) of an open .pt file that holds one tensor."""
    with zipfile.ZipFile(source) as archive:
        records = {info.filename.lower(): info for info in archive.infolist()}  # torch ignores case
        if len(records) < len(archive.infolist()) or any(info.compress_type for info in records.values()):
            raise UserError('not written by torch.save: it is compressed, or two records have the same name')
        if sum(info.file_size for info in records.values()) > size:
            raise UserError('truncated')
        top = archive.namelist()[0].partition('/')[0]
        tensors = [name for name in archive.namelist() if re.fullmatch(r'[^/]+/data/[^/]+', name)]
        if len(tensors) != 1 or archive.getinfo(f'{top}/data.pkl').file_size > 10_000:
            raise UserError(f'it holds {len(tensors)} tensors or other objects, expected one tensor')
        if f'{top}/byteorder' in records and archive.read(f'{top}/byteorder') != b'little':
            raise UserError('its ids are not little-endian')
        named = [arg for code, arg, _ in pickletools.genops(archive.read(f'{top}/data.pkl')) if code.name == 'GLOBAL']
        if wrong := [name for name in named if not PICKLED.fullmatch(name)]:
            raise UserError(f'not opened: its pickle names {wrong[0].replace(" ", ".")}, expected one plain tensor')
        record = archive.getinfo(tensors[0])
    source.seek(-22, os.SEEK_END)
    if not re.fullmatch(rb'PK\x05\x06.{16}\0\0', source.read(), re.DOTALL):  # end record of a zip without a comment
        raise UserError('other bytes follow its end')
    source.seek(record.header_offset + 26)
    start = source.tell() + 4 + sum(struct.unpack('<2H', source.read(4)))  # after name and padding

    import torch  # imported here because it takes seconds and only .pt files need it
    try:
        tensor = torch.load(source.name, map_location='cpu', weights_only=True, mmap=True)
    except Exception:  # several types; not quoted because its text advises to switch weights_only off
        raise UserError('damaged, or it holds more than one plain tensor: torch.load with weights_only refuses it')
    if type(tensor) is not torch.Tensor:
        raise UserError(f'it holds a {type(tensor).__name__}, expected one tensor')
    if not tensor.is_contiguous() or tensor.is_neg():
        raise UserError('its rows are not contiguous in memory: save tensor.contiguous()')
    offset = tensor.storage_offset() * tensor.element_size()
    if offset + tensor.numel() * tensor.element_size() > record.file_size:
        raise UserError('truncated')
    return tuple(tensor.shape), str(tensor.dtype).removeprefix('torch.'), start + offset


def check(file, vocab_size=0):
    """
    Read a whole shard. Returns {file, rows, length, dtype, tokens, min_id, max_id, bytes (of the file), sha256 (of the
    file), seen: (max_id + 1,) bool, which ids occur}.

    Raises UserError for files that `inspect` refuses, for damage, and for ids outside the vocabulary.
    vocab_size=0 means a limit of 2**24.
    """
    file = Path(file)
    rows, length, dtype, offset = inspect(file)
    if file.suffix == '.pt':
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except Exception as error:
            damaged = type(error).__name__
        if damaged:
            raise UserError(f'{file}: damaged (the checksum of {damaged} is wrong)')
    found = scan(file, offset, rows * length, dtype, vocab_size or LARGEST_VOCAB)
    return {'file': file, 'rows': rows, 'length': length, 'dtype': str(dtype), **found}


def check_all(files, vocab_size):
    """
    Run check() on all files. Returns ([result or UserError of each file], bool array: which ids occur in any file).

    Uses threads, because reading, hashing and numpy release the GIL.
    """
    occurring, lock = [np.zeros(0, bool)], Lock()

    def attempt(file):
        try:
            found = check(file, vocab_size)
        except UserError as error:
            return error
        with lock:
            occurring[0] = union(occurring[0], found.pop('seen'))
        return found
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        return list(pool.map(attempt, files)), occurring[0]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C should not wait for the remaining files


def union(a, b):
    """Union of two bool arrays over ids. The longer array is changed in place and returned."""
    a, b = (a, b) if len(a) > len(b) else (b, a)
    a[:len(b)] |= b
    return a


# ----------------------------------------------------------------------------------------------------------------------
# Validate, split, pack

def validate(path, vocab_size=0, say=print):
    """
    Read all tokens at `path` (shards or a prepared directory) and print a summary.

    Returns {format, files, rows, length, dtype, tokens, min_id, max_id, vocab_size, unique, bytes, checked: [results of
    check() without `seen`]}. Raises UserError with one line per bad file.
    """
    path = Path(path).expanduser()
    meta = read_json(path / 'meta.json') if (path / 'meta.json').is_file() else {}
    if meta and meta.get('kind') != 'shards':
        return validate_bins(TokenData(path, 1, vocab_size or LARGEST_VOCAB, verify='never'), say)
    vocab_size = vocab_size or (int(meta['vocab_size']) if meta else 0)
    files, checked, seen = read_all(path, meta, vocab_size, say)
    return summary('+'.join(sorted({file.suffix[1:] for file in files})), checked, seen, vocab_size, say)


def read_all(path, meta, vocab_size, say):
    """
    Read all shards at `path`. Returns (files, results of check() without `seen`, which ids occur). Raises UserError
    with one line per bad file. meta: the content of meta.json, {} if there is none.
    """
    entries = {entry['name']: entry for entry in chain(*entries_of(meta, path).values())} if meta else {}
    files = find_shards(path)
    say(f'{path}: reading {len(files):,} files')
    results, seen = check_all(files, vocab_size)
    checked = [found for found in results if not isinstance(found, UserError)]
    problems = [problem for found in results if isinstance(found, UserError) for problem in found.args]
    usual = Counter(found['length'] for found in checked).most_common(1)
    problems += [f"{found['file']}: rows of {found['length']:,} tokens, where most files have {usual[0][0]:,}"
                 for found in checked if found['length'] != usual[0][0]]
    if entries and not problems:
        hashes = {found['file'].relative_to(path).as_posix(): found['sha256'] for found in checked}
        wrong = [name for name in sorted({*entries, *hashes})
                 if name not in entries or hashes.get(name) != entries[name]['sha256']]
        problems = [f'{path / name}: not the file that meta.json describes: remove {path} and split it again'
                    for name in wrong]
        checked = list({found['file'].resolve(): found for found in checked}.values())  # one file may serve both splits
    if problems:
        raise UserError(*problems)
    return files, checked, seen


def validate_bins(data, say):
    """validate() for the bins of a TokenData."""
    checked, seen = [], np.zeros(0, bool)
    for name, found in data.verify(reread=True).items():
        seen = union(seen, found.pop('seen'))
        checked.append({'file': data.path / name, 'rows': 0, 'length': 0, 'dtype': data.dtype.name, **found})
    documents = data.meta.get('documents') or {}
    return summary('bin', checked, seen, data.n_vocab, say, documents.get('train', 0) + documents.get('val', 0))


def summary(kind, checked, seen, vocab_size, say, documents=0):
    """Print the summary of validate() and return its result."""
    total = {key: sum(found[key] for found in checked) for key in ('rows', 'tokens', 'bytes')}
    low, high = min(found['min_id'] for found in checked), max(found['max_id'] for found in checked)
    size, unique = vocab_size or high + 1, int(seen.sum())
    dtype = ', '.join(sorted({found['dtype'] for found in checked}))
    rows = sorted({found['rows'] for found in checked})
    count = f'{rows[0]:,}' if len(rows) == 1 else f'{rows[0]:,} to {rows[-1]:,}'
    shape = f"{count}, {checked[0]['length']:,}"
    say(columns([
        ('format', kind), ('files', f"{len(checked):,}, {total['bytes'] / 1e6:,.1f} MB"),
        ('shape', f'({shape})' if rows[-1] else f"({total['tokens']:,},)"),
        ('dtype', dtype), ('ids', f'{low} to {high:,}'),
        ('sequences', f"{total['rows'] or documents:,}"), ('tokens', f"{total['tokens']:,}"),
        ('vocabulary', f'{size:,}' + ('' if vocab_size else ' (the highest id + 1)')),
        ('unique tokens', f'{unique:,} ({unique / size:.1%} of the vocabulary)')]))
    return {'format': kind, 'files': len(checked), **total, 'length': checked[0]['length'], 'dtype': dtype,
            'min_id': low, 'max_id': high, 'vocab_size': size, 'unique': unique, 'checked': checked}


def tokenizer_beside(path, files):
    """The path of the tokenizer.json that belongs to the shards at `path`, None if there is none."""
    root = Path(path) if Path(path).is_dir() else Path(os.path.commonpath([file.parent.absolute() for file in files]))
    file = root / 'tokenizer.json'
    return file if file.exists() else None


def split(path, out, val_ratio=0.01, vocab_size=0, seed=1337, say=print, content=None):
    """
    Validate the shards at `path` and make `out`, a directory that open_data() reads. It holds train/ and val/ with
    links to the shards, and meta.json. Returns the content of meta.json.

    If `path` already has train/ and val/, they are the splits. If there is a single file, its last rows are val.
    Otherwise the files are ordered by a hash of (seed, name), and the first val_ratio of them are val.

    content: the tokenizer that made the ids. It is stored in `out`. A tokenizer.json beside the shards, ours or Hugging
    Face's, takes precedence.
    """
    path, out = Path(path).expanduser(), Path(out)
    if not 0 < val_ratio < 1:
        raise UserError(f'val_ratio={val_ratio}: expected a fraction between 0 and 1')
    if (path / 'meta.json').is_file():
        raise UserError(f'{path} is already prepared (it has a meta.json): use it as it is')
    if path.resolve() in [out.resolve(), *out.resolve().parents]:
        raise UserError(f'{out} lies inside {path}, which holds the shards: choose another place')
    files = find_shards(path)
    root = path if path.is_dir() else os.path.commonpath([file.parent.absolute() for file in files])
    if beside := tokenizer_beside(path, files):
        given, content = content, vocabulary.from_file(beside)
        if given and given != content:
            say(f'{beside} is the tokenizer of these rows: --tokenizer ({vocabulary.label(given)}) is not used')
    encoding = load_tokenizer(content) if content else None
    label = vocabulary.label(content) if content else None
    request = {'version': VERSION, 'kind': 'shards', **source_of(path, files), 'seed': seed, 'val_ratio': val_ratio,
               'given_vocab_size': vocab_size, 'tokenizer': label}
    if is_prepared(out, request):
        say(f'{out} is already prepared: nothing to do')
        return read_json(out / 'meta.json')
    if encoding and vocab_size not in (0, encoding.n_vocab):
        say(f'vocab_size={vocab_size} is not used: the tokenizer {label} has {encoding.n_vocab} tokens')

    _, checked, seen = read_all(path, {}, 0 if encoding else vocab_size, say)
    if encoding:
        vocab_size = encoding.n_vocab
        check_tokenizer(checked, vocab_size, beside or label, say)
    found = summary('+'.join(sorted({file.suffix[1:] for file in files})), checked, seen, vocab_size, say)
    names = [Path(os.path.relpath(file.absolute(), Path(root).absolute())).as_posix() for file in files]
    parts = deal(dict(zip(names, found['checked'])), val_ratio, seed, say)
    meta = {**request, 'vocab_size': found['vocab_size'], 'row': found['length'],
            'eot_id': encoding.eot_token if encoding else None, 'created': now(),
            'files': {part: [entry(name, *rest) for name, *rest in parts[part]] for part in parts}}
    with workspace(out, request) as work:
        if work:
            clear(work)
            for name, checked, *_ in chain(*parts.values()):
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).symlink_to(checked['file'].absolute())
            finish(work, out, meta, content)
    counts = []
    for part, dealt in parts.items():
        files = '1 file' if len(dealt) == 1 else f'{len(dealt):,} files'
        counts.append(f'{sum(rows for *_, rows in dealt):,} {part} rows from {files}')
    say(f"{out}: {', '.join(counts)}")
    return meta


def check_tokenizer(checked, n_vocab, name, say):
    """Raises UserError if ids of the shards exceed the vocabulary. Says if they are suspiciously small."""
    highest = max(checked, key=lambda found: found['max_id'])
    max_id = highest['max_id']
    if max_id >= n_vocab:
        remedy = ('replace this file with the tokenizer that made these rows, or remove it' if isinstance(name, Path)
                  else 'give the tokenizer that made these rows, or --tokenizer=none to train without text')
        raise UserError(f"{highest['file']}: id {max_id:,} is outside the vocabulary of {n_vocab:,} tokens of {name}: "
                        f'{remedy}')
    if 2 * max_id < n_vocab:
        say(f'the highest id is {max_id:,}, but the tokenizer {name} has {n_vocab:,} tokens: did it make these rows?')


def source_of(path, files):
    """The entries of meta.json that describe the source files of a split."""
    there = [file for file in files if file.exists()]
    return {'source': {'dataset': f'shards:{path}', **sizes(there)}, 'inputs': stamp(there)}


def check_split(path, out):
    """Raises UserError if the files at `path` have changed since they were split into the directory `out`."""
    path = Path(path).expanduser()
    compare(read_json(out / 'meta.json'), source_of(path, find_shards(path)), f'{out} was prepared',
            f'remove it to split them again, or use it as it is with --dataset={out}')


def deal(checked, val_ratio, seed, say):
    """
    Assign files to splits: {name relative to the source root: result of check()} ->
    {split: [(name relative to the output directory, result of check(), first row, rows)]}
    """
    def whole(names, folder=''):
        return [(folder + name, checked[name], 0, checked[name]['rows']) for name in names]
    own = {part: [name for name in checked if name.startswith(f'{part}/')] for part in ('train', 'val')}
    if own['train'] and own['val']:
        left = len(checked) - sum(map(len, own.values()))
        say('the splits are the directories train/ and val/' + (f'; {left:,} other files are left out' if left else ''))
        return {part: whole(own[part]) for part in own}
    if len(checked) == 1:
        (name, found), = checked.items()
        if found['rows'] == 1:
            raise UserError(f"{found['file']}: a single row cannot be both train and val: provide more rows")
        last = min(max(1, round(val_ratio * found['rows'])), found['rows'] - 1)
        first = found['rows'] - last
        return {'train': [(f'train/{name}', found, 0, first)], 'val': [(f'val/{name}', found, first, last)]}
    order = sorted(checked, key=lambda name: hashlib.sha256(os.fsencode(f'{seed}:{name}')).digest())
    val = {*order[:min(max(1, round(val_ratio * len(order))), len(order) - 1)]}
    share = sum(checked[name]['rows'] for name in val) / sum(found['rows'] for found in checked.values())
    if not 0.5 < share / val_ratio < 1.5:
        say(f'val gets {100 * share:.3g} % of the rows instead of {100 * val_ratio:.3g} % (val_ratio), because files '
            'are not divided: use more and smaller files to come closer')
    return {'train': whole([name for name in checked if name not in val], 'train/'), 'val': whole(sorted(val), 'val/')}


def entry(name, found, first, rows):
    """
    The entry of a file in meta.json. Rows [first, first + rows) belong to the split. bytes, max_id and sha256 describe
    the whole file.
    """
    return {'name': name, 'first': first, 'rows': rows, 'tokens': rows * found['length'],
            **{key: found[key] for key in ('bytes', 'max_id', 'sha256')}}


def pack(data_path, row, out, rows_per_shard=100, say=print):
    """
    Convert the bins of a prepared directory into shards with the same ids. `out` becomes a directory that open_data()
    reads. Returns the content of its meta.json.

    Each shard has shape (rows_per_shard, row). The last shard of a split may be smaller. A row is a run of consecutive
    tokens. Tokens at the end of a split that do not fill a row are left out.
    """
    if row < 2 or rows_per_shard < 1:
        raise UserError(f'row={row}, rows_per_shard={rows_per_shard}: expected at least 2 tokens per row '
                        'and 1 row per shard')
    out, data = Path(out), open_data(data_path, 1, LARGEST_VOCAB, verify='never')
    if isinstance(data, ShardData):
        raise UserError(f'{data_path} already holds shards')
    request = {'version': VERSION, 'kind': 'shards', 'source': data.meta['source'], 'row': row,
               'rows_per_shard': rows_per_shard, 'packed': data.fingerprint}
    if is_prepared(out, request):
        say(f'{out} is already packed: nothing to do')
        return read_json(out / 'meta.json')
    counts = {part: divmod(sum(entry['tokens'] for entry in data.meta['files'][part]), row)
              for part in ('train', 'val')}
    for part, (rows, rest) in counts.items():
        if not rows:
            larger = ' or use a larger --val_ratio' if part == 'val' else ''
            raise UserError(f'{data_path}: the {part} split has {rest:,} tokens, fewer than one row of {row:,}: '
                            f'use --row={rest} or less, or prepare more text{larger}')
        say(f'{part}: {rows:,} rows of {row:,} tokens; the last {rest:,} tokens do not fill a row and are left out')
    validate_bins(data, say)
    with workspace(out, request) as work:
        if work:
            clear(work)
            need = data.dtype.itemsize * row * sum(rows for rows, _ in counts.values())
            free = shutil.disk_usage(work).free
            say(f'{out} needs {need / 1e6:,.1f} MB ({free / 1e6:,.1f} MB are free)')
            if need > free:
                raise UserError(f'{out}: {need / 1e6:,.1f} MB do not fit on the disk: free some space, '
                                'or choose another place')
            files = {part: pack_split(data, part, row, rows, rows_per_shard, work / part)
                     for part, (rows, _) in counts.items()}
            finish(work, out, {**request, 'filter': data.meta.get('filter'), 'vocab_size': data.n_vocab,
                               'eot_id': data.meta.get('eot_id'), 'created': now(), 'files': files}, data.tokenizer)
    meta = read_json(out / 'meta.json')
    say(f"{out}: {len(meta['files']['train']):,} train and {len(meta['files']['val']):,} val shards")
    return meta


def pack_split(data, split, row, rows, rows_per_shard, folder):
    """Write the first rows of a split to files in `folder`. Reads them back and returns their entries for meta.json."""
    folder.mkdir()
    entries = []
    for first in range(0, rows, rows_per_shard):
        file, end = folder / f'shard_{len(entries):05d}.npy', min(first + rows_per_shard, rows)
        with open(file, 'wb') as target:
            np.lib.format.write_array_header_1_0(target, {
                'descr': data.dtype.str, 'fortran_order': False, 'shape': (end - first, row)})
            target.writelines(data.read(split, start, min(start + BLOCK, end * row)).tobytes()
                              for start in range(first * row, end * row, BLOCK))
        fsync(file)
        entries.append(entry(f'{split}/{file.name}', check(file, data.n_vocab), 0, end - first))
    return entries


def finish(work, out, meta, content):
    """Write tokenizer.json (skipped if content is None) and meta.json into `work`, then rename `work` to `out`."""
    if content:
        write_json(work / 'tokenizer.json', content)
    write_json(work / 'meta.json', meta)
    publish(work, out)


# ----------------------------------------------------------------------------------------------------------------------
# Batches

def entries_of(meta, path):
    """{split: [entry of a file]} from meta.json. Raises UserError if a key is missing or has a wrong type or value."""
    kinds = {'name': str, 'first': int, 'rows': int, 'bytes': int, 'sha256': str}
    try:
        entries = {split: [{key: kind(entry[key]) for key, kind in kinds.items()} for entry in meta['files'][split]]
                   for split in ('train', 'val')}
        if meta['version'] != VERSION:
            raise ValueError(f"version {meta['version']!r}, expected {VERSION}")
        if not all(entries.values()) or any(entry['first'] < 0 or entry['rows'] < 1
                                            for entry in chain(*entries.values())):
            raise ValueError('a split without files, or a file without rows')
        if int(meta['row']) < 2 or int(meta['vocab_size']) < 1:
            raise ValueError('no row or no vocab_size')
        return entries
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path / 'meta.json'}: broken ({error!r}): remove {path} and make it again")


class ShardData(TokenData):
    """
    Loads a directory made by split() or pack(), with the interface of TokenData. .tokenizer is None if there is no
    tokenizer.json.

    A window lies inside one row of L tokens. Let T = block_size.
    - If L - 1 is a multiple of T, a row has (L - 1) / T windows of T + 1 tokens.
    - If L is a multiple of T, a row has L / T windows of T tokens. The last target of every window is -1, which the
      loss ignores. Only the last window of a row lacks a next token. But with -1 in all windows, every micro-batch has
      the same number of targets, and the mean does not depend on the number of processes.

    The constructor checks sizes and headers. Every batch checks its ids. Whole files are read only with
    verify='always'.
    """

    def __init__(self, path, block_size, vocab_size, verify='once'):
        self.path, self.block_size = Path(path), block_size
        self.again = f'remove {self.path} and make it again'
        self.meta = read_json(self.path / 'meta.json')
        entries = entries_of(self.meta, self.path)
        self.row, self.n_vocab = int(self.meta['row']), int(self.meta['vocab_size'])
        if self.n_vocab > vocab_size:
            raise UserError(f'{self.path} has a vocabulary of {self.n_vocab}, the model only {vocab_size}: '
                            f'use --vocab_size={self.n_vocab}')
        self.tokenizer, file = None, self.path / 'tokenizer.json'
        if file.exists():
            self.tokenizer = read_json(file)
            if (tokens := load_tokenizer(self.path).n_vocab) != self.n_vocab:
                raise UserError(f'{file}: {tokens} tokens, but meta.json says {self.n_vocab}: {self.again}')
        content = [self.row, self.n_vocab, entries, self.tokenizer]
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

        # Whether every position of a window has a target.
        self.whole = (self.row - 1) % block_size == 0 and block_size < self.row
        if not self.whole and self.row % block_size:
            sizes = ' or '.join(f'--block_size={size}' for size in nearest(self.row, block_size))
            raise UserError(f'{self.path}: block_size={block_size} divides neither its rows of {self.row} tokens nor '
                            f'{self.row - 1}: use {sizes}')
        self.per_row = (self.row - self.whole) // block_size
        self.files, self.starts, rows = {}, {}, {}
        for split, listed in entries.items():
            self.files[split] = [self.open_shard(**entry) for entry in listed]
            ends = np.cumsum([entry['rows'] for entry in listed]).tolist()
            self.starts[split], rows[split] = [0, *ends[:-1]], ends[-1]  # first row of each file within the split
        self.train_tokens = rows['train'] * self.row
        self.n_windows, self.n_val_windows = rows['train'] * self.per_row, rows['val'] * self.per_row
        if verify == 'always':
            validate(self.path, say=lambda line: None)

    def open_shard(self, name, first, rows, bytes, sha256):
        """Check size and header of a file. Returns (file, dtype, byte offset of its row `first`)."""
        file = self.path / name
        there, length, dtype, offset = inspect(file)
        if file.stat().st_size != bytes or length != self.row or there < first + rows:
            raise UserError(f'{file}: {there} rows of {length} tokens in {file.stat().st_size} bytes, '
                            f'but meta.json says {first + rows} rows of {self.row} in {bytes} bytes: {self.again}')
        return file, dtype, offset + first * length * dtype.itemsize

    def gather(self, split, windows):
        """(n,) windows -> x, y: (n, T) int64"""
        T = self.block_size
        tokens = np.full((len(windows), T + 1), -1)  # positions without a token stay ignored targets
        for i, window in enumerate(windows.tolist()):
            row, k = divmod(window, self.per_row)
            number = bisect_right(self.starts[split], row) - 1
            file, dtype, offset = self.files[split][number]
            at = (row - self.starts[split][number]) * self.row + k * T
            try:
                ids = np.fromfile(file, dtype, T + self.whole, offset=offset + at * dtype.itemsize)
            except OSError as error:
                raise UserError(f'{file}: {error.strerror or error}: {self.again}')
            if len(ids) < T + self.whole:
                raise UserError(f'{file}: the file became shorter: {self.again}')
            if ids.max() >= self.n_vocab or ids.min() < 0:
                wrong = int(np.argmax((ids < 0) | (ids >= self.n_vocab)))
                raise UserError(f'{file}: id {ids[wrong]} at position {at + wrong} of its {split} rows is outside the '
                                f'vocabulary of {self.n_vocab}: {self.again}')
            tokens[i, :len(ids)] = ids
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def nearest(row, block_size):
    """The nearest block sizes below and above this one that divide row or row - 1."""
    sizes = sorted({size for n in (row, row - 1) for i in range(1, math.isqrt(n) + 1) if n % i == 0
                    for size in (i, n // i)})
    below, above = [size for size in sizes if size < block_size], [size for size in sizes if size > block_size]
    return below[-1:] + above[:1]
