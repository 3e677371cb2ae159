"""The folder in which the shards of a remote split are kept, shared by the processes of a node.

    <cache>/<fingerprint[:16]>/
        corpus.json index.safetensors tokenizer.model   as they came
        shard-000042.tar                                whole and verified
        shard-000043.tar.partial                        being fetched; locked by the process that does
        reader-x1y2z3.json                              what a process reads now and next; locked as long as it lives
        lock                                            held for a moment by who makes room, starts or finishes a file

All locks are flock: they end with their process, however it ends, so what a killed process left is told from what is in
use, and removed. The bytes of shards, those being fetched included, never exceed the bound. Whoever needs room removes
first what no reader expects, the least recently expected first, then what is needed last. A file that is removed while
somebody has it mapped stays readable, and keeps its space on the disk until it is unmapped.
"""

import fcntl
import json
import math
import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Iterator

from memformer_dist.errors import UserError

CACHE_FOLDER = "~/.cache/memformer_dist"
CACHE_GIB = 32.0
PARTIAL = ".partial"


class Reservation:
    """A file that this process alone may fetch, until it is kept or dropped. `path`: where to write it."""

    def __init__(self, cache: "Cache", name: str):
        self.path = cache.folder / (name + PARTIAL)
        self._cache, self._target = cache, cache.folder / name
        self._file = self.path.open("wb")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def keep(self) -> None:
        with self._cache.locked(), self._file:
            self.path.rename(self._target)

    def drop(self) -> None:
        with self._cache.locked(), self._file:
            self.path.unlink(missing_ok=True)


class Cache:
    """The folder of one split.

    sizes   bytes of its shards, by name
    bound   bytes that the shards in the folder may take together
    """

    def __init__(self, folder: Path, sizes: dict[str, int], bound: int):
        """Raises UserError where the folder cannot be written to or has no locks."""
        self.folder, self.bound, self._sizes = folder, bound, sizes
        self._wanted: list[str] = []  # the shards that this reader reads now and next, in the order of need
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.locked():
                number, _ = tempfile.mkstemp(prefix="reader-", suffix=".json", dir=folder)
                self._reader: IO = os.fdopen(number, "w")
                fcntl.flock(self._reader, fcntl.LOCK_EX)
                self._publish([])
                self._remove_what_the_dead_left()
                for name, entry in self._present().items():
                    if entry.stat().st_size != sizes[name]:
                        os.unlink(entry)
        except OSError as error:
            raise UserError(
                f"data.cache: {folder}: {error.strerror}; expected a folder on a local disk, where files can be written"
                " and locked"
            ) from None

    def want(self, names: list[str]) -> None:
        """Say what this reader reads now and next, in the order of need."""
        if names == self._wanted:
            return
        with self.locked():
            self._publish(names)
            now = time.time_ns()
            present = self._present()
            for entry in filter(None, map(present.get, names)):
                # When it was last expected. The time of the last change is left as it is: it tells whether a file changed.
                os.utime(entry, ns=(now, entry.stat().st_mtime_ns))

    def reserve(self, name: str, *, needed: bool) -> Reservation | None:
        """The right to fetch a file that is not there.

        None where it cannot be had at the moment: the file is there, somebody else fetches it, or there is no room. Room for
        a file that is merely expected is not made at the cost of any that is needed sooner; for one that is `needed` now it
        is made at the cost of all that this reader does not expect as well.
        """
        with self.locked():
            fetching = self._remove_what_the_dead_left()
            if name in fetching or (self.folder / name).exists():
                return None
            if name in self._sizes and not self._make_room(name, fetching, needed):
                return None
            return Reservation(self, name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone in the folder. A few milliseconds at most: nothing is fetched or hashed meanwhile."""
        with (self.folder / "lock").open(
            "a"
        ) as file:  # opened anew, because threads of a process exclude each other too
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _present(self) -> dict[str, os.DirEntry]:
        with os.scandir(self.folder) as entries:
            return {entry.name: entry for entry in entries if entry.name in self._sizes}

    def _publish(self, names: list[str]) -> None:
        self._wanted = names
        self._reader.seek(0)
        self._reader.truncate()
        self._reader.write(json.dumps(names))
        self._reader.flush()

    def _remove_what_the_dead_left(self) -> set[str]:
        """-> the names of the files that somebody is fetching."""
        fetching = set()
        for path in (*self.folder.glob("*" + PARTIAL), *self.folder.glob("reader-*.json")):
            if not _alive(path):
                path.unlink()
            elif path.name.endswith(PARTIAL):
                fetching.add(path.name.removesuffix(PARTIAL))
        return fetching

    def _make_room(self, name: str, fetching: set[str], needed: bool) -> bool:
        present = self._present()
        room = self.bound - sum(self._sizes.get(other, 0) for other in {name, *present, *fetching})
        if room >= 0:
            return True
        turn: dict[str, float] = {}  # how soon somebody needs a shard
        for path in self.folder.glob("reader-*.json"):
            for place, other in enumerate(json.loads(path.read_text())):
                turn[other] = min(place, turn.get(other, math.inf))
        spared = set(self._wanted) if needed and name in self._wanted else set()
        sooner_than = -1 if needed else turn.get(name, math.inf)
        candidates = [other for other in present if other not in spared and turn.get(other, math.inf) > sooner_than]
        candidates.sort(key=lambda other: (-turn.get(other, math.inf), present[other].stat().st_atime_ns))
        evicted = []
        for other in candidates:
            if room >= 0:
                break
            evicted.append(other)
            room += self._sizes[other]
        if room < 0:
            return False
        for other in evicted:
            os.unlink(present[other])
        return True


def _alive(path: Path) -> bool:
    """Whether the process that made the file still has it locked. Asked under the lock of the folder."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
