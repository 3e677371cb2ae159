"""WindowReader: what one process reads, its lanes of the schedule, window by window.

    schedule = LaneSchedule(corpus.lengths, seed=0, lanes=16, segment_length=64)
    reader = WindowReader(corpus, schedule, lanes=range(0, 8))
    problem = reader.prepare(start=0, segments=8)  # on every process, which then agree on whether to go on
    window = reader.window(start=0, segments=8)
    window[0].tokens  # int64 [8, 64]

A window is N consecutive ticks. Its segments are made when they are asked for, never all at once: the training loop
visits them forwards (rollout), then backwards (replay), and a thread prepares the next few in that order.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, overload

import torch

from memformer_dist.data.dataset import Spans, TokenDataset
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.segments import SegmentReader
from memformer_dist.errors import CorpusError
from memformer_dist.segment import Segment

CPU = torch.device("cpu")
KEPT_BYTES = 2**26  # of a window's segments that stay on a GPU from the rollout to the replay
TICKS_AHEAD = 1024  # whose remote shards are fetched ahead of need, as many of them as the cache holds


class Counts(NamedTuple):
    """What all lanes of a schedule read in some ticks."""

    labels: int | None  # that count in the loss; None where loss masks decide: see WindowReader.labels
    input_tokens: int  # tokens read, without padding
    documents: int  # that begin there


class SegmentThread:
    """Reads segments in a thread and hands them to the thread that consumes them, on `device`.

    wait_s   seconds that the consumer has waited, in total
    """

    def __init__(self, segments: SegmentReader, device: torch.device):
        self.wait_s = 0.0
        self._segments, self._device = segments, device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="window-reader")

    def begin(self, tick: int, lanes: range) -> Future[Segment]:
        """Have the thread read a segment."""
        return self._thread.submit(self._read, tick, lanes)

    def begin_next_chunk(self, tick: int, lanes: range) -> None:
        """Have the thread read the chunk that a tick lies in."""
        self._thread.submit(self._segments.read_chunk, tick, lanes)  # `finish` raises again what this raises

    def finish(self, tick: int, lanes: range, begun: Future[Segment] | None) -> Segment:
        """Wait for a segment that was begun, or read it here; move it to the device. Raises what reading raised."""
        began = time.perf_counter()
        try:
            segment = begun.result() if begun else self._read(tick, lanes)
        finally:
            self.wait_s += time.perf_counter() - began
        return segment.to(self._device)

    def chunk_ticks(self, lanes: range) -> int:
        return self._segments.chunk_ticks(lanes)

    def segment_bytes(self, lanes: range) -> int:
        """Tokens and labels of a segment, int64: nearly all that it takes."""
        return 16 * len(lanes) * self._segments.schedule.segment_length

    @property
    def on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _read(self, tick: int, lanes: range) -> Segment:
        segment = self._segments.read(tick, lanes)
        return segment.pin_memory() if self.on_gpu else segment


class Window(Sequence[Segment]):
    """`segments` consecutive ticks from `start`, each read when it is asked for.

    The order of memory replay is the fast one: 0, 1, ..., N-2, then N-1 down to 0. Any other works. On a GPU a segment is
    copied once: it stays there for its second visit, unless the window's segments together take more than KEPT_BYTES.
    """

    def __init__(self, thread: SegmentThread, lanes: range, start: int, segments: int, *, prefetch: int):
        self.start = start
        self._thread, self._lanes, self._segments, self._prefetch = thread, lanes, segments, prefetch
        self._begun: dict[int, Future[Segment]] = {}
        self._keeps = thread.on_gpu and segments * thread.segment_bytes(lanes) <= KEPT_BYTES
        self._kept: dict[int, Segment] = {}  # on the device, from the rollout's visit on
        self._last = -1
        self._begin_after(-1)

    def __len__(self) -> int:
        return self._segments

    @overload
    def __getitem__(self, t: int) -> Segment: ...
    @overload
    def __getitem__(self, t: slice) -> list[Segment]: ...
    def __getitem__(self, t: int | slice) -> Segment | list[Segment]:
        """Raises what reading raised in the thread, e.g. CorpusError."""
        if isinstance(t, slice):
            return [self[number] for number in range(self._segments)[t]]
        t = range(self._segments)[t]
        begun, kept = self._begun.pop(t, None), self._kept.pop(t, None)
        # Going forwards, t is visit number t; going backwards, or asked for again, it is visit 2 (N - 1) - t.
        forwards = t > self._last
        self._begin_after(t if forwards else 2 * (self._segments - 1) - t)
        self._last = t
        if kept is not None:
            return kept
        segment = self._thread.finish(self.start + t, self._lanes, begun)
        if self._keeps and forwards and t < self._segments - 1:
            self._kept[t] = segment
        return segment

    def _begin_after(self, visit: int) -> None:
        """Begin to read what the visits after this one need."""
        if not self._prefetch:
            return
        turn = self._segments - 1
        last = turn if self._keeps else 2 * turn
        visits = range(visit + 1, min(visit + 1 + self._prefetch, last + 1))
        upcoming = [turn - abs(turn - visit) for visit in visits]
        for t in self._begun.keys() - set(upcoming):
            self._begun.pop(t).cancel()
        for t in upcoming:
            if t not in self._begun:
                self._begun[t] = self._thread.begin(self.start + t, self._lanes)
        # Where disks are slow a chunk takes longer than a segment: the one after that of the next segments begins now.
        ahead = visit + self._thread.chunk_ticks(self._lanes)
        if ahead <= last:
            self._thread.begin_next_chunk(self.start + turn - abs(turn - ahead), self._lanes)


class WindowReader:
    """Reads the global lanes `lanes` of a schedule.

    prefetch  segments of a window that a thread prepares ahead of need
    device    where the segments of windows arrive; on a GPU from pinned memory, without blocking
    stop      the first tick that will not be read, where that is not the schedule's end
    """

    def __init__(
        self,
        dataset: TokenDataset,
        schedule: LaneSchedule,
        *,
        lanes: range,
        prefetch: int = 2,
        device: torch.device = CPU,
        stop: int | None = None,
    ):
        assert lanes.step == 1
        assert 0 <= lanes.start < lanes.stop <= schedule.lanes
        self.dataset, self.schedule, self.lanes = dataset, schedule, lanes
        self._prefetch, self._stop = prefetch, stop
        self._segments = SegmentReader(dataset, schedule)
        self._thread = SegmentThread(self._segments, device)
        self._checker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="window-checker")
        self._checking: tuple[range, Future[None]] | None = None  # ticks that are checked in the background
        self._check_s = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds that callers have waited for segments of windows and for `prepare`, in total."""
        return self._thread.wait_s + self._check_s

    def prepare(self, start: int, segments: int) -> str | None:
        """Get ready to read `segments` ticks from `start` on. Returns what is wrong, or None.

        To be called before each window, so that all processes can stop together instead of one in the middle of a
        collective. Checks the documents of these ticks, has remote shards fetched that are read long after them, and
        begins to check the documents of as many ticks after these in the background.

        A remote corpus is read in several windows where its cache does not hold the shards of all at once.
        """
        began = time.perf_counter()
        stop = self._until(start + segments)
        try:
            if self.dataset.is_remote:
                self.dataset.prefetch(self._spans(start, self._until(start + max(4 * segments, TICKS_AHEAD))))
            self._wait_for_checks(start, stop)
            self.dataset.check(self._spans(start, stop))
        except CorpusError as error:
            return str(error)
        finally:
            self._check_s += time.perf_counter() - began
        self._check_in_background(stop, self._until(stop + segments))
        return None

    def counts(self, start: int, stop: int) -> Counts:
        """What ALL lanes of the schedule read in start <= tick < stop: no token is touched, no process asked."""
        runs = self.schedule.spans(start, stop)
        spans = self._segments.token_spans(runs)
        tokens = int((spans.stop - spans.start).sum())
        return Counts(
            labels=None if self.dataset.has_mask else tokens,  # each token predicts one label
            input_tokens=tokens,
            documents=int((runs.segment == 0).sum()),
        )

    def labels(self, start: int, stop: int, lanes: range | None = None) -> int:
        """Labels that count in the loss in start <= tick < stop, of `lanes` (by default ALL of the schedule).

        Reads the loss masks where there are some: let each process count its own lanes then.
        """
        return self.dataset.labels_in(self._segments.spans(start, stop, lanes))

    def segment(self, tick: int, lanes: range | None = None) -> Segment:
        """The segment of `lanes` (global numbers, by default all of the reader's) at a tick, on the CPU.

        Each document is compared with its crc32 the first time. Raises CorpusError.
        """
        return self._segments.read(tick, self._checked(lanes))

    def window(self, start: int, segments: int, lanes: range | None = None) -> Window:
        """The segments of `lanes` (global numbers, by default all of the reader's) from tick `start`, on the device."""
        return Window(self._thread, self._checked(lanes), start, segments, prefetch=self._prefetch)

    def _checked(self, lanes: range | None) -> range:
        if lanes is None:
            return self.lanes
        assert lanes.step == 1
        assert self.lanes.start <= lanes.start < lanes.stop <= self.lanes.stop
        return lanes

    def _until(self, tick: int) -> int:
        return tick if self._stop is None else min(tick, self._stop)

    def _spans(self, start: int, stop: int) -> Spans:
        return self._segments.spans(start, stop, self.lanes)

    def _check_in_background(self, start: int, stop: int) -> None:
        if start >= stop or (self._checking and self._checking[0] == range(start, stop)):
            return
        checking = self._checker.submit(
            self.dataset.check, self._spans(start, stop)
        )  # `prepare` raises again what it raises
        self._checking = range(start, stop), checking

    def _wait_for_checks(self, start: int, stop: int) -> None:
        """Wait for the background checks of these ticks, rather than check the same documents at the same time."""
        if self._checking and self._checking[0].start < stop and start < self._checking[0].stop:
            wait([self._checking[1]])
