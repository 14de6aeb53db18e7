"""Atomic file writes, and a digest that detects changed files.

    with replacing(path) as file: file.write(content)      # path appears once the whole content is on disk
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
    """
    Yields a binary file open for writing. It becomes `path` only on success: temporary name, fsync, rename.

    With sync=False the write is still atomic for every reader, but it may not survive a power loss.
    """
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
            directory = os.open(path.parent, os.O_RDONLY)  # the rename must reach the disk, too
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except BaseException:
        with contextlib.suppress(OSError):  # the directory may not be writable
            temporary.unlink()
        raise


@contextlib.contextmanager
def replacing_directory(path):
    """Yields a new temporary directory. It is renamed to `path` on success and removed on failure."""
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
    Yields a temporary path beside `path` for a file or a directory. Write and check it inside the block.

    It becomes `path` on success and is removed on failure. A UserError raised inside mentions `path` instead of the
    temporary path. An OSError becomes a UserError.
    """
    path = Path(path)
    folder = path.with_name(f'.{path.name}.tmp')
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=not path.suffix)  # for an output directory, parents may be created, too
        yield folder / path.name
        (folder / path.name).replace(path)
    except UserError as error:
        raise UserError(*(str(line).replace(f'{folder}/', f'{path.parent}/') for line in error.args))
    except OSError as error:
        raise UserError(f'{path}: could not be written ({error.strerror or error})')
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path, content):
    """Write JSON atomically: temporary name, fsync, rename."""
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
    """Flush to disk: the content of a file, or the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def stamp(files):
    """A digest of the names, sizes and modification times of files. It changes if any file is edited or replaced."""
    listing = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return hashlib.sha256(os.fsencode(repr(listing))).hexdigest()[:16]
