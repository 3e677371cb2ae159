"""Files behind URLs, through fsspec: fetched whole and verified, listed, or read as they come.

    Remote("https://host/corpora/books/train").fetch("shard-000000.tar", Path("..."), sha256="5a1c...", size=1_048_576)
    matches("s3://bucket/texts/*.jsonl")
    with open_url("https://host/books/a.txt") as file: ...

fsspec knows http(s) and file, and with their packages installed s3, gs, hf and many more. The time limits below apply
to http(s), where fsspec's default would end every download after five minutes; other file systems have limits of their
own.

A connection that drops, stalls or ends early, and a server that answers 5xx, are tried again: up to TRIES times, after
a pause that doubles each time and is randomised, so that a thousand processes do not return at once. What is missing
or forbidden is not tried again. A file that is fetched whole is fetched from its first byte each time, and one that
arrives complete but with the wrong content twice is damaged at its source. A file that is read as it comes continues
at the byte where the connection broke.

Errors are CorpusErrors that name the URL, the number of tries and the last reason.
"""

import io
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.callbacks import Callback

from memformer_dist.errors import CorpusError, UserError
from memformer_dist.files import NO_SPACE, sha256_of

TRIES = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0  # 0.5 to 32 s: a server may be away for a minute
CONNECT_S, STALL_S = 30.0, 60.0  # to connect, and between two pieces of a body
ENDING_S = 0.05  # between the end of a process's thread pools and that of its main thread
BUFFER_BYTES = 2**20
VERSION_MARKS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "last_modified", "updated", "mtime")

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Remote:
    """The folder at a URL."""

    def __init__(self, url: str):
        """Raises UserError where fsspec does not know the protocol, or lacks the package for it."""
        self.url = url.rstrip("/")
        self._files, self._path = _connect(self.url)

    def read(self, name: str, parse: Callable[[bytes], Result]) -> Result:
        """parse(content of a small file). Content that `parse` refuses with a ValueError is fetched once more."""

        def attempt() -> Result:
            raw = self._files.cat_file(f"{self._path}/{name}")
            try:
                return parse(raw)
            except ValueError as error:
                raise _WrongContent(str(error)) from None

        return _retried(f"{self.url}/{name}", attempt)

    def fetch(self, name: str, target: Path, *, sha256: str, size: int | None = None) -> None:
        """Overwrite `target` with the file, which has this hash and this size in bytes.

        Raises CorpusError with both hashes where the content was wrong twice, and naming the folder if its disk is
        full.
        """

        def attempt() -> None:
            callback = Callback() if size is None else _AtMost(size)
            try:
                self._files.get_file(f"{self._path}/{name}", str(target), callback=callback)
            except OSError as error:
                if error.errno in NO_SPACE:
                    raise CorpusError(
                        f"data.cache: {target.parent}: the disk is full ({error.strerror}), {name} is not fetched"
                    ) from None
                raise
            found = target.stat().st_size
            if size is not None and found < size:
                raise OSError(f"{found} bytes arrived, expected {size}")
            if size is not None and found > size:
                raise _WrongContent(f"{found} bytes, expected {size}")
            if (digest := sha256_of(target)) != sha256:
                raise _WrongContent(f"sha256 is {digest}, expected {sha256}")

        _retried(f"{self.url}/{name}", attempt)


class _WrongContent(Exception):
    """The file arrived without any error, and is not the one that was asked for."""


class _AtMost(Callback):
    """Ends a transfer that brings more bytes than the file has: a server may send without end."""

    def __init__(self, size: int):
        super().__init__()
        self._size = size

    def call(self, hook_name: str | None = None, **kwargs: object) -> None:
        if self.value > self._size:
            raise _WrongContent(f"more than the {self._size} bytes that are expected")


# ------------------------------------------------------------------------------------------- listing and reading inputs


def matches(given: str) -> list[tuple[str, list[str] | None]]:
    """What a URL or a glob of URLs names: each file with None, each folder with the paths of all files in it.

    The paths are sorted and relative to the folder. Over HTTP a URL that ends with /, or is redirected to one that
    does, is a folder, and the links of its page are its listing.
    """

    def attempt() -> list[tuple[str, list[str] | None]]:
        system, path = _connect(given)
        is_glob = "*" in path or "[" in path
        names = [system.unstrip_protocol(name) for name in sorted(system.glob(path))] if is_glob else [given]
        return [(name, _files_inside(name)) for name in names]

    return _retried(given, attempt)


def look(url: str) -> tuple[int | None, str]:
    """Bytes of a file, None where the server does not report them, and a mark of its version, "" if it has none."""

    def attempt() -> dict[str, Any]:
        system, path = _connect(url)
        system.invalidate_cache()
        return system.info(path)

    info = _retried(url, attempt)
    return info["size"], next((str(info[mark]) for mark in VERSION_MARKS if info.get(mark)), "")


def open_url(url: str, size: int | None = None) -> io.BufferedReader:
    """The bytes of a file. `size`: how many there are, where it is known; a body that ends earlier is tried again."""
    return io.BufferedReader(_RemoteFile(url, size), BUFFER_BYTES)


def _files_inside(url: str) -> list[str] | None:
    system, path = _connect(url)
    if _is_http(url):
        if url[-1] != "/" and "." not in url.rsplit("/", 1)[1] and str(system.info(path).get("url", "")).endswith("/"):
            return _files_inside(url + "/")  # where the server redirects to
        is_folder = url.endswith("/")
    else:
        is_folder = system.isdir(path)
    if not is_folder:
        return None
    prefix = url.rstrip("/") + "/"
    found = sorted(system.unstrip_protocol(name) for name in system.find(path))
    return [name.removeprefix(prefix) for name in found if name.startswith(prefix) and name != prefix]


class _RemoteFile(io.RawIOBase):
    """A file that is read from start to end in one request, or after a `seek` in ranges."""

    def __init__(self, url: str, size: int | None):
        self._url, self._size, self._position = url, size, 0
        self._file: IO[bytes] | None = None
        self._in_ranges = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            size, _ = look(self._url)
            if size is None:
                raise UserError(f"{self._url}: the server does not report the size of the file, which .parquet needs")
            offset += size
        elif whence == io.SEEK_CUR:
            offset += self._position
        if offset != self._position:
            self._drop()
            self._position, self._in_ranges = offset, True
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        read = _retried(f"{self._url}: byte {self._position}", lambda: self._read(len(buffer)))
        buffer[: len(read)] = read
        self._position += len(read)
        return len(read)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._open()
            read = self._file.read(size)
            if not read and self._size is not None and self._position < self._size:
                raise OSError(f"ends here, expected {self._size} bytes")
            return read
        except Exception as error:
            self._drop()
            if "range requests" in str(error):
                raise UserError(
                    f"{self._url}: the server does not serve byte ranges, which .parquet and a part of a .jsonl need;"
                    " download the file first, or for .jsonl give a larger --partition-mib"
                ) from None
            raise

    def _open(self) -> IO[bytes]:
        system, path = _connect(self._url)
        if not _is_http(self._url) or self._in_ranges:
            file = system.open(path, "rb")
            file.seek(self._position)
            return file
        file = system.open(path, "rb", block_size=0)  # one request for the whole file: not every server serves ranges
        left = self._position  # to skip, after the connection broke
        while left and (skipped := len(file.read(min(left, BUFFER_BYTES)))):
            left -= skipped
        return file

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


# ------------------------------------------------------------------------------------------------ connecting and trying


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _connect(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises UserError where fsspec does not know the protocol, or lacks the package for it.
    """
    options = {}
    try:
        if _is_http(url):
            import aiohttp  # an optional package

            limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
            options["client_kwargs"] = {"timeout": limits, "trust_env": True}  # the proxy of the environment
        return fsspec.url_to_fs(url, **options)
    except ImportError as error:
        package = "pip install 'memformer_dist[remote]'" if _is_http(url) else "the package of its protocol"
        raise UserError(f"{url}: reading it needs {package}: {error}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def _retried(place: str, attempt: Callable[[], Result]) -> Result:
    """attempt(), repeated while it fails in a way that may pass. `place` begins the messages."""
    wrong = 0
    for number in range(1, TRIES + 1):
        try:
            return attempt()
        except UserError:
            raise
        except _WrongContent as error:
            wrong, reason = wrong + 1, str(error)
        except Exception as error:  # every file system of fsspec has exceptions of its own
            time.sleep(ENDING_S)
            if not threading.main_thread().is_alive():  # the process is ending, and fsspec's threads with it
                raise
            error = _underlying(error)
            if refusal := _refusal(error):
                raise CorpusError(f"{place}: {refusal}") from None
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if number == TRIES or wrong == 2:
            break
        pause = min(FIRST_PAUSE_S * 2 ** (number - 1), LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)
        log.warning("%s: %s; try %d of %d, the next in %.1f s", place, reason, number, TRIES, pause)
        time.sleep(pause)
    source = "; the content was wrong twice, so the file is damaged at its source" if wrong == 2 else ""
    raise CorpusError(f"{place}: given up after {number} tries: {reason}{source}")


def _underlying(error: Exception) -> Exception:
    """The reason of a failure. Over HTTP fsspec reports any that keeps it from looking at a file as "no such file"."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


def _refusal(error: Exception) -> str | None:
    """Why it is useless to try again, or None."""
    status = getattr(error, "status", None)  # of an HTTP response
    if isinstance(error, FileNotFoundError) or status == 404:
        return "not found"
    if isinstance(error, PermissionError) or status in (400, 401, 403, 410):
        return f"refused: {error}"
    return None
