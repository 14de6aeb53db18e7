"""
Builds a prepared directory atomically. One process works at a time. After a kill, the same command resumes the work.

    with workspace(out, request) as work:   # work is None if another process finished `out` while we waited
        bins = Bins(work, 'train', lengths, dtype, entries=[])
        bins.append(ids)
        write_json(work / 'meta.json', {**request, 'files': {'train': bins.close(), ...}, ...})
        publish(work, out)
"""
import fcntl
import hashlib
import os
import re
import shutil
import sqlite3
from contextlib import contextmanager, suppress
from datetime import datetime, timezone

from configurator import UserError, read_json
from files import fsync, write_json

BIN_TOKENS = 10**9  # maximum tokens per file: 2 or 4 GB


def is_prepared(out, request, sharded=False):
    """
    Whether `out` already holds the requested data. Raises UserError if it holds anything else, because nothing is
    overwritten. sharded: `out` may hold shards.
    """
    allowed = re.compile(r'\.?shard-\d{5}-of-\d{5}(\.tmp)?' if sharded else '')
    if not out.exists() or out.is_dir() and all(allowed.fullmatch(path.name) for path in out.iterdir()):
        return False
    if not (out / 'meta.json').is_file():
        raise UserError(f'{out} exists but is not a prepared dataset (no meta.json): choose another --out')
    compare(read_json(out / 'meta.json'), request, f'{out} was prepared', 'remove it, or choose another --out')
    return True


def compare(old, request, where, remedy):
    """Raises UserError if the prepared data (`old`) differ from the `request`."""
    # Older directories lack these keys. If no stamp of the source files was recorded, we assume they did not change.
    old = {'tokenizer': 'bpe', 'max_documents': 0, 'bad_text': 'refuse', 'inputs': request.get('inputs')} | old
    for key, value in request.items():
        before = old.get(key)
        if before == value:
            continue
        if key == 'inputs':
            raise UserError(f'{where} before its source files were changed: {remedy}')
        if isinstance(before, dict) and isinstance(value, dict):  # show only the differences
            before, value = [{k: v for k, v in one.items() if (k, v) not in other.items()}
                             for one, other in ((before, value), (value, before))]
        raise UserError(f'{where} with {key} {before!r}, not {value!r}: {remedy}')


@contextmanager
def workspace(out, request):
    """
    Yields a work directory beside `out`, locked for one process. It may hold finished parts of a killed preparation
    with the same request. Yields None if another process has finished `out` in the meantime.

    If the work fails or is interrupted, recorded parts stay on disk and the same command resumes from them. Without
    recorded parts, the work directory is removed.
    """
    out = out.resolve()
    work, made = out.with_name(f'.{out.name}.tmp'), not out.parent.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(work)
    try:
        if is_prepared(out, request):
            work.rmdir()
            yield None
            return
        old = next((read_json(work / name) for name in ('meta.json', 'request.json') if (work / name).exists()), {})
        if begun(work):
            if old.get('bad_text') == 'refuse':  # so far no text was bad, so this option may change
                old['bad_text'] = request['bad_text']
            compare(old, request, f'{work} holds an unfinished preparation',
                    'finish it with its own options, or remove this directory')
        elif old != request:
            clear(work)
        write_json(work / 'request.json', request)
        yield work
    finally:
        if work.exists() and not begun(work):
            shutil.rmtree(work)
        os.close(lock)
        if made:
            with suppress(OSError):  # after success it is not empty and stays
                out.parent.rmdir()


def begun(work):
    """Whether `work` holds finished parts that are worth keeping."""
    return (work / 'state.json').exists() or (work / 'meta.json').exists()


def locked(work):
    """
    Create the directory `work` if needed and lock it for this process. Returns a handle. The lock ends when the handle
    is closed or the process dies.
    """
    while True:
        work.mkdir(exist_ok=True)
        handle = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'{work}: waiting for another process that uses this directory', flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        # While we waited, the other process may have renamed or removed the directory.
        if work.exists() and os.path.samestat(os.fstat(handle), work.stat()):
            return handle
        os.close(handle)


def clear(work):
    for path in work.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def publish(work, out):
    """
    Remove temporary files and rename the finished directory `work` to `out`. Once meta.json exists, a killed
    preparation only needs this step.
    """
    made_for_work = ('state.json', 'split.json', 'request.json')
    for file in (*work.glob('seen.sqlite*'), *work.glob('*.tmp'), *(work / name for name in made_for_work)):
        file.unlink(missing_ok=True)
    fsync(work)
    work.rename(out.resolve())
    fsync(out.resolve().parent)


def now():
    return datetime.now(timezone.utc).isoformat(timespec='seconds')


# ----------------------------------------------------------------------------------------------------------------------
# Contents of the work directory

class Seen:
    """
    The digests of all documents so far. They are in an SQLite file because each would take 100 bytes of memory.

    After a kill, digests added since the last commit() are lost. The constructor also deletes digests of batches that
    the recorded state does not cover: those numbered `batches` or higher.
    """

    def __init__(self, path, batches):
        self.db = sqlite3.connect(path, isolation_level=None)
        for line in ('PRAGMA journal_mode = WAL', 'PRAGMA synchronous = FULL', 'PRAGMA cache_size = -65536',  # 64 MB
                     'CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY, batch INT) WITHOUT ROWID'):
            self.db.execute(line)
        self.db.execute('DELETE FROM seen WHERE batch >= ?', (batches,))
        self.db.execute('BEGIN')

    def is_new(self, digest, batch):
        return self.db.execute('INSERT OR IGNORE INTO seen VALUES (?, ?)', (digest, batch)).rowcount == 1

    def commit(self):
        self.db.execute('COMMIT')
        self.db.execute('BEGIN')

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.db.close()


class Bins:
    """
    Writes the token files of a split and keeps their entries for meta.json.

    Until close() the files are named train-00000.bin ... Then a single file becomes train.bin, and several files become
    train-00000-of-00002.bin ...
    """

    def __init__(self, folder, split, lengths, dtype, entries):
        """
        lengths: (n_vocab,) bytes of each token. dtype: type of an id. entries: the recorded entries of existing files.
        Data in the files beyond these entries come from a killed preparation and are removed.
        """
        self.dtype = dtype
        self.folder, self.split, self.lengths, self.entries = folder, split, lengths, [dict(entry) for entry in entries]
        for file in folder.glob(f'{split}*.bin'):  # close() was killed during its renames
            number = re.fullmatch(rf'{split}(?:-(\d+)(?:-of-\d+)?)?', file.stem)[1] or 0
            file.rename(self.path(int(number)))
        for file in folder.glob(f'{split}-*.bin'):
            if int(file.stem.rpartition('-')[2]) >= max(1, len(self.entries)):
                file.unlink()
        self.tokens, self.bytes = (sum(entry[key] for entry in self.entries) for key in ('tokens', 'bytes'))
        if not self.entries:
            self.entries.append({'tokens': 0, 'bytes': 0, 'max_id': 0, 'sha256': hashlib.sha256().hexdigest()})
        self.open()

    def path(self, number):
        return self.folder / f'{self.split}-{number:05d}.bin'

    def open(self):
        path, entry = self.path(len(self.entries) - 1), self.entries[-1]
        self.file = open(path, 'ab')
        self.file.truncate(self.dtype.itemsize * entry['tokens'])
        with open(path, 'rb') as file:
            self.sha256 = hashlib.sha256()
            while chunk := file.read(2**20):
                self.sha256.update(chunk)
        if self.sha256.hexdigest() != entry['sha256']:
            raise UserError(f'{path}: damaged since it was written: remove {self.folder} and start again')

    def append(self, ids):
        """ids: (n,) of type self.dtype"""
        assert ids.dtype == self.dtype, f'{ids.dtype} ids for bins of {self.dtype}'
        while len(ids):
            if self.entries[-1]['tokens'] == BIN_TOKENS:
                self.sync()
                self.file.close()
                self.entries.append({'tokens': 0, 'bytes': 0, 'max_id': 0, 'sha256': hashlib.sha256().hexdigest()})
                self.open()
            entry = self.entries[-1]
            part = ids[:BIN_TOKENS - entry['tokens']]
            size = int(self.lengths[part].sum())
            self.file.write(part)
            self.sha256.update(part)
            entry.update(tokens=entry['tokens'] + len(part), bytes=entry['bytes'] + size,
                         max_id=max(entry['max_id'], int(part.max())))
            self.tokens, self.bytes, ids = self.tokens + len(part), self.bytes + size, ids[len(part):]

    def sync(self):
        """Flush all appended ids to disk. Returns the entries that describe the files."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.entries[-1]['sha256'] = self.sha256.hexdigest()
        return self.entries

    def close(self):
        self.sync()
        self.file.close()
        n = len(self.entries)
        names = [f'{self.split}-{number:05d}-of-{n:05d}.bin' for number in range(n)] if n > 1 else [f'{self.split}.bin']
        for number, name in enumerate(names):
            self.path(number).rename(self.folder / name)
        return [{'name': name, **entry} for name, entry in zip(names, self.entries)]
