"""Segments as they reach the training loop."""

import gc
import itertools
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer_dist.data import windows as module
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import CorpusError
from memformer_dist.segment import IGNORE, concatenate, select_rows
from tests.helpers.corpora import EOS, random_split


def make_reader(corpus, lanes=4, segment_length=5, seed=0, epochs=None, block=None, prefetch=2):
    schedule = LaneSchedule(corpus.lengths, seed=seed, lanes=lanes, segment_length=segment_length, epochs=epochs)
    return WindowReader(corpus, schedule, lanes=block or range(lanes), prefetch=prefetch)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def corpus(tmp_path):
    return random_split(tmp_path / "train", [13, 1, 5, 10, 27, 4, 6, 11, 2, 9])[0]


def test_one_document_by_hand(tmp_path):
    corpus, [document], _ = random_split(tmp_path / "a", [7])
    reader = make_reader(corpus, lanes=2, segment_length=5, epochs=1)
    first, second = reader.segment(0), reader.segment(1)
    d = document.tolist()
    assert first.tokens.tolist() == [d[:5], [0] * 5] and first.labels.tolist() == [d[1:6], [IGNORE] * 5]
    assert second.tokens[0].tolist() == d[5:] + [0] * 3 and second.labels[0].tolist() == [d[6], EOS] + [IGNORE] * 3
    assert (first.length.tolist(), first.reset.tolist(), first.reset_memory.tolist()) == (
        [5, 0],
        [True, False],
        [False, False],
    )
    assert (first.document.tolist(), first.offset.tolist()) == ([0, -1], [0, 0])
    assert (second.length.tolist(), second.reset.tolist(), second.offset.tolist()) == ([2, 0], [False, False], [5, 0])
    types = {name: column.dtype for name, column in first._asdict().items()}
    assert types.pop("reset") == types.pop("forget") == torch.bool and set(types.values()) == {torch.int64}


cases = dict(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    lanes=st.sampled_from([1, 2, 4, 6]),
    segment_length=st.integers(1, 9),
    masked=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(**cases)
def test_every_token_is_read_once_and_predicted_once(tmp_path_factory, lengths, lanes, segment_length, masked):
    corpus, documents, masks = random_split(tmp_path_factory.mktemp("corpus") / "a", lengths, masked)
    reader = make_reader(corpus, lanes, segment_length, epochs=1)
    tokens = [np.full(length, -1) for length in lengths]
    labels = [np.full(length, -1) for length in lengths]
    for tick in range(reader.schedule.ticks):
        segment = reader.segment(tick)
        for row in range(lanes):
            number, start, length = (int(column[row]) for column in (segment.document, segment.offset, segment.length))
            assert (number < 0) == (length == 0)
            assert (segment.tokens[row, length:] == 0).all() and (segment.labels[row, length:] == IGNORE).all()
            if length:
                assert (tokens[number][start : start + length] == -1).all()  # not read before
                assert bool(segment.reset[row]) == (start == 0)
                tokens[number][start : start + length] = segment.tokens[row, :length]
                labels[number][start : start + length] = segment.labels[row, :length]
    for number, document in enumerate(documents):
        assert tokens[number].tolist() == document.tolist()
        # All but the first token, then EOS; of these what the mask lets through.
        assert labels[number].tolist() == np.where(masks[number], [*document[1:], EOS], IGNORE).tolist()


@settings(max_examples=40, deadline=None)
@given(**cases, epochs=st.sampled_from([None, 1]), start=st.integers(0, 20), ticks=st.integers(0, 12))
def test_valid_tokens_equal_a_count(tmp_path_factory, lengths, lanes, segment_length, masked, epochs, start, ticks):
    corpus, *_ = random_split(tmp_path_factory.mktemp("corpus") / "a", lengths, masked)
    everything = make_reader(corpus, lanes, segment_length, epochs=epochs)
    count = sum(int((everything.segment(tick).labels != IGNORE).sum()) for tick in range(start, start + ticks))
    first_lane = make_reader(corpus, lanes, segment_length, epochs=epochs, block=range(1))
    assert first_lane.valid_tokens(start, start + ticks) == count  # of all lanes, whichever are read


def blocks(lanes, world_size):
    return [range(rank * lanes // world_size, (rank + 1) * lanes // world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_batches_do_not_depend_on_the_number_of_processes(corpus, world_size):
    single = make_reader(corpus, lanes=12)
    ranks = [make_reader(corpus, lanes=12, block=block) for block in blocks(12, world_size)]
    for tick in range(25):
        assert same(single.segment(tick), concatenate([rank.segment(tick) for rank in ranks]))


def test_a_schedule_for_each_process_would_fail(corpus):
    """Negative control of the test above: lanes dealt by each process for itself."""
    single = make_reader(corpus, lanes=12)
    ranks = [make_reader(corpus, lanes=6, seed=rank) for rank in range(2)]
    assert not all(
        same(single.segment(tick), concatenate([rank.segment(tick) for rank in ranks])) for tick in range(25)
    )


def test_lane_groups(corpus):
    reader = make_reader(corpus, lanes=12, block=range(4, 12))
    whole = reader.window(3, 4)
    for group in range(4, 8), range(8, 12):
        rows = slice(group.start - 4, group.stop - 4)
        assert all(same(part, select_rows(full, rows)) for part, full in zip(reader.window(3, 4, group), whole))


ORDERS = {
    "replay": lambda n: [*range(n - 1), *reversed(range(n))],
    "forwards": range,
    "backwards": lambda n: reversed(range(n)),
    "each twice": lambda n: [t for t in range(n) for _ in range(2)],
    "jumping": lambda n: [t * 5 % n for t in range(3 * n)],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("segments", [1, 2, 7])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 20])
def test_a_window_gives_the_same_in_any_order(corpus, order, segments, prefetch):
    direct = make_reader(corpus)
    window = make_reader(corpus, prefetch=prefetch).window(6, segments)
    assert len(window) == segments and window.start == 6
    for t in ORDERS[order](segments):
        assert same(window[t], direct.segment(6 + t))


def test_a_window_is_a_sequence(corpus):
    window = make_reader(corpus).window(0, 3)
    assert len(list(window)) == 3 and same(window[-1], window[2])
    with pytest.raises(IndexError):
        window[3]


def test_chunks_do_not_change_what_is_read(corpus, monkeypatch):
    readers, sizes = [make_reader(corpus) for _ in range(3)], set()
    for tick in [*range(70), 3, 200, 64]:
        segments = []
        for reader, limit in zip(readers, (0, 200, 10**9)):
            monkeypatch.setattr(module, "CHUNK_BYTES", limit)
            segments.append(reader.segment(tick))
            sizes.add(len(reader.chunk_of(tick, reader.lanes)[0].rest))
            assert len(reader._chunks) <= module.CHUNKS_HELD
        assert same(segments[0], segments[1]) and same(segments[0], segments[2])
    assert sizes == {1, 5, 64}


def test_replay_order_is_prepared_in_the_background(corpus, monkeypatch):
    reader = make_reader(corpus)
    read = reader.segment
    here, ticks_read = [], []

    def spy(tick, lanes=None):
        ticks_read.append(tick)
        if threading.current_thread() is threading.main_thread():
            here.append(tick)
        return read(tick, lanes)

    monkeypatch.setattr(reader, "segment", spy)
    window = reader.window(10, 5)
    for t in ORDERS["replay"](5):
        window[t]
        assert len(window._prepared) <= 2
    assert not here and ticks_read == [10 + t for t in ORDERS["replay"](5)]
    window[3]  # out of order: read at once
    assert here == [13]


def test_wait_is_counted(corpus, monkeypatch):
    reader = make_reader(corpus)
    read = reader.segment
    monkeypatch.setattr(reader, "segment", lambda *arguments: (time.sleep(0.1), read(*arguments))[1])
    window = reader.window(0, 4)
    window[0]
    assert 0.09 < reader.wait_s < 1
    before = reader.wait_s
    time.sleep(0.5)  # long enough to prepare the next two
    window[1], window[2]
    assert reader.wait_s - before < 0.09


def test_slow_disks_are_read_ahead(corpus, monkeypatch):
    """Documents of the next window are checked, and chunks behind the next segments read, while this one is worked on."""
    compare, tokens = corpus._compare, corpus.tokens
    monkeypatch.setattr(corpus, "_compare", lambda document: (time.sleep(0.05), compare(document)))
    reader, direct = make_reader(corpus), make_reader(corpus)
    reader.look_ahead(8, 40)
    time.sleep(0.05 * len(corpus.lengths) + 0.3)  # the step
    assert reader.damage(8, 40) is None and reader.wait_s < 0.05
    control = make_reader(make_again(corpus))
    monkeypatch.setattr(control.corpus, "_compare", lambda document: time.sleep(0.05))
    assert control.damage(8, 40) is None and control.wait_s > 0.2, "the control"

    def slow(document, start, stop):
        time.sleep(0.004)
        return tokens(document, start, stop)

    expected = [direct.segment(t) for t in range(24)]
    monkeypatch.setattr(corpus, "tokens", slow)
    monkeypatch.setattr(module, "CHUNK_TICKS", 8)
    waits = []
    for prefetch in (2, 0):
        reader = make_reader(corpus, prefetch=prefetch)
        window = reader.window(0, 24)
        time.sleep(0.3)
        for t in range(24):
            assert same(window[t], expected[t])
            time.sleep(0.03)
        waits.append(reader.wait_s)
    assert waits[0] < 0.25 * waits[1]


def make_again(corpus):
    return Corpus.open(corpus.path)


def flip_a_token(corpus, document):
    shard, first_byte = corpus.place(document)
    raw = bytearray(Path(shard).read_bytes())
    raw[first_byte] ^= 1
    Path(shard).write_bytes(raw)


def test_damage_surfaces_where_the_segment_is_asked_for(corpus):
    flip_a_token(corpus, document=4)
    schedule = make_reader(corpus).schedule
    tick = next(tick for tick in itertools.count() if 4 in schedule.at(tick).document)
    window = make_reader(corpus).window(0, tick + 3)
    for t in range(tick):
        window[t]
    with pytest.raises(CorpusError, match="document 4 at byte"):
        window[tick]
    with pytest.raises(CorpusError, match="document 4 at byte"):  # it does not go away
        window[tick]
    with pytest.raises(CorpusError, match="document 4 at byte"):  # resumed in the middle of the document
        make_reader(corpus).segment(tick + 2)
    assert "document 4 at byte" in make_reader(corpus).damage(tick + 1, tick + 2)
    assert make_reader(corpus).damage(0, tick) is None


@pytest.mark.parametrize("what", ["written to", "cut short", "replaced"])
def test_a_shard_that_changes_while_it_is_read(corpus, what):
    reader = make_reader(corpus)
    for tick in range(40):
        reader.segment(tick)
    shard = Path(corpus.place(4)[0])
    if what == "replaced":  # the map is that of the old file, as it was
        raw = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(raw[::-1])
        fresh = make_reader(corpus)
        assert reader.damage(0, 40) is None and same(reader.segment(39), fresh.segment(39))
        return
    with shard.open("r+b") as file:
        file.truncate(100) if what == "cut short" else file.write(b"other")
    expected = f"{shard}: was changed while it was read"
    assert reader.damage(0, 40).startswith(expected)
    with pytest.raises(CorpusError, match=re.escape(expected)):
        make_reader(corpus).segment(39)


def test_a_document_is_compared_once(corpus, monkeypatch):
    compared = []
    monkeypatch.setattr(corpus, "_compare", compared.append)
    reader = make_reader(corpus)
    for tick in range(40):
        reader.segment(tick)
    assert sorted(compared) == list(range(len(corpus.lengths)))


def test_memory_comes_back_when_its_last_tensor_is_gone(corpus):
    reader = make_reader(corpus)
    first = reader.segment(0)
    row, expected = first.tokens[1], first.tokens[1].tolist()
    place, places = first.tokens.data_ptr(), {first.tokens.data_ptr(), first.labels.data_ptr()}
    del first  # `row` is still on its tokens
    second = reader.segment(1)
    assert row.tolist() == expected and place not in (second.tokens.data_ptr(), second.labels.data_ptr())
    del row, second
    gc.collect()
    third, fourth = reader.segment(2), reader.segment(3)
    used = {segment.tokens.data_ptr() for segment in (third, fourth)} | {
        third.labels.data_ptr(),
        fourth.labels.data_ptr(),
    }
    assert len(used) == 4 and places < used
    assert same(third, make_reader(corpus).segment(2)) and same(fourth, make_reader(corpus).segment(3))
