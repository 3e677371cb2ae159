"""Documents of a task (tasks/) as training and evaluation read them.

    valid = TaskDocuments(config, segment_length=8, seed=0, held_out=True)    # evaluation reads it as it does text
    reader = TaskReader(train, lanes=range(0, 8), all_lanes=16, carry=0.5)    # training, in place of a WindowReader

In training every window is a document of its own on every lane, exactly as long as the window. So a curriculum of the
window is one of the distance that must be remembered, and the whole way from the question back to what it asks for lies
within the reach of the gradient. The number of a document follows from its lane and first tick: it is new in every step,
the same on any number of ranks, and a resumed run reads what it would have read.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import torch

from memformer_dist.data.dataset import Spans
from memformer_dist.data.sampler import WeightedDocuments
from memformer_dist.data.windows import CPU, Counts
from memformer_dist.errors import UserError
from memformer_dist.segment import IGNORE, Segment, select_rows
from memformer_dist.tasks.base import CARRIED, HELD_OUT, TRAINING, Documents, Draws, TaskConfig, keys


class TaskDocuments:
    """The first documents of a stream of a task, as a TokenDataset. The answers are what its loss masks let through."""

    def __init__(self, config: TaskConfig, *, segment_length: int, seed: int, held_out: bool):
        self.task = config.build(segment_length, held_out=held_out)
        self.vocabulary = self.task.vocabulary
        self.seed, self._stream, self._segments = seed, HELD_OUT if held_out else TRAINING, config.held_out_segments
        self.lengths = np.full(config.held_out_documents, config.held_out_segments * segment_length)
        self.total_tokens = int(self.lengths.sum())
        self.token_dtype = self.vocabulary.token_dtype
        self.fingerprint = self.vocabulary.tokenizer_sha256
        self.has_mask, self.is_remote = True, False
        self.path: str | Path = f"task {config.name}"
        self.folder = Path()
        self.shard_ends: np.ndarray | None = None

    def documents(self, numbers: np.ndarray, segments: int) -> Documents:
        """Documents of the stream by their numbers, int64 [B], each of `segments` segments."""
        return self.task.documents(keys(self.seed, numbers, self._stream), segments)

    def segments(
        self, numbers: np.ndarray, segments: int, *, reset: torch.Tensor | None = None, device: torch.device = CPU
    ) -> list[Segment]:
        """The same documents side by side, segment by segment; `reset` bool [B]: which start from an empty memory."""
        tokens, labels = (
            torch.from_numpy(column).unflatten(1, (segments, -1)).transpose(0, 1).contiguous().to(device)
            for column in self.documents(numbers, segments)
        )  # [N, B, S]
        document = torch.from_numpy(numbers).to(device)
        no, length = torch.zeros_like(document, dtype=torch.bool), torch.full_like(document, tokens.shape[2])
        first = ~no if reset is None else reset.to(device)
        return [
            Segment(tokens[t], labels[t], length, first if t == 0 else no, no, document, length * t)
            for t in range(segments)
        ]

    @cached_property
    def _first(self) -> Documents:
        return self.documents(np.arange(len(self.lengths)), self._segments)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self._first.tokens[document, start:stop].astype(self.token_dtype)

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        return (self._first.labels[document, start:stop] != IGNORE).astype(np.uint8)

    def last_labels(self, documents: np.ndarray) -> np.ndarray:
        return self._first.labels[documents, -1]

    def labels_in(self, spans: Spans) -> int:
        return sum(int(self.mask(*span).sum()) for span in zip(*(column.tolist() for column in spans)))

    def check(self, spans: Spans) -> None:
        pass

    def prefetch(self, spans: Spans) -> None:
        pass

    def place(self, document: int) -> tuple[str, int]:
        return str(self.path), document

    def sources(self, min_tokens: int = 1) -> list[WeightedDocuments]:
        return [WeightedDocuments(np.arange(len(self.lengths)))]

    def tokenizer(self) -> Path:
        raise UserError(f"data.task: {self.path} has no tokenizer, and no text to be shown or generated")


class TaskWindow(Sequence[Segment]):
    """`segments` ticks from `start`: one document of each lane."""

    def __init__(self, start: int, segments: Sequence[Segment]):
        self.start, self._segments = start, segments

    def __len__(self) -> int:
        return len(self._segments)

    @overload
    def __getitem__(self, t: int) -> Segment: ...
    @overload
    def __getitem__(self, t: slice) -> Sequence[Segment]: ...
    def __getitem__(self, t: int | slice) -> Segment | Sequence[Segment]:
        return self._segments[t]


class TaskReader:
    """Makes the windows of the global lanes `lanes`, with the methods of a WindowReader that training calls.

    all_lanes  how many there are on all ranks together
    carry      share of the documents that start from the memory that the lane's last document left
    device     where the segments of windows arrive
    """

    def __init__(
        self, dataset: TaskDocuments, *, lanes: range, all_lanes: int, carry: float = 0.0, device: torch.device = CPU
    ):
        assert 0 <= lanes.start < lanes.stop <= all_lanes
        self.dataset, self.lanes, self.wait_s = dataset, lanes, 0.0
        self._all_lanes, self._carry, self._device = all_lanes, carry, device
        self._window = TaskWindow(0, [])  # of all lanes, the one that was made last

    def prepare(self, start: int, segments: int) -> str | None:
        return None

    def counts(self, start: int, stop: int) -> Counts:
        tokens = (stop - start) * self._all_lanes * self.dataset.task.segment_length
        return Counts(labels=None, input_tokens=tokens, documents=self._all_lanes)

    def labels(self, start: int, stop: int, lanes: range | None = None) -> int:
        """Labels of `lanes` (by default all of the reader's) in the window start <= tick < stop."""
        return sum(int((segment.labels != IGNORE).sum()) for segment in self.window(start, stop - start, lanes))

    def segment(self, tick: int, lanes: range | None = None) -> Segment:
        """The segment at a tick of the window that was made last, or else the first one of a shortest document."""
        held = range(self._window.start, self._window.start + len(self._window))
        start, segments = (held.start, len(held)) if tick in held else (tick, self.dataset.task.least)
        return self.window(start, segments, lanes)[tick - start]

    def window(self, start: int, segments: int, lanes: range | None = None) -> TaskWindow:
        """A document of `segments` segments on each of `lanes` (global numbers, by default all of the reader's)."""
        if (self._window.start, len(self._window)) != (start, segments):
            began = time.perf_counter()
            self._window = TaskWindow(start, self._made(start, segments))
            self.wait_s += time.perf_counter() - began
        if lanes is None or lanes == self.lanes:
            return self._window
        rows = slice(lanes.start - self.lanes.start, lanes.stop - self.lanes.start)
        return TaskWindow(start, [select_rows(segment, rows) for segment in self._window])

    def _made(self, start: int, segments: int) -> list[Segment]:
        numbers = start * self._all_lanes + np.arange(self.lanes.start, self.lanes.stop)
        return self.dataset.segments(numbers, segments, reset=self._resets(start, numbers), device=self._device)

    def _resets(self, start: int, numbers: np.ndarray) -> torch.Tensor:
        """bool [B]: which documents start from an empty memory; all of a run's first window do."""
        uniform = (Draws(keys(self.dataset.seed, numbers, CARRIED)).bits(1)[:, 0] >> np.uint64(11)) * 2.0**-53
        return torch.from_numpy((uniform >= self._carry) | (start == 0))
