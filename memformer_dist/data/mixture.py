"""Several corpora as one, mixed by weights.

    train, valid = open_mixture({"corpora/books": 1, "corpora/code": 0.5})

A weight is how often the documents of a corpus are dealt in an epoch: 2 is twice, 0.5 every second time (order.py), so
proportions are exact in documents. Documents are numbered through, one corpus after the other. Validation reads every
document of every corpus once.
"""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np

from memformer_dist.data.corpus import Corpus, open_corpora
from memformer_dist.data.sampler import Source
from memformer_dist.errors import UserError


class Mixture:
    """Answers as a Corpus does."""

    def __init__(self, corpora: list[Corpus], weights: list[Fraction]):
        """Raises UserError where the corpora were made with different tokenizers."""
        first = corpora[0]
        for corpus in corpora[1:]:
            if corpus.tokenizer_sha256 != first.tokenizer_sha256:
                raise UserError(
                    f"data.corpus: {corpus.path} was made with another tokenizer than {first.path}: sha256"
                    f" {corpus.tokenizer_sha256[:16]} and {first.tokenizer_sha256[:16]}"
                )
        self._corpora, self._weights = corpora, weights
        self.folder, self.is_remote = first.folder, any(corpus.is_remote for corpus in corpora)
        self.path = " + ".join(str(corpus.path) for corpus in corpora)
        self.vocab_size, self.bos_id, self.eos_id = first.vocab_size, first.bos_id, first.eos_id
        self.token_dtype = first.token_dtype
        self.tokenizer_sha256, self.has_mask = first.tokenizer_sha256, any(corpus.has_mask for corpus in corpora)
        self.total_tokens = sum(corpus.total_tokens for corpus in corpora)
        self.lengths = np.concatenate([corpus.lengths for corpus in corpora])
        self._ends = np.cumsum([len(corpus.lengths) for corpus in corpora])
        self._starts = self._ends - [len(corpus.lengths) for corpus in corpora]
        self.shard_ends = np.concatenate([c.shard_ends + start for c, start in zip(corpora, self._starts)])
        facts = [[corpus.fingerprint, str(weight)] for corpus, weight in zip(corpora, weights)]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def sources(self, min_tokens: int = 1) -> list[Source]:
        return [
            Source(source.documents + start, weight)
            for corpus, start, weight in zip(self._corpora, self._starts, self._weights)
            for source in corpus.sources(min_tokens)
        ]

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        corpus, number = self._of(document)
        return corpus.tokens(number, start, stop)

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        corpus, number = self._of(document)
        return corpus.mask(number, start, stop) if corpus.has_mask else np.ones(stop - start, np.uint8)

    def last_labels(self, document: np.ndarray) -> np.ndarray:
        return np.full(len(document), self.eos_id)

    def labels_between(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> int:
        return sum(corpus.labels_between(*places) for corpus, places in self._split(document, start, stop))

    def check(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
        for corpus, places in self._split(document, start, stop):
            corpus.check(*places)

    def expect(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
        for corpus, places in self._split(document, start, stop):
            corpus.expect(*places)

    def tokenizer(self) -> Path:
        return self._corpora[0].tokenizer()

    def place(self, document: int) -> tuple[str, int]:
        corpus, number = self._of(document)
        return corpus.place(number)

    def _of(self, document: int) -> tuple[Corpus, int]:
        which = int(np.searchsorted(self._ends, document, side="right"))
        return self._corpora[which], document - int(self._starts[which])

    def _split(self, document: np.ndarray, *columns: np.ndarray):
        which = np.searchsorted(self._ends, document, side="right")
        for number, (corpus, first) in enumerate(zip(self._corpora, self._starts)):
            mine = which == number
            yield corpus, (document[mine] - first, *(column[mine] for column in columns))


def open_mixture(weights: dict[str, float], **cache) -> tuple[Corpus | Mixture, Corpus | Mixture]:
    """The training and the validation split of corpora by folder or URL; further arguments as open_corpora takes them.

    Raises UserError as open_corpora does.
    """
    train, valid = zip(*(open_corpora(corpus, **cache) for corpus in weights))
    exact = [Fraction(str(weight)) for weight in weights.values()]
    if exact == [1]:
        return train[0], valid[0]
    return Mixture(list(train), exact), valid[0] if len(valid) == 1 else Mixture(
        list(valid), [Fraction(1)] * len(valid)
    )
