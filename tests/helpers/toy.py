"""Small recurrent cells with everything that makes replay hard, and references to compare their gradients with.

ToyCell: dropout in both parts, a learned initial state, a reset inside advance, odd-sized parameters (ZeRO pads
partitions), a parameter that only the writer uses, an integer leaf in the state. Its relatives have one thing more each:
an auxiliary loss, a state of complex numbers, leaves that are empty or that nothing reads.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.cells.layers import within
from memformer_dist.mrbp.executor import Executor
from memformer_dist.segment import IGNORE, Segment, concatenate, select_rows

VOCABULARY, SIZE = 11, 6


class ToyState(NamedTuple):
    memory: Tensor  # [B, D]
    seen: Tensor  # int64 [B], segments since the reset


class ToyFeatures(NamedTuple):
    mixed: Tensor  # [B, S, D], position i of the memory and the tokens up to i
    seen: Tensor  # int64 [B]


class ToyCell(RecurrentCell):
    memory_leaves = ("memory",)
    dtype = torch.float32  # of the state

    def __init__(self, width: int = 7, dropout: float = 0.0, segment_length: int = SIZE):
        super().__init__()
        self.width, self.vocab_size, self.segment_length = width, VOCABULARY, segment_length
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
        device = device or next(self.parameters()).device
        memory = torch.zeros(lanes, self.width, device=device, dtype=self.dtype)
        return ToyState(memory, torch.zeros(lanes, dtype=torch.long, device=device))

    def advance(self, segment, state):
        fresh = self.initial(torch.ones_like(state.memory[:, :1])).to(self.dtype)
        memory = torch.where((segment.reset | segment.reset_memory)[:, None], fresh, state.memory)
        seen = torch.where(segment.reset, 0, state.seen)
        real = within(segment.length, segment.tokens.shape[1])[..., None]
        embedded = self.dropout(self.embedding(segment.tokens)) * real
        summary = embedded.cumsum(1) / real.cumsum(1).clamp(min=1)  # of the tokens up to each
        mixed = torch.tanh(self.mix(torch.cat([summary, memory[:, None].expand_as(summary).to(summary.dtype)], 2)))
        last = (mixed * real).sum(1) / segment.length.clamp(min=1)[:, None]
        written = torch.tanh(self.write(torch.cat([last.to(self.dtype), memory], 1)))
        return ToyFeatures(mixed, seen), ToyState(written.to(self.dtype), seen + 1)

    def logits(self, segment, features):
        hidden = self.dropout(self.embedding(segment.tokens))
        both = torch.cat([hidden, features.mixed.to(hidden.dtype)], 2)
        return self.head(both) / (1 + features.seen[:, None, None])


class PenalisedFeatures(NamedTuple):
    mixed: Tensor
    seen: Tensor
    penalty: Tensor  # [B], a loss beside that of the labels


class PenalisedCell(ToyCell):
    """With an auxiliary loss of each lane, as rule 7 of cells/base.py has it."""

    def advance(self, segment, state):
        features, state = super().advance(segment, state)
        return PenalisedFeatures(*features, state.memory.square().mean(1) * 0.3), state

    def readout(self, segment, features):
        nll = super().readout(segment, features)
        penalty = features.penalty - features.penalty.detach()
        return torch.cat([nll[:, :1] + penalty[:, None].to(nll.dtype), nll[:, 1:]], 1)


class OscillatorState(NamedTuple):
    memory: Tensor  # complex [B, D]
    nothing: Tensor  # [B, 0]
    unread: Tensor  # [B], handed on and never looked at


class OscillatorFeatures(NamedTuple):
    mixed: Tensor  # [B, S, D]
    unread: Tensor  # [B, S, D], made and never looked at


class OscillatorCell(ToyCell):
    """A linear recurrence in complex numbers, as in LRU and S4; leaves that are empty or that nothing reads."""

    def __init__(self, width: int = 6, dropout: float = 0.0, segment_length: int = SIZE):
        super().__init__(width, dropout, segment_length)
        self.turn = nn.Linear(1, 2 * width)  # decay and angle of each oscillator

    def empty_state(self, lanes, device=None):
        device = device or next(self.parameters()).device
        zeros = torch.zeros(lanes, self.width, device=device, dtype=self.dtype)
        return OscillatorState(torch.complex(zeros, zeros), zeros[:, :0], zeros[:, 0])

    def advance(self, segment, state):
        one = torch.ones(1, 1, dtype=self.dtype, device=segment.tokens.device)
        fresh = self.initial(one).to(self.dtype)
        start = torch.complex(fresh, fresh.flip(1)).expand_as(state.memory)
        memory = torch.where((segment.reset | segment.reset_memory)[:, None], start, state.memory)
        real = within(segment.length, segment.tokens.shape[1])[..., None]
        embedded = self.dropout(self.embedding(segment.tokens)) * real
        both = torch.cat([embedded.cumsum(1), memory.real[:, None].expand_as(embedded).to(embedded.dtype)], 2)
        mixed = torch.tanh(self.mix(both))
        decay, angle = self.turn(one).to(self.dtype).chunk(2, 1)
        summary = torch.cat([embedded.sum(1).to(self.dtype), memory.imag], 1)
        written = memory * torch.polar(torch.sigmoid(decay), angle) + torch.tanh(self.write(summary)).to(self.dtype)
        unread = torch.where(segment.reset, 1.0, state.unread)
        return OscillatorFeatures(mixed, mixed * 2), OscillatorState(written, state.nothing, unread)

    def logits(self, segment, features):
        hidden = self.dropout(self.embedding(segment.tokens))
        return self.head(torch.cat([hidden, features.mixed.to(hidden.dtype)], 2))


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


def full_bptt(executor: Executor, window, state, *, loss_scale, readout_group=1, readout_parts=1, detach_memory=False):
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
        features = outputs[0]._make(torch.cat(column) for column in zip(*(outputs[t] for t in group), strict=True))
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
