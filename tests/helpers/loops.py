"""Transformer layers as printed, one lane, one head and one query at a time: what a cell's own reference is built of.

A reference knows nothing of the cell but the names of its parameters. It can be made to break a rule by name (`mistake`); a
comparison that does not notice is none.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from memformer_dist.cells.base import CellConfig, RecurrentCell
from memformer_dist.segment import IGNORE, Segment, differentiable
from tests.helpers.memformer import BOS, SIZE, VOCABULARY

Seen = Callable[[int, int], bool]  # whether query i may see key j


class Loops:
    """For one lane: rows of x [S, D] are positions."""

    mistakes: tuple[str, ...] = ()

    def __init__(self, cell: RecurrentCell, mistake: str = ""):
        self.config, self.weights, self.mistake = cell.config, dict(cell.named_parameters()), mistake
        self.head_size = self.config.width // self.config.heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in self.weights:
            return x
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.head_size, dim=-1)

    def rotated(self, x: Tensor, positions: list[int]) -> Tensor:
        """Rotary positions, of one head."""
        if self.config.positions == "none" or self.mistake == "no positions":
            return x
        rows = []
        for position, row in zip(positions, x, strict=True):
            angles = [position / 10000 ** (2 * pair / self.head_size) for pair in range(self.head_size // 2)]
            cosines, sines = (x.new_tensor([turn(angle) for angle in angles]) for turn in (math.cos, math.sin))
            a, b = row[0::2], row[1::2]
            rows.append(torch.stack([a * cosines - b * sines, a * sines + b * cosines], dim=1).flatten())
        return torch.stack(rows)

    def attention(self, queries: Tensor, keys: Tensor, values: Tensor, seen: Seen) -> Tensor:
        """One head."""
        rows = []
        for i, query in enumerate(queries):
            allowed = [j for j in range(len(keys)) if seen(i, j)]
            weights = torch.exp(keys[allowed] @ query / math.sqrt(self.head_size))
            rows.append(weights / weights.sum() @ values[allowed])
        return torch.stack(rows)

    def self_attention(self, name: str, x: Tensor, positions: list[int], seen: Seen) -> Tensor:
        """x and its residual branch."""
        normed = self.norm(f"{name}.self_norm", x)
        q, k, v = (
            self.heads(part) for part in self.linear(f"{name}.self_attention.query_key_value", normed).chunk(3, dim=-1)
        )
        mixed = [
            self.attention(self.rotated(q_h, positions), self.rotated(k_h, positions), v_h, seen)
            for q_h, k_h, v_h in zip(q, k, v, strict=True)
        ]
        return x + self.linear(f"{name}.self_attention.output", torch.cat(mixed, dim=-1))

    def cross_attention(self, name: str, x: Tensor, source: Tensor, seen: Seen) -> Tensor:
        q = self.heads(self.linear(f"{name}.cross_attention.query", self.norm(f"{name}.cross_norm", x)))
        k, v = (self.heads(y) for y in self.linear(f"{name}.cross_attention.key_value", source).chunk(2, dim=-1))
        mixed = [self.attention(q_h, k_h, v_h, seen) for q_h, k_h, v_h in zip(q, k, v, strict=True)]
        return x + self.linear(f"{name}.cross_attention.output", torch.cat(mixed, dim=-1))

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        inner = self.linear(f"{name}.feed_forward.0", self.norm(f"{name}.feed_forward_norm", x))
        return x + self.linear(f"{name}.feed_forward.2", 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2))))

    def layer(self, name: str, x: Tensor, positions: list[int], seen: Seen) -> Tensor:
        """One that reads no source."""
        return self.feed_forward(name, self.self_attention(name, x, positions, seen))

    def embedded(self, tokens: list[int]) -> Tensor:
        return self.weights["embedding.weight"][tokens]

    def losses(self, hidden: Tensor, labels: list[int]) -> Tensor:
        """Of the S positions of a segment; `hidden` may have the rows of the real ones alone."""
        head = self.weights["embedding.weight" if self.config.tie_embeddings else "head.weight"]
        nll = hidden.new_zeros(len(labels))
        for position, label in enumerate(labels):
            if label != IGNORE:
                scores = torch.exp(head @ hidden[position])
                nll[position] = -torch.log(scores[label] / scores.sum())
        return nll


def enlarged(config: CellConfig) -> RecurrentCell:
    """A cell in float64, its weights so large that every term matters, norms and biases included."""
    torch.manual_seed(0)
    cell = config.build(vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cell


def trace(cell: RecurrentCell, ticks: list[Segment]) -> list[Tensor]:
    """nll [ticks, B, S], then every floating-point leaf of the state after each tick [ticks, B, ...]."""
    state, found = cell.empty_state(len(ticks[0].length)), []
    for segment in ticks:
        features, state = cell("advance", segment, state)
        found.append((cell("readout", segment, features), *(leaf for leaf in state if differentiable(leaf))))
    return [torch.stack(column) for column in zip(*found, strict=True)]


def lane_by_lane(tick: Callable, ticks: list[Segment]) -> list[Tensor]:
    """The same of a reference: tick(segment, lane, state) -> (nll [S], leaves, state), the first of a lane with None."""
    lanes = []
    for lane in range(len(ticks[0].length)):
        state, found = None, []
        for segment in ticks:
            nll, leaves, state = tick(segment, lane, state)
            found.append((nll, *leaves))
        lanes.append([torch.stack(column) for column in zip(*found, strict=True)])
    return [torch.stack(column, dim=1) for column in zip(*lanes, strict=True)]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True))


def gradients(cell: RecurrentCell, outputs: list[Tensor]) -> list[Tensor]:
    """Of a fixed random combination of all outputs, with respect to all parameters."""
    generator = torch.Generator().manual_seed(9)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    return list(torch.autograd.grad(total, list(cell.parameters())))
