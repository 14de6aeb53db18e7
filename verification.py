"""
Verifies token files by reading them completely once, and records the result. Imported by data.py, shards.py,
prepare.py:

    found = verify(folder, files, n_vocab, again)    # files: {name: BinFile}; reads only files without a record
    remember(folder, hashes, n_vocab)                # called by the program that has just written the files

The record `.verified.json` beside the files holds for each file its size, modification time, inode and sha256, and the
vocabulary size that bounds its ids. A file is read again if its size, time or inode changes, or if it is a copy.
"""
import fcntl
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError, read_json
from files import write_json

RECORD = '.verified.json'
LONG = 2 * 10**9  # bytes; reading more takes some seconds, so a message is printed
BLOCK = 2**23  # bytes per read


class BinFile(NamedTuple):
    sha256: str  # of the whole file
    dtype: np.dtype  # of an id
    offset: int = 0  # byte of the first id


def verify(folder, files, n_vocab, again, reread=False):
    """
    Read all files {name: BinFile} that have no valid record (all files with reread=True), and record them.

    Returns {name: result of scan()} for the files that were read. Raises UserError for a wrong sha256 or an id outside
    the vocabulary. The message ends with the advice `again`.

    One process per machine reads while the others wait. So processes that start together read the files only once.
    """
    hashes = {name: file.sha256 for name, file in files.items()}
    unknown = list(files) if reread else unverified(folder, hashes, n_vocab)
    if not unknown:
        return {}
    with locked(folder):
        if not reread:
            unknown = unverified(folder, hashes, n_vocab)  # another process may have read them
        # Taken before the read. If a file changes during the read, its record will not match.
        identities = {name: identity(folder / name, hashes[name], n_vocab) for name in unknown}
        size = sum(entry['size'] for entry in identities.values())
        if size >= LONG:
            print(f'{folder}: verifying {size / 1e9:.1f} GB of tokens' + ('' if reread else ', once'), flush=True)

        def check(name):
            file = files[name]
            count = (identities[name]['size'] - file.offset) // file.dtype.itemsize
            try:
                found = scan(folder / name, file.offset, count, file.dtype, n_vocab)
            except UserError as error:
                raise UserError(f'{error}: {again}')
            if found['sha256'] != file.sha256:
                raise UserError(f'{folder / name}: damaged: its sha256 differs from meta.json: {again}')
            return found

        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # reading, hashing and numpy release the GIL
        try:
            found = dict(zip(unknown, pool.map(check, unknown)))
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C or an error should not wait for the rest
        save(folder, identities)
    return found


def remember(folder, hashes, n_vocab):
    """Record files {name: sha256} as verified without reading them. The caller has just written them."""
    save(folder, {name: identity(folder / name, sha256, n_vocab) for name, sha256 in hashes.items()})


def unverified(folder, hashes, n_vocab):
    """The names in {name: sha256} without a record that matches the current file."""
    records = [read_record(path) for path in record_paths(folder)]
    return [name for name, sha256 in hashes.items()
            if not any(record.get(name) == identity(folder / name, sha256, n_vocab) for record in records)]


def identity(file, sha256, n_vocab):
    """The record entry of a file. Raises UserError if the file can't be accessed."""
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f'{file}: {error.strerror}')
    return {'size': status.st_size, 'mtime_ns': status.st_mtime_ns, 'inode': status.st_ino, 'sha256': sha256,
            'vocab_size': n_vocab}


def record_paths(folder):
    """Paths of the record: beside the files, or in the user's cache if the folder is not writable."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return [folder / RECORD, Path(cache, 'nanotrix', f'verified-{digest}.json')]


def read_record(path):
    """{name: entry}, empty if the record is missing or broken."""
    try:
        files = read_json(path).get('files')
    except UserError:
        return {}
    return files if isinstance(files, dict) else {}


def save(folder, entries):
    """Add the entries to the record. Prints a message if no record can be written."""
    for path in record_paths(folder):
        with suppress(OSError):
            if path.parent != folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {'version': 1, 'files': read_record(path) | entries})
            return
    print(f'{folder}: every start will read all tokens again, because neither this directory nor {path.parent} '
          'can be written to record that they were verified', flush=True)


@contextmanager
def locked(folder):
    """Lock a folder for one process of this machine at a time."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks; then every process reads
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def blocks(source, size):
    """Yields the next `size` bytes of an open file, at most BLOCK at a time. Raises OSError if there are fewer."""
    while size:
        block = source.read(min(size, BLOCK))
        if len(block) < min(size, BLOCK):
            raise OSError('the file became shorter while it was read')
        size -= len(block)
        yield block


def scan(file, offset, count, dtype, limit):
    """
    Read a file that has `count` ids starting at byte `offset`. Returns {tokens, min_id, max_id, bytes (of the file),
    sha256 (of the file), seen: (max_id + 1,) bool, which ids occur}.

    Memory holds one block and one flag per id, for any file size. Raises UserError with the first id outside
    range(limit).
    """
    digest, seen, low, high, at = hashlib.sha256(), np.zeros(2**16, bool), limit, 0, 0
    try:
        with open(file, 'rb') as source:
            for block in blocks(source, offset):
                digest.update(block)
            for block in blocks(source, count * dtype.itemsize):
                digest.update(block)
                ids = np.frombuffer(block, dtype)
                least, most = int(ids.min()), int(ids.max())
                if least < 0 or most >= limit:
                    k = int(np.argmax((ids < 0) | (ids >= limit)))
                    raise UserError(f'{file}: id {ids[k]} at position {at + k:,} is outside '
                                    f'the vocabulary of {limit:,}')
                if most >= len(seen):
                    seen = np.pad(seen, (0, most + 1 - len(seen)))
                seen[ids] = True
                low, high, at = min(low, least), max(high, most), at + len(ids)
            while block := source.read(BLOCK):
                digest.update(block)
            size = source.tell()
    except OSError as error:
        raise UserError(f'{file}: {error.strerror or error}')
    return {'tokens': count, 'min_id': low, 'max_id': high, 'bytes': size, 'sha256': digest.hexdigest(),
            'seen': seen[:high + 1]}
