"""Files of a remote folder, through fsspec: fetched whole, retried, and verified before they count.

    Remote("https://host/corpora/books/train").fetch("shard-000000.tar", Path("..."), sha256="5a1c...", size=1_048_576)

A connection that drops, stalls or ends early, and a server that answers 5xx, are tried again after a pause that doubles
from try to try and is drawn at random around that, so that a thousand processes do not come back at once. Every try
starts from nothing: what an earlier one left is not built upon. What arrives whole and is still wrong a second time is
damaged where it comes from, and an error.

fsspec knows http(s), file, and with their packages installed s3, gs, hf and many more. The time limits below are given
to http(s), whose default would end every download after five minutes; other file systems have limits of their own.
"""

import errno
import logging
import random
import threading
import time
from pathlib import Path
from typing import Callable, TypeVar

import fsspec
from fsspec.callbacks import Callback

from memformer_dist.errors import CorpusError, UserError
from memformer_dist.files import sha256_of

TRIES = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0  # 0.5 to 32 s: a server may be away for a minute
CONNECT_S, STALL_S = 30.0, 60.0  # to connect, and between two pieces of a body
ENDING_S = 0.05  # between the end of a process's thread pools and that of its main thread

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class _Wrong(Exception):
    """What arrived, without any error, is not what was asked for."""


class _NoMoreThan(Callback):
    """Ends a transfer that brings more bytes than the file has: a server may send without end."""

    def __init__(self, size: int):
        super().__init__()
        self._most = size

    def call(self, hook_name=None, **kwargs) -> None:
        if self.value > self._most:
            raise _Wrong(f"more than the {self._most} bytes that are expected")


class Remote:
    """The folder at a URL."""

    def __init__(self, url: str):
        """Raises UserError where fsspec does not know the protocol, or lacks the package for it."""
        self.url = url.rstrip("/")
        options = {}
        try:
            if self.url.startswith(("http://", "https://")):
                import aiohttp

                limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
                options["client_kwargs"] = {"timeout": limits, "trust_env": True}  # the proxy of the environment
            self._files, self._path = fsspec.url_to_fs(self.url, **options)
        except ImportError as error:
            needed = "pip install fsspec[http]" if "aiohttp" in str(error) else "the package of its protocol"
            raise UserError(f"{url}: fsspec cannot read it without {needed}: {error}") from None
        except ValueError as error:
            raise UserError(f"{url}: {error}") from None

    def read(self, name: str, parse: Callable[[bytes], Result]) -> Result:
        """parse(content of a small file); what it refuses with a ValueError is fetched once more."""

        def attempt() -> Result:
            raw = self._files.cat_file(f"{self._path}/{name}")
            try:
                return parse(raw)
            except ValueError as error:
                raise _Wrong(str(error)) from None

        return _retried(f"{self.url}/{name}", attempt)

    def fetch(self, name: str, target: Path, *, sha256: str, size: int | None = None) -> None:
        """Overwrite `target` with the file, which has that hash and size in bytes.

        Raises CorpusError naming URL, tries and reason, with both hashes where the content was wrong twice, or the folder
        whose disk is full.
        """

        def attempt() -> None:
            callback = Callback() if size is None else _NoMoreThan(size)
            try:
                self._files.get_file(f"{self._path}/{name}", str(target), callback=callback)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise CorpusError(
                        f"data.cache: {target.parent}: the disk is full ({error.strerror}), {name} is not fetched"
                    ) from None
                raise
            found = target.stat().st_size
            if size is not None and found < size:
                raise OSError(f"{found} bytes arrived, expected {size}")
            if size is not None and found > size:
                raise _Wrong(f"{found} bytes, expected {size}")
            if (digest := sha256_of(target)) != sha256:
                raise _Wrong(f"sha256 is {digest}, expected {sha256}")

        _retried(f"{self.url}/{name}", attempt)


def _retried(url: str, attempt: Callable[[], Result]) -> Result:
    wrong = 0
    for number in range(1, TRIES + 1):
        try:
            return attempt()
        except CorpusError:
            raise
        except FileNotFoundError:
            raise CorpusError(f"{url}: not found") from None
        except _Wrong as error:
            wrong, reason = wrong + 1, str(error)
        except Exception as error:  # every file system of fsspec has exceptions of its own
            time.sleep(ENDING_S)
            if not threading.main_thread().is_alive():  # the process ends, and with it what fsspec works with
                raise
            status = getattr(error, "status", None)
            if isinstance(error, PermissionError) or status in (400, 401, 403, 410):
                raise CorpusError(f"{url}: refused: {error}") from None
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if number == TRIES or wrong == 2:
            break
        pause = min(FIRST_PAUSE_S * 2 ** (number - 1), LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)
        log.warning("%s: %s; try %d of %d, the next in %.1f s", url, reason, number, TRIES, pause)
        time.sleep(pause)
    again = "; what came was wrong twice, so it is damaged where it comes from" if wrong == 2 else ""
    raise CorpusError(f"{url}: given up after {number} tries: {reason}{again}")
