"""ShardCache: the folder in which the shards of a remote split are kept, shared by the processes of a node.

    <cache>/<fingerprint[:16]>/
        corpus.json index.safetensors tokenizer.*       as they were fetched
        shard-000042.tar                                whole and verified
        shard-000043.tar.partial                        being fetched; locked by the process that fetches it
        reader-0123abcd.json                            what a process reads now and next; locked while it lives
        lock                                            held for a moment whenever the folder is changed

All locks are flock: they end with their process, however it ends. That is how what a killed process left behind is
recognised and removed. The bytes of all shards, including those being fetched, never exceed the bound. To make room,
the shards that no process has announced are removed first, beginning with the one announced longest ago, then those
that are needed last. A file that is removed while a process has it mapped stays readable, and takes its space on the
disk until it is unmapped.
"""

import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from memformer_dist.errors import UserError
from memformer_dist.files import PARTIAL, lock, try_lock

CACHE_FOLDER = "~/.cache/memformer_dist"
CACHE_GIB = 32.0


class Reservation:
    """The right to fetch a file, which no other process has until `keep` or `drop`. `path`: where to write it."""

    def __init__(self, cache: "ShardCache", name: str):
        self.path = cache.folder / (name + PARTIAL)
        self._cache, self._target = cache, cache.folder / name
        self._file = self.path.open("wb")
        lock(self._file)

    def keep(self) -> None:
        with self._cache.locked(), self._file:
            self.path.rename(self._target)

    def drop(self) -> None:
        with self._cache.locked(), self._file:
            self.path.unlink(missing_ok=True)


class ShardCache:
    """The folder of one split.

    sizes   bytes of the shards, by name
    bound   bytes that the shards in the folder may take together
    """

    def __init__(self, folder: Path, sizes: dict[str, int], bound: int):
        """Raises UserError where files in the folder cannot be written or locked."""
        self.folder, self.bound, self._sizes = folder, bound, sizes
        self._announced: list[str] = []  # what this process reads now and next, in the order of need
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.locked():
                # Not tempfile, whose files no other user can read: a cache may be a group's.
                self._reader: IO[str] = (folder / f"reader-{secrets.token_hex(8)}.json").open("x")
                lock(self._reader)
                self._announce([])
                self._remove_abandoned()
                for name, entry in self._present().items():
                    if entry.stat().st_size != sizes[name]:
                        os.unlink(entry)
        except OSError as error:
            raise UserError(
                f"data.cache: {folder}: {error.strerror}; expected a folder on a local disk, where files can be written"
                " and locked"
            ) from None

    def prefetch(self, names: list[str]) -> list[str]:
        """Announce the shards that this process reads now and next, in the order of need: other processes spare them.

        Returns those that are not in the folder, which are to be fetched. All of `names` must fit within the bound.
        """
        if names != self._announced:
            with self.locked():
                self._announce(names)
                now = time.time_ns()
                present = self._present()
                for entry in filter(None, map(present.get, names)):
                    # The access time says when a shard was last announced. The time of the last change stays as it is:
                    # it shows whether a file was changed.
                    with suppress(PermissionError):  # another user's
                        os.utime(entry, ns=(now, entry.stat().st_mtime_ns))
        return [name for name in names if not (self.folder / name).exists()]

    def reserve(self, name: str, *, needed: bool) -> Reservation | None:
        """The right to fetch a file that is not in the folder.

        None where it cannot be had at the moment: the file is there, another process or thread fetches it, or there is
        no room. Room for a file that is only announced is made by removing what is needed later. Room for one that is
        `needed` now is also made by removing what other processes have announced, but not what this one has.
        """
        with self.locked():
            fetching = self._remove_abandoned()
            if name in fetching or (self.folder / name).exists():
                return None
            if name in self._sizes and not self._make_room(name, fetching, needed):
                return None
            return Reservation(self, name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone in the folder. Takes a few milliseconds at most: nothing is fetched or hashed meanwhile."""
        with (self.folder / "lock").open("a") as file:  # opened each time: threads must exclude each other, too
            lock(file)
            yield

    def _present(self) -> dict[str, os.DirEntry[str]]:
        with os.scandir(self.folder) as entries:
            return {entry.name: entry for entry in entries if entry.name in self._sizes}

    def _announce(self, names: list[str]) -> None:
        self._announced = names
        self._reader.seek(0)
        self._reader.truncate()
        self._reader.write(json.dumps(names))
        self._reader.flush()

    def _remove_abandoned(self) -> set[str]:
        """Remove what processes left behind that are gone. Returns the names of the files that are being fetched."""
        fetching = set()
        for path in (*self.folder.glob("*" + PARTIAL), *self.folder.glob("reader-*.json")):
            if _is_abandoned(path):
                path.unlink()
            elif path.name.endswith(PARTIAL):
                fetching.add(path.name.removesuffix(PARTIAL))
        return fetching

    def _make_room(self, name: str, fetching: set[str], needed: bool) -> bool:
        """Remove shards until `name` fits within the bound. False, and nothing is removed, where that cannot be."""
        present = self._present()
        taken = {name, *present, *fetching}  # `fetching` has files that are not shards, which do not count
        excess = sum(self._sizes.get(other, 0) for other in taken) - self.bound
        if excess <= 0:
            return True
        removed = []
        for other in self._removable(name, present, needed):
            if excess <= 0:
                break
            removed.append(other)
            excess -= self._sizes[other]
        if excess > 0:
            return False
        for other in removed:
            os.unlink(present[other])
        return True

    def _removable(self, name: str, present: dict[str, os.DirEntry[str]], needed: bool) -> list[str]:
        """The shards that may be removed in favour of `name`, the first one first."""
        turns = self._turns()

        def turn(shard: str) -> float:
            return turns.get(shard, math.inf)

        if needed:
            spared = set(self._announced) if name in self._announced else set()
            candidates = [other for other in present if other not in spared]
        else:
            candidates = [other for other in present if turn(other) > turn(name)]
        return sorted(candidates, key=lambda other: (-turn(other), present[other].stat().st_atime_ns))

    def _turns(self) -> dict[str, int]:
        """How soon some process needs a shard, for each that was announced: its place in the announcement."""
        turns: dict[str, int] = {}
        for path in self.folder.glob("reader-*.json"):
            with suppress(OSError, ValueError):  # another user's, or written to a full disk
                for place, name in enumerate(json.loads(path.read_text())):
                    turns[name] = min(place, turns.get(name, place))
        return turns


def _is_abandoned(path: Path) -> bool:
    """Whether the process that made the file is gone, and its lock with it. To be called while the folder is locked."""
    try:
        with path.open("r+b") as file:  # NFS locks no file that is open for reading alone
            return try_lock(file)
    except PermissionError:  # another user's
        return False
