"""Segments as they reach the training loop."""

import gc
import itertools
import re
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer_dist.data import segments as segments_module
from memformer_dist.data import windows
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.stream import Stream
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import CorpusError
from memformer_dist.segment import IGNORE, Segment, concatenate, select_rows
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
    assert types.pop("reset") == types.pop("reset_memory") == torch.bool and set(types.values()) == {torch.int64}


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


ticks = dict(epochs=st.sampled_from([None, 1]), start=st.integers(0, 20), count=st.integers(0, 12))


def summed(reader, ticks):
    """(labels, tokens read, documents begun) of the reader's lanes, from the segments themselves."""
    segments = [reader.segment(tick) for tick in ticks]
    columns = (
        (segment.labels != IGNORE for segment in segments),
        (s.length for s in segments),
        (s.reset for s in segments),
    )
    return tuple(sum(int(column.sum()) for column in columns) for columns in columns)


@settings(max_examples=60, deadline=None)
@given(**cases, **ticks, streamed=st.booleans())
def test_counts_equal_sums_over_segments(
    tmp_path_factory, lengths, lanes, segment_length, masked, epochs, start, count, streamed
):
    """Padding, several documents in a lane, lanes that have run dry, parts of a stream: all from the schedule alone."""
    dataset, *_ = random_split(tmp_path_factory.mktemp("corpus") / "a", lengths, masked)
    if streamed and not masked and dataset.total_tokens >= lanes:
        dataset = Stream(dataset, lanes)
    everything = make_reader(dataset, lanes, segment_length, epochs=epochs)
    labels, tokens, documents = summed(everything, range(start, start + count))
    first_lane = make_reader(dataset, lanes, segment_length, epochs=epochs, block=range(1))
    found = first_lane.counts(start, start + count)  # of all lanes, whichever are read
    assert found == (None if masked else labels, tokens, documents)
    assert first_lane.labels(start, start + count) == labels
    assert first_lane.labels(start, start + count, range(1)) == summed(first_lane, range(start, start + count))[0]


def test_counts_touch_no_token(corpus, monkeypatch):
    reader = make_reader(corpus)
    expected = summed(make_reader(corpus), range(3, 40))
    for name in ("tokens", "mask", "check"):
        monkeypatch.delattr(type(corpus), name)
    assert reader.counts(3, 40) == expected


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
        assert all(
            same(part, select_rows(full, rows)) for part, full in zip(reader.window(3, 4, group), whole, strict=True)
        )


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
    assert all(map(same, window[1:], (window[1], window[2])))
    with pytest.raises(IndexError):
        window[3]


def test_chunks_do_not_change_what_is_read(corpus, monkeypatch):
    readers, sizes = [make_reader(corpus) for _ in range(3)], set()
    for tick in [*range(70), 3, 200, 64]:
        segments = []
        for reader, limit in zip(readers, (0, 200, 10**9), strict=True):
            monkeypatch.setattr(segments_module, "CHUNK_BYTES", limit)
            segments.append(reader.segment(tick))
            chunks = reader._segments._chunks
            sizes.add(len(list(chunks.values())[-1].columns))
            assert len(chunks) <= segments_module.CHUNKS_HELD
        assert same(segments[0], segments[1]) and same(segments[0], segments[2])
    assert sizes == {1, 5, 64}


def on_main_thread():
    return threading.current_thread() is threading.main_thread()


def finish_reading(reader):
    """Wait until the reader's threads have done all that they were given."""
    for thread in (reader._thread._thread, reader._checker):
        thread.submit(lambda: None).result()


def test_replay_order_is_prepared_in_the_background(corpus, monkeypatch):
    reader = make_reader(corpus)
    read = reader._segments.read
    here, ticks_read = [], []

    def spy(tick, lanes):
        ticks_read.append(tick)
        if on_main_thread():
            here.append(tick)
        return read(tick, lanes)

    monkeypatch.setattr(reader._segments, "read", spy)
    window = reader.window(10, 5)
    for t in ORDERS["replay"](5):
        window[t]
        assert len(window._begun) <= 2
    assert not here and ticks_read == [10 + t for t in ORDERS["replay"](5)]
    window[3]  # out of order: read at once
    assert here == [13]


def test_wait_is_counted(corpus, monkeypatch):
    """By a clock that stands still except for the 5 s that reading the first segment takes, and the 7 s of a check."""
    now, asked = [0.0], threading.Event()

    def clock():
        before = now[0]
        asked.set()
        return before

    monkeypatch.setattr(windows, "time", SimpleNamespace(perf_counter=clock))
    reader = make_reader(corpus)
    read = reader._segments.read

    def slow(tick, lanes):
        if tick == 0:
            assert asked.wait(60), "the consumer waits"
            now[0] += 5
        return read(tick, lanes)

    monkeypatch.setattr(reader._segments, "read", slow)
    window = reader.window(0, 4)
    window[0]
    assert reader.wait_s == 5
    finish_reading(reader)  # the next two are prepared
    window[1], window[2]
    assert reader.prepare(0, 4) is None and reader.wait_s == 5
    monkeypatch.setattr(corpus, "check", lambda spans: now.__setitem__(0, now[0] + 7))
    assert reader.prepare(20, 4) is None and reader.wait_s == 12


def test_the_next_window_is_checked_in_the_background(corpus, monkeypatch):
    """Its documents are compared while this window is worked on; `prepare` then finds them compared, or waits for them."""
    compare, compared, here = corpus._compare, [], []

    def spy(document):
        compared.append(document)
        if on_main_thread():
            here.append(document)
        compare(document)

    monkeypatch.setattr(corpus, "_compare", spy)
    reader = make_reader(corpus)
    documents = [set(reader.schedule.spans(start, start + 4).document.tolist()) for start in (0, 4, 8)]
    assert reader.prepare(0, 4) is None and set(here) == documents[0]
    finish_reading(reader)
    assert set(compared) == documents[0] | documents[1] and documents[1] - documents[0], "a test of something"
    here.clear()
    for start in (4, 8):  # with no pause for the thread
        assert reader.prepare(start, 4) is None
        assert not here, "what the thread checks is not checked a second time"
    finish_reading(reader)
    assert len(compared) == len(set(compared))
    control = make_reader(Corpus.open(corpus.path))
    monkeypatch.setattr(control.dataset, "_compare", spy)
    assert control.prepare(4, 4) is None and set(here) == documents[1], "the control: nobody has checked before"


def test_checks_in_the_background_are_waited_for(corpus, monkeypatch):
    """They have only begun when `prepare` is called for the same window: it does not compare the documents as well."""
    compare, wait, began, release, here = corpus._compare, windows.wait, threading.Event(), threading.Event(), []

    def spy(document):
        if on_main_thread():
            here.append(document)
        else:
            began.set()
            assert release.wait(60)
        compare(document)

    reader = make_reader(corpus)
    monkeypatch.setattr(corpus, "_compare", spy)
    monkeypatch.setattr(windows, "wait", lambda futures: (release.set(), wait(futures)))
    assert reader.prepare(0, 4) is None
    assert began.wait(60)
    here.clear()
    assert reader.prepare(0, 4) is None and not release.is_set(), "another window does not wait"
    assert reader.prepare(4, 4) is None and release.is_set() and not here


def test_chunks_are_read_ahead(corpus, monkeypatch):
    """A chunk is read by the thread, while the segments of the one before are worked on."""
    monkeypatch.setattr(segments_module, "CHUNK_TICKS", 8)
    direct, reader = make_reader(corpus), make_reader(corpus)
    read, chunks, here = reader._segments._read, [], []

    def spy(start, stop, lanes):
        chunks.append(start)
        if on_main_thread():
            here.append(start)
        return read(start, stop, lanes)

    monkeypatch.setattr(reader._segments, "_read", spy)
    window = reader.window(0, 24)
    for t in range(24):
        finish_reading(reader)
        assert max(chunks) >= min(t + 7, 23) // 8 * 8, "ready before its first segment is"
        assert same(window[t], direct.segment(t))
    assert not here and sorted(set(chunks)) == [0, 8, 16]
    control = make_reader(corpus, prefetch=0)
    monkeypatch.setattr(control._segments, "_read", spy)
    for segment in control.window(0, 24):
        assert segment is not None
    assert here == [0, 8, 16], "the control"


class Remote:
    """A dataset that claims to be remote, and what is prefetched from it."""

    is_remote = True

    def __init__(self, dataset):
        self.dataset, self.prefetched = dataset, []

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def prefetch(self, spans):
        self.prefetched.append(spans)


@pytest.mark.parametrize(
    "segments, epochs, stop, expected",
    [
        (4, None, None, 3 + 50),  # as far as TICKS_AHEAD
        (20, None, None, 3 + 80),  # as far as four windows
        (4, None, 30, 30),  # no further than what is read
        (4, 1, None, 10**6),  # no further than the schedule
    ],
)
def test_remote_shards_are_fetched_far_ahead(corpus, monkeypatch, segments, epochs, stop, expected):
    monkeypatch.setattr(windows, "TICKS_AHEAD", 50)
    remote = Remote(corpus)
    schedule = make_reader(corpus, epochs=epochs).schedule
    lanes = range(1, 3)
    reader = WindowReader(remote, schedule, lanes=lanes, stop=stop)
    assert reader.prepare(3, segments) is None
    (found,) = remote.prefetched
    assert all(map(np.array_equal, found, reader._segments.spans(3, expected, lanes))), "in the order of need"
    local = Remote(corpus)
    local.is_remote = False
    assert WindowReader(local, schedule, lanes=lanes).prepare(3, segments) is None and not local.prefetched


def test_nothing_behind_the_last_tick_is_checked(corpus, monkeypatch):
    compared = []
    monkeypatch.setattr(corpus, "_compare", compared.append)
    schedule = make_reader(corpus).schedule
    reader = WindowReader(corpus, schedule, lanes=range(4), stop=6)
    assert reader.prepare(4, 4) is None
    finish_reading(reader)
    assert set(compared) == set(schedule.spans(4, 6).document.tolist()) != set(schedule.spans(4, 8).document.tolist())


# ---- the device ----------------------------------------------------------------------------------------------------------


def test_segments_are_pinned_by_the_reading_thread_and_copied_by_the_consumer(corpus, monkeypatch):
    calls = []

    def spy(what):
        def call(segment, *device):
            calls.append((what, *device, on_main_thread()))
            return segment

        return call

    monkeypatch.setattr(Segment, "pin_memory", spy("pin"))
    monkeypatch.setattr(Segment, "to", spy("copy"))
    gpu = torch.device("cuda", 1)
    schedule = make_reader(corpus).schedule
    reader = WindowReader(corpus, schedule, lanes=range(4), device=gpu)
    window, visits = reader.window(0, 5), ORDERS["replay"](5)
    for t in visits:
        window[t]
    assert len(visits) == 9
    assert Counter(calls) == {("pin", False): 5, ("copy", gpu, True): 5}, "a segment stays for its second visit"
    assert not window._kept, "and no longer"
    calls.clear()
    monkeypatch.setattr(windows, "KEPT_BYTES", 100)
    window = reader.window(0, 5)
    for t in visits:
        window[t]
    assert Counter(calls) == {("pin", False): 9, ("copy", gpu, True): 9}, "a window too large to be kept"
    calls.clear()
    reader.segment(0)
    assert not calls, "a single segment stays on the CPU"
    for t in visits:
        WindowReader(corpus, schedule, lanes=range(4)).window(0, 5)[t]
    assert Counter(calls) == {("copy", torch.device("cpu"), True): len(visits)}, "without a GPU: the same, not pinned"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_segments_arrive_on_a_gpu(corpus, prefetch):
    direct = make_reader(corpus)
    schedule, gpu = direct.schedule, torch.device("cuda", torch.cuda.current_device())
    reader = WindowReader(corpus, schedule, lanes=range(4), device=gpu, prefetch=prefetch)
    for start in range(0, 200, 5):  # memory is recycled and pinned memory reused on the way
        window = reader.window(start, 5)
        found = [window[t] for t in range(5)]
        for t, segment in enumerate(found):
            assert all(column.device == gpu for column in segment)
            assert same(segment.to(torch.device("cpu")), direct.segment(start + t))
    assert all(column.is_pinned() for column in direct.segment(0).pin_memory())


# ---- damage --------------------------------------------------------------------------------------------------------------


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
    assert "document 4 at byte" in make_reader(corpus).prepare(tick + 1, 1)
    assert make_reader(corpus).prepare(0, tick) is None


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
        assert reader.prepare(0, 40) is None and same(reader.segment(39), fresh.segment(39))
        return
    with shard.open("r+b") as file:
        if what == "cut short":
            file.truncate(100)
        else:
            file.write(b"other")
    expected = f"{shard}: was changed while it was read"
    assert reader.prepare(0, 40).startswith(expected)
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
