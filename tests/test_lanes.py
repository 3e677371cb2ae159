"""The lane schedule, against a simulation that goes tick by tick."""

import itertools
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from memformer_dist.data import lanes
from memformer_dist.data.lanes import LaneSchedule

corpora = st.lists(st.integers(1, 40), min_size=1, max_size=12)
sizes = dict(lengths=corpora, seed=st.integers(0, 5), lane_count=st.integers(1, 9), segment_length=st.integers(1, 9))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a few documents are more than are held and dealt at once."""
    monkeypatch.setattr(lanes, "DEALS_AT_ONCE", 5)
    monkeypatch.setattr(lanes, "deals_per_block", lambda lanes: 2)


def permutation(seed, epoch, documents):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(documents)


def simulate(lengths, seed, lane_count, segment_length, ticks, epochs=None):
    """Rows (document, segment, epoch, reset) by tick and lane."""
    epochs = itertools.count() if epochs is None else range(epochs)
    deck = ((int(document), epoch) for epoch in epochs for document in permutation(seed, epoch, len(lengths)))
    todo = [[] for _ in range(lane_count)]
    for _ in range(ticks):
        for lane in range(lane_count):
            if not todo[lane]:
                document, epoch = next(deck, (-1, -1))
                segments = -(-lengths[document] // segment_length) if document >= 0 else 1
                todo[lane] = [(document, segment, epoch, document >= 0 and segment == 0) for segment in range(segments)]
        yield [rows.pop(0) for rows in todo]


def rows_at(schedule, tick):
    now = schedule.at(tick)
    assert all(column.shape == (schedule.lanes,) for column in now)
    return list(zip(*(column.tolist() for column in (now.document, now.segment, now.epoch, now.reset)), strict=True))


@settings(max_examples=150, deadline=None)
@given(**sizes, epochs=st.sampled_from([None, 1, 2]))
def test_schedule_equals_the_simulation(lengths, seed, lane_count, segment_length, epochs):
    schedule = LaneSchedule(
        np.array(lengths), seed=seed, lanes=lane_count, segment_length=segment_length, epochs=epochs
    )
    expected = list(simulate(lengths, seed, lane_count, segment_length, 60, epochs))
    assert [rows_at(schedule, tick) for tick in range(60)] == expected


@settings(max_examples=100, deadline=None)
@given(**sizes, ticks=st.lists(st.integers(0, 80), max_size=20))
def test_a_tick_does_not_depend_on_the_way_there(lengths, seed, lane_count, segment_length, ticks):
    def new():
        return LaneSchedule(np.array(lengths), seed=seed, lanes=lane_count, segment_length=segment_length)

    wandering = new()
    wandering.concurrent_copies()
    for tick in ticks:
        assert rows_at(wandering, tick) == rows_at(new(), tick)


@settings(max_examples=100, deadline=None)
@given(**sizes, epochs=st.integers(1, 3))
def test_each_epoch_deals_every_segment_once_and_documents_in_one_piece(
    lengths, seed, lane_count, segment_length, epochs
):
    schedule = LaneSchedule(
        np.array(lengths), seed=seed, lanes=lane_count, segment_length=segment_length, epochs=epochs
    )
    table = [rows_at(schedule, tick) for tick in range(schedule.ticks)]
    live = [row[:3] for rows in table for row in rows if row[0] >= 0]
    every = [
        (document, segment, epoch)
        for epoch in range(epochs)
        for document, length in enumerate(lengths)
        for segment in range(-(-length // segment_length))
    ]
    assert sorted(live) == sorted(every) and len(every) == epochs * schedule.segments.sum()
    assert any(row[0] >= 0 for row in table[-1])  # `ticks` is not too many
    for lane in zip(*table, strict=True):
        for (document, segment, epoch, _), following in itertools.pairwise(lane):
            if document >= 0 and (segment + 1) * segment_length < lengths[document]:
                assert following == (document, segment + 1, epoch, False)
    dry = rows_at(schedule, schedule.ticks)
    assert dry == rows_at(schedule, schedule.ticks + 99) == [(-1, 0, -1, False)] * lane_count


def test_epochs_are_shuffled_by_the_seed():
    def first_epochs(seed):
        schedule = LaneSchedule(np.ones(50, int), seed=seed, lanes=1, segment_length=4)
        return [[schedule.at(50 * epoch + place).document[0] for place in range(50)] for epoch in range(3)]

    one, other = first_epochs(0), first_epochs(1)
    orders = [tuple(order) for order in one + other]
    assert len(set(orders)) == 6 and all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] == tuple(permutation(0, 0, 50))


def test_number_of_ticks():
    schedule = LaneSchedule(np.array([8, 8, 8]), seed=0, lanes=2, segment_length=4, epochs=1)
    assert schedule.ticks == 4 and schedule.segments.sum() == 6
    endless = LaneSchedule(np.array([8]), seed=0, lanes=2, segment_length=4)
    with pytest.raises(ValueError, match="endless"):
        _ = endless.ticks


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_concurrent_copies(lengths, seed, lane_count, segment_length):
    schedule = LaneSchedule(np.array(lengths), seed=seed, lanes=lane_count, segment_length=segment_length)
    epochs = lane_count // len(lengths) + 2
    most = 0
    for tick in itertools.count():
        documents = [row[0] for row in rows_at(schedule, tick) if row[2] < epochs]
        if not documents:
            break
        most = max(most, *(documents.count(document) for document in documents))
    assert schedule.concurrent_copies() == most


def test_concurrent_copies_of_many_and_of_few_documents():
    assert LaneSchedule(np.full(1000, 8), seed=0, lanes=4, segment_length=4).concurrent_copies() == 1
    assert LaneSchedule(np.full(2, 8), seed=0, lanes=16, segment_length=4).concurrent_copies() == 8


def test_epochs_that_deal_nothing_have_no_copies():
    nothing = LaneSchedule(np.full(3, 8), seed=0, lanes=2, segment_length=4, order=lambda epoch: np.empty(0, np.int64))
    assert nothing.concurrent_copies() == 0


def test_of_small_epochs_many_are_held(monkeypatch):
    monkeypatch.setattr(lanes, "DEALS_AT_ONCE", 300)
    schedule = LaneSchedule(np.full(3, 4), seed=0, lanes=16, segment_length=4)
    for tick in 400, 3, 200:
        schedule.at(tick)
    held = [len(deals.lane) for deals in schedule._held.values()]
    assert len(held) == 100 and schedule._deals_held == sum(held) == 300


def test_threads_may_share_a_schedule():
    lengths = np.random.default_rng(0).integers(1, 30, 200)
    alone = LaneSchedule(lengths, seed=0, lanes=4, segment_length=4)
    expected = [rows_at(alone, tick) for tick in range(300)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            shared = LaneSchedule(lengths, seed=0, lanes=4, segment_length=4)
            ticks = [*random.sample(range(300), 300), *range(300)]
            with ThreadPoolExecutor(4) as threads:
                found = list(threads.map(rows_at, itertools.repeat(shared), ticks))
            assert found[300:] == expected
    finally:
        sys.setswitchinterval(interval)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_dealt_epochs_are_stored_under_what_they_depend_on(tmp_path, monkeypatch):
    """The second schedule deals nothing itself; another seed, length, order or lane number does not find the first one's."""
    monkeypatch.setattr(lanes, "STORED_FROM", 10)
    lengths = np.random.default_rng(0).integers(1, 30, 50)
    facts = dict(seed=0, lanes=4, segment_length=4, store=tmp_path / "schedules", order_key="a")

    def read(lengths=lengths, start=0, stop=300, **other):
        schedule = LaneSchedule(lengths, **(facts | other))
        return [rows_at(schedule, tick) for tick in range(start, stop, 7)]

    dealt, deal = [], LaneSchedule._deal
    monkeypatch.setattr(LaneSchedule, "_deal", lambda self, epoch: (dealt.append(epoch), deal(self, epoch))[1])
    expected = read(store=None)
    epochs, dealt[:] = len(dealt), []
    assert read() == expected and dealt == [*range(epochs)] and epochs > 5
    *kept, starts = sorted((tmp_path / "schedules").iterdir())
    assert [path.stem[-6:] for path in kept] == [f"{epoch:06d}" for epoch in range(epochs)][-lanes.EPOCHS_HELD :]
    assert starts.name.endswith("-starts.safetensors")
    dealt.clear()
    assert read(start=280) == expected[40:] and not dealt, "where a run resumes"
    assert read(start=7, stop=8) == expected[1:2] and dealt == [0], "one epoch is dealt, and none of those before it"
    for other in dict(seed=1), dict(lanes=5), dict(segment_length=3), dict(order_key="b"), dict(lengths=lengths + 4):
        dealt.clear()
        found = read(**other)
        assert dealt and found == read(**other, store=None) and (found != expected or "order_key" in other)
    raw = bytearray(kept[-1].read_bytes())
    raw[-5] ^= 1
    kept[-1].write_bytes(raw)
    kept[-2].write_bytes(kept[-2].read_bytes()[:-9])
    dealt.clear()
    assert read(start=280) == expected[40:] and 1 <= len(dealt) <= 2, "a damaged one is dealt again"
    dealt.clear()
    assert read(start=280) == expected[40:] and not dealt, "and kept again"
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o666 & ~umask()}, "others may read them"
    left = starts.with_name(f"{kept[-1].name}.host-1")  # of a process that was killed
    left.write_bytes(b"")
    os.utime(left, (0, 0))  # longer ago than schedule_store.ABANDONED_S
    save_file({"free": np.zeros((1, 4), np.int64), "reading": np.zeros((1, 3, 4), np.int64)}, starts)
    assert read(start=280) == expected[40:] and starts.exists() and not left.exists(), "without a sum it does not count"
    starts.write_bytes(starts.read_bytes()[:-3])
    assert read(start=280) == expected[40:] and starts.exists(), "without the starts, from the first epoch on"
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert read(store=blocked / "schedules") == expected, "a folder that cannot be made"
