"""TokenDataset: what the reader and the schedule of lanes need to know about documents.

A Corpus, a Mixture of several corpora and a Stream (all documents as one text) are TokenDatasets. Documents are
numbered from 0; their tokens are addressed as Spans.

    spans = Spans(np.array([7, 7]), start=np.array([0, 64]), stop=np.array([64, 100]))
    dataset.check(spans)
    dataset.tokens(7, 0, 64)
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from memformer_dist.data.sampler import WeightedDocuments
from memformer_dist.vocabulary import Vocabulary


class Spans(NamedTuple):
    """Stretches of tokens: start <= i < stop of a document. int64 [spans] each."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class TokenDataset(Protocol):
    """Documents of token ids, read at random."""

    lengths: np.ndarray  # int64 [documents], tokens of each document
    vocabulary: Vocabulary
    token_dtype: np.dtype  # of `tokens`: uint16 or uint32, little-endian
    fingerprint: str  # sha256 that stands for all tokens, masks and weights
    total_tokens: int
    has_mask: bool  # loss masks say which labels count
    is_remote: bool  # shards are fetched from elsewhere: `prefetch` is worth its time
    path: str | Path  # what messages call the dataset
    folder: Path  # on this machine: where schedules are stored
    shard_ends: np.ndarray | None  # int64 [shards], documents up to the end of each; None where shards are not shuffled

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start <= i < stop of a document, fewer where it ends before: `token_dtype` [tokens], read-only."""
        ...

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """uint8 [tokens], 1 where the label at that token counts in the loss. To be called only where `has_mask`."""
        ...

    def last_labels(self, documents: np.ndarray) -> np.ndarray:
        """int64 [n]: the labels of the last tokens of documents, int64 [n]."""
        ...

    def labels_in(self, spans: Spans) -> int:
        """How many labels count in the loss over all spans. Reads the masks where there are some."""
        ...

    def check(self, spans: Spans) -> None:
        """Fetch the shards of spans if necessary, and compare each document with its crc32 the first time.

        To be called before spans are read.

        Raises CorpusError where a document is damaged, or its shard cannot be had or has changed while it was read.
        """
        ...

    def prefetch(self, spans: Spans) -> None:
        """Start fetching the remote shards that these spans lie in, in their order; they are read next.

        Raises CorpusError where the cache folder cannot be used.
        """
        ...

    def place(self, document: int) -> tuple[str, int]:
        """Where a document lies: the shard, as messages call it, and the byte in it at which the tokens start."""
        ...

    def sources(self, min_tokens: int = 1) -> list[WeightedDocuments]:
        """What each epoch is drawn from: the documents of at least `min_tokens` tokens.

        Raises UserError where a corpus has none.
        """
        ...

    def tokenizer(self) -> Path:
        """The file of the tokenizer that the dataset was made with, on this machine.

        Raises UserError where it is missing or another one.
        """
        ...
