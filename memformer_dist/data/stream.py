"""All documents of a corpus as one text, as papers on WikiText-103 read it: joined by EOS, cut evenly among the lanes.

    stream = Stream(corpus, parts=16)
    schedule = LaneSchedule(stream.lengths, lanes=16, segment_length=64)

A part of the text is what a document is elsewhere: a lane reads it from end to end and resets where it begins. The rest is
as always: every part is dealt once an epoch, positions are ticks. Within a part nothing is reset, documents run on through
memory and context, and the first token of a document is predicted from the EOS before it.
"""

from pathlib import Path

import numpy as np

from memformer_dist.data.corpus import Corpus
from memformer_dist.data.mixture import Mixture
from memformer_dist.data.sampler import Source
from memformer_dist.errors import UserError


class Stream:
    """Answers as a Corpus does, of `parts` documents. The text ends with its last document: T = tokens + documents - 1."""

    def __init__(self, corpus: Corpus | Mixture, parts: int):
        """The weights of a Mixture do not count. Raises UserError for loss masks, and for fewer tokens than parts."""
        if corpus.has_mask:
            raise UserError('data.mode: "stream" joins documents, which loss masks are not made for; use "documents"')
        self._corpus, self.path, self.fingerprint = corpus, corpus.path, corpus.fingerprint
        self.vocab_size, self.bos_id, self.eos_id = corpus.vocab_size, corpus.bos_id, corpus.eos_id
        self.folder, self.is_remote, self.token_dtype = corpus.folder, corpus.is_remote, corpus.token_dtype
        self.shard_ends = None  # the parts are shuffled, not the shards
        self.tokenizer_sha256, self.has_mask = corpus.tokenizer_sha256, False
        self._ends = np.cumsum(corpus.lengths + 1)  # of the documents in the text, each with the EOS behind it
        self.total_tokens = int(self._ends[-1]) - 1
        if self.total_tokens < parts:
            raise UserError(f"data.lanes: {parts} lanes for a text of {self.total_tokens} tokens; expected fewer lanes")
        bounds = np.arange(parts + 1) * self.total_tokens // parts
        self._starts, self.lengths = bounds[:-1], np.diff(bounds)

    def sources(self, min_tokens: int = 1) -> list[Source]:
        return [Source(np.arange(len(self.lengths)))]

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start <= i < stop of a part, a copy."""
        first = int(self._starts[document])
        return self._text(first + start, first + min(stop, int(self.lengths[document])))

    def last_labels(self, document: np.ndarray) -> np.ndarray:
        """The first token of the next part; EOS at the end of the text."""
        following = (self._starts + self.lengths)[document].tolist()
        return np.array([self._text(place, place + 1)[0] for place in following], np.int64)

    def labels_between(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> int:
        return int((stop - start).sum())

    def check(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
        self._corpus.check(*self._whole_documents(document, start, stop))

    def expect(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
        self._corpus.expect(*self._whole_documents(document, start, stop))

    def _whole_documents(self, part: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, ...]:
        """Those that the stretches of the parts, and the token behind each, lie in."""
        first, last = (np.searchsorted(self._ends, self._starts[part] + x, side="right") for x in (start, stop))
        runs = [np.arange(a, min(b + 1, len(self._ends))) for a, b in zip(first, last)]
        numbers = np.unique(np.concatenate(runs)) if runs else np.empty(0, np.int64)
        return numbers, np.zeros_like(numbers), self._corpus.lengths[numbers]

    def tokenizer(self) -> Path:
        return self._corpus.tokenizer()

    def place(self, document: int) -> tuple[str, int]:
        """Of the document that the part begins in."""
        return self._corpus.place(int(np.searchsorted(self._ends, self._starts[document], side="right")))

    def _text(self, start: int, stop: int) -> np.ndarray:
        """What stands between two positions, in the dtype of the shards."""
        text = np.full(stop - start, self.eos_id, self.token_dtype)
        number = int(np.searchsorted(self._ends, start, side="right"))
        while number < len(self._ends):
            length = int(self._corpus.lengths[number])
            first = int(self._ends[number]) - length - 1  # of the document, in the text
            if first >= stop:
                break
            begin, end = max(start - first, 0), min(stop - first, length)
            if begin < end:
                text[first + begin - start : first + end - start] = self._corpus.tokens(number, begin, end)
            number += 1
        return text
