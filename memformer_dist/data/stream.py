"""Stream: all documents of a dataset as one text, joined by EOS and cut evenly among the lanes.

    stream = Stream(corpus, parts=16)
    schedule = LaneSchedule(stream.lengths, lanes=16, segment_length=64)

This is how papers on WikiText-103 read it. A part of the text takes the place of a document: a lane reads it from end
to end, with a reset where it begins, and every part is dealt once per epoch. Within a part nothing is reset: documents
run on through memory and context, and the first token of a document is predicted from the EOS before it.
"""

from pathlib import Path

import numpy as np

from memformer_dist.data.dataset import Spans, TokenDataset
from memformer_dist.data.sampler import WeightedDocuments
from memformer_dist.errors import UserError


class Stream:
    """A TokenDataset of `parts` documents, each a part of the text.

    The text ends with the last token of the last document: tokens + documents - 1 tokens. Weights of a Mixture have no
    effect.
    """

    def __init__(self, dataset: TokenDataset, parts: int):
        """Raises UserError where there are loss masks, or fewer tokens than parts."""
        if dataset.has_mask:
            raise UserError('data.mode: found "stream" with a corpus of loss masks, expected "documents"')
        self._dataset, self.path, self.fingerprint = dataset, dataset.path, dataset.fingerprint
        self.folder, self.is_remote, self.has_mask = dataset.folder, dataset.is_remote, False
        self.vocabulary, self.token_dtype = dataset.vocabulary, dataset.token_dtype
        self.shard_ends: np.ndarray | None = None  # the parts are shuffled, not the shards
        self._ends = np.cumsum(dataset.lengths + 1)  # of the documents in the text, each with the EOS behind it
        self.total_tokens = int(self._ends[-1]) - 1
        if self.total_tokens < parts:
            raise UserError(f"data.lanes: {parts} lanes for a text of {self.total_tokens} tokens; expected fewer lanes")
        bounds = np.arange(parts + 1) * self.total_tokens // parts
        self._starts, self.lengths = bounds[:-1], np.diff(bounds)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start <= i < stop of a part, a copy."""
        first = int(self._starts[document])
        return self._text(first + start, first + min(stop, int(self.lengths[document])))

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        return np.ones(stop - start, np.uint8)

    def last_labels(self, documents: np.ndarray) -> np.ndarray:
        """The first token of the next part; EOS at the end of the text."""
        following = (self._starts + self.lengths)[documents].tolist()
        return np.array([self._text(place, place + 1)[0] for place in following], np.int64)

    def labels_in(self, spans: Spans) -> int:
        return int((spans.stop - spans.start).sum())

    def check(self, spans: Spans) -> None:
        self._dataset.check(self._documents_of(spans))

    def prefetch(self, spans: Spans) -> None:
        self._dataset.prefetch(self._documents_of(spans))

    def place(self, document: int) -> tuple[str, int]:
        """The place of the document that the part begins in."""
        return self._dataset.place(int(np.searchsorted(self._ends, self._starts[document], side="right")))

    def sources(self, min_tokens: int = 1) -> list[WeightedDocuments]:
        """All parts, whatever `min_tokens`."""
        return [WeightedDocuments(np.arange(len(self.lengths)))]

    def tokenizer(self) -> Path:
        return self._dataset.tokenizer()

    def _documents_of(self, spans: Spans) -> Spans:
        """The whole documents that spans of parts, and the token behind each span, lie in."""
        first, last = (
            np.searchsorted(self._ends, self._starts[spans.document] + x, side="right")
            for x in (spans.start, spans.stop)
        )
        runs = [np.arange(a, min(b + 1, len(self._ends))) for a, b in zip(first, last)]
        numbers = np.unique(np.concatenate(runs)) if runs else np.empty(0, np.int64)
        return Spans(numbers, np.zeros_like(numbers), self._dataset.lengths[numbers])

    def _text(self, start: int, stop: int) -> np.ndarray:
        """What stands between two positions, in the dtype of the shards."""
        text = np.full(stop - start, self.vocabulary.eos_id, self.token_dtype)
        number = int(np.searchsorted(self._ends, start, side="right"))
        while number < len(self._ends):
            length = int(self._dataset.lengths[number])
            first = int(self._ends[number]) - length - 1  # of the document, in the text
            if first >= stop:
                break
            begin, end = max(start - first, 0), min(stop - first, length)
            if begin < end:
                text[first + begin - start : first + end - start] = self._dataset.tokens(number, begin, end)
            number += 1
        return text
