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
            fsync(path.parent)  # the rename must reach the disk, too
    except BaseException:
        with contextlib.suppress(OSError):  # the directory may not be writable
            temporary.unlink()
        raise


@contextlib.contextmanager
def named_at_last(path, parents=False):
    """
    Yields a temporary path beside `path` for a file or a directory. Write and check it inside the block.

    It becomes `path` on success and is removed on failure. A UserError raised inside mentions `path` instead of the
    temporary path. An OSError becomes a UserError. parents: create missing parent directories.
    """
    path = Path(path)
    folder = path.with_name(f'.{path.name}.tmp')
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=parents)
        yield folder / path.name
        (folder / path.name).replace(path)
    except UserError as error:
        raise UserError(*(str(line).replace(f'{folder}/', f'{path.parent}/') for line in error.args))
    except OSError as error:
        raise UserError(f'{path}: could not be written ({error.strerror or error})')
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path, content):
    """Write JSON atomically."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def fsync(path):
    """Flush to disk: the content of a file, or the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sizes(files):
    """How many files there are, and their bytes, as meta.json records them."""
    return {'files': len(files), 'bytes': sum(file.stat().st_size for file in files)}


def stamp(files):
    """A digest of the names, sizes and modification times of files. It changes if any file is edited or replaced."""
    listing = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return hashlib.sha256(os.fsencode(repr(listing))).hexdigest()[:16]
