"""LaneSchedule: which segment of which document each lane reads at each tick.

B global lanes, fixed by the configuration and independent of the number of processes, each read one document after the
other, one segment of S tokens per tick. Each epoch is a seeded permutation of the documents (sampler.py), dealt like
cards: the next document goes to the lane that is free first; of several, to the lowest. No lane waits at the end of an
epoch, so lanes may be in different epochs.

    tick        0    1    2    3    4    5    6
    lane 0     [document 7  ][2  ][document 5   ...
    lane 1     [4  ][document 0       ][8  ][1   ...

The schedule is a pure function of its arguments. Each process computes all of it and reads its own lanes, so the
batches are the same on any number of processes, the position of the data is one number (the tick), and the tokens of a
window can be counted without communication.

An epoch is dealt when a tick in it is asked for first, about 0.3 s for a million documents, and a few epochs stay in
memory. Where each epoch found the lanes is kept for good, so that any epoch can be dealt again on its own. Within an
epoch the first ticks of the deals never fall, so a tick is found by bisection. For large corpora schedule_store.py
keeps both on disk: where all epochs found the lanes, and the last epochs themselves.
"""

import hashlib
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from heapq import heapreplace
from pathlib import Path
from threading import RLock
from typing import NamedTuple

import numpy as np

from memformer_dist.data.sampler import EpochSampler, WeightedDocuments
from memformer_dist.data.schedule_store import ScheduleStore

DEALS_AT_ONCE = 1_000_000
EPOCHS_HELD = 3
STORED_FROM = 100_000  # deals in an epoch: dealing fewer is faster than reading them from a disk


def deals_per_block(lanes: int) -> int:
    """Deals between two records of what the lanes read; so many that the records take no more room than the deals."""
    return max(512, 4 * lanes)


class LaneTick(NamedTuple):
    """What the B lanes read at one tick."""

    document: np.ndarray  # int64 [B], -1 on a lane that has run dry (finite schedules)
    segment: np.ndarray  # int64 [B], counted from the document's start; 0 on a dry lane
    epoch: np.ndarray  # int64 [B], -1 on a dry lane
    reset: np.ndarray  # bool [B], the document's first segment


class LaneSpans(NamedTuple):
    """Runs of consecutive segments of one document on one lane, int64 [spans] each."""

    lane: np.ndarray
    document: np.ndarray
    segment: np.ndarray  # the first one
    tick: np.ndarray  # of the first one
    ticks: np.ndarray  # how many there are


class Deals(NamedTuple):
    """An epoch, dealt. The names are those of the columns on disk."""

    document: np.ndarray  # uint32 [deals]
    lane: np.ndarray  # uint32 [deals]
    start: np.ndarray  # int64 [deals], first ticks, in ascending order
    before: np.ndarray  # int64 [blocks, 3, B], before each block of deals: document, epoch and first tick of the lanes
    free: np.ndarray  # int64 [lanes that read], the heap after the last deal
    reading: np.ndarray  # int64 [3, B] after the last deal


class EpochStart(NamedTuple):
    """Which lanes are free, and when, as an epoch starts. The names are those of the columns on disk."""

    free: (
        np.ndarray
    )  # int64 [lanes that read], a heap of tick * B + lane, when and which lane is free: ties go to the lowest lane
    reading: np.ndarray  # int64 [3, B]: document, epoch and first tick of each lane's last deal


class LaneSchedule:
    """The schedule of documents of `lengths` tokens on `lanes` lanes, endless unless `epochs` is given.

    order      the documents that an epoch deals, int64 [deals]; by default a permutation of all of them
    store      folder in which large epochs are stored, under a hash of all that they depend on (schedule_store.py)
    order_key  stands for `order` in that hash
    dealt      how many of the lanes read, the first ones; by default all. The others are dry from the start

    Queries do not depend on those before them. Safe to use from several threads.
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
        store: Path | None = None,
        order_key: str = "",
        dealt: int | None = None,
    ):
        assert min(lanes, segment_length, len(lengths), np.min(lengths, initial=1)) > 0
        assert dealt is None or (0 < dealt <= lanes and store is None)
        self.lanes = lanes
        self.segment_length = segment_length
        self.segments = -(-np.asarray(lengths, np.int64) // segment_length)  # [documents], segments of each
        self._order = order or EpochSampler([WeightedDocuments(np.arange(len(lengths)))], seed=seed)
        self._epochs = epochs
        self._block = deals_per_block(lanes)
        facts = f"1 {lanes} {segment_length} {seed} {order_key} {zlib.crc32(self.segments.data)} {len(lengths)}"
        key = hashlib.sha256(facts.encode()).hexdigest()[:32]
        self._store = None if store is None else ScheduleStore(store, key)
        reading = np.tile(np.array([[-1], [-1], [0]]), lanes)
        self._starts = [
            EpochStart(np.arange(dealt or lanes), reading)
        ]  # by epoch, as far as epochs were dealt, and the next one
        self._first_ticks = [0]  # of each epoch of _starts
        self._held: OrderedDict[int, Deals] = OrderedDict()
        self._deals_held = 0
        self._lock = RLock()
        if stored := self._load("starts", EpochStart._fields):
            for start in map(EpochStart, *stored.values()):
                self._add_start(start)

    def at(self, tick: int) -> LaneTick:
        """What every lane reads at a tick."""
        document, epoch, start = self._reading(tick)
        segment = tick - start
        dry = (document < 0) | (segment >= self.segments[document])
        document[dry] = epoch[dry] = -1
        segment[dry] = 0
        return LaneTick(document, segment, epoch, (segment == 0) & ~dry)

    def spans(self, start: int, stop: int, lanes: range | None = None) -> LaneSpans:
        """What `lanes` (by default all) read in start <= tick < stop, in the order in which they begin to."""
        lanes = range(self.lanes) if lanes is None else lanes
        document, _, tick = self._reading(start)[:, lanes.start : lanes.stop]
        columns: list[tuple[np.ndarray, ...]] = [(np.arange(lanes.start, lanes.stop), document, tick)]
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
        """uint32 [deals]: the documents of an epoch in the order of dealing."""
        with self._lock:
            for earlier in range(len(self._starts) - 1, epoch):
                self._deals(earlier)
            return self._deals(epoch).document

    @property
    def ticks(self) -> int:
        """Ticks until every lane has run dry. Raises ValueError where the schedule is endless."""
        if self._epochs is None:
            raise ValueError("an endless schedule has no number of ticks")
        for epoch in range(self._epochs):
            free = self._deals(epoch).free
        return int(free.max()) // self.lanes

    def concurrent_copies(self) -> int:
        """The largest number of lanes that read one document at the same tick, in the first epochs.

        More than 1 means too many lanes for the number of documents, or one very long document.
        """
        # The epochs that it takes to give each lane a document, and the one after them.
        epochs = min(self.lanes // len(self.segments) + 2, self._epochs or 2**62)
        dealt = [self._deals(epoch) for epoch in range(epochs)]
        if not sum(len(deals.lane) for deals in dealt):  # small weights on few documents: an epoch may deal none
            return 0
        document = np.concatenate([deals.document for deals in dealt]).astype(np.int64)
        start = np.concatenate([deals.start for deals in dealt])
        end = start + self.segments[document]
        span = int(end.max()) + 1
        starts, ends = np.sort(document * span + start), np.sort(document * span + end)
        # At each start: the copies of this and all smaller documents that have begun, less those that have ended.
        return int((np.arange(1, len(starts) + 1) - np.searchsorted(ends, starts, side="right")).max())

    def _epoch_at(self, tick: int) -> int:
        """The last epoch with a deal that starts at or before `tick`."""
        with self._lock:
            known = len(self._first_ticks) - 1  # epochs that have been dealt
            while self._first_ticks[known] <= tick and known != self._epochs:
                self._deals(known)
                known += 1
        epoch = bisect_right(self._first_ticks, tick) - 1
        return epoch if self._epochs is None else min(epoch, self._epochs - 1)

    def _reading(self, tick: int) -> np.ndarray:
        """int64 [3, B]: document, epoch and first tick of each lane's last deal that starts at or before `tick`."""
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
        reading[0, lane] = document  # where a lane occurs several times, its last deal stays
        reading[1, lane] = epoch
        reading[2, lane] = start

    def _deals(self, epoch: int) -> Deals:
        """The deals of an epoch whose start is known: from memory, from the disk, or dealt."""
        with self._lock:
            deals = self._held.pop(epoch, None)
            if deals is None:
                stored = self._load(_name(epoch), Deals._fields)
                deals = Deals(**stored) if stored else self._deal(epoch)
                self._deals_held += len(deals.lane)
            self._held[epoch] = deals
            while len(self._held) > EPOCHS_HELD and self._deals_held > DEALS_AT_ONCE:
                _, dropped = self._held.popitem(last=False)
                self._deals_held -= len(dropped.lane)
            if epoch + 1 == len(self._starts):
                self._add_start(EpochStart(deals.free, deals.reading))
                if self._store and len(deals.lane) >= STORED_FROM:
                    columns = (np.stack(column) for column in zip(*self._starts[1:]))
                    self._store.save("starts", dict(zip(EpochStart._fields, columns)))
            return deals

    def _add_start(self, start: EpochStart) -> None:
        self._starts.append(start)
        self._first_ticks.append(int(start.free.min()) // self.lanes)

    def _deal(self, epoch: int) -> Deals:
        order = self._order(epoch)
        keys = np.empty(len(order), np.int64)
        free, reading = self._starts[epoch].free.tolist(), self._starts[epoch].reading.copy()
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
        if self._store and len(order) >= STORED_FROM:
            self._store.save(_name(epoch), deals._asdict())
            self._store.remove_epochs_before(epoch + 1 - EPOCHS_HELD)  # a run resumes in one of the last epochs
        return deals

    def _load(self, name: str, columns: tuple[str, ...]) -> dict[str, np.ndarray] | None:
        return self._store.load(name, columns) if self._store else None


def _name(epoch: int) -> str:
    """What the store calls an epoch."""
    return f"{epoch:06d}"
