"""Files written whole or not at all, and what tells whether files have changed.

    with replacing(path) as file: file.write(content)      # path appears when all of it is on the disk
    write_json(path, {'step': 1})
"""
import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from configurator import UserError


@contextlib.contextmanager
def replacing(path, sync=True):
    """A file open for writing that becomes `path` only if all went well: temporary name, fsync, rename. Without `sync` it is
    still whole or not at all for every reader, but the machine must not lose its power."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            directory = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk, too
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except BaseException:
        with contextlib.suppress(OSError):  # where nothing can be written nothing can be deleted
            temporary.unlink()
        raise


@contextlib.contextmanager
def replacing_directory(path):
    """A new directory to fill, which is renamed to `path` if all went well and removed if not."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def named_at_last(path):
    """
    A place beside `path` for a file or a directory that is written, read and compared in here. It becomes `path` if all of that
    went well, else it is removed. A UserError in here speaks of `path`.
    """
    path = Path(path)
    folder = path.with_name(f'.{path.name}.tmp')
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=not path.suffix)  # a directory may be new with those above it
        yield folder / path.name
        (folder / path.name).replace(path)
    except UserError as error:
        raise UserError(*(str(line).replace(f'{folder}/', f'{path.parent}/') for line in error.args))
    except OSError as error:
        raise UserError(f'{path}: could not be written ({error.strerror or error})')
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path, content):
    """Whole or not at all."""
    beside = path.with_name(f'.{path.name}.tmp')
    try:
        beside.write_text(json.dumps(content, indent=1), encoding='utf-8')
        fsync(beside)
        beside.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    fsync(path.parent)


def fsync(path):
    """Contents on the disk: of a file, or of a directory the names in it."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def stamp(files):
    """A digest of the names, sizes and modification times of files: it changes when any of them is edited or replaced."""
    listing = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return hashlib.sha256(os.fsencode(repr(listing))).hexdigest()[:16]
