"""Write, lock, hash and remove files, on the file systems of clusters too.

A file is written beside its place, flushed to disk and renamed: one that exists is whole. What a file system does not
offer (flushing folders, locks, permissions) is done without. On NFS a file that some process has open leaves a .nfsXXXX
in its folder when it is removed, and the folder stays until it is closed: so nothing that is written by name depends
on old folders being gone.
"""

import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from memformer_dist.errors import UserError

PARTIAL = ".partial"  # what a file is called until it is whole
REMOVED = "removed-"  # how the name of a folder begins that could not be removed yet
LOCK_ATTEMPTS = 10
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # OSError.errno where a file does not fit
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)  # by fsync, on some file systems
TRIED_BYTES = 2**12  # written by `expect_writable`: a full disk still makes empty files
READ_BYTES = 2**20  # at once, where a file is hashed
log = logging.getLogger(__name__)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield the path to write to. It is renamed to `path` when the block ends, and removed if the block fails.

    A link is followed. What is no plain file, such as /dev/stdout, is written to as it is.

    Raises OSError if the disk is full or the folder cannot be written to; what was at `path` then stays as it was.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        flush(partial)
        try:
            partial.rename(path)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
            shutil.copyfile(partial, path)  # a file that is mounted into a container has no other place to be written
            partial.unlink()
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def expect_writable(path: Path, option: str) -> None:
    """Try to write where a file is to be written later, so that a mistake is found before the work and not after it.

    The folder is made if it is missing. What is at `path` stays as it is. Raises UserError beginning with `option`.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            return  # /dev/stdout, say
        folder = Path(os.path.realpath(path)).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(TRIED_BYTES))
            file.flush()
    except FileExistsError as error:  # by mkdir
        raise UserError(f"{option}: cannot write {path}: {error.filename} is not a folder") from None
    except OSError as error:
        raise UserError(f"{option}: cannot write {path}: {error.strerror}") from None


def is_mount_point(folder: Path) -> bool:
    """Whether a folder is where a file system, or another folder (bind mount), is mounted: it cannot be renamed."""
    if os.path.ismount(folder):
        return True
    with suppress(OSError):  # a bind mount of the same file system is found here alone
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
        places = (line.split(" ")[4] for line in mounts)
        unescaped = (re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), place) for place in places)
        return os.path.realpath(folder) in unescaped
    return False


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `written` does."""
    with written(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a file in UTF-8 as `written` does."""
    write_bytes(path, content.encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a small JSON file. None where there is none, or, with a warning, where the file is damaged."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s: is damaged and not used: %s", path, error)
        return None
    return found


def read_json_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a file of JSON objects, and these. Lines that are torn are left out, with a warning.

    A process that is killed leaves half a line, a machine without power a block of zeros. No lines where no file is.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    found, torn = [], [] if lines[-1] == b"" else [len(lines)]  # numbers from 1
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            found.append((line + b"\n", entry))
        else:
            torn.append(number)
    if torn:
        log.warning("%s: left out what is torn: lines %s", path, ", ".join(map(str, sorted(torn))))
    return found


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give the file that is written in this block the permissions of every new file, by the umask.

    Some libraries, such as safetensors, write files that nobody but their owner can read.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    with suppress(OSError):  # a file system without permissions
        path.chmod(mode)


@contextmanager
def named_in_utf8(path: Path) -> Iterator[Path]:
    """A file under a name that is UTF-8: safetensors takes no other. One whose last part is not must exist."""
    if _is_utf8(path):
        yield path
        return
    through_folder = _is_utf8(Path(path.name))
    handle = os.open(path.parent if through_folder else path, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{handle}", path.name if through_folder else "")
    finally:
        os.close(handle)


def _is_utf8(path: Path) -> bool:
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk. A file system that cannot flush them is no error."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not is_folder and error.errno not in NOT_OFFERED:
            raise


def lock(file: IO) -> None:
    """Lock an open file until it is closed, waiting for whoever has it. Raises OSError on a file system without locks."""
    fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: IO) -> bool:
    """Lock an open file until it is closed, at the latest by the end of the process. False if another process holds it.

    On NFS the file must be open for writing. Returns True, with a warning, on a file system without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning(
            "%s: this file system has no locks (%s); make sure yourself that no other process works there",
            file.name,
            error.strerror,
        )
    return True


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold the lock `path`, a file that is removed at the end. Yields False if another process holds it.

    The file must not lie in a folder that is removed meanwhile.
    """
    with _locked_file(path) as file:
        if file is None:
            yield False
            return
        try:
            yield True
        finally:
            with suppress(OSError):
                path.unlink()  # before the lock is given up: whoever waits for it sees that the file is another one


@contextmanager
def _locked_file(path: Path) -> Iterator[IO | None]:
    for _ in range(LOCK_ATTEMPTS):
        with path.open("a") as file:
            if not try_lock(file):
                break
            try:
                is_current = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                is_current = False
            if is_current:  # else its holder has removed it between `open` and `try_lock`
                yield file
                return
    yield None


def remove_folder(path: Path) -> bool:
    """Remove a folder and all that it holds. False, with a warning, where that is not possible at the moment."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        if not os.path.lexists(path):
            return True
        log.warning(
            "cannot remove %s at the moment: %s: %s; it is tried again later", path, error.filename, error.strerror
        )
        return False
    return True


def make_way(path: Path) -> None:
    """Remove a folder if it exists. One that cannot be removed is set aside. Raises OSError where neither is possible."""
    if os.path.lexists(path) and not remove_folder(path):
        set_aside(path)


def set_aside(path: Path) -> None:
    """Rename a folder to removed-NAME-0, or the next free number, so that its name is free at once."""
    asides = (path.with_name(f"{REMOVED}{path.name}-{number}") for number in itertools.count())
    path.rename(next(aside for aside in asides if not os.path.lexists(aside)))


def sha256_of(path: Path, progress: Callable[[int], object] = lambda read: None) -> str:
    """The sha256 of a file, in hexadecimal. `progress` is called with the size of each piece that was read, in bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(READ_BYTES))
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
            progress(read)
    return digest.hexdigest()
