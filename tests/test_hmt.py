"""Hierarchical Memory Transformer, its causal form, against its equations, written out for one lane at a time."""

import math

import pytest
import torch
from torch import Tensor

from memformer_dist.cells.hmt import Hmt, HmtConfig
from memformer_dist.segment import Segment
from tests.helpers.loops import Loops, difference, gradients, lane_by_lane, trace
from tests.helpers.memformer import BOS, SIZE, TICKS, VOCABULARY, make_segment

SLOTS, SENSORY = 2, SIZE + 1  # so that the tail is short in a document's second segment


def make(**fields) -> Hmt:
    """A small cell with weights large enough that every term matters, norms included."""
    torch.manual_seed(0)
    small = {"width": 8, "heads": 2, "feed_forward": 12, "layers": 2, "dropout": 0.0, "init_std": 0.3}
    config = HmtConfig(**small | {"slots": SLOTS, "sensory_tokens": SENSORY} | fields)
    cell = config.build(vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cell


class Reference(Loops):
    """A list of memory embeddings and a list of tokens: padding does not exist here."""

    def backbone(self, x: Tensor, positions: list[int]) -> Tensor:
        for number in range(self.config.layers):
            x = self.layer(f"layers.layers.{number}", x, positions, lambda i, j: j <= i)
        return self.norm("layers.norm", x)

    def recall(self, summary: Tensor, embeddings: list[Tensor]) -> Tensor:
        start = self.weights["recall.start.value"][0]
        if self.mistake == "no recall":
            return start
        kept = embeddings if self.mistake == "nothing is overwritten" else embeddings[-self.config.slots :]
        candidates = torch.stack(kept if kept and self.mistake == "no learned vector among others" else [start, *kept])
        query, keys = self.linear("recall.query", summary), self.linear("recall.key", candidates)
        scale = 1 if self.mistake == "scores of any size" else math.sqrt(self.config.width)
        weights = torch.stack([torch.exp(query @ key / scale) for key in keys])
        values = keys if self.mistake == "keys are recalled" else candidates
        return sum(weight * value for weight, value in zip(weights / weights.sum(), values, strict=True))

    def tick(self, segment: Segment, lane: int, state: tuple[list, list] | None) -> tuple[Tensor, tuple, tuple]:
        embeddings, tail = state if state is not None and not segment.reset[lane] else ([], [])
        if segment.reset_memory[lane] and self.mistake != "reset_memory ignored":
            embeddings = []
            tail = [] if self.mistake == "a reset memory drops the tail" else tail
        tokens, sensory = segment.tokens[lane, : segment.length[lane]].tolist(), self.config.sensory_tokens
        first = 1 if self.mistake == "the tail at the left" else 1 + sensory - len(tail)
        before = [0, *range(first, first + len(tail))]

        end, summarised = self.weights["summary.value"], tail
        if self.mistake == "the segment's own beginning is summarised":
            summarised = (tokens + tail)[: len(tail)]
        summary = self.backbone(torch.cat([end, self.embedded(summarised), end]), [*before, 1 + sensory])[-1]
        ends = self.recall(summary, embeddings)[None]
        last = 1 + sensory + (len(tokens) if self.mistake == "the last vector behind the last token" else SIZE)
        positions = [*before, *range(1 + sensory, 1 + sensory + len(tokens)), last]
        hidden = self.backbone(torch.cat([ends, self.embedded(tail), self.embedded(tokens), ends]), positions)
        nll = self.losses(hidden[1 + len(tail) : -1], segment.labels[lane].tolist())

        embeddings = [*embeddings, hidden[0 if self.mistake == "the first row is remembered" else -1]]
        memory = [torch.zeros_like(hidden[0])] * self.config.slots
        for number, embedding in enumerate(embeddings):
            memory[number % len(memory)] = embedding
        text = tokens if self.mistake == "a tail of the last segment alone" else tail + tokens
        return nll, (torch.stack(memory),), (embeddings, text[-sensory:])


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


@pytest.mark.parametrize("sensory_tokens", [1, 3, SIZE, 2 * SIZE + 1])
@torch.no_grad()
def test_a_tail_of_any_length(sensory_tokens):
    cell = make(sensory_tokens=sensory_tokens)
    assert difference(trace(cell, TICKS), lane_by_lane(Reference(cell).tick, TICKS)) < 1e-11


@pytest.mark.parametrize(
    "mistake",
    [
        "the segment's own beginning is summarised",
        "no recall",
        "nothing is overwritten",
        "no learned vector among others",
        "scores of any size",
        "keys are recalled",
        "the first row is remembered",
        "the last vector behind the last token",
        "the tail at the left",
        "a tail of the last segment alone",
        "a reset memory drops the tail",
        "reset_memory ignored",
        "no positions",
    ],
)
@torch.no_grad()
def test_the_comparison_notices(mistake):
    cell = make()
    assert difference(trace(cell, TICKS), lane_by_lane(Reference(cell, mistake).tick, TICKS)) > 1e-3


@torch.no_grad()
def test_an_embedding_is_kept_for_as_many_segments_as_there_are_slots():
    """Row t mod N is of segment t, untouched until its turn comes again."""
    cell = make(slots=3)
    state, memories = cell.empty_state(1), []
    for t in range(7):
        _, state = cell("advance", make_segment([SIZE], reset=[t == 0], seed=t), state)
        memories.append(state.memory[0])
    for t in range(1, 7):
        changed = [row for row in range(3) if not torch.equal(memories[t][row], memories[t - 1][row])]
        assert changed == [t % 3]
    assert int(state.written) == 7
