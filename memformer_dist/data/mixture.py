"""Mixture: several corpora as one dataset, mixed by weights.

    train, valid = open_mixture({"corpora/books": 1, "corpora/code": 0.5})  # in open_data.py

A weight is how often the documents of a corpus are dealt per epoch: 2 is twice, 0.5 every second epoch (sampler.py), so
proportions are exact in documents. Documents are numbered consecutively, one corpus after the other. Validation reads
every document of every corpus once, whatever the weights.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from memformer_dist.data.corpus import Corpus
from memformer_dist.data.dataset import Spans
from memformer_dist.data.sampler import WeightedDocuments
from memformer_dist.errors import UserError


class Mixture:
    """A TokenDataset of corpora, with a weight for each."""

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[Fraction]):
        """Raises UserError where the corpora were made with different tokenizers."""
        first = corpora[0]
        for corpus in corpora[1:]:
            found, expected = corpus.vocabulary.tokenizer_sha256, first.vocabulary.tokenizer_sha256
            if found != expected:
                raise UserError(
                    f"data.corpus: {corpus.path} was made with another tokenizer than {first.path}: sha256"
                    f" {found[:16]} and {expected[:16]}"
                )
        self._corpora, self._weights = corpora, weights
        self.path: str | Path = " + ".join(str(corpus.path) for corpus in corpora)
        self.folder, self.is_remote = first.folder, any(corpus.is_remote for corpus in corpora)
        self.vocabulary, self.token_dtype = first.vocabulary, first.token_dtype
        self.has_mask = any(corpus.has_mask for corpus in corpora)
        self.total_tokens = sum(corpus.total_tokens for corpus in corpora)
        self.lengths = np.concatenate([corpus.lengths for corpus in corpora])
        self._ends = np.cumsum([len(corpus.lengths) for corpus in corpora])
        self._starts = self._ends - [len(corpus.lengths) for corpus in corpora]
        ends = [corpus.shard_ends + start for corpus, start in zip(corpora, self._starts)]
        self.shard_ends: np.ndarray | None = np.concatenate(ends)
        facts = [[corpus.fingerprint, str(weight)] for corpus, weight in zip(corpora, weights)]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        corpus, number = self._find(document)
        return corpus.tokens(number, start, stop)

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Ones for a corpus without masks."""
        corpus, number = self._find(document)
        return corpus.mask(number, start, stop) if corpus.has_mask else np.ones(stop - start, np.uint8)

    def last_labels(self, documents: np.ndarray) -> np.ndarray:
        return np.full(len(documents), self.vocabulary.eos_id)

    def labels_in(self, spans: Spans) -> int:
        return sum(corpus.labels_in(part) for corpus, part in self._by_corpus(spans))

    def check(self, spans: Spans) -> None:
        for corpus, part in self._by_corpus(spans):
            corpus.check(part)

    def prefetch(self, spans: Spans) -> None:
        for corpus, part in self._by_corpus(spans):
            corpus.prefetch(part)

    def place(self, document: int) -> tuple[str, int]:
        corpus, number = self._find(document)
        return corpus.place(number)

    def sources(self, min_tokens: int = 1) -> list[WeightedDocuments]:
        return [
            WeightedDocuments(source.documents + start, weight)
            for corpus, start, weight in zip(self._corpora, self._starts, self._weights)
            for source in corpus.sources(min_tokens)
        ]

    def tokenizer(self) -> Path:
        return self._corpora[0].tokenizer()

    def _find(self, document: int) -> tuple[Corpus, int]:
        """The corpus of a document, and its number there."""
        which = int(np.searchsorted(self._ends, document, side="right"))
        return self._corpora[which], document - int(self._starts[which])

    def _by_corpus(self, spans: Spans) -> Iterator[tuple[Corpus, Spans]]:
        """Each corpus with its spans, perhaps none."""
        which = np.searchsorted(self._ends, spans.document, side="right")
        for number, (corpus, first) in enumerate(zip(self._corpora, self._starts)):
            mine = which == number
            yield corpus, Spans(spans.document[mine] - first, spans.start[mine], spans.stop[mine])
