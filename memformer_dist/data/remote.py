"""The shards of a split behind a URL: fetched whole into a cache folder, ahead of need, and read from there.

    Corpus.open("https://host/corpora/books/train", cache=Path("/scratch/cache"), cache_gib=100)

Opening fetches corpus.json and the index, and leaves the shards where they are. `expect` then says which shards are read
next; a few threads fetch as many of these as the cache may hold, in the order of need. `path` hands out a shard that is
there, or fetches it at once while the caller waits. download.py retries and verifies, cache.py shares the folder among
the processes of a node.

A download that fails for good is told to whoever waits for the shard, and for a minute to whoever asks for it: readers ask
often. Later it is tried again, because the network may be back by then.
"""

import hashlib
import json
import logging
import threading
import time
from collections import deque
from pathlib import Path
from typing import Callable

import numpy as np
from pydantic import ValidationError

from memformer_dist.data.cache import PARTIAL, Cache
from memformer_dist.data.format import INDEX, MANIFEST, Manifest, Split, read_split
from memformer_dist.data.transfer import Remote
from memformer_dist.errors import CorpusError, UserError
from memformer_dist.files import sha256_of

FETCHERS = 4  # threads
REST_S = 60.0  # after a shard could not be had, until it is asked for again
POLL_S = 0.05  # while another process fetches what this one needs
TOKENIZER = "tokenizer.model"
log = logging.getLogger(__name__)


class RemoteShards:
    """The shards of the split at a URL. `wait_s`: seconds that callers have waited for shards, in all.

    forget   called with shards that left the cache although this process may have them mapped
    """

    advice = "; remove the cached file, and it is fetched again"

    def __init__(self, remote: Remote, cache: Cache, manifest: Manifest):
        self.folder, self.wait_s = cache.folder, 0.0
        self.on_evict: Callable[[set[int]], object] = lambda numbers: None
        self._remote, self._cache, self._manifest = remote, cache, manifest
        self._mapped: set[int] = set()
        self._changed = threading.Condition()  # guards what follows
        self._expected: list[int] = []
        self._held: set[int] = set()  # the expected shards that the cache can hold together: the first ones
        self._ahead: deque[int] = deque()  # of these, what no thread has begun with
        self._fetching: set[int] = set()
        self._failed: dict[int, Exception] = {}
        self._failed_at: dict[int, float] = {}  # by the monotonic clock
        self._threads = 0

    def path(self, number: int) -> Path:
        """The shard on this machine, verified. Waits until it is there; other processes may remove it again.

        Raises CorpusError where it cannot be fetched or the cache is too small.
        """
        file = self.folder / self._manifest.shards[number].name
        if file.exists():
            return file
        began = time.perf_counter()
        try:
            while not file.exists():
                self._check_bound(number)
                self._wait_or_fetch(number)
        finally:
            self.wait_s += time.perf_counter() - began
        return file

    def map(self, number: int) -> np.ndarray:
        """The bytes of the shard, uint8."""
        while True:
            try:
                file = self.path(number)
                size, expected = file.stat().st_size, self._manifest.shards[number].bytes
                if size != expected:  # somebody has changed it in the cache
                    raise CorpusError(f"{self.name(number)}: {size} bytes, expected {expected}{self.advice}")
                # A plain array: slicing np.memmap, a subclass, takes several times as long.
                found = np.memmap(file, np.uint8, "r").view(np.ndarray)
            except FileNotFoundError:  # removed between the two
                continue
            self._mapped.add(number)
            return found

    def name(self, number: int) -> str:
        """What messages call the shard."""
        shard = self._manifest.shards[number].name
        return f"{self._remote.url}/{shard} (cached as {self.folder / shard})"

    def expect(self, numbers: list[int]) -> set[int]:
        """The shards that are read next, in the order of need -> those whose maps may stay open."""
        held, room = [], self._cache.bound
        for number in numbers:
            room -= self._manifest.shards[number].bytes
            if room < 0:
                break
            held.append(number)
        try:
            self._cache.want([self._manifest.shards[number].name for number in held])
        except OSError as error:
            raise CorpusError(f"data.cache: {self.folder}: {error.strerror}") from None
        with self._changed:
            self._expected, self._held = list(numbers), set(held)
            absent = (n for n in held if not (self.folder / self._manifest.shards[n].name).exists())
            self._ahead = deque(number for number in absent if not self._rests(number))
            while self._threads < min(FETCHERS, len(self._ahead)):
                self._threads += 1
                threading.Thread(target=self._fetch_ahead, name="shard-fetcher", daemon=True).start()
        return set(held)

    def _rests(self, number: int) -> bool:
        return number in self._failed and time.monotonic() < self._failed_at[number] + REST_S

    def tokenizer(self) -> Path:
        """The tokenizer of the corpus, on this machine. Raises CorpusError if it is not the one of the shards."""
        corpus = Remote(self._remote.url.rpartition("/")[0])
        _obtain_whole(corpus, self._cache, TOKENIZER, self._manifest.tokenizer_sha256)
        return self.folder / TOKENIZER

    def _check_bound(self, number: int) -> None:
        """What is asked for before anything else is expected is needed together with all that comes before it."""
        with self._changed:
            if number in self._held:
                return
            expected = number in self._expected
            at_once = self._expected[: self._expected.index(number) + 1] if expected else [number]
        needed = sum(self._manifest.shards[other].bytes for other in at_once)
        if needed > self._cache.bound:
            raise CorpusError(
                f"data.cache_gib: found {self._cache.bound / 2**30:.4g}, expected at least {needed / 2**30:.4g}: so much"
                f" space take the {len(at_once)} shards of {self._remote.url} that are read at once"
            )

    def _wait_or_fetch(self, number: int) -> None:
        with self._changed:
            if number in self._fetching:
                while number in self._fetching:
                    self._changed.wait()
                if number in self._failed:
                    raise self._failed[number]
                return
            if self._rests(number):
                raise self._failed[number]
            self._begin(number)
        self._fetch(number, needed=True)

    def _begin(self, number: int) -> None:
        self._fetching.add(number)
        self._failed.pop(number, None)

    def _fetch(self, number: int, *, needed: bool) -> None:
        """Of a shard that was begun with. One that is not needed yet is left for later where it cannot be had at once."""
        shard = self._manifest.shards[number]
        try:
            while not _obtain(self._remote, self._cache, shard.name, shard.sha256, shard.bytes, needed=needed):
                if not needed:
                    return
                time.sleep(POLL_S)
        except Exception as error:
            self._failed_at[number], self._failed[number] = time.monotonic(), error
            raise
        finally:
            with self._changed:
                self._fetching.discard(number)
                self._changed.notify_all()
        self._forget_what_is_gone()

    def _forget_what_is_gone(self) -> None:
        """Maps of removed shards, so that the disk gets its space back; of those that are expected they serve on."""
        passed = self._mapped.copy() - self._held
        gone = {number for number in passed if not (self.folder / self._manifest.shards[number].name).exists()}
        self._mapped -= gone
        self.on_evict(gone)

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                while self._ahead and self._ahead[0] in self._fetching:
                    self._ahead.popleft()
                if not self._ahead:
                    self._threads -= 1
                    return
                number = self._ahead.popleft()
                self._begin(number)
            try:
                self._fetch(number, needed=False)
            except Exception as error:
                if threading.main_thread().is_alive():
                    log.warning("%s; tried again when it is needed, in a minute at the earliest", error)


def open_remote(url: str, cache: Path, cache_bytes: int) -> tuple[Split, RemoteShards]:
    """A split and its shards. Raises CorpusError or UserError, naming the URL, where that cannot be."""
    remote = Remote(url)
    raw = remote.read(MANIFEST, _checked_json)
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise UserError(f"{remote.url}/{MANIFEST}: {field}: {problem['msg']}, found {problem['input']!r}") from None
    folder = cache.expanduser() / hashlib.sha256(raw).hexdigest()[:16]
    kept = Cache(folder, {shard.name: shard.bytes for shard in manifest.shards}, cache_bytes)
    try:
        if not (folder / MANIFEST).exists() or (folder / MANIFEST).read_bytes() != raw:
            with kept.locked():
                partial = folder / (MANIFEST + PARTIAL)
                partial.write_bytes(raw)
                partial.rename(folder / MANIFEST)
    except OSError as error:
        raise CorpusError(f"data.cache: {error.filename or folder}: {error.strerror}, fetching {MANIFEST}") from None
    _obtain_whole(remote, kept, INDEX, manifest.index_sha256)
    return read_split(folder, remote.url), RemoteShards(remote, kept, manifest)


def _checked_json(raw: bytes) -> bytes:
    json.loads(raw)
    return raw


def _obtain(remote: Remote, cache: Cache, name: str, sha256: str, size: int | None = None, *, needed: bool) -> bool:
    """Whether the file is there, fetched if nobody else is at it and there is room."""
    try:
        reservation = cache.reserve(name, needed=needed)
        if reservation is None:
            return (cache.folder / name).exists()
        try:
            remote.fetch(name, reservation.path, sha256=sha256, size=size)
        except BaseException:
            reservation.drop()
            raise
        reservation.keep()
    except OSError as error:
        raise CorpusError(f"data.cache: {error.filename or cache.folder}: {error.strerror}, fetching {name}") from None
    return True


def _obtain_whole(remote: Remote, cache: Cache, name: str, sha256: str) -> None:
    """A file that is not a shard, compared with its hash also where it is there already."""
    file = cache.folder / name
    if file.exists():
        before = file.stat().st_ino
        if sha256_of(file) != sha256:
            with cache.locked():
                if file.exists() and file.stat().st_ino == before:  # nobody else has found the same meanwhile
                    file.unlink()
    while not _obtain(remote, cache, name, sha256, needed=True):
        time.sleep(POLL_S)
