"""What a run reads, made of its `data` section: the documents and their lane schedule.

train, valid = open_data({"corpora/books": 1, "corpora/code": 0.5}, mode="documents", lanes=16)
schedule = lane_schedule(train, seed=0, lanes=16, segment_length=64)
"""

from typing import Literal, NamedTuple

from memformer_dist.data.corpus import Corpus
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.mixture import Mixture, open_mixture
from memformer_dist.data.sampler import EpochSampler
from memformer_dist.data.stream import Stream
from memformer_dist.errors import UserError

Mode = Literal["documents", "stream"]


def open_data(corpora: dict[str, float], *, mode: Mode, lanes: int, **cache) -> tuple:
    """The training and the validation documents of corpora by folder or URL; of a stream as many parts as lanes.

    `cache` as open_corpora takes it. Raises UserError as it does.
    """
    return tuple(as_read(split, mode, lanes) for split in open_mixture(corpora, **cache))


def as_read(corpus: Corpus | Mixture, mode: Mode, lanes: int) -> Corpus | Mixture | Stream:
    return Stream(corpus, lanes) if mode == "stream" else corpus


def lane_schedule(
    corpus: Corpus | Mixture | Stream,
    *,
    seed: int,
    lanes: int,
    segment_length: int,
    min_tokens: int = 1,
    shuffle_shards: int | None = None,
) -> LaneSchedule:
    """The endless schedule of training. Epochs of many documents are kept beside the index.

    Raises UserError if no document has `min_tokens`, or the weights leave less than one to an epoch.
    """
    sources = corpus.sources(min_tokens)
    dealt = sum(source.weight * len(source.documents) for source in sources)
    if dealt < 1:
        raise UserError(
            f"data.corpus: an epoch deals {float(dealt):.2g} documents; expected weights that make at least 1"
        )
    order = EpochSampler(sources, seed=seed, shard_ends=corpus.shard_ends, shuffle_shards=shuffle_shards)
    return LaneSchedule(
        corpus.lengths,
        seed=seed,
        lanes=lanes,
        segment_length=segment_length,
        order=order,
        cache=corpus.folder / "schedules",
        key=f"{corpus.fingerprint} {min_tokens} {shuffle_shards}",
    )


class Epoch(NamedTuple):
    """The first epoch of a schedule."""

    documents: int
    tokens: int
    padding: float  # share of the positions


def first_epoch(corpus: Corpus | Mixture | Stream, schedule: LaneSchedule) -> Epoch:
    documents = schedule.documents(0)
    tokens = int(corpus.lengths[documents].sum())
    positions = int(schedule.segments[documents].sum()) * schedule.segment_length
    return Epoch(len(documents), tokens, 1 - tokens / positions if positions else 0.0)
