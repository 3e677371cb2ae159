"""Maps: the shards of a split that are mapped into memory, a bounded number of them in the whole process.

Each map takes one of the files that a process may have open (`ulimit -n`, often 1,024), and a corpus may have any
number of shards, with further ones for validation and in a mixture. So the shards that were not read for the longest
time are unmapped. Whoever still has a view of one keeps its map until the view is gone.
"""

import errno
import gc
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from memformer_dist.errors import CorpusError

MAPS_HELD = 1024  # at most
FILES_WANTED = 65_536  # to which the limit is raised where the system allows it
VIEWS_HELD = 4096  # documents of a split whose views are kept
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # for a further file or map


class DocumentViews(NamedTuple):
    """A document where its shard is mapped."""

    tokens: np.ndarray  # uint16 or uint32 [tokens]
    mask: np.ndarray | None  # uint8 [tokens]


class Mapped(NamedTuple):
    """A shard in memory."""

    raw: np.ndarray  # uint8
    file: str
    stamp: tuple[int, ...]  # of the file, when it was mapped
    documents: set[int]  # that have views


class Maps:
    """The shards of a split that are mapped, and views of the documents read last.

    May be used from any thread; those that are reading keep what they have when a shard is unmapped.
    """

    def __init__(self) -> None:
        self.shards: dict[int, Mapped] = {}
        self.documents: dict[int, DocumentViews] = {}
        self._self = weakref.ref(self)

    def shard(self, number: int, open_it: Callable[[], Mapped]) -> Mapped:
        """A shard, which `open_it` maps where it is not mapped.

        Raises CorpusError naming the limit where the system lets the process open no further file.
        """
        with _lock:
            found = self.shards.get(number)
            if found is not None:
                _recent.move_to_end((self._self, number))
                return found
        try:
            found = open_it()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            found = _open_in_need(open_it)
        with _lock:
            # Where two threads mapped the same shard, the second map takes the place of the first, with its views.
            self._unmap({number})
            self.shards[number] = found
            _recent[self._self, number] = None
            _make_room(_maps_held())
        return found

    def touch(self, number: int) -> Mapped | None:
        """A shard if it is mapped, which counts as reading it."""
        with _lock:
            found = self.shards.get(number)
            if found is not None:
                _recent.move_to_end((self._self, number))
            return found

    def keep(self, document: int, views: DocumentViews, number: int, mapped: Mapped) -> None:
        """Keep views of a document of shard `number`, unless that was unmapped meanwhile."""
        with _lock:
            if self.shards.get(number) is not mapped:
                return
            if len(self.documents) >= VIEWS_HELD:
                self.documents.clear()
                for other in self.shards.values():
                    other.documents.clear()
            self.documents[document] = views
            mapped.documents.add(document)

    def unmap(self, numbers: set[int]) -> None:
        """Close the maps of shards, so that the disk regains the space of files that were removed."""
        with _lock:
            self._unmap(numbers)

    def unmap_others(self, kept: set[int]) -> None:
        """Close the maps of all shards but these."""
        with _lock:
            self._unmap(self.shards.keys() - kept)

    def _unmap(self, numbers: set[int]) -> None:
        for number in numbers:
            mapped = self.shards.pop(number, None)
            if mapped is not None:
                _recent.pop((self._self, number), None)
                for document in mapped.documents:
                    self.documents.pop(document, None)


# Of all Maps of the process. The lock may be taken again by its thread: a map may be closed, and numpy's memory collected,
# wherever memory is allocated.
_lock = threading.RLock()
_recent: OrderedDict[tuple[weakref.ref[Maps], int], None] = OrderedDict()  # all mapped shards, the last read last
_limit: int | None = None


def _make_room(limit: int) -> None:
    """Unmap the shards that were not read for the longest time until `limit` are left."""
    while len(_recent) > limit:
        (maps, number), _ = _recent.popitem(last=False)
        owner = maps()
        if owner is not None:
            owner._unmap({number})


def _maps_held() -> int:
    """How many shards the process may have mapped: a quarter of the files that it may open, after raising that limit."""
    global _limit
    if _limit is None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                soft = wanted
        _limit = MAPS_HELD if soft == resource.RLIM_INFINITY else max(1, min(MAPS_HELD, soft // 4))
    return _limit


def _open_in_need(open_it: Callable[[], Mapped]) -> Mapped:
    """Map a shard after all others were unmapped: other parts of the program have taken what the system allows."""
    with _lock:
        _make_room(0)
    gc.collect()
    try:
        return open_it()
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise CorpusError(
            f"data.corpus: cannot map {error.filename or 'a shard'}: {error.strerror}; this process may open {limit} files"
            " (ulimit -n) and the system bounds maps (sysctl vm.max_map_count): raise what is too small"
        ) from None
