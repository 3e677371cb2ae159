"""The lane schedule: which segment of which document every lane reads at every tick.

G lanes, fixed by the configuration and independent of the number of processes, each read one document after the other,
a segment of S tokens a tick. Every epoch is a seeded permutation of the documents (order.py), dealt like cards: the next
document goes to the lane that is free first, of several to the lowest. No lane waits at the end of an epoch, so lanes may
be in different epochs.

    tick        0    1    2    3    4    5    6
    lane 0     [document 7  ][2  ][document 5   ...
    lane 1     [4  ][document 0       ][8  ][1   ...

The schedule is a pure function of its arguments. Each process computes all of it and reads its own lanes, so the
batches are the same on any number of processes, the position of the data is one number (the tick), and the tokens of a
window can be counted without communication.

An epoch is dealt when a tick in it is asked for, about 0.3 s for a million documents, and a few epochs are held. What is
kept for good is where each epoch found the lanes, so any epoch can be dealt again. Within an epoch the first ticks of its
deals only grow, which makes a tick a matter of bisection. Of a large corpus both are on disk, too: where all epochs found
the lanes, and the last epochs themselves.
"""

import hashlib
import os
import time
import zlib
from bisect import bisect_right
from collections import OrderedDict
from contextlib import suppress
from heapq import heapreplace
from pathlib import Path
from threading import RLock
from typing import Callable, NamedTuple, Sequence

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from memformer_dist.data.sampler import EpochSampler, Source

DEALS_AT_ONCE = 1_000_000
EPOCHS_HELD = 3
CACHE_FROM = 100_000  # deals of an epoch; fewer are dealt in no time


def deals_of_a_block(lanes: int) -> int:
    """Deals between two notes of what the lanes read: so many that the notes take no more room than the deals."""
    return max(512, 4 * lanes)


class LaneTick(NamedTuple):
    """What the G lanes read at one tick."""

    document: np.ndarray  # int64 [G], -1 on a lane that has run dry (finite schedules)
    segment: np.ndarray  # int64 [G], counted from the document's start; 0 on a dry lane
    epoch: np.ndarray  # int64 [G], -1 on a dry lane
    reset: np.ndarray  # bool [G], the document's first segment


class LaneSpans(NamedTuple):
    """Consecutive segments of one document on one lane. Several stretches, int64 [stretches] each."""

    lane: np.ndarray
    document: np.ndarray
    segment: np.ndarray  # the first one
    tick: np.ndarray  # of the first one
    ticks: np.ndarray  # how many there are


class Deals(NamedTuple):
    """An epoch, dealt."""

    document: np.ndarray  # uint32 [deals]
    lane: np.ndarray  # uint32 [deals]
    start: np.ndarray  # int64 [deals], first ticks; they do not fall
    before: np.ndarray  # int64 [blocks, 3, G], before each block of deals: document, epoch and first tick of the lanes
    free: np.ndarray  # int64 [G], the heap behind the last deal
    reading: np.ndarray  # int64 [3, G] behind the last deal


class Found(NamedTuple):
    """How an epoch finds the lanes."""

    free: np.ndarray  # int64 [G], a heap of tick * G + lane, when and which lane is free: ties go to the lowest lane
    reading: np.ndarray  # int64 [3, G]: document, epoch and first tick of each lane's last deal


class LaneSchedule:
    """The schedule of documents of `lengths` tokens on `lanes` lanes, endless or of some `epochs`.

    order   documents that an epoch deals; a permutation of all of them, unless given
    cache   a folder in which large epochs are kept, under a hash of what they depend on; `key` then names the order

    What `at` and `stretches` answer does not depend on what was asked before. Safe to use from several threads.
    """

    def __init__(
        self,
        lengths: np.ndarray,  # int [documents], at least 1 each
        *,
        seed: int = 0,
        lanes: int,
        segment_length: int,
        epochs: int | None = None,
        order: Callable[[int], np.ndarray] | None = None,
        cache: Path | None = None,
        key: str = "",
    ):
        assert len(lengths) > 0 and np.min(lengths) > 0 and lanes > 0 and segment_length > 0
        self.lanes = lanes
        self.segment_length = segment_length
        self.segments = -(-np.asarray(lengths, np.int64) // segment_length)  # [documents], segments of each
        self._order = order or EpochSampler([Source(np.arange(len(lengths)))], seed=seed)
        self._epochs = epochs
        self._block = deals_of_a_block(lanes)
        self._cache = cache
        facts = f"1 {lanes} {segment_length} {seed} {key} {zlib.crc32(self.segments)} {len(lengths)}"
        self._key = hashlib.sha256(facts.encode()).hexdigest()[:32]
        reading = np.tile(np.array([[-1], [-1], [0]]), lanes)
        self._found = [Found(np.arange(lanes), reading)]  # by epoch
        self._first_ticks = [0]  # of each epoch of _found
        self._held: OrderedDict[int, Deals] = OrderedDict()
        self._deals_held = 0
        self._lock = RLock()
        if kept := self._load("starts", Found._fields):
            for start in map(Found, *kept.values()):
                self._add(start)

    def at(self, tick: int) -> LaneTick:
        document, epoch, start = self._reading(tick)
        segment = tick - start
        dry = (document < 0) | (segment >= self.segments[document])
        document[dry] = epoch[dry] = -1
        segment[dry] = 0
        return LaneTick(document, segment, epoch, (segment == 0) & ~dry)

    def spans(self, start: int, stop: int, lanes: range | None = None) -> LaneSpans:
        """What some lanes (all unless given) read in start <= tick < stop, in the order in which it begins."""
        lanes = range(self.lanes) if lanes is None else lanes
        document, _, tick = self._reading(start)[:, lanes.start : lanes.stop]
        columns = [(np.arange(lanes.start, lanes.stop), document, tick)]
        for epoch in range(self._epoch_at(start), self._epoch_at(stop - 1) + 1):
            deals = self._deals(epoch)
            within = slice(*np.searchsorted(deals.start, [start + 1, stop]))
            lane = deals.lane[within].astype(np.int64)
            chosen = (lane >= lanes.start) & (lane < lanes.stop)
            column = lane, deals.document[within].astype(np.int64), deals.start[within]
            columns.append(tuple(x[chosen] for x in column))
        lane, document, tick = map(np.concatenate, zip(*columns))
        first = np.maximum(tick, start)
        spans = LaneSpans(lane, document, first - tick, first, np.minimum(tick + self.segments[document], stop) - first)
        live = (document >= 0) & (spans.ticks > 0)
        return LaneSpans(*(column[live] for column in spans))

    def documents(self, epoch: int) -> np.ndarray:
        """uint32 [deals]: what an epoch deals, in its order."""
        with self._lock:
            for earlier in range(len(self._found) - 1, epoch):
                self._deals(earlier)
            return self._deals(epoch).document

    @property
    def ticks(self) -> int:
        """Ticks until every lane has run dry. Raises ValueError if the schedule is endless."""
        if self._epochs is None:
            raise ValueError("an endless schedule has no number of ticks")
        for epoch in range(self._epochs):
            free = self._deals(epoch).free
        return int(free.max()) // self.lanes

    def concurrent_copies(self) -> int:
        """How many lanes at most read the same document at once, in the first epochs.

        More than 1 means that there are many lanes for so few documents, or one very long document.
        """
        # Those that the lanes hold at first, and the next one.
        epochs = min(self.lanes // len(self.segments) + 2, self._epochs or 2**62)
        dealt = [self._deals(epoch) for epoch in range(epochs)]
        if not sum(len(deals.lane) for deals in dealt):  # little weight on few documents: epochs may deal none
            return 0
        document = np.concatenate([deals.document for deals in dealt]).astype(np.int64)
        start = np.concatenate([deals.start for deals in dealt])
        end = start + self.segments[document]
        span = int(end.max()) + 1
        starts, ends = np.sort(document * span + start), np.sort(document * span + end)
        # At each start: so many copies of this and all smaller documents have begun, less those that have ended.
        return int((np.arange(1, len(starts) + 1) - np.searchsorted(ends, starts, side="right")).max())

    def _epoch_at(self, tick: int) -> int:
        """The last epoch with a deal that starts at `tick` or before."""
        with self._lock:
            known = len(self._first_ticks) - 1  # the epochs that were dealt once
            while self._first_ticks[known] <= tick and known != self._epochs:
                self._deals(known)
                known += 1
        epoch = bisect_right(self._first_ticks, tick) - 1
        return epoch if self._epochs is None else min(epoch, self._epochs - 1)

    def _reading(self, tick: int) -> np.ndarray:
        """int64 [3, G]: document, epoch and first tick of the last deal of each lane that starts at `tick` or before."""
        epoch = self._epoch_at(tick)
        deals = self._deals(epoch)
        number = int(np.searchsorted(deals.start, tick, side="right"))
        block = max(number - 1, 0) // self._block
        some = slice(block * self._block, number)
        reading = deals.before[block].copy()
        self._apply(reading, epoch, deals.document[some], deals.lane[some], deals.start[some])
        return reading

    @staticmethod
    def _apply(reading: np.ndarray, epoch: int, document: np.ndarray, lane: np.ndarray, start: np.ndarray) -> None:
        reading[0, lane] = document  # of a lane's deals the last one stays
        reading[1, lane] = epoch
        reading[2, lane] = start

    def _deals(self, epoch: int) -> Deals:
        """Of an epoch whose predecessor was dealt once."""
        with self._lock:
            deals = self._held.pop(epoch, None)
            if deals is None:
                kept = self._load(f"{epoch:06d}", Deals._fields)
                deals = Deals(**kept) if kept else self._deal(epoch)
                self._deals_held += len(deals.lane)
            self._held[epoch] = deals
            while len(self._held) > EPOCHS_HELD and self._deals_held > DEALS_AT_ONCE:
                _, gone = self._held.popitem(last=False)
                self._deals_held -= len(gone.lane)
            if epoch + 1 == len(self._found):
                self._add(Found(deals.free, deals.reading))
                if len(deals.lane) >= CACHE_FROM:
                    columns = (np.stack(column) for column in zip(*self._found[1:]))
                    self._store("starts", dict(zip(Found._fields, columns)))
            return deals

    def _add(self, found: Found) -> None:
        self._found.append(found)
        self._first_ticks.append(int(found.free.min()) // self.lanes)

    def _deal(self, epoch: int) -> Deals:
        order = self._order(epoch)
        keys = np.empty(len(order), np.int64)
        free, reading = self._found[epoch].free.tolist(), self._found[epoch].reading.copy()
        for first in range(0, len(order), DEALS_AT_ONCE):
            steps = self.segments[order[first : first + DEALS_AT_ONCE]] * self.lanes
            # The lane that is free first takes the document and is free again when it has read it.
            keys[first : first + len(steps)] = [heapreplace(free, free[0] + step) for step in steps.tolist()]
        start, lane = np.divmod(keys, self.lanes)
        before = []
        for first in range(0, max(len(order), 1), self._block):
            before.append(reading.copy())
            some = slice(first, first + self._block)
            self._apply(reading, epoch, order[some], lane[some], start[some])
        document, lane = order.astype(np.uint32), lane.astype(np.uint32)
        deals = Deals(document, lane, start, np.stack(before), np.array(free), reading)
        if len(order) >= CACHE_FROM:
            self._store(f"{epoch:06d}", deals._asdict())
            self._remove_old(epoch)
        return deals

    # ---- what is kept on disk: <key>-000003.safetensors, an epoch; <key>-starts.safetensors, what the epochs found ------

    def _file(self, name: str) -> Path:
        return self._cache / f"{self._key}-{name}.safetensors"

    def _load(self, name: str, columns: Sequence[str]) -> dict[str, np.ndarray] | None:
        """What is damaged is as good as not there."""
        if self._cache is None:
            return None
        try:
            with safe_open(self._file(name), "numpy") as file:
                found = {column: file.get_tensor(column) for column in columns}
                whole = file.metadata()["crc32"] == _crc32(found)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return found if whole else None

    def _store(self, name: str, columns: dict[str, np.ndarray]) -> None:
        """A folder that cannot be written to has no cache; nothing is lost but time."""
        if self._cache is None:
            return
        file = self._file(name)
        partial = file.with_name(f"{file.name}.{os.uname().nodename}-{os.getpid()}")
        try:
            file.parent.mkdir(exist_ok=True)
            partial.write_bytes(save(columns, metadata={"crc32": _crc32(columns)}))  # save_file keeps it from others
            partial.rename(file)
        except (OSError, SafetensorError):
            with suppress(OSError):
                partial.unlink()

    def _remove_old(self, epoch: int) -> None:
        """Of the epochs, the last ones stay: where a run goes on. What an hour ago was not finished never will be."""
        if self._cache is None:
            return
        with suppress(OSError):
            for file in self._cache.glob(f"{self._key}-[0-9]*.safetensors"):
                if int(file.stem.rpartition("-")[2]) <= epoch - EPOCHS_HELD:
                    file.unlink(missing_ok=True)
            for partial in self._cache.glob(f"{self._key}-*.safetensors.*"):
                if partial.stat().st_mtime < time.time() - 3600:
                    partial.unlink(missing_ok=True)


def _crc32(columns: dict[str, np.ndarray]) -> str:
    value = 0
    for column in columns.values():
        value = zlib.crc32(np.ascontiguousarray(column).view(np.uint8).reshape(-1), value)
    return f"{value:08x}"
