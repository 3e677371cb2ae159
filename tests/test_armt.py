"""Associative Recurrent Memory Transformer against the paper's equations, written out for one lane and one write token."""

import pytest
import torch
from torch import Tensor

from memformer_dist.cells.armt import Armt, ArmtConfig, AssociativeMemory
from memformer_dist.segment import Segment
from tests.helpers.loops import Loops, difference, gradients, lane_by_lane, trace
from tests.helpers.memformer import BOS, SIZE, TICKS, VOCABULARY

SMALL = {"width": 8, "heads": 2, "feed_forward": 12, "layers": 2, "write_tokens": 3, "memory_width": 3}


def make(**fields) -> Armt:
    """A small cell with weights large enough that every term matters, norms included."""
    torch.manual_seed(0)
    config = ArmtConfig(**SMALL | {"dropout": 0.0, "init_std": 0.3} | fields)
    cell = config.build(vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cell


class Reference(Loops):
    """The real tokens of the segment, then the write tokens, which write one by one: padding does not exist here."""

    def features(self, x: Tensor) -> Tensor:
        u = torch.cat([torch.where(x > 0, x, 0), torch.where(x < 0, -x, 0)])
        shifts = (1, 1, 1) if self.mistake == "one roll alone" else (1, 2, 3)
        products = torch.stack([u[i] * u[i - shift] for shift in shifts for i in range(len(u))])
        return products if self.mistake == "keys of any norm" else products / torch.sqrt((products**2).sum() + 1e-30)

    def found(self, key: Tensor, associations: Tensor, keys: Tensor) -> Tensor:
        numbers = sum(weight * row for weight, row in zip(key, associations, strict=True))
        return numbers if self.mistake == "no normaliser" else numbers / (key @ keys + 1e-5)

    def read(self, name: str, x: Tensor, associations: Tensor, keys: Tensor) -> Tensor:
        return torch.stack(
            [row + self.found(self.features(self.linear(f"{name}.query", row)), associations, keys) for row in x]
        )

    def write(self, name: str, rows: Tensor, associations: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        associations_before, keys_before = associations, keys
        for row in rows:
            if self.mistake == "write tokens one after another":
                associations_before, keys_before = associations, keys
            key, value = self.features(self.linear(f"{name}.key", row)), self.linear(f"{name}.value", row)
            strength = 1 / (1 + torch.exp(-self.linear(f"{name}.strength", row)))
            old = 0 if self.mistake == "no delta rule" else self.found(key, associations_before, keys_before)
            associations = associations + strength * key[:, None] * (value - old)[None]
            share = torch.clip(1 - key @ keys_before, 0, 1)
            if self.mistake != "a gradient through how often a key counts":
                share = share.detach()
            keys = keys + (1 if self.mistake == "keys count every time" else share) * key
        return associations, keys

    def tick(self, segment: Segment, lane: int, state: tuple | None) -> tuple[Tensor, tuple, tuple]:
        length, config = int(segment.length[lane]), self.config
        zeros = self.weights["embedding.weight"].new_zeros(config.layers, 6 * config.memory_width, config.width)
        associations, keys = state or (zeros, zeros[..., 0])
        if segment.reset[lane] or (segment.reset_memory[lane] and self.mistake != "reset_memory ignored"):
            associations, keys = zeros, zeros[..., 0]

        def seen(i: int, j: int) -> bool:
            return j <= i or (i >= length and self.mistake != "write tokens do not see one another")

        first = length if self.mistake == "write tokens behind the last token" else SIZE
        positions = [*range(length), *range(first, first + config.write_tokens)]
        x = torch.cat([self.embedded(segment.tokens[lane, :length].tolist()), self.weights["write_tokens.value"]])
        after = []
        for number, own in enumerate(zip(associations, keys, strict=True)):
            name, entering = f"memories.{number}", x
            if self.mistake != "read behind the layer":
                x = self.read(name, x, *own)
            x = self.layer(f"stack.layers.{number}", x, positions, seen)
            if self.mistake == "read behind the layer":
                x = self.read(name, x, *own)
            rows = entering if self.mistake == "written from the layer's input" else x
            after.append(self.write(name, rows[length:], *own))
        nll = self.losses(self.norm("stack.norm", x)[:length], segment.labels[lane].tolist())
        state = tuple(torch.stack(leaves) for leaves in zip(*after, strict=True))
        return nll, state, state


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


def test_the_comparison_of_gradients_notices():
    """How often a key counts is held fixed; as a part of the graph it changes no value."""
    cell = make()
    found = trace(cell, TICKS)
    expected = lane_by_lane(Reference(cell, "a gradient through how often a key counts").tick, TICKS)
    assert difference(found, expected) < 1e-11
    assert difference(gradients(cell, found), gradients(cell, expected)) > 1e-3


@pytest.mark.parametrize(
    "mistake",
    [
        "one roll alone",
        "keys of any norm",
        "no normaliser",
        "no delta rule",
        "keys count every time",
        "write tokens one after another",
        "write tokens do not see one another",
        "write tokens behind the last token",
        "read behind the layer",
        "written from the layer's input",
        "reset_memory ignored",
    ],
)
@torch.no_grad()
def test_the_comparison_notices(mistake):
    cell = make()
    assert difference(trace(cell, TICKS), lane_by_lane(Reference(cell, mistake).tick, TICKS)) > 1e-3


@torch.no_grad()
def test_a_value_replaces_what_its_key_held():
    torch.manual_seed(0)
    memory = AssociativeMemory(ArmtConfig(**SMALL, init_std=0.5)).double()
    memory.query.weight.copy_(memory.key.weight)
    row = torch.randn(1, 1, 8, dtype=torch.float64)
    memory.strength.weight.copy_(1e3 * row[0])  # b = 1
    state = torch.zeros(1, 18, 8, dtype=torch.float64), torch.zeros(1, 18, dtype=torch.float64)
    assert not memory.read(row, *state).any()
    written = memory.write(row, *state)
    again = memory.write(row, *written)
    for state in written, again:
        torch.testing.assert_close(memory.read(row, *state), memory.value(row), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again[1], written[1], rtol=1e-12, atol=1e-12)
    memory.value.weight.mul_(-3)
    torch.testing.assert_close(memory.read(row, *memory.write(row, *again)), memory.value(row), rtol=1e-4, atol=1e-5)
