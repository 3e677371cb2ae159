"""Which documents an epoch deals, and in which order: a pure function of the seed and the epoch's number.

    order = EpochOrder([Source(np.arange(0, 900)), Source(np.arange(900, 1000), weight=Fraction(1, 2))], seed=0)
    order(epoch=3)  # 950 numbers of documents

A source of weight w has its documents dealt w times an epoch. Where w is no whole number the rest is a share that moves
on from epoch to epoch through a permutation of its own: with 1/2 each document is dealt in every second epoch, with 5/2
twice or three times in turn. After e epochs a source of n documents was dealt floor(e w n) times, none of its documents
more than once oftener than another.
"""

import math
from fractions import Fraction
from typing import NamedTuple, Sequence

import numpy as np


class Source(NamedTuple):
    """Documents that are mixed in with one weight."""

    documents: np.ndarray  # int64 [n], their numbers
    weight: Fraction = Fraction(1)


class EpochSampler:
    """The order of all epochs.

    shard_ends, shuffle_shards: shuffle within groups of so many shards, in a random order of the shards, instead of
    through the whole epoch, so that shards that are far away are fetched once an epoch. `shard_ends` int64 [shards]: the
    number of documents up to the end of each.
    """

    def __init__(
        self,
        sources: Sequence[Source],
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
            shards = len(self._shard_ends)
            place = self._generator(epoch, len(self._sources), 0).permutation(shards)  # of each shard in the epoch
            group = place[np.searchsorted(self._shard_ends, drawn, side="right")] // self._shuffle_shards
            order = order[np.argsort(group[order], kind="stable")]
        return drawn[order]

    def _draw(self, number: int, epoch: int) -> np.ndarray:
        """The documents of a source that belong to an epoch; those of its own whole rounds in their own order."""
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
