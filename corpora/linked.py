"""
Makes token files of other projects available as a directory that TokenData reads. Imported by prepare.py:

    link('fineweb10B', Path('data/fineweb'), content, val_ratio=0.05)   # content: the tokenizer of these files

The directory has tokenizer.json, meta.json and symbolic links to the files. Nothing is copied. Training reads the
original files, starting at the byte of their first id. link() reads all files once, to check that the tokenizer has
every id.
"""
import glob
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError
from files import sizes, stamp, write_json
from data import DTYPES, VERSION
from tokenizer import id_dtype, load_tokenizer
from verification import remember, scan
from corpora.vocabulary import label
from corpora.workspace import clear, is_prepared, now, publish, workspace

# nanoGPT: 16-bit ids without a header (data/openwebtext/prepare.py in github.com/karpathy/nanoGPT).
# llm.c: a header of 256 32-bit numbers, then the ids. The first three numbers are a magic number, a version and the
# number of ids (dev/data/data_common.py in github.com/karpathy/llm.c).
# modded-nanogpt (github.com/KellerJordan/modded-nanogpt) uses the first entry of HEADERS.
HEADERS = {20240520: (1, DTYPES['uint16']), 20240801: (7, DTYPES['uint32'])}  # {magic: (version, type of an id)}
HEADER_BYTES = 256 * 4
EVALUATION = 20240522  # magic number of llm.c's multiple-choice questions


class Bin(NamedTuple):
    file: Path
    offset: int  # byte of the first id
    tokens: int
    dtype: np.dtype


def find_bins(path):
    """
    The sorted .bin files at `path`: a directory, a glob or a file. None if there are .parquet text files instead, as in
    nanochat. Raises UserError if there are neither.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = glob.glob(os.path.join(glob.escape(path), '*'))
    else:
        found = [path] if os.path.exists(path) else glob.glob(path)
    files = sorted(Path(name) for name in found if name.endswith('.bin'))
    if not files and any(name.endswith('.parquet') for name in found):
        return None
    if not files:
        raise UserError(f'{path}: no such file, and no directory or glob with .bin files of tokens '
                        'or .parquet files of text')
    return files


def inspect(file, n_vocab):
    """The Bin at a path, from its header and size. Raises UserError if the file has none of the known formats."""
    try:
        size = file.stat().st_size
        header = np.fromfile(file, '<i4', 256)
    except OSError as error:
        broken = file.is_symlink() and not file.exists()
        raise UserError(f'{file}: ' + (f'broken symbolic link to {os.readlink(file)}' if broken else error.strerror))
    magic = int(header[0]) if len(header) else 0
    if magic == EVALUATION:
        raise UserError(f"{file}: this file holds questions with answers (llm.c's evaluation format), "
                        'not text to train on')
    if magic not in HEADERS:
        if len(header) == 256 and not header[3:].any():
            raise UserError(f'{file}: its header has the unknown magic number {magic}, expected '
                            + ' or '.join(map(str, HEADERS)))
        dtype = id_dtype(n_vocab)
        if not size or size % dtype.itemsize:
            raise UserError(f'{file}: {size:,} bytes, expected ids of {dtype.itemsize} bytes each')
        return Bin(file, 0, size // dtype.itemsize, dtype)
    version, dtype = HEADERS[magic]
    if len(header) < 256:
        raise UserError(f'{file}: truncated, {size:,} bytes are less than its header of {HEADER_BYTES:,}')
    if header[1] != version:
        raise UserError(f'{file}: version {header[1]} of the format {magic}, expected {version}')
    tokens = int(header[2])
    missing = HEADER_BYTES + tokens * dtype.itemsize - size
    if tokens < 1:
        raise UserError(f'{file}: its header says {tokens:,} tokens, expected at least 1')
    if missing:
        raise UserError(f'{file}: its header says {tokens:,} tokens, but {abs(missing):,} bytes are '
                        + ('missing' if missing > 0 else 'too many'))
    return Bin(file, HEADER_BYTES, tokens, dtype)


def deal(files, val_ratio, say):
    """
    [Bin] -> {split: [Bin]}, by the words in the file names. If no name contains val, the last tokens become the
    validation split: whole files, and the end of one file if needed.
    """
    words = {bin.file: set(re.findall('[a-z]+', bin.file.stem.lower())) for bin in files}
    val = [bin for bin in files if words[bin.file] & {'val', 'valid', 'validation'}]
    test = [bin for bin in files if 'test' in words[bin.file]]
    train = [bin for bin in files if bin not in val + test]
    if test:
        say(f'left out: {", ".join(bin.file.name for bin in test)}')
    if not train:
        names = ', '.join(bin.file.name for bin in files)
        raise UserError(f'{files[0].file.parent}: none of its .bin files is for training: {names}')
    if val:
        return {'train': train, 'val': val}
    need = max(1, round(val_ratio * sum(bin.tokens for bin in train)))
    say(f'no file has val in its name: the last {need:,} tokens are the validation split (--val_ratio={val_ratio})')
    while need >= train[-1].tokens and len(train) > 1:
        val.insert(0, train.pop())
        need -= val[0].tokens
    if need:
        last = train.pop()
        kept = last.tokens - min(need, last.tokens - 1)
        if not kept or kept == last.tokens:
            raise UserError(f'{last.file}: {last.tokens} token cannot be both training and validation: '
                            'provide more tokens')
        train.append(last._replace(tokens=kept))
        val.insert(0, last._replace(offset=last.offset + kept * last.dtype.itemsize, tokens=last.tokens - kept))
    return {'train': train, 'val': val}


def make_request(path, known, val_ratio):
    """The entries of meta.json that are known before the files are read. known: those about the tokenizer."""
    files = [file for file in find_bins(path) if file.exists()]
    source = {'dataset': f'bins:{path}', **sizes(files)}
    return {'version': VERSION, 'source': source, 'inputs': stamp(files), **known, 'val_ratio': val_ratio}


def link(path, out, content, val_ratio, say=print):
    """
    Make `out`, a prepared directory with the .bin files at `path`.

    content: the tokenizer that made the files. Raises UserError if it is None.
    val_ratio: share of the tokens that become validation if no file name contains val.
    """
    files = find_bins(path)
    if content is None:
        pickled = any((file.parent / 'meta.pkl').exists() for file in files)
        advice = ('. Its meta.pkl is not read, because opening a pickle can run any program. Prepare the text itself '
                  'instead: --dataset=text:FILE') if pickled else ''
        raise UserError(f'{path}: give the tokenizer that made these tokens: --tokenizer=gpt2, or --tokenizer=FILE '
                        f'for a tokenizer.json{advice}')
    encoding = load_tokenizer(content)
    request = make_request(path, {'tokenizer': label(content), 'vocab_size': encoding.n_vocab}, val_ratio)
    if is_prepared(out, request):
        say(f'{out} is already prepared: nothing to do')
        return
    if twice := [name for name, count in Counter(file.name for file in files).items() if count > 1]:
        raise UserError(f'{path}: two files are named {twice[0]}: give only one directory')
    inspected = [inspect(file, encoding.n_vocab) for file in files]
    dtypes = sorted({bin.dtype.name for bin in inspected})
    if len(dtypes) > 1:
        raise UserError(f'{path}: ids of {" and ".join(dtypes)}: give files of only one kind')
    splits = deal(inspected, val_ratio, say)
    read = {bin.file for split in splits.values() for bin in split}
    inspected = [bin for bin in inspected if bin.file in read]
    say(f'{path}: reading {sum(bin.tokens for bin in inspected):,} tokens of {len(inspected):,} files')

    def check(bin):
        try:
            return scan(bin.file, bin.offset, bin.tokens, bin.dtype, encoding.n_vocab)
        except UserError as error:
            raise UserError(f'{error}: another tokenizer made this file, or it has another format')
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        found = dict(zip((bin.file for bin in inspected), pool.map(check, inspected)))
    finally:
        pool.shutdown(cancel_futures=True)

    def entry(bin):
        checked = found[bin.file]
        return {'name': bin.file.name, 'offset': bin.offset, 'tokens': bin.tokens, 'size': checked['bytes'],
                'max_id': checked['max_id'], 'sha256': checked['sha256']}
    entries = {split: [entry(bin) for bin in splits[split]] for split in splits}
    meta = {**request, 'eot_id': encoding.eot_token, 'files': entries, 'created': now()}
    if dtypes != ['uint16']:
        meta['dtype'] = dtypes[0]
    with workspace(out, request) as work:
        if work:
            clear(work)
            for file in found:
                (work / file.name).symlink_to(file.absolute())
            write_json(work / 'tokenizer.json', content)
            remember(work, {file.name: checked['sha256'] for file, checked in found.items()}, encoding.n_vocab)
            write_json(work / 'meta.json', meta)
            publish(work, out)
    train, val = (sum(bin.tokens for bin in splits[split]) for split in ('train', 'val'))
    say(f'{out}: {train:,} train + {val:,} val tokens, linked to {len(found):,} files')
