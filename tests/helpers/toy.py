"""A small recurrent cell with everything that makes replay hard, and the references that its gradient is compared with.

ToyCell: dropout in both parts, a learned initial state, a reset inside advance, odd-sized parameters (ZeRO pads partitions), a
parameter that only the writer uses, an integer leaf in the state.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.segment import IGNORE, Segment, concatenate, select_rows

VOCABULARY = 11


class ToyState(NamedTuple):
    memory: Tensor  # [lanes, width]
    seen: Tensor  # int64 [lanes], segments since the reset


class ToyFeatures(NamedTuple):
    mixed: Tensor  # [lanes, width]
    seen: Tensor  # int64 [lanes]


class ToyCell(RecurrentCell):
    memory_leaves = ("memory",)
    dtype = torch.float32  # of the state

    def __init__(self, width: int = 7, dropout: float = 0.0):
        super().__init__()
        self.width = width
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mix = nn.Linear(2 * width, width)
        self.write = nn.Linear(2 * width, width)
        self.initial = nn.Linear(1, width)  # m(0), as a module of its own so that ZeRO-3 gathers it
        self.head = nn.Linear(2 * width, VOCABULARY)

    def double(self):
        self.dtype = torch.float64
        return super().double()

    def empty_state(self, lanes, device=None):
        memory = torch.zeros(lanes, self.width, device=device, dtype=self.dtype)
        return ToyState(memory, torch.zeros(lanes, dtype=torch.long, device=device))

    def advance(self, segment, state):
        fresh = self.initial(torch.ones_like(state.memory[:, :1])).to(self.dtype)
        memory = torch.where((segment.reset | segment.reset_memory)[:, None], fresh, state.memory)
        seen = torch.where(segment.reset, 0, state.seen)
        summary = self.dropout(self.embedding(segment.tokens)).mean(1)
        both = torch.cat([summary, memory], 1)
        mixed = torch.tanh(self.mix(both))
        written = torch.tanh(self.write(torch.cat([mixed.to(self.dtype), memory], 1)))
        return ToyFeatures(mixed, seen), ToyState(written.to(self.dtype), seen + 1)

    def readout(self, segment, features):
        hidden = self.dropout(self.embedding(segment.tokens))
        wide = features.mixed[:, None].expand_as(hidden)
        logits = self.head(torch.cat([hidden, wide.to(hidden.dtype)], 2)) / (1 + features.seen[:, None, None])
        return functional.cross_entropy(
            logits.to(self.dtype).transpose(1, 2), segment.labels, ignore_index=IGNORE, reduction="none"
        )


def random_window(segments: int, lanes: int, length: int, seed: int, vocabulary: int = VOCABULARY) -> list[Segment]:
    """Segments with resets in mid-window, ragged lengths and padding."""
    generator = torch.Generator().manual_seed(seed)
    window, fresh, offset = [], torch.ones(lanes, dtype=torch.bool), torch.zeros(lanes, dtype=torch.long)
    for t in range(segments):
        tokens = torch.randint(4, vocabulary, (lanes, length), generator=generator)
        labels = torch.randint(4, vocabulary, (lanes, length), generator=generator)
        ends = torch.rand(lanes, generator=generator) < 0.35
        real = torch.where(ends, torch.randint(1, length + 1, (lanes,), generator=generator), length)
        padding = torch.arange(length) >= real[:, None]
        reset = fresh if t else torch.rand(lanes, generator=generator) < 0.5
        offset = torch.where(reset, 0, offset)
        window.append(
            Segment(
                tokens.masked_fill(padding, 0),
                labels.masked_fill(padding, IGNORE),
                real,
                reset,
                torch.zeros(lanes, dtype=torch.bool),
                torch.zeros(lanes, dtype=torch.long),
                offset,
            )
        )
        fresh, offset = ends, offset + length
    return window


def labels_in(window: list[Segment]) -> int:
    return sum(int((segment.labels != IGNORE).sum()) for segment in window)


def full_bptt(executor, window, state, *, loss_scale, readout_group=1, readout_parts=1, detach_memory=False):
    """One graph over the whole window, back-propagated once. The readout is batched as the replay batches it, because dropout
    masks depend on the batch. `detach_memory` cuts the gradient between segments: the negative control."""
    outputs, loss = [], 0.0
    for t, segment in enumerate(window):
        features, state = executor.advance(t, segment, state)
        outputs.append(features)
        if detach_memory:
            state = state._make(x.detach() for x in state)
    for stop in range(len(window), 0, -readout_group):
        group = range(max(0, stop - readout_group), stop)
        features = outputs[0]._make(torch.cat(column) for column in zip(*(outputs[t] for t in group)))
        batch = concatenate([window[t] for t in group])
        bounds = [len(features[0]) * number // readout_parts for number in range(readout_parts + 1)]
        for part, rows in enumerate(map(slice, bounds, bounds[1:])):
            nll = executor.readout(group.start, part, select_rows(batch, rows), select_rows(features, rows))
            loss = loss + nll.sum() * loss_scale
    loss.backward()
    return state._make(x.detach() for x in state), loss.detach()


def gradients(cell: nn.Module) -> dict[str, Tensor]:
    """Zero where a parameter was not used."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in cell.named_parameters()}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference over the norm of the whole gradient."""
    scale = torch.stack([x.norm() for x in expected.values()]).norm()
    return max(float((found[name] - expected[name]).abs().max() / scale) for name in expected)
