"""Cells against their papers' equations, written out in tests/helpers/references.py; Memformer has tests/test_memformer.py."""

import pytest
import torch

from memformer_dist.cells.armt import ArmtConfig
from memformer_dist.cells.hmt import HmtConfig
from memformer_dist.cells.rmt import RmtConfig
from tests.helpers.loops import difference, enlarged, gradients, lane_by_lane, trace
from tests.helpers.memformer import SIZE, TICKS
from tests.helpers.references import ArmtReference, HmtReference, RmtReference

SMALL = {"width": 8, "heads": 2, "feed_forward": 12, "layers": 2, "dropout": 0.0, "init_std": 0.3}
CELLS = {
    "rmt": (RmtConfig(**SMALL, slots=3), RmtReference),
    "armt": (ArmtConfig(**SMALL, write_tokens=3, memory_width=3), ArmtReference),
    "hmt": (HmtConfig(**SMALL, slots=2, sensory_tokens=SIZE + 1), HmtReference),  # the tail is short for a segment
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    "fields",
    [{}, {"positions": "none", "attention_bias": True, "tie_embeddings": False, "final_norm": False}],
    ids=["default", "alternatives"],
)
def test_values_and_gradients_follow_the_equations(name, fields):
    config, reference = CELLS[name]
    cell = enlarged(config.model_copy(update=fields))
    found, expected = trace(cell, TICKS), lane_by_lane(reference(cell).tick, TICKS)
    assert difference(found, expected) < 1e-11
    assert difference(gradients(cell, found), gradients(cell, expected)) < 1e-8


@pytest.mark.parametrize(
    "name, mistake", [(name, mistake) for name, (_, reference) in CELLS.items() for mistake in reference.mistakes]
)
@torch.no_grad()
def test_the_comparison_notices(name, mistake):
    config, reference = CELLS[name]
    cell = enlarged(config)
    assert difference(trace(cell, TICKS), lane_by_lane(reference(cell, mistake).tick, TICKS)) > 1e-3


def test_the_comparison_of_gradients_notices():
    """How often one of ARMT's keys counts is held fixed; as a part of the graph it changes no value."""
    config, reference = CELLS["armt"]
    cell = enlarged(config)
    found = trace(cell, TICKS)
    expected = lane_by_lane(reference(cell, "a gradient through how often a key counts").tick, TICKS)
    assert difference(found, expected) < 1e-11
    assert difference(gradients(cell, found), gradients(cell, expected)) > 1e-3


@pytest.mark.parametrize("sensory_tokens", [1, 3, SIZE, 2 * SIZE + 1])
@torch.no_grad()
def test_a_tail_of_any_length(sensory_tokens):
    """Of HMT, also of more tokens than a segment has."""
    config, reference = CELLS["hmt"]
    cell = enlarged(config.model_copy(update={"sensory_tokens": sensory_tokens}))
    assert difference(trace(cell, TICKS), lane_by_lane(reference(cell).tick, TICKS)) < 1e-11
