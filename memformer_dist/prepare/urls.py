"""Inputs behind URLs, through fsspec: what a folder holds, how large a file is, its bytes.

https://, s3://, gs:// and whatever else fsspec knows. Over HTTP a URL that ends with /, or is redirected to one, is a folder,
whose page of links is its listing. A connection that breaks, and a body that ends before the size that was listed, is
tried again where it broke; what stays broken ends the program, because what a network keeps back is no damaged document.
"""

import io
import sys
import time
from typing import Callable, TypeVar

from memformer_dist.errors import UserError

Result = TypeVar("Result")

WAITS = (1, 2, 4, 8)  # seconds before another attempt
VERSION_MARKS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "last_modified", "updated", "mtime")
BUFFER = 1 << 20  # bytes


def matches(given: str) -> list[tuple[str, list[str] | None]]:
    """Each file or folder of a URL or a glob of URLs, and what is in the folder, recursively and relative to it."""
    system, path = _connect(given)
    try:
        if "*" in path or "[" in path:
            found = [system.unstrip_protocol(name) for name in sorted(system.glob(path))]
        else:
            found = [given]
        return [(name, _inside(name)) for name in found]
    except FileNotFoundError:
        return []
    except Exception as error:  # each library behind fsspec raises its own
        raise UserError(f"{given}: {type(error).__name__}: {error}") from None


def look(url: str) -> tuple[int | None, str]:
    """Size in bytes, and a mark of this version of the file ("" where there is none). Raises UserError naming the URL."""

    def ask() -> dict:
        system, path = _connect(url)
        system.invalidate_cache()
        return system.info(path)

    info = _patiently(ask, lambda: url)
    return info["size"], next((str(info[mark]) for mark in VERSION_MARKS if info.get(mark)), "")


def open_url(url: str, size: int | None = None) -> io.BufferedReader:
    """`size` in bytes, where it is known: a body that ends before is tried again."""
    return io.BufferedReader(_Remote(url, size), BUFFER)


def _inside(url: str) -> list[str] | None:
    system, path = _connect(url)
    if _is_http(url):
        if url[-1] != "/" and "." not in url.rsplit("/", 1)[1] and str(system.info(path).get("url", "")).endswith("/"):
            return _inside(url + "/")  # what the server redirects to
        folder = url.endswith("/")
    else:
        folder = system.isdir(path)
    if not folder:
        return None
    prefix = url.rstrip("/") + "/"
    found = sorted(system.unstrip_protocol(name) for name in system.find(path))
    return [name.removeprefix(prefix) for name in found if name.startswith(prefix) and name != prefix]


class _Remote(io.RawIOBase):
    """A file read from its start to its end, or after a `seek` in ranges."""

    def __init__(self, url: str, size: int | None):
        self._url, self._size, self._position = url, size, 0
        self._file, self._in_ranges = None, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            size, _ = look(self._url)
            if size is None:
                raise UserError(f"{self._url}: the server does not tell how long the file is, which a .parquet needs")
            offset += size
        elif whence == io.SEEK_CUR:
            offset += self._position
        if offset != self._position:
            self._drop()
            self._position, self._in_ranges = offset, True
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        read = _patiently(lambda: self._read(len(buffer)), lambda: f"{self._url}: byte {self._position}")
        buffer[: len(read)] = read
        self._position += len(read)
        return len(read)

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._open()
            read = self._file.read(size)
            if not read and self._size is not None and self._position < self._size:
                raise OSError(f"ends here, expected {self._size} bytes")
            return read
        except Exception as error:
            self._drop()
            if "range requests" in str(error):
                raise UserError(
                    f"{self._url}: the server does not serve byte ranges, which a .parquet or a part of a .jsonl needs;"
                    " fetch the file first, or for a .jsonl give a larger --partition-mib"
                ) from None
            raise

    def close(self) -> None:
        self._drop()
        super().close()

    def _open(self) -> None:
        system, path = _connect(self._url)
        # HTTP: block size 0 is one request for the whole file, others are ranges, which not every server serves.
        stream = _is_http(self._url) and not self._in_ranges
        self._file = system.open(path, "rb", **({"block_size": 0} if stream else {}))
        if not stream:
            self._file.seek(self._position)
        else:
            left = self._position  # after a broken connection
            while left:
                left -= len(self._file.read(min(left, BUFFER))) or left

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _patiently(action: Callable[[], Result], place: Callable[[], str]) -> Result:
    """Try again what fails, but not what is not there. `place` says what it was about."""
    for wait in (*WAITS, None):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # each library behind fsspec raises its own
            reason = f"{place()}: {type(error).__name__}: {error}"
            # Over HTTP fsspec says of whatever went wrong that there is no such file; the cause knows more.
            status = getattr(error.__cause__, "status", None)
            missing = isinstance(error, FileNotFoundError) and (error.__cause__ is None or status in (403, 404, 410))
            if missing or wait is None:
                attempts = "" if missing else f"; given up after {len(WAITS) + 1} attempts"
                raise UserError(reason + attempts) from None
            print(f"{reason}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _connect(url: str):
    """The file system of a URL, and the path in it."""
    import fsspec

    options = {}
    try:
        if _is_http(url):
            import aiohttp

            # Its default ends every request after 5 minutes, also one that a slow reader is still reading.
            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60)}}
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # no such protocol, or its library is not there
        raise UserError(f"{url}: {error}; for http(s): pip install 'memformer_dist[remote]'") from None
