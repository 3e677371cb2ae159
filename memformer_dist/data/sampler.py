"""EpochSampler: which documents each epoch deals and in which order, a pure function of seed and epoch.

    sampler = EpochSampler(
        [WeightedDocuments(np.arange(0, 900)), WeightedDocuments(np.arange(900, 1000), weight=Fraction(1, 2))], seed=0
    )
    sampler(epoch=3)  # the numbers of 950 documents

Documents of weight w are dealt w times per epoch. Where w is not a whole number, some of them are dealt once more than
the others; which ones moves on from epoch to epoch through a permutation of its own. With 1/2 each document is dealt in
every second epoch, with 5/2 twice or three times in turn. After e epochs, n documents of weight w have been dealt
floor(e w n) times, and the counts of any two of them differ by at most 1.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np


class WeightedDocuments(NamedTuple):
    """Documents that are mixed in with one weight."""

    documents: np.ndarray  # int64 [n], their numbers
    weight: Fraction = Fraction(1)  # how often each of them is dealt per epoch


class EpochSampler:
    """The documents of every epoch in the order of dealing.

    sources         at least one of them has documents and a weight above 0
    shuffle_shards  shuffle within groups of this many shards instead of through the whole epoch, so that remote shards
                    are fetched once per epoch; each epoch forms other groups and reads them in another order
    shard_ends      int64 [shards], documents up to the end of each shard; needed with `shuffle_shards`
    """

    def __init__(
        self,
        sources: Sequence[WeightedDocuments],
        *,
        seed: int,
        shard_ends: np.ndarray | None = None,
        shuffle_shards: int | None = None,
    ):
        assert any(len(source.documents) and source.weight > 0 for source in sources)
        self._sources, self._seed = sources, seed
        self._shard_ends, self._shuffle_shards = shard_ends, shuffle_shards

    def __call__(self, epoch: int) -> np.ndarray:
        """int64 [documents dealt in the epoch], in the order of dealing."""
        drawn = np.concatenate([self._draw(number, epoch) for number in range(len(self._sources))])
        order = self._generator(epoch).permutation(len(drawn))
        if self._shuffle_shards is not None:
            assert self._shard_ends is not None
            shards = len(self._shard_ends)
            place = self._generator(epoch, len(self._sources), 0).permutation(shards)  # of each shard in the epoch
            group = place[np.searchsorted(self._shard_ends, drawn, side="right")] // self._shuffle_shards
            order = order[np.argsort(group[order], kind="stable")]
        return drawn[order]

    def _draw(self, number: int, epoch: int) -> np.ndarray:
        """int64 [documents dealt]: those of one source in an epoch, not shuffled yet."""
        documents, weight = self._sources[number]
        size = len(documents)
        start, stop = (math.floor(e * weight * size) for e in (epoch, epoch + 1))
        drawn = [np.empty(0, np.int64)]
        while start < stop:
            own_epoch, first = divmod(start, size)
            last = min(first + stop - start, size)
            if (first, last) == (0, size):
                drawn.append(documents)
            else:
                drawn.append(documents[self._generator(own_epoch, number, 1).permutation(size)[first:last]])
            start += last - first
        return np.concatenate(drawn)

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, *numbers])))
