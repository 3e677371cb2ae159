"""Segments for a process: the lanes of the schedule, filled with tokens from the corpus.

A window is N consecutive ticks. Its segments are made when they are asked for, never a window at a time: the training
loop visits them forwards (rollout), then backwards (replay), and a thread prepares the next few in that order.

    reader = WindowReader(corpus, LaneSchedule(corpus.lengths, seed=0, lanes=16, segment_length=64), lanes=range(0, 8))
    window = reader.window(start_tick=0, segments=8)
    window[0].tokens  # int64 [8, 64]
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from memformer_dist.data.corpus import Corpus, CorpusError
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.segment import IGNORE, Segment


class WindowReader:
    """Reads the global lanes `lanes`. `wait_s`: seconds that callers have waited for segments of windows, in all."""

    def __init__(self, corpus: Corpus, schedule: LaneSchedule, *, lanes: range, prefetch: int = 2):
        assert lanes.step == 1 and 0 <= lanes.start < lanes.stop <= schedule.lanes
        self.corpus = corpus
        self.schedule = schedule
        self.lanes = lanes
        self.prefetch = prefetch
        self.wait_s = 0.0
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="window-reader")
        self._checked = np.zeros(len(corpus.lengths), bool)

    def segment(self, tick: int, lanes: range | None = None) -> Segment:
        """The rows of `lanes` (global numbers, all of the reader's unless given) at a tick, on the CPU.

        A document is checked against its crc32 when this reader meets it first. Raises CorpusError.
        """
        lanes = self.lanes if lanes is None else lanes
        assert lanes.step == 1 and self.lanes.start <= lanes.start < lanes.stop <= self.lanes.stop
        now = self.schedule.at(tick)
        rows = slice(lanes.start, lanes.stop)
        document, offset = now.document[rows], now.segment[rows] * self.schedule.segment_length
        tokens = np.zeros((len(lanes), self.schedule.segment_length), np.int64)
        labels = np.full_like(tokens, IGNORE)
        length = np.zeros(len(lanes), np.int64)
        for row in np.flatnonzero(document >= 0):
            length[row] = self._fill(tokens[row], labels[row], int(document[row]), int(offset[row]))
        reset, forget = now.reset[rows], np.zeros(len(lanes), bool)
        return Segment(*map(torch.from_numpy, (tokens, labels, length, reset, forget, document, offset)))

    def window(self, start_tick: int, segments: int, lanes: range | None = None) -> "Window":
        return Window(self, start_tick, segments, lanes)

    def valid_tokens(self, start_tick: int, stop_tick: int) -> int:
        """Labels that count in the loss, over ALL lanes of the schedule and the ticks start <= tick < stop."""
        count = 0
        for tick in range(start_tick, stop_tick):
            now = self.schedule.at(tick)
            live = now.document >= 0
            document, start = now.document[live], now.segment[live] * self.schedule.segment_length
            stop = np.minimum(start + self.schedule.segment_length, self.corpus.lengths[document])
            if self.corpus.has_mask:
                count += sum(np.count_nonzero(self.corpus.mask(*place)) for place in zip(document, start, stop))
            else:
                count += int((stop - start).sum())
        return count

    def damage(self, start_tick: int, stop_tick: int) -> str | None:
        """What is wrong with a document that the reader's lanes read in start <= tick < stop, or None.

        Asked before a window, so that all processes can stop together instead of one in the middle of a collective.
        """
        rows = slice(self.lanes.start, self.lanes.stop)
        try:
            for tick in range(start_tick, stop_tick):
                for document in self.schedule.at(tick).document[rows]:
                    if document >= 0:
                        self._check(int(document))
        except CorpusError as error:
            return str(error)
        return None

    def _check(self, document: int) -> None:
        if not self._checked[document]:
            self.corpus.check(document)
            self._checked[document] = True

    def _fill(self, tokens: np.ndarray, labels: np.ndarray, document: int, start: int) -> int:
        """Write one row, [S] each; returns the number of tokens that are not padding."""
        self._check(document)
        end = int(self.corpus.lengths[document])
        stop = min(start + len(tokens), end)
        length = stop - start
        text = self.corpus.tokens(document, start, stop + 1)  # one more for the last label, unless the document ends
        tokens[:length] = text[:length]
        labels[: len(text) - 1] = text[1:]
        if stop == end:
            labels[length - 1] = self.corpus.eos_id
        if self.corpus.has_mask:
            labels[:length][self.corpus.mask(document, start, stop) == 0] = IGNORE
        return length


class Window(Sequence[Segment]):
    """`segments` consecutive ticks from `start`, each made when it is asked for.

    The order to be quick in is the one of memory replay: 0, 1, ..., N-2, then N-1 down to 0. Any other works.
    """

    def __init__(self, reader: WindowReader, start: int, segments: int, lanes: range | None):
        self.start = start
        self._reader, self._segments, self._lanes = reader, segments, lanes
        self._prepared: dict[int, Future[Segment]] = {}
        self._last = -1
        self._prepare_after(-1)

    def __len__(self) -> int:
        return self._segments

    def __getitem__(self, t: int) -> Segment:
        """Raises what reading raised in the thread, e.g. CorpusError."""
        t = range(self._segments)[t]
        begin = time.perf_counter()
        ready = self._prepared.pop(t, None)
        # Going forwards t is the visit number t; going backwards, or asked for again, it is visit 2 (N - 1) - t.
        self._prepare_after(t if t > self._last else 2 * (self._segments - 1) - t)
        self._last = t
        segment = ready.result() if ready else self._reader.segment(self.start + t, self._lanes)
        self._reader.wait_s += time.perf_counter() - begin
        return segment

    def _prepare_after(self, visit: int) -> None:
        turn = self._segments - 1
        visits = range(visit + 1, min(visit + 1 + self._reader.prefetch, 2 * turn + 1))
        wanted = [turn - abs(turn - visit) for visit in visits]
        for t in self._prepared.keys() - set(wanted):
            self._prepared.pop(t).cancel()
        for t in wanted:
            if t not in self._prepared:
                self._prepared[t] = self._reader.thread.submit(self._reader.segment, self.start + t, self._lanes)
