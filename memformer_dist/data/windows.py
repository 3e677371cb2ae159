"""Segments for a process: the lanes of the schedule, filled with tokens from the corpus.

A window is N consecutive ticks. Its segments are made when they are asked for, never a window at a time: the training
loop visits them forwards (rollout), then backwards (replay), and a thread prepares the next few in that order.

    reader = WindowReader(corpus, LaneSchedule(corpus.lengths, seed=0, lanes=16, segment_length=64), lanes=range(0, 8))
    window = reader.window(start_tick=0, segments=8)
    window[0].tokens  # int64 [8, 64]

Text is copied from the shards a chunk of some ticks at a time, in which a lane mostly stays within one document: a copy of
many segments costs hardly more than that of one. A segment is cut from its chunk and widened to int64.
"""

import time
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np
import torch

from memformer_dist.data.lanes import LaneSchedule, LaneSpans
from memformer_dist.errors import CorpusError
from memformer_dist.segment import IGNORE, Segment

CHUNK_BYTES, CHUNK_TICKS = 2**22, 64  # at most, unless one tick has more
CHUNKS_HELD = 4
TICKS_AHEAD = 1024  # of a remote corpus, whose shards are fetched before; as many of them as the cache holds


class TokenDataset(Protocol):
    """What is read: a Corpus, a Mixture of several, a Stream."""

    lengths: np.ndarray  # int64 [documents]
    vocab_size: int
    bos_id: int
    eos_id: int
    tokenizer_sha256: str
    fingerprint: str
    total_tokens: int
    has_mask: bool
    is_remote: bool
    token_dtype: np.dtype

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray: ...
    def mask(self, document: int, start: int, stop: int) -> np.ndarray: ...
    def last_labels(self, document: np.ndarray) -> np.ndarray: ...
    def check(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None: ...
    def expect(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None: ...
    def labels_between(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> int: ...
    def tokenizer(self) -> Path: ...


class Chunk(NamedTuple):
    """K ticks of L lanes as they lie in the corpus.

    text   uint16 or uint32 [L, K S + 1], with the token behind the last one; anything at all where a document has ended
    mask   uint8 [L, K S], where the corpus has masks
    ends   of each tick, for the rows that end their document or have none: where the padding starts and stops in the L S
           places of a segment, and the last label
    rest   of each tick the columns of a segment but tokens and labels
    """

    text: np.ndarray
    mask: np.ndarray | None
    ends: list[list[tuple[int, int, int]]]
    rest: list[tuple[torch.Tensor, ...]]


class RecycledMemory:
    """Arrays whose memory comes back when nothing is left of them, no view and no tensor.

    Asked for anew, the system hands out every page in a fault of its own, which takes longer than filling it.
    """

    def __init__(self):
        self._free: defaultdict[tuple, list[memoryview]] = defaultdict(list)
        self._lent: dict[int, tuple[memoryview, weakref.ref]] = {}

    def take(self, shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
        """With anything in it."""
        free = self._free[shape, dtype]
        memory = free.pop() if free else memoryview(np.empty(shape, dtype))
        lent = np.asarray(memory)  # numpy's views keep it alive, as its memory is no array
        key = id(memory)
        self._lent[key] = memory, weakref.ref(lent, lambda gone: free.append(self._lent.pop(key)[0]))
        return lent


class WindowReader:
    """Reads the global lanes `lanes`.

    wait_s   seconds that callers have waited for segments of windows and for their documents to be checked, in all
    """

    def __init__(self, corpus: TokenDataset, schedule: LaneSchedule, *, lanes: range, prefetch: int = 2):
        assert lanes.step == 1 and 0 <= lanes.start < lanes.stop <= schedule.lanes
        self.corpus = corpus
        self.schedule = schedule
        self.lanes = lanes
        self.prefetch = prefetch
        self.wait_s = 0.0
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="window-reader")
        self._checker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="window-checker")
        self._memory = RecycledMemory()
        self._chunks: OrderedDict[tuple[range, int], Chunk] = OrderedDict()
        self._lock = Lock()  # chunks are asked for by this thread and by the caller's

    def segment(self, tick: int, lanes: range | None = None) -> Segment:
        """The rows of `lanes` (global numbers, all of the reader's unless given) at a tick, on the CPU.

        A document is checked against its crc32 when this process meets it first. Raises CorpusError.
        """
        if lanes is None:
            lanes = self.lanes
        assert lanes.step == 1 and self.lanes.start <= lanes.start < lanes.stop <= self.lanes.stop
        chunk, k = self.chunk_of(tick, lanes)
        rows, size = len(lanes), self.schedule.segment_length
        start, stop = k * size, (k + 1) * size
        both = self._memory.take((2 * rows * size,), np.int64)
        tokens, labels = both.reshape(2, rows, size)
        tokens[:], labels[:] = chunk.text[:, start:stop], chunk.text[:, start + 1 : stop + 1]
        behind = tokens.size  # the labels lie behind the tokens
        for first, end, last_label in chunk.ends[k]:
            both[first:end], both[behind + first : behind + end] = 0, IGNORE
            if last_label != IGNORE:
                both[behind + first - 1] = last_label
        if chunk.mask is not None:
            labels[chunk.mask[:, start:stop] == 0] = IGNORE
        return Segment(torch.from_numpy(tokens), torch.from_numpy(labels), *chunk.rest[k])

    def chunk_ticks(self, lanes: range) -> int:
        """K of the chunks of some lanes."""
        ticks = CHUNK_BYTES // (len(lanes) * self.schedule.segment_length * self.corpus.token_dtype.itemsize)
        return max(1, min(ticks, CHUNK_TICKS))

    def chunk_of(self, tick: int, lanes: range) -> tuple[Chunk, int]:
        """The chunk that a tick lies in, and where."""
        ticks = self.chunk_ticks(lanes)
        number, k = divmod(tick, ticks)
        with self._lock:
            chunk = self._chunks.pop((lanes, number), None)
            if chunk is None:
                try:
                    chunk = self._read(number * ticks, (number + 1) * ticks, lanes)
                except CorpusError:  # perhaps of a document that this tick has nothing to do with
                    return self._read(tick, tick + 1, lanes), 0
            self._chunks[lanes, number] = chunk
            if len(self._chunks) > CHUNKS_HELD:
                self._chunks.popitem(last=False)
        return chunk, k

    def _read(self, start: int, stop: int, lanes: range) -> Chunk:
        """The ticks start <= tick < stop."""
        spans = self.schedule.spans(start, stop, lanes)
        places = self._places(spans)
        self.corpus.check(*places)
        here = spans._replace(lane=spans.lane - lanes.start, tick=spans.tick - start)
        rows, ticks = len(lanes), stop - start
        return Chunk(*self._copy(here, places, rows, ticks), *self._columns(here, rows, ticks))

    def _copy(
        self, spans: LaneSpans, places: tuple[np.ndarray, ...], rows: int, ticks: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Text and mask of a chunk, whose first lane and tick are 0; `places` as `_places` tells them."""
        size = self.schedule.segment_length
        width = ticks * size + 1
        document, first, last = places
        # One more, for the last label. Where the document ends there is none, and the next one begins.
        stop = np.minimum(last + 1, self.corpus.lengths[document])
        at = spans.lane * width + spans.tick * size
        text, tokens = self._memory.take((rows * width,), self.corpus.token_dtype), self.corpus.tokens
        for number, i, j, begin, end in zip(*(x.tolist() for x in (document, first, stop, at, at + stop - first))):
            text[begin:end] = tokens(number, i, j)
        mask = None
        if self.corpus.has_mask:
            mask = np.zeros((rows, width - 1), np.uint8)
            places = spans.lane, spans.tick * size, document, first, last
            for row, begin, number, i, j in zip(*(x.tolist() for x in places)):
                mask[row, begin : begin + j - i] = self.corpus.mask(number, i, j)
        return text.reshape(rows, width), mask

    def _columns(self, spans: LaneSpans, rows: int, ticks: int) -> tuple[list, list]:
        """Ends and the rest of a chunk, whose first lane and tick are 0."""
        size, count = self.schedule.segment_length, spans.ticks
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # each segment in its stretch
        cell = np.repeat(spans.tick * rows + spans.lane, count) + within * rows
        document, offset, left = (np.full(ticks * rows, value) for value in (-1, 0, 0))  # of a lane that has run dry
        document[cell] = np.repeat(spans.document, count)
        offset[cell] = (np.repeat(spans.segment, count) + within) * size
        left[cell] = np.repeat(self.corpus.lengths[spans.document], count) - offset[cell]  # to the document's end
        length = np.minimum(left, size)
        ending = np.flatnonzero(left <= size)
        last_label, live = np.full(len(ending), IGNORE), left[ending] > 0
        last_label[live] = self.corpus.last_labels(document[ending[live]])
        tick, row = np.divmod(ending, rows)
        ends: list[list[tuple[int, int, int]]] = [[] for _ in range(ticks)]
        for k, *end in zip(*(x.tolist() for x in (tick, row * size + length[ending], (row + 1) * size, last_label))):
            ends[k].append(tuple(end))
        rest = length, (offset == 0) & (left > 0), np.zeros(len(left), bool), document, offset
        return ends, list(zip(*(torch.from_numpy(column.reshape(ticks, rows)).unbind() for column in rest)))

    def window(self, start_tick: int, segments: int, lanes: range | None = None) -> "Window":
        return Window(self, start_tick, segments, lanes)

    def valid_tokens(self, start_tick: int, stop_tick: int, lanes: range | None = None) -> int:
        """Labels that count in the loss, over ALL lanes of the schedule unless given, and the ticks start <= tick < stop."""
        return self.corpus.labels_between(*self._places(self.schedule.spans(start_tick, stop_tick, lanes)))

    def expect(self, start_tick: int, stop_tick: int) -> None:
        """Say that the reader's lanes read these ticks next, so that what is far away is fetched ahead of need."""
        if not self.corpus.is_remote:
            return
        self.corpus.expect(*self._places(self.schedule.spans(start_tick, stop_tick, self.lanes)))

    def damage(self, start_tick: int, stop_tick: int, *, ahead: int | None = None) -> str | None:
        """What is wrong with a document that the reader's lanes read in start <= tick < stop, or None.

        Asked before a window, so that all processes can stop together instead of one in the middle of a collective.
        `ahead`: the ticks up to there are read next (see `expect`).
        """
        began = time.perf_counter()
        places = self._places(self.schedule.spans(start_tick, stop_tick, self.lanes))
        try:
            if ahead is not None:
                self.expect(start_tick, ahead)
            self.corpus.check(*places)
        except CorpusError as error:
            return str(error)
        finally:
            self.wait_s += time.perf_counter() - began
        return None

    def look_ahead(self, start_tick: int, stop_tick: int) -> None:
        """Check these documents while something else is done, so that `damage` finds them in memory."""
        places = self._places(self.schedule.spans(start_tick, stop_tick, self.lanes))
        self._checker.submit(self.corpus.check, *places)  # what it raises, `damage` will raise again

    def _places(self, spans: LaneSpans) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document, first token and last + 1 of each stretch, int64 [stretches] each."""
        length = self.schedule.segment_length
        start = spans.segment * length
        stop = np.minimum(start + spans.ticks * length, self.corpus.lengths[spans.document])
        return spans.document, start, stop


class Window(Sequence[Segment]):
    """`segments` consecutive ticks from `start`, each made when it is asked for.

    The order to be quick in is the one of memory replay: 0, 1, ..., N-2, then N-1 down to 0. Any other works.
    """

    def __init__(self, reader: WindowReader, start: int, segments: int, lanes: range | None):
        self.start = start
        self._reader, self._segments = reader, segments
        self._lanes = reader.lanes if lanes is None else lanes
        self._prepared: dict[int, Future[Segment]] = {}
        self._last = -1
        self._prepare_after(-1)

    def __len__(self) -> int:
        return self._segments

    def __getitem__(self, t: int) -> Segment:
        """Raises what reading raised in the thread, e.g. CorpusError."""
        t = range(self._segments)[t]
        begin = time.perf_counter()
        ready = self._prepared.pop(t, None)
        # Going forwards t is the visit number t; going backwards, or asked for again, it is visit 2 (N - 1) - t.
        self._prepare_after(t if t > self._last else 2 * (self._segments - 1) - t)
        self._last = t
        segment = ready.result() if ready else self._reader.segment(self.start + t, self._lanes)
        self._reader.wait_s += time.perf_counter() - begin
        return segment

    def _prepare_after(self, visit: int) -> None:
        if not self._reader.prefetch:
            return
        turn = self._segments - 1
        visits = range(visit + 1, min(visit + 1 + self._reader.prefetch, 2 * turn + 1))
        wanted = [turn - abs(turn - visit) for visit in visits]
        for t in self._prepared.keys() - set(wanted):
            self._prepared.pop(t).cancel()
        for t in wanted:
            if t not in self._prepared:
                self._prepared[t] = self._reader.thread.submit(self._reader.segment, self.start + t, self._lanes)
        # A chunk takes longer than a segment where disks are slow: the one after the next segments' begins now.
        ahead = visit + self._reader.chunk_ticks(self._lanes)
        if ahead <= 2 * turn:
            self._reader.thread.submit(self._reader.chunk_of, self.start + turn - abs(turn - ahead), self._lanes)
