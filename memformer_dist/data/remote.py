"""RemoteShards: the shards of a split behind a URL, fetched whole into a cache folder ahead of need.

    open_split("https://host/corpora/books/train", cache="/scratch/cache", cache_gib=100)  # in open_data.py

Opening fetches corpus.json and the index; the shards stay where they are. `prefetch` announces which shards are read
next. A few threads fetch as many of them as the cache may hold, in the order of need. `map` returns a shard that is
there, and fetches any other at once while the caller waits. transfer.py retries and verifies downloads; cache.py shares
the folder among the processes of a node.

A download that fails for good raises its error in whoever waits for the shard, and for the next minute in whoever asks
for it, because readers ask often. After that it is tried again: the network may have recovered.
"""

import hashlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from memformer_dist.data.cache import ShardCache
from memformer_dist.data.format import INDEX, MANIFEST, Manifest, Shard, Split, read_split
from memformer_dist.data.transfer import Remote
from memformer_dist.errors import CorpusError, UserError, first_problem
from memformer_dist.files import sha256_of, write_bytes

FETCHERS = 4  # threads
REST_S = 60.0  # after a shard could not be fetched, until it is tried again
POLL_S = 0.05  # while another process fetches what this one needs
SIGNALS_S = 1.0  # Python may miss a signal that comes just before a wait begins: after so long it is looked for
log = logging.getLogger(__name__)


class RemoteShards:
    """The shards of the split at a URL.

    on_evict  called with the numbers of shards that were removed from the cache while this process may have them mapped
    wait_s    seconds that callers have waited for shards, in total
    """

    is_remote = True
    advice = "; remove the cached file, and it is fetched again"

    def __init__(
        self, remote: Remote, cache: ShardCache, manifest: Manifest, *, on_evict: Callable[[set[int]], object]
    ):
        self.folder, self.wait_s = cache.folder, 0.0
        self._remote, self._cache, self._manifest, self._on_evict = remote, cache, manifest, on_evict
        self._mapped: set[int] = set()
        self._changed = threading.Condition()  # guards what follows
        self._upcoming: list[int] = []  # what is read next, in the order of need
        self._held: set[int] = set()  # the first of these, as many as the cache can hold together
        self._queue: deque[int] = deque()  # of the held ones, those that no thread has begun to fetch
        self._fetching: set[int] = set()
        self._failed: dict[int, Exception] = {}
        self._failed_at: dict[int, float] = {}  # by the monotonic clock
        self._threads = 0

    def map(self, number: int) -> np.ndarray:
        """The bytes of a shard, uint8. Waits until it is fetched.

        Raises CorpusError where it cannot be fetched, the cache is too small, or the cached file was changed.
        """
        while True:
            try:
                file = self._fetched(number)
                size, expected = file.stat().st_size, self._shard(number).bytes
                if size != expected:  # somebody has changed it in the cache
                    raise CorpusError(f"{self.name(number)}: {size} bytes, expected {expected}{self.advice}")
                # A plain array: slicing np.memmap, a subclass, takes several times as long.
                found = np.memmap(file, np.uint8, "r").view(np.ndarray)
            except FileNotFoundError:  # another process has removed it meanwhile
                continue
            self._mapped.add(number)
            return found

    def name(self, number: int) -> str:
        """What messages call the shard."""
        return f"{self._remote.url}/{self._shard(number).name} (cached as {self._file(number)})"

    def prefetch(self, numbers: list[int]) -> set[int]:
        """Start fetching the shards that are read next, in this order; returns those whose maps may stay open.

        Raises CorpusError where the cache folder cannot be used.
        """
        held = self._as_many_as_fit(numbers)
        try:
            absent = set(self._cache.prefetch([self._shard(number).name for number in held]))
        except OSError as error:
            raise CorpusError(f"data.cache: {self.folder}: {error.strerror}") from None
        with self._changed:
            self._upcoming, self._held = list(numbers), set(held)
            self._queue = deque(
                number for number in held if self._shard(number).name in absent and not self._is_resting(number)
            )
            while self._threads < min(FETCHERS, len(self._queue)):
                self._threads += 1
                threading.Thread(target=self._fetch_queue, name="shard-fetcher", daemon=True).start()
        return set(held)

    def tokenizer(self) -> Path:
        """The tokenizer of the corpus, on this machine. Raises CorpusError if it is not the one of the shards."""
        corpus = Remote(self._remote.url.rpartition("/")[0])
        _fetch_verified(corpus, self._cache, self._manifest.tokenizer, self._manifest.tokenizer_sha256)
        return self.folder / self._manifest.tokenizer

    def _shard(self, number: int) -> Shard:
        return self._manifest.shards[number]

    def _file(self, number: int) -> Path:
        return self.folder / self._shard(number).name

    def _as_many_as_fit(self, numbers: list[int]) -> list[int]:
        """The first of these shards, as many as the cache can hold together."""
        room = self._cache.bound
        for count, number in enumerate(numbers):
            room -= self._shard(number).bytes
            if room < 0:
                return numbers[:count]
        return numbers

    def _is_resting(self, number: int) -> bool:
        """Whether a shard failed so recently that it is not tried again yet."""
        return number in self._failed and time.monotonic() < self._failed_at[number] + REST_S

    def _fetched(self, number: int) -> Path:
        """A shard's file in the cache, verified. Waits until it is there; other processes may remove it again.

        Raises CorpusError where it cannot be fetched or the cache is too small.
        """
        file = self._file(number)
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

    def _check_bound(self, number: int) -> None:
        """Raises CorpusError where a shard and all those that are read before it take more than the cache may hold.

        A shard that was not announced needs room for itself alone.
        """
        with self._changed:
            if number in self._held:
                return
            announced = number in self._upcoming
            together = self._upcoming[: self._upcoming.index(number) + 1] if announced else [number]
        needed = sum(self._shard(other).bytes for other in together)
        if needed > self._cache.bound:
            raise CorpusError(
                f"data.cache_gib: found {self._cache.bound / 2**30:.4g}, expected at least {needed / 2**30:.4g} for the"
                f" shards of {self._remote.url} that are read at once ({len(together)})"
            )

    def _wait_or_fetch(self, number: int) -> None:
        """Wait for the thread that fetches a shard, or fetch it. Raises the error of whoever fetched it."""
        with self._changed:
            if number in self._fetching:
                while number in self._fetching:
                    self._changed.wait(SIGNALS_S)
                if number in self._failed:
                    raise self._failed[number]
                return
            if self._is_resting(number):
                raise self._failed[number]
            self._begin(number)
        self._fetch(number, needed=True)

    def _begin(self, number: int) -> None:
        self._fetching.add(number)
        self._failed.pop(number, None)

    def _fetch(self, number: int, *, needed: bool) -> None:
        """Fetch a shard after `_begin`. One that is not needed yet is skipped where it cannot be had at once."""
        shard = self._shard(number)
        try:
            while not _try_fetch(self._remote, self._cache, shard.name, shard.sha256, shard.bytes, needed=needed):
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
        self._evict()

    def _evict(self) -> None:
        """Report the shards that were removed, so that their maps are closed. Those that are read next stay mapped."""
        passed = self._mapped.copy() - self._held
        removed = {number for number in passed if not self._file(number).exists()}
        self._mapped -= removed
        self._on_evict(removed)

    def _fetch_queue(self) -> None:
        """A thread: fetch what is queued, and end."""
        while True:
            with self._changed:
                while self._queue and self._queue[0] in self._fetching:
                    self._queue.popleft()
                if not self._queue:
                    self._threads -= 1
                    self._changed.notify_all()
                    return
                number = self._queue.popleft()
                self._begin(number)
            try:
                self._fetch(number, needed=False)
            except Exception as error:
                if threading.main_thread().is_alive():
                    later = f"not needed yet; it is tried again when it is, after {REST_S:.0f} s at the earliest"
                    log.warning("%s; %s", error, later)


def fetch_split(url: str, cache: Path, bound: int) -> tuple[Split, Remote, ShardCache]:
    """Fetch corpus.json and the index of a split: the split, where its shards are, and where they are kept.

    cache  folder of the caches of all splits
    bound  bytes that the shards of this one may take in it

    Raises CorpusError or UserError naming the URL or the cache folder.
    """
    remote = Remote(url)
    raw = remote.read(MANIFEST, _checked_json)
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise UserError(f"{remote.url}/{MANIFEST}: {first_problem(error)}") from None
    folder = cache.expanduser() / hashlib.sha256(raw).hexdigest()[:16]
    kept = ShardCache(folder, {shard.name: shard.bytes for shard in manifest.shards}, bound)
    try:
        if not (folder / MANIFEST).exists() or (folder / MANIFEST).read_bytes() != raw:
            with kept.locked():
                write_bytes(folder / MANIFEST, raw)
    except OSError as error:
        raise CorpusError(f"data.cache: {error.filename or folder}: {error.strerror}, writing {MANIFEST}") from None
    _fetch_verified(remote, kept, INDEX, manifest.index_sha256)
    return read_split(folder, remote.url), remote, kept


def _checked_json(raw: bytes) -> bytes:
    json.loads(raw)
    return raw


def _try_fetch(remote: Remote, cache: ShardCache, name: str, sha256: str, size: int | None, *, needed: bool) -> bool:
    """Fetch a file that is not in the cache, unless another process does or there is no room.

    Returns whether it is there.
    """
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


def _fetch_verified(remote: Remote, cache: ShardCache, name: str, sha256: str) -> None:
    """Fetch a file that is not a shard; one that is in the cache already is compared with its hash, too."""
    file = cache.folder / name
    if file.exists():
        before = file.stat().st_ino
        if sha256_of(file) != sha256:
            with cache.locked():
                if file.exists() and file.stat().st_ino == before:  # else another process has replaced it meanwhile
                    file.unlink()
    while not _try_fetch(remote, cache, name, sha256, None, needed=True):
        time.sleep(POLL_S)
