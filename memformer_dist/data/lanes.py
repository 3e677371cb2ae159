"""The lane schedule: which segment of which document every lane reads at every tick.

G lanes, fixed by the configuration and independent of the number of processes, each read one document after the other,
a segment of S tokens a tick. Every epoch is a seeded permutation of the documents, dealt like cards: the next document
goes to the lane that is free first, of several to the lowest. No lane waits at the end of an epoch, so lanes may be in
different epochs.

    tick        0    1    2    3    4    5    6
    lane 0     [document 7  ][2  ][document 5   ...
    lane 1     [4  ][document 0       ][8  ][1   ...

The schedule is a pure function of its arguments. Each process computes all of it and reads its own lanes, so the
batches are the same on any number of processes, the position of the data is one number (the tick), and the tokens of a
window can be counted without communication.
"""

import heapq
from bisect import bisect_right
from threading import Lock
from typing import NamedTuple

import numpy as np

DEALS_PER_BLOCK = 4096


class LaneTick(NamedTuple):
    """What the G lanes read at one tick."""

    document: np.ndarray  # int64 [G], -1 on a lane that has run dry (finite schedules)
    segment: np.ndarray  # int64 [G], counted from the document's start; 0 on a dry lane
    epoch: np.ndarray  # int64 [G], -1 on a dry lane
    reset: np.ndarray  # bool [G], the document's first segment


class Block(NamedTuple):
    """Consecutive deals, ordered by the tick they start at, and what the lanes read before them."""

    lane: np.ndarray  # int64 [deals]
    deals: np.ndarray  # int64 [3, deals]: document, epoch, first tick
    before: np.ndarray  # int64 [3, G]: the same of the lanes' last deals


class LaneSchedule:
    """The schedule of documents of `lengths` tokens on `lanes` lanes, endless or of some `epochs`.

    Documents are dealt on demand and kept in blocks; a tick is looked up in its block, so that `at` costs the same
    wherever it looks and does not depend on what was asked before. Safe to use from several threads.
    """

    def __init__(self, lengths: np.ndarray, *, seed: int, lanes: int, segment_length: int, epochs: int | None = None):
        assert len(lengths) > 0 and np.min(lengths) > 0 and lanes > 0 and segment_length > 0
        self.lanes = lanes
        self.segment_length = segment_length
        self.segments = -(-np.asarray(lengths, np.int64) // segment_length)  # [documents], segments of each
        self._seed = seed
        self._epochs = epochs
        # The tick at which each lane is free, with ties going to the lowest lane, as one integer: tick * lanes + lane.
        self._free = list(range(lanes))
        self._dealt = 0
        self._blocks: list[Block] = []
        self._block_starts: list[int] = []  # the first tick of each block
        self._reading = np.tile(np.array([[-1], [-1], [0]]), lanes)  # [3, G]: document, epoch, first tick
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))  # an epoch and its permutation
        self._lock = Lock()

    def at(self, tick: int) -> LaneTick:
        self._deal_until(tick)
        block = self._blocks[bisect_right(self._block_starts, tick) - 1]
        started = np.searchsorted(block.deals[2], tick, side="right")
        reading = block.before.copy()
        reading[:, block.lane[:started]] = block.deals[:, :started]  # of a lane's deals the last one stays
        document, epoch, start = reading
        segment = tick - start
        dry = (document < 0) | (segment >= self.segments[document])
        document[dry] = epoch[dry] = -1
        segment[dry] = 0
        return LaneTick(document, segment, epoch, (segment == 0) & ~dry)

    @property
    def ticks(self) -> int:
        """Ticks until every lane has run dry. Raises ValueError if the schedule is endless."""
        if self._epochs is None:
            raise ValueError("an endless schedule has no number of ticks")
        self._deal_documents(self._epochs * len(self.segments))
        return max(self._free) // self.lanes

    def concurrent_copies(self) -> int:
        """How many lanes at most read the same document at once, in the first epochs.

        More than 1 means that there are many lanes for so few documents, or one very long document.
        """
        documents = len(self.segments)
        # Those that the lanes hold at first, and the next one.
        epochs = min(self.lanes // documents + 2, self._epochs or 2**62)
        self._deal_documents(epochs * documents)
        deals = np.concatenate([block.deals for block in self._blocks], axis=1)[:, : epochs * documents]
        start = np.empty((epochs, documents), np.int64)
        start[deals[1], deals[0]] = deals[2]
        return max(
            int((start[: epoch + 1] + self.segments > start[epoch]).sum(axis=0).max()) for epoch in range(epochs)
        )

    def _deal_until(self, tick: int) -> None:
        """Deal all documents that start at `tick` or before."""
        with self._lock:
            while self._free[0] // self.lanes <= tick and self._deal_block():
                pass

    def _deal_documents(self, number: int) -> None:
        with self._lock:
            while self._dealt < number and self._deal_block():
                pass

    def _deal_block(self) -> bool:
        """False if all epochs are dealt."""
        document, epoch = self._next_documents()
        if not len(document):
            return False
        keys = []
        for step in (self.segments[document] * self.lanes).tolist():
            key = self._free[0]
            keys.append(key)
            heapq.heapreplace(self._free, key + step)
        start, lane = np.divmod(np.array(keys), self.lanes)
        block = Block(lane, np.stack([document, epoch, start]), self._reading.copy())
        self._reading[:, lane] = block.deals
        self._blocks.append(block)
        self._block_starts.append(keys[0] // self.lanes)
        self._dealt += len(document)
        return True

    def _next_documents(self) -> tuple[np.ndarray, np.ndarray]:
        """The next documents to deal and their epochs, int64 [<= DEALS_PER_BLOCK] each."""
        documents = len(self.segments)
        stop = self._dealt + DEALS_PER_BLOCK
        if self._epochs is not None:
            stop = min(stop, self._epochs * documents)
        epoch, place = np.divmod(np.arange(self._dealt, stop), documents)
        permutations = [self._permutation(e)[place[epoch == e]] for e in np.unique(epoch)]
        return np.concatenate([np.empty(0, np.int64), *permutations]), epoch

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch])))
            self._order = (epoch, generator.permutation(len(self.segments)))
        return self._order[1]
