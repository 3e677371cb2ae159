"""Pieces: long documents, cut so that all lanes of an evaluation have something to read.

    pieces = cut(corpus, lanes=16, segment_length=64, warmup_segments=8, ticks=7212)
    schedule = LaneSchedule(pieces.lengths, lanes=16, segment_length=64, epochs=1, order=pieces.order)
    segment = pieces.in_documents(reader.segment(tick))  # numbers and offsets are those of the documents

A lane reads a document from its beginning to its end, so that one long book keeps one lane busy while the others idle.
Here documents are laid end to end, and cut where a lane has enough:

    lane 0     [document 0          ][document 1    |
    lane 1      ~~~~|   document 1                  |
    lane 2      ~~~~|   ... document 1   ][document 2 ]

A piece that begins inside its document is read from `warmup_segments` earlier on (~~~~), as if a document began there.
The labels of these segments are masked, so that every label counts exactly once. What differs from reading the document
as a whole is what the state holds of the text before: at a piece's first label that of the warm-up alone. For a cell
that forgets within so many segments nothing differs.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from memformer_dist.data.dataset import Spans, TokenDataset
from memformer_dist.data.sampler import WeightedDocuments
from memformer_dist.segment import Segment

WORTH_A_CUT = 0.9  # of the ticks at most: a cut changes figures a little


class Layout(NamedTuple):
    """Pieces in the order in which lanes begin to read them. int64 [pieces] each, in segments of their documents."""

    document: np.ndarray
    start: np.ndarray  # the first one that is read
    first: np.ndarray  # the first one that counts
    stop: np.ndarray


class Pieces:
    """A TokenDataset whose documents are the pieces of another one's."""

    def __init__(self, dataset: TokenDataset, layout: Layout, segment_length: int):
        self._dataset, self.path, self.fingerprint = dataset, dataset.path, dataset.fingerprint
        self.folder, self.is_remote = dataset.folder, dataset.is_remote
        self.vocabulary, self.token_dtype = dataset.vocabulary, dataset.token_dtype
        self.total_tokens = dataset.total_tokens
        self.shard_ends: np.ndarray | None = None
        self.document = layout.document
        self._offset = layout.start * segment_length  # [pieces], the first token's place in its document
        self._masked = (layout.first - layout.start) * segment_length  # [pieces], tokens whose labels do not count
        whole = dataset.lengths[self.document]
        self._end = np.minimum(layout.stop * segment_length, whole)  # [pieces], place behind the last token
        self._ends_document = self._end == whole
        self.lengths = self._end - self._offset
        self.has_mask = dataset.has_mask or bool(self._masked.any())

    def order(self, epoch: int) -> np.ndarray:
        """For LaneSchedule: pieces are dealt in the order of their numbers."""
        return np.arange(len(self.lengths))

    def in_documents(self, segment: Segment) -> Segment:
        """With numbers and offsets of documents instead of pieces; dry lanes stay as they are."""
        live, piece = segment.length > 0, segment.document.numpy()
        document, offset = (torch.from_numpy(x[piece]) for x in (self.document, self._offset))
        return segment._replace(
            document=torch.where(live, document, segment.document),
            offset=torch.where(live, segment.offset + offset, segment.offset),
        )

    def documents_of(self, pieces: np.ndarray) -> np.ndarray:
        """The documents of pieces, int64 [n]; -1, a lane that reads nothing, stays."""
        return np.where(pieces < 0, pieces, self.document[pieces])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        first = int(self._offset[document])
        return self._dataset.tokens(
            int(self.document[document]), first + start, min(first + stop, int(self._end[document]))
        )

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        first = int(self._offset[document])
        if self._dataset.has_mask:
            mask = self._dataset.mask(int(self.document[document]), first + start, first + stop).copy()
        else:
            mask = np.ones(stop - start, np.uint8)
        mask[: max(0, int(self._masked[document]) - start)] = 0
        return mask

    def last_labels(self, documents: np.ndarray) -> np.ndarray:
        """Of a piece that ends inside its document, the token behind it."""
        labels = self._dataset.last_labels(self.document[documents])
        for n in np.flatnonzero(~self._ends_document[documents]).tolist():
            piece = documents[n]
            behind = int(self._end[piece])
            labels[n] = self._dataset.tokens(int(self.document[piece]), behind, behind + 1)[0]
        return labels

    def labels_in(self, spans: Spans) -> int:
        start = np.minimum(np.maximum(spans.start, self._masked[spans.document]), spans.stop)
        return self._dataset.labels_in(self._in_documents(spans._replace(start=start)))

    def check(self, spans: Spans) -> None:
        self._dataset.check(self._in_documents(spans))

    def prefetch(self, spans: Spans) -> None:
        self._dataset.prefetch(self._in_documents(spans))

    def place(self, document: int) -> tuple[str, int]:
        return self._dataset.place(int(self.document[document]))

    def sources(self, min_tokens: int = 1) -> list[WeightedDocuments]:
        return [WeightedDocuments(np.arange(len(self.lengths)))]

    def tokenizer(self) -> Path:
        return self._dataset.tokenizer()

    def _in_documents(self, spans: Spans) -> Spans:
        offset = self._offset[spans.document]
        return Spans(self.document[spans.document], spans.start + offset, spans.stop + offset)


def cut(dataset: TokenDataset, *, lanes: int, segment_length: int, warmup_segments: int, ticks: int) -> Pieces | None:
    """The documents in pieces that `lanes` lanes read in as few ticks as possible.

    Args:
        ticks: what it takes without a cut. None is returned where cuts would save less than a tenth of them.
    """
    segments = -(-dataset.lengths // segment_length)
    layout = lay_out(segments, lanes, warmup_segments, int(ticks * WORTH_A_CUT))
    return None if layout is None else Pieces(dataset, layout, segment_length)


def lay_out(segments: np.ndarray, lanes: int, warmup: int, most_ticks: int) -> Layout | None:
    """The layout of fewest ticks, warm-up included; None where it takes more than `most_ticks`.

    Args:
        segments: int64 [documents], of each.
    """
    ends = np.cumsum(segments)
    best, low = None, -(-int(ends[-1]) // lanes)
    while low <= most_ticks:
        ticks = (low + most_ticks) // 2
        bounds = _lane_bounds(ends, lanes, warmup, ticks)
        if bounds is None:
            low = ticks + 1
        else:
            best, most_ticks = bounds, ticks - 1
    return None if best is None else _layout(ends, best, warmup)


def _lane_bounds(ends: np.ndarray, lanes: int, warmup: int, ticks: int) -> list[int] | None:
    """Where the lanes begin, and the last of them ends, in the line of all documents' segments, one behind the other.

    None where lanes of so many ticks are too few. `ends`: of the documents in that line.
    """
    bounds = [0]
    while bounds[-1] < ends[-1]:
        begin = bounds[-1]
        stop = begin + ticks - (warmup if begin > _start(ends, begin) else 0)
        if stop < ends[-1]:
            start = _start(ends, stop)
            if start < stop <= start + warmup:  # the warm-up would read again all that lies before the cut
                stop = start
        if stop <= begin or len(bounds) > lanes:
            return None
        bounds.append(min(stop, int(ends[-1])))
    return bounds


def _start(ends: np.ndarray, place: int) -> int:
    """Where the document begins that a place in the line of segments belongs to."""
    document = int(np.searchsorted(ends, place, side="right"))
    return int(ends[document - 1]) if document else 0


def _layout(ends: np.ndarray, bounds: list[int], warmup: int) -> Layout:
    """The documents, cut at the bounds of lanes. A lane deals itself what comes next in this order, or is done earlier."""
    edges = np.union1d(np.append(0, ends), bounds)
    first, stop = edges[:-1], edges[1:]
    document = np.searchsorted(ends, first, side="right")
    begins = np.append(0, ends)[document]  # of the documents
    start = np.where(first > begins, first - warmup, first)
    lane = np.searchsorted(bounds, first, side="right") - 1
    lane_begins = np.array(bounds)[lane]
    cut = np.isin(lane_begins, ends, invert=True) & (lane_begins > 0)
    tick = np.where(first == lane_begins, 0, first - lane_begins + np.where(cut, warmup, 0))
    order = np.lexsort((lane, tick))
    return Layout(*(x[order] for x in (document, start - begins, first - begins, stop - begins)))
