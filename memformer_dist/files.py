"""Write, lock and hash files. A file is written beside its place, flushed to disk and renamed: one that exists is whole."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PARTIAL = ".partial"  # what a file is called until it is whole
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # OSError.errno where a file does not fit
READ_BYTES = 2**20  # at once, where a file is hashed


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield the path to write to. It is renamed to `path` when the block ends, and removed if the block fails.

    Raises OSError if the disk is full or the folder cannot be written to; what was at `path` then stays as it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        flush(partial)
        partial.rename(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `written` does."""
    with written(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a file in UTF-8 as `written` does."""
    write_bytes(path, content.encode())


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk. A file system that cannot flush folders is no error."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def lock(file: IO) -> None:
    """Lock an open file until it is closed, waiting for whoever has it. Raises OSError on a file system without locks."""
    fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: IO) -> bool:
    """Lock an open file until it is closed, at the latest by the end of the process. False if another process holds it.

    Returns True on a file system without locks, where it protects nobody.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def sha256_of(path: Path, progress: Callable[[int], object] = lambda read: None) -> str:
    """The sha256 of a file, in hexadecimal. `progress` is called with the size of each piece that was read, in bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(READ_BYTES))
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
            progress(read)
    return digest.hexdigest()
