"""A run may stop at any tick and resume on any number of ranks: the batches are those of the run that was left alone."""

import random
from fractions import Fraction

import numpy as np
import pytest

from memformer_dist.data import segments
from memformer_dist.data.mixture import Mixture
from memformer_dist.data.open_data import lane_schedule
from memformer_dist.data.stream import Stream
from memformer_dist.data.windows import WindowReader
from memformer_dist.segment import concatenate
from tests.helpers.corpora import random_split

LANES, WORLD_SIZES, OFFSETS, TICKS = 12, (1, 2, 3, 4, 6, 12), 500, 600


def random_corpus(folder, seed):
    """A corpus, a mixture, a stream, or a corpus whose shards are shuffled in groups; its schedule's settings."""
    generator = random.Random(seed)

    def some(name):
        lengths = [generator.choice((1, 3, 9, 40)) + generator.randrange(6) for _ in range(generator.randint(13, 60))]
        return random_split(folder / name, lengths, masked=name == "masked", seed=seed)[0]

    kind = ("masked", "mixture", "stream", "grouped")[seed % 4]
    settings = dict(seed=seed, lanes=LANES, segment_length=generator.randint(2, 9))
    if kind == "mixture":
        return Mixture([some("a"), some("b")], [Fraction(1), Fraction(3, 7)]), settings | {"min_tokens": 4}
    if kind == "stream":
        return Stream(some("a"), LANES), settings
    return some(kind), settings | ({"shuffle_shards": 2} if kind == "grouped" else {})


def read(corpus, schedule, world_size, tick):
    """What ranks that have just started read, one after the other."""
    share = LANES // world_size
    readers = [WindowReader(corpus, schedule, lanes=range(first, first + share)) for first in range(0, LANES, share)]
    return concatenate([reader.segment(tick) for reader in readers]), (
        readers[-1].labels(tick, tick + 3),
        readers[-1].counts(tick, tick + 3),
    )


def same(one, other):
    return one[1] == other[1] and all(np.array_equal(a, b) for a, b in zip(one[0], other[0], strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_any_number_of_ranks_reads_the_same_from_any_tick_on(tmp_path, monkeypatch, seed):
    corpus, settings = random_corpus(tmp_path, seed)
    alone = WindowReader(corpus, lane_schedule(corpus, **settings), lanes=range(LANES))
    expected = [
        (alone.segment(tick), (alone.labels(tick, tick + 3), alone.counts(tick, tick + 3))) for tick in range(TICKS)
    ]
    epochs = int(alone.schedule.at(TICKS - 1).epoch.max())
    assert epochs >= 2 and len({row[1] for row in expected}) > 1, "a test of several epochs"
    monkeypatch.setattr(segments, "CHUNK_TICKS", 1)
    for tick in random.Random(seed).sample(range(TICKS), -(-OFFSETS // 8)):
        schedule = lane_schedule(corpus, **settings)  # of a process that has just started
        for world_size in WORLD_SIZES:
            assert same(read(corpus, schedule, world_size, tick), expected[tick]), (tick, world_size)
    other = lane_schedule(corpus, **settings | {"seed": seed + 1})  # the control
    assert not all(same(read(corpus, other, 1, tick), expected[tick]) for tick in range(0, 40, 4))
