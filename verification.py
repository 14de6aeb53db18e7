"""
Token files are read as a whole once, and the result is remembered. Imported by data.py, shards.py and prepare.py:

    found = verify(folder, files, n_vocab, again)    # files: {name: BinFile}; reads those that no record knows
    remember(folder, hashes, n_vocab)                # by the program that has just written the files

The record `.verified.json` beside the files holds the size, modification time and inode of each file, its sha256, and the size
of the vocabulary that all its ids are in. A file with another size, time or inode is read again, and so is a copy.
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
LONG = 2 * 10**9  # bytes that take some seconds to read: said
BLOCK = 2**23  # bytes that are read at a time


class BinFile(NamedTuple):
    sha256: str  # of the whole file
    dtype: np.dtype  # of an id
    offset: int = 0  # bytes before the first id


def verify(folder, files, n_vocab, again, reread=False):
    """
    Read the files {name: BinFile} that no record knows, or all of them (reread), and remember them.
    -> {name: what scan() found} of those that were read. UserError, ending with the advice `again`, for a wrong sha256 or
    an id outside the vocabulary.

    One process of a machine does it while the others wait, so that many that start together read the files once.
    """
    hashes = {name: file.sha256 for name, file in files.items()}
    unknown = list(files) if reread else unverified(folder, hashes, n_vocab)
    if not unknown:
        return {}
    with locked(folder):
        if not reread:
            unknown = unverified(folder, hashes, n_vocab)  # another process may have read them meanwhile
        identities = {name: identity(folder / name, hashes[name], n_vocab) for name in unknown}  # before they are read
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
                raise UserError(f'{folder / name}: damaged, its sha256 is not the one in meta.json: {again}')
            return found

        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # reading, hashing and numpy leave Python's lock alone
        try:
            found = dict(zip(unknown, pool.map(check, unknown)))
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C and the first error don't wait for the rest
        save(folder, identities)
    return found


def remember(folder, hashes, n_vocab):
    """Put files {name: sha256} on record that the caller knows to be right: it has just written them."""
    save(folder, {name: identity(folder / name, sha256, n_vocab) for name, sha256 in hashes.items()})


def unverified(folder, hashes, n_vocab):
    """The names of {name: sha256} that no record knows as they are now."""
    records = [read_record(path) for path in record_paths(folder)]
    return [name for name, sha256 in hashes.items()
            if not any(record.get(name) == identity(folder / name, sha256, n_vocab) for record in records)]


def identity(file, sha256, n_vocab):
    """What a record holds of a file."""
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f'{file}: {error.strerror}')
    return {'size': status.st_size, 'mtime_ns': status.st_mtime_ns, 'inode': status.st_ino, 'sha256': sha256,
            'vocab_size': n_vocab}


def record_paths(folder):
    """Beside the files, or in the user's cache where that directory can't be written."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return [folder / RECORD, Path(cache, 'nanotrix', f'verified-{digest}.json')]


def read_record(path):
    """{name: entry}; nothing of a record that is missing or broken."""
    try:
        files = read_json(path).get('files')
    except UserError:
        return {}
    return files if isinstance(files, dict) else {}


def save(folder, entries):
    """Add the entries to the record, and say so where it can't be written."""
    for path in record_paths(folder):
        with suppress(OSError):
            if path.parent != folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {'version': 1, 'files': read_record(path) | entries})
            return
    print(f'{folder}: neither this directory nor {path.parent} can be written to remember that the tokens were '
          'verified: every start will read them again', flush=True)


@contextmanager
def locked(folder):
    """One process of this machine at a time."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network file system without locks: each process reads for itself
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def blocks(source, size):
    """The next `size` bytes of an open file, at most BLOCK at a time. Raises OSError if there are fewer."""
    while size:
        block = source.read(min(size, BLOCK))
        if len(block) < min(size, BLOCK):
            raise OSError('it became shorter while it was read')
        size -= len(block)
        yield block


def scan(file, offset, count, dtype, limit):
    """
    Read a file with `count` ids from byte `offset` on -> {tokens, min_id, max_id, bytes (of the file), sha256 (of the
    file), seen: (max_id + 1,) bool, which ids occur}. Memory for a block and the vocabulary, whatever the file's size.
    UserError names the first id outside range(limit).
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
                    raise UserError(f'{file}: id {ids[k]} at position {at + k:,} is outside the vocabulary of {limit:,}')
                if most >= len(seen):
                    seen = np.pad(seen, (0, most + 1 - len(seen)))
                seen[ids] = True
                low, high, at = min(low, least), max(high, most), at + len(ids)
            while block := source.read(BLOCK):
                digest.update(block)
            size = source.tell()
    except OSError as error:
        raise UserError(f'{file}: {error.strerror or error}')
    return {'tokens': count, 'min_id': low, 'max_id': high, 'bytes': size, 'sha256': digest.hexdigest(), 'seen': seen[:high + 1]}
