"""SegmentReader: the segments of some lanes at a tick, cut from the documents that the schedule names.

    segments = SegmentReader(corpus, LaneSchedule(corpus.lengths, seed=0, lanes=16, segment_length=64))
    segments.read(tick=0, lanes=range(0, 8)).tokens  # int64 [8, 64]

Text is copied from the shards in chunks of some ticks, because a lane mostly stays within one document for so long:
copying many segments in a row takes hardly longer than copying one. A segment is cut from its chunk and widened to
int64.
"""

import weakref
from collections import OrderedDict, defaultdict
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from memformer_dist.data.dataset import Spans, TokenDataset
from memformer_dist.data.lanes import LaneSchedule, LaneSpans
from memformer_dist.errors import CorpusError
from memformer_dist.segment import IGNORE, Segment

CHUNK_BYTES, CHUNK_TICKS = 2**22, 64  # at most, unless one tick takes more bytes
CHUNKS_HELD = 4


class PaddedRow(NamedTuple):
    """A row of a segment in which its document ends, or of a lane that has run dry."""

    start: int  # of the padding, counted through the B S places of the segment
    stop: int  # of the padding
    last_label: int  # what the last token before the padding predicts; IGNORE on a dry lane


class Chunk(NamedTuple):
    """Some ticks of B lanes as they lie in the corpus.

    text         uint16 or uint32 [B, ticks S + 1], with the token behind the last one; undefined where documents end
    mask         uint8 [B, ticks S]; None where the dataset has no masks
    padded_rows  by tick
    columns      by tick: the columns of a segment except tokens and labels
    """

    text: np.ndarray
    mask: np.ndarray | None
    padded_rows: list[list[PaddedRow]]
    columns: list[tuple[torch.Tensor, ...]]


class RecycledMemory:
    """Hands out arrays, and takes their memory back when nothing refers to them any more, neither a view nor a tensor.

    In fresh memory every page costs a page fault, which takes longer than filling the page.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[tuple[int, ...], np.dtype], list[memoryview]] = defaultdict(list)
        self._lent: dict[int, tuple[memoryview, weakref.ref[np.ndarray]]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with undefined content."""
        free = self._free[shape, dtype]
        memory = free.pop() if free else np.empty(shape, dtype).data
        lent = np.asarray(memory)  # numpy's views keep this array alive, because its memory belongs to no array
        key = id(memory)
        self._lent[key] = memory, weakref.ref(lent, lambda gone: free.append(self._lent.pop(key)[0]))
        return lent


class SegmentReader:
    """Reads segments of any lanes of a schedule. Safe to use from several threads."""

    def __init__(self, dataset: TokenDataset, schedule: LaneSchedule):
        self.dataset, self.schedule = dataset, schedule
        self._memory = RecycledMemory()
        self._chunks: OrderedDict[tuple[range, int], Chunk] = OrderedDict()
        self._lock = Lock()

    def read(self, tick: int, lanes: range) -> Segment:
        """The segment of `lanes` (global numbers) at a tick, on the CPU.

        Each document is compared with its crc32 the first time. Raises CorpusError.
        """
        chunk, k = self._chunk_of(tick, lanes)
        rows, size = len(lanes), self.schedule.segment_length
        start, stop = k * size, (k + 1) * size
        both = self._memory.take((2 * rows * size,), np.dtype(np.int64))
        tokens, labels = both.reshape(2, rows, size)
        tokens[:], labels[:] = chunk.text[:, start:stop], chunk.text[:, start + 1 : stop + 1]
        behind = tokens.size  # the labels lie behind the tokens
        for first, end, last_label in chunk.padded_rows[k]:
            both[first:end], both[behind + first : behind + end] = 0, IGNORE
            if last_label != IGNORE:
                both[behind + first - 1] = last_label
        if chunk.mask is not None:
            labels[chunk.mask[:, start:stop] == 0] = IGNORE
        return Segment(torch.from_numpy(tokens), torch.from_numpy(labels), *chunk.columns[k])

    def read_chunk(self, tick: int, lanes: range) -> None:
        """Read the chunk that a tick lies in, so that `read` finds it in memory. Raises CorpusError."""
        self._chunk_of(tick, lanes)

    def chunk_ticks(self, lanes: range) -> int:
        """Ticks in a chunk of some lanes."""
        ticks = CHUNK_BYTES // (len(lanes) * self.schedule.segment_length * self.dataset.token_dtype.itemsize)
        return max(1, min(ticks, CHUNK_TICKS))

    def spans(self, start: int, stop: int, lanes: range | None = None) -> Spans:
        """The tokens that lanes (by default all of the schedule) read in start <= tick < stop, in the order of need."""
        return self.token_spans(self.schedule.spans(start, stop, lanes))

    def token_spans(self, spans: LaneSpans) -> Spans:
        """The tokens that runs of segments read."""
        size = self.schedule.segment_length
        start = spans.segment * size
        stop = np.minimum(start + spans.ticks * size, self.dataset.lengths[spans.document])
        return Spans(spans.document, start, stop)

    def _chunk_of(self, tick: int, lanes: range) -> tuple[Chunk, int]:
        """The chunk that a tick lies in, and the tick's place in it."""
        ticks = self.chunk_ticks(lanes)
        number, k = divmod(tick, ticks)
        with self._lock:
            chunk = self._chunks.pop((lanes, number), None)
            if chunk is None:
                try:
                    chunk = self._read(number * ticks, (number + 1) * ticks, lanes)
                except CorpusError:  # perhaps of a document that other ticks of the chunk read
                    return self._read(tick, tick + 1, lanes), 0
            self._chunks[lanes, number] = chunk
            if len(self._chunks) > CHUNKS_HELD:
                self._chunks.popitem(last=False)
        return chunk, k

    def _read(self, start: int, stop: int, lanes: range) -> Chunk:
        """A chunk of the ticks start <= tick < stop."""
        spans = self.schedule.spans(start, stop, lanes)
        tokens = self.token_spans(spans)
        self.dataset.check(tokens)
        here = spans._replace(lane=spans.lane - lanes.start, tick=spans.tick - start)
        rows, ticks = len(lanes), stop - start
        return Chunk(*self._copy(here, tokens, rows, ticks), *self._columns(here, rows, ticks))

    def _copy(self, spans: LaneSpans, tokens: Spans, rows: int, ticks: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Text and mask of a chunk. `spans`: lanes and ticks counted from its first ones; `tokens`: what they read."""
        size = self.schedule.segment_length
        width = ticks * size + 1
        document, first, last = tokens
        # One more token, for the last label. Where the document ends there is none, and the next one begins there.
        stop = np.minimum(last + 1, self.dataset.lengths[document])
        at = spans.lane * width + spans.tick * size
        text, read = self._memory.take((rows * width,), self.dataset.token_dtype), self.dataset.tokens
        for number, i, j, begin, end in zip(*(x.tolist() for x in (document, first, stop, at, at + stop - first))):
            text[begin:end] = read(number, i, j)
        mask = None
        if self.dataset.has_mask:
            mask = np.zeros((rows, width - 1), np.uint8)
            places = spans.lane, spans.tick * size, document, first, last
            for row, begin, number, i, j in zip(*(x.tolist() for x in places)):
                mask[row, begin : begin + j - i] = self.dataset.mask(number, i, j)
        return text.reshape(rows, width), mask

    def _columns(
        self, spans: LaneSpans, rows: int, ticks: int
    ) -> tuple[list[list[PaddedRow]], list[tuple[torch.Tensor, ...]]]:
        """Padded rows and columns of a chunk. `spans`: lanes and ticks counted from its first ones."""
        size, count = self.schedule.segment_length, spans.ticks
        within = np.arange(count.sum()) - np.repeat(
            np.cumsum(count) - count, count
        )  # the place of each segment in its span
        cell = np.repeat(spans.tick * rows + spans.lane, count) + within * rows
        document, offset, left = (np.full(ticks * rows, value) for value in (-1, 0, 0))  # as on a lane that has run dry
        document[cell] = np.repeat(spans.document, count)
        offset[cell] = (np.repeat(spans.segment, count) + within) * size
        left[cell] = (
            np.repeat(self.dataset.lengths[spans.document], count) - offset[cell]
        )  # tokens to the document's end
        length = np.minimum(left, size)
        ending = np.flatnonzero(left <= size)
        last_label, live = np.full(len(ending), IGNORE), left[ending] > 0
        last_label[live] = self.dataset.last_labels(document[ending[live]])
        tick, row = np.divmod(ending, rows)
        padded_rows: list[list[PaddedRow]] = [[] for _ in range(ticks)]
        places = tick, row * size + length[ending], (row + 1) * size, last_label
        for k, start, stop, label in zip(*(x.tolist() for x in places)):
            padded_rows[k].append(PaddedRow(start, stop, label))
        columns = length, (offset == 0) & (left > 0), np.zeros(len(left), bool), document, offset
        return padded_rows, list(zip(*(torch.from_numpy(column.reshape(ticks, rows)).unbind() for column in columns)))
