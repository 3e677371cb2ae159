"""Orders of epochs, several corpora as one, and all documents as one text."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer_dist.data.dataset import Spans
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.mixture import Mixture
from memformer_dist.data.open_data import lane_schedule
from memformer_dist.data.sampler import EpochSampler, WeightedDocuments
from memformer_dist.data.stream import Stream
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import UserError
from memformer_dist.segment import IGNORE
from tests.helpers.corpora import EOS, VOCABULARY, random_split

weights = st.sampled_from([Fraction(n) for n in ("1", "2", "1/2", "5/2", "1/3", "0.7", "3")])


# ---- orders --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(sources=st.lists(st.tuples(st.integers(1, 9), weights), min_size=1, max_size=3), seed=st.integers(0, 3))
def test_proportions_are_exact(sources, seed):
    """After every epoch: floor(epochs x weight x documents) of each source, the counts of any two documents at most 1 apart."""
    bounds = np.cumsum([0] + [size for size, _ in sources])
    order = EpochSampler(
        [
            WeightedDocuments(np.arange(a, b), weight)
            for (a, b), (_, weight) in zip(itertools.pairwise(bounds), sources, strict=True)
        ],
        seed=seed,
    )
    dealt = Counter()
    for epoch in range(7):
        dealt.update(order(epoch).tolist())
        assert np.array_equal(order(epoch), order(epoch))
        for (first, last), (size, weight) in zip(itertools.pairwise(bounds), sources, strict=True):
            counts = [dealt[document] for document in range(first, last)]
            assert sum(counts) == (epoch + 1) * weight * size // 1
            assert max(counts) - min(counts) <= 1


def test_one_source_is_a_permutation_by_seed_and_epoch():
    orders = [
        tuple(EpochSampler([WeightedDocuments(np.arange(50))], seed=seed)(epoch))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9 and all(sorted(order) == list(range(50)) for order in orders)


def test_shards_are_read_in_groups():
    ends = np.array([30, 60, 70, 100, 130, 160])
    order = EpochSampler([WeightedDocuments(np.arange(160))], seed=0, shard_ends=ends, shuffle_shards=2)(epoch=1)
    assert sorted(order) == list(range(160)) and list(order) != list(range(160))
    shards = np.searchsorted(ends, order, side="right")
    sizes = np.diff([0, *ends])
    groups, start = [], 0
    while start < len(order):  # each group holds all documents of two shards, and no other
        group = set(shards[start : start + 1]) | set(shards[start : start + 41])
        count = sum(sizes[list(group)])
        assert len(group) == 2 and set(shards[start : start + count]) == group
        groups.append(group)
        start += count
    assert sorted(itertools.chain(*groups)) == list(range(6))
    plain = np.searchsorted(ends, EpochSampler([WeightedDocuments(np.arange(160))], seed=0)(epoch=1), side="right")
    assert len(set(plain[:60])) > 2, "the control"


# ---- mixtures ------------------------------------------------------------------------------------------------------------


def mixture_of(tmp_path, masked=(False, True)):
    made = {"a": ([13, 1, 5, 10], masked[0], 0), "b": ([7, 30, 2], masked[1], 1)}
    parts = [random_split(tmp_path / name, *facts, shard_tokens=20) for name, facts in made.items()]
    mixture = Mixture([corpus for corpus, *_ in parts], [Fraction(1), Fraction(2)])
    return mixture, [d for _, documents, _ in parts for d in documents], [m for *_, masks in parts for m in masks]


def read_epoch(reader, epochs):
    """{document: [labels of each time it was read]}, tokens compared on the way."""
    found, texts = {}, {}
    for tick in range(reader.schedule.ticks):
        segment = reader.segment(tick)
        for row in np.flatnonzero(segment.length.numpy()):
            number, length = int(segment.document[row]), int(segment.length[row])
            if segment.reset[row]:
                found.setdefault(number, []).append([])
                texts.setdefault(number, []).append([])
            found[number][-1] += segment.labels[row, :length].tolist()
            texts[number][-1] += segment.tokens[row, :length].tolist()
    return found, texts


@pytest.mark.parametrize("masked", [(False, False), (False, True)])
def test_a_mixture_reads_each_corpus_by_its_weight(tmp_path, masked):
    mixture, documents, masks = mixture_of(tmp_path, masked)
    order = EpochSampler(mixture.sources(), seed=0)
    schedule = LaneSchedule(mixture.lengths, order=order, lanes=1, segment_length=4, epochs=1)
    reader = WindowReader(mixture, schedule, lanes=range(1))
    labels, texts = read_epoch(reader, 1)
    assert {number: len(times) for number, times in labels.items()} == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    for number, document in enumerate(documents):
        expected = np.where(masks[number], [*document[1:], EOS], IGNORE).tolist()
        assert all(time == expected for time in labels[number])
        assert all(time == document.tolist() for time in texts[number])
    count = sum(label != IGNORE for times in labels.values() for time in times for label in time)
    assert reader.labels(0, schedule.ticks) == count
    assert mixture.total_tokens == sum(map(len, documents))
    assert mixture.shard_ends.tolist() == [3, 4, 5, 6, 7]


def test_a_mixture_knows_what_it_is_made_of(tmp_path):
    mixture, *_ = mixture_of(tmp_path)
    one, other = mixture._corpora
    assert Mixture([one, other], [Fraction(1), Fraction(2)]).fingerprint == mixture.fingerprint
    prints = {Mixture([one, other], [Fraction(2), Fraction(1)]).fingerprint, mixture.fingerprint, one.fingerprint}
    assert len(prints) == 3
    foreign, *_ = random_split(tmp_path / "c", [3], vocabulary=VOCABULARY.model_copy(update={"tokenizer_sha256": "y"}))
    with pytest.raises(UserError, match="another tokenizer than"):
        Mixture([one, foreign], [Fraction(1)] * 2)


def test_min_tokens(tmp_path):
    mixture, *_ = mixture_of(tmp_path)
    kept = np.concatenate([source.documents for source in mixture.sources(min_tokens=5)])
    assert kept.tolist() == [0, 2, 3, 4, 5]
    with pytest.raises(UserError, match="data.min_tokens: no document of .* has 31 tokens; the longest has"):
        mixture.sources(min_tokens=31)


# ---- one text ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    lanes=st.integers(1, 5),
    segment_length=st.integers(1, 9),
)
def test_a_stream_is_all_documents_joined(tmp_path_factory, lengths, lanes, segment_length):
    corpus, documents, _ = random_split(tmp_path_factory.mktemp("stream") / "a", lengths)
    text = np.concatenate([[*document, EOS] for document in documents]).astype(int)[:-1]
    if len(text) < lanes:
        with pytest.raises(UserError, match=f"data.lanes: {lanes} lanes for a text of {len(text)} tokens"):
            Stream(corpus, lanes)
        return
    stream = Stream(corpus, lanes)
    assert stream.total_tokens == len(text) and max(stream.lengths) - min(stream.lengths) <= 1
    schedule = LaneSchedule(stream.lengths, lanes=lanes, segment_length=segment_length, epochs=1)
    reader = WindowReader(stream, schedule, lanes=range(lanes))
    stream.prefetch(Spans(*np.array([[0], [0], [stream.lengths[0]]])))
    assert reader.prepare(0, schedule.ticks) is None
    labels, texts = read_epoch(reader, 1)
    assert sorted(labels) == list(range(lanes)) and all(len(times) == 1 for times in texts.values())
    assert [token for part in range(lanes) for token in texts[part][0]] == text.tolist()
    assert [label for part in range(lanes) for label in labels[part][0]] == [*text[1:].tolist(), EOS]
    assert reader.labels(0, schedule.ticks) == len(text)


def test_a_stream_checks_what_it_reads(tmp_path):
    corpus, *_ = random_split(tmp_path / "a", [40, 3, 50, 2, 60])
    stream = Stream(corpus, 3)
    seen = []
    corpus._compare = seen.append
    for part, start, stop, expected in ((0, 0, 5, {0}), (0, 30, 52, {0, 1, 2}), (1, 0, 40, {2}), (2, 0, 10, {4})):
        corpus._checked[:] = False
        seen.clear()
        stream.check(Spans(np.array([part]), np.array([start]), np.array([stop])))
        assert set(seen) == expected, (part, start, stop, seen, stream.lengths)


def test_a_stream_has_no_masks(tmp_path):
    corpus, *_ = random_split(tmp_path / "a", [40, 3], masked=True)
    with pytest.raises(UserError, match="data.mode"):
        Stream(corpus, 2)


def test_segments_of_a_stream_are_tensors_of_a_corpus(tmp_path):
    """The training loop sees no difference."""
    corpus, *_ = random_split(tmp_path / "a", [40, 3])
    for documents in (corpus, Stream(corpus, 2)):
        schedule = LaneSchedule(documents.lengths, lanes=2, segment_length=5)
        segment = WindowReader(documents, schedule, lanes=range(2)).segment(0)
        assert [column.dtype for column in segment] == 3 * [torch.int64] + 2 * [torch.bool] + 2 * [torch.int64]
        assert segment.reset.all() and segment.tokens.shape == (2, 5)


def test_weights_that_deal_nothing(tmp_path):
    corpus, *_ = random_split(tmp_path / "a", [3, 4])
    facts = dict(seed=0, lanes=1, segment_length=2)
    with pytest.raises(UserError, match="data.corpus: an epoch deals 0.98 documents; expected weights that make at"):
        lane_schedule(Mixture([corpus], [Fraction("0.49")]), **facts)
    lane_schedule(Mixture([corpus], [Fraction("0.5")]), **facts)
