"""Recurrent Memory Transformer against the paper's equations, written out in tests/helpers/loops.py for one lane at a time."""

import pytest
import torch
from torch import Tensor

from memformer_dist.cells.rmt import Rmt, RmtConfig
from memformer_dist.segment import Segment
from tests.helpers.loops import Loops, difference, gradients, lane_by_lane, trace
from tests.helpers.memformer import BOS, SIZE, TICKS, VOCABULARY, make_segment

SLOTS = 3


def make(**fields) -> Rmt:
    """A small cell with weights large enough that every term matters, norms and biases included."""
    torch.manual_seed(0)
    small = {"width": 8, "heads": 2, "feed_forward": 12, "layers": 2, "slots": SLOTS, "dropout": 0.0, "init_std": 0.3}
    cell = RmtConfig(**small | fields).build(vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cell


class Reference(Loops):
    """Read tokens, the real tokens of the segment, write tokens: padding does not exist here."""

    def tick(self, segment: Segment, lane: int, state: Tensor | None) -> tuple[Tensor, tuple[Tensor], Tensor]:
        length, initial = int(segment.length[lane]), self.weights["start.value"]
        memory = initial if state is None or segment.reset[lane] or segment.reset_memory[lane] else state
        if self.mistake == "a reset to zeros" and segment.reset[lane]:
            memory = torch.zeros_like(initial)
        if self.mistake == "reset_memory ignored" and state is not None and not segment.reset[lane]:
            memory = state
        slots, end = len(memory), len(memory) + length

        def seen(i: int, j: int) -> bool:
            if i < slots:
                return j < slots if self.mistake != "read tokens are causal" else j <= i
            if i < end:
                return slots * (self.mistake == "tokens do not see the memory") <= j <= i
            return j <= (i if self.mistake == "write tokens do not see one another" else end + slots)

        first = end if self.mistake == "write tokens behind the last token" else slots + SIZE
        positions = [*range(end), *range(first, first + slots)]
        written = initial if self.mistake == "write tokens start as the learned vectors" else memory
        x = torch.cat([memory, self.embedded(segment.tokens[lane, :length].tolist()), written])
        for number in range(self.config.layers):
            x = self.layer(f"layers.layers.{number}", x, positions, seen)
        normed = x if self.mistake == "the memory is not normed" else self.norm("layers.norm", x)
        after = normed[:slots] if self.mistake == "memory from the read tokens" else normed[end:]
        after = after + memory if self.mistake == "the memory is added up" else after
        return self.losses(self.norm("layers.norm", x)[slots:end], segment.labels[lane].tolist()), (after,), after


@pytest.mark.parametrize(
    "fields",
    [{}, {"positions": "none", "attention_bias": True, "tie_embeddings": False, "final_norm": False}],
    ids=["default", "alternatives"],
)
def test_values_and_gradients_follow_the_equations(fields):
    cell = make(**fields)
    found, expected = trace(cell, TICKS), lane_by_lane(Reference(cell).tick, TICKS)
    assert difference(found, expected) < 1e-11
    assert difference(gradients(cell, found), gradients(cell, expected)) < 1e-8


@pytest.mark.parametrize(
    "mistake",
    [
        "read tokens are causal",
        "tokens do not see the memory",
        "write tokens do not see one another",
        "write tokens behind the last token",
        "write tokens start as the learned vectors",
        "memory from the read tokens",
        "the memory is added up",
        "the memory is not normed",
        "a reset to zeros",
        "reset_memory ignored",
        "no positions",
    ],
)
@torch.no_grad()
def test_the_comparison_notices(mistake):
    cell = make()
    assert difference(trace(cell, TICKS), lane_by_lane(Reference(cell, mistake).tick, TICKS)) > 1e-3


def test_a_memory_is_of_the_size_that_the_layers_write():
    """As initialised: memories keep the norm sqrt(D) from the first on, and the text decides what they are.

    With the small weights of other models it does not, the control: memories of two texts are all but the same.
    """
    shares = {}
    for std in (64**-0.5, 0.02):
        torch.manual_seed(0)
        config = RmtConfig(width=64, heads=4, feed_forward=128, layers=2, slots=4, dropout=0.0, init_std=std)
        cell = config.build(vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE)
        memories = []
        for text in range(2):
            state = cell.empty_state(8)
            for t in range(3):
                segment = make_segment([SIZE] * 8, reset=[t == 0] * 8, seed=10 * text + t)
                with torch.no_grad():
                    _, state = cell("advance", segment, state)
                norms = state.memory.norm(dim=-1)
                assert norms == pytest.approx(torch.full_like(norms, 8.0), rel=1e-2)
            memories.append(state.memory)
        shares[std] = float((memories[0] - memories[1]).norm() / memories[0].norm())
    assert shares[64**-0.5] > 0.2 and shares[0.02] < 0.02, shares


@torch.no_grad()
def test_tokens_are_read_once_in_generation():
    """`extend` computes the tokens that it is given alone, `close` the write tokens: the cache is no recomputation."""
    cell = make()
    rows = []
    cell.layers.layers[0].feed_forward.register_forward_hook(
        lambda module, inputs, output: rows.append(output.shape[1])
    )
    cache = cell.open(cell.empty_state(2), torch.ones(2, dtype=torch.bool))
    for count in (2, 1):
        _, cache = cell.extend(torch.ones(2, count, dtype=torch.int64), cache)
    cell.close(cache)
    assert rows == [SLOTS, 2, 1, SLOTS]
