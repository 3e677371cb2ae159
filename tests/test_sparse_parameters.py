"""A cell with parameters that only some segments use, and some windows not at all: nothing stale, nothing lost.

ZeRO-3 keeps a parameter's gradient of the step before where a step gives it none, ZeRO 1-2 leave it out of the reduction.
"""

import math

import pytest
import torch

from memformer_dist.mrbp.executor import TorchExecutor
from tests.helpers.engines import LANES, Rows, largest_difference, make_engine, weights_of
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import ToyCell, full_bptt, labels_in, random_window

SEGMENTS = 4
USED = [(0, 1), (), (2,), (), (3,), (0,)]  # segments of each step's window
STEP = 1.0
EVERYWHERE = range(LANES)


class SometimesCell(ToyCell):
    """`extra` works in advance and `late` in readout, on rows whose document has the number 1."""

    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(self.width, self.width)
        self.late = torch.nn.Linear(self.width, self.width)

    def advance(self, segment, state):
        features, state = super().advance(segment, state)
        chosen = segment.document == 1
        if chosen.any():
            state = state._replace(memory=state.memory + self.extra(state.memory) * chosen[:, None])
        return features, state

    def readout(self, segment, features):
        chosen = segment.document == 1
        if chosen.any():
            features = features._replace(mixed=features.mixed + self.late(features.mixed) * chosen[:, None, None])
        return super().readout(segment, features)


def new_cell():
    torch.manual_seed(5)
    return SometimesCell()


def windows(lanes):
    """Marked on `lanes` in the segments of USED."""
    made = []
    for step, used in enumerate(USED):
        marks = [torch.tensor([int(t in used and lane in lanes) for lane in range(LANES)]) for t in range(SEGMENTS)]
        window = random_window(SEGMENTS, LANES, 6, seed=step)
        made.append([segment._replace(document=mark) for segment, mark in zip(window, marks, strict=True)])
    return made


def reference_run(lanes):
    """Plain torch, one process, full BPTT; a parameter without a gradient stays as it is."""
    cell = new_cell()
    optimizer = torch.optim.SGD(cell.parameters(), lr=STEP)
    state, norms = cell.empty_state(LANES), []
    for window in windows(lanes):
        optimizer.zero_grad()
        state, _ = full_bptt(TorchExecutor(cell, 0), window, state, loss_scale=1 / labels_in(window))
        norms.append(float(torch.nn.utils.clip_grad_norm_(cell.parameters(), math.inf)))
        optimizer.step()
    return dict(cell.named_parameters()), norms


def engine_run(world, lanes, stage, *, fill_in=True, overlap_comm=False, **options):

    cell = new_cell()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": overlap_comm}
    optimizer = torch.optim.SGD(cell.parameters(), lr=STEP)
    engine = make_engine(cell, optimizer, world, settings={"zero_optimization": zero}, **options)
    if not fill_in:
        engine.reduction._fill_in_zeros = lambda parameters: None
    share = LANES // world.size
    rows = slice(world.rank * share, (world.rank + 1) * share)
    states, norms = [engine.module.empty_state(share)], []
    for step, window in enumerate(windows(lanes)):
        part = Rows(window, rows, start=step * SEGMENTS)
        states = engine.accumulate([part], states, valid_tokens=labels_in(window), readout_group=1 + step % 2).states
        norms.append(engine.step(STEP).gradient_norm)
    return weights_of(engine), norms


def everywhere_rank(world):
    expected, norms = reference_run(EVERYWHERE)
    unused = {name: weight for name, weight in new_cell().named_parameters() if name.startswith(("extra", "late"))}
    assert all(largest_difference({name: expected[name]}, {name: weight}) > 1e-3 for name, weight in unused.items())
    ways = [(stage, {}) for stage in (0, 1, 2, 3)]
    ways += [(2, {"overlap_comm": True}), (3, {"overlap_comm": True}), (3, {"keep_gathered": "none"})]
    ways += [(2, {"reduce": "segment"}), (3, {"reduce": "segment"})]
    for stage, options in ways:
        found, found_norms = engine_run(world, EVERYWHERE, stage, **options)
        assert largest_difference(found, expected) <= 1e-6, f"ZeRO {stage}, {options}"
        assert max(abs(x - y) for x, y in zip(found_norms, norms, strict=True)) <= 1e-6, f"ZeRO {stage}, {options}"
    stale, _ = engine_run(world, EVERYWHERE, 3, fill_in=False)
    assert largest_difference(stale, expected) > 1e-3, "DeepSpeed has changed: ZeRO-3 forgets old gradients by itself"


@pytest.mark.slow
def test_parameters_that_only_some_segments_use():
    """Six SGD steps at every stage, two of them without these parameters, equal full BPTT; unfilled, ZeRO-3 is wrong."""
    run_ranks(2, everywhere_rank)


def one_rank_rank(world):
    lanes = range(LANES // 2)  # those of rank 0
    expected, _ = reference_run(lanes)
    for stage in (0, 1, 2):
        found, _ = engine_run(world, lanes, stage)
        assert largest_difference(found, expected) <= 1e-6, f"ZeRO {stage}"


def test_parameters_that_only_one_rank_uses():
    """At ZeRO 0-2 with the reduction at the end; elsewhere ranks act together and rule 6 of cells/base.py is needed."""
    run_ranks(2, one_rank_rank)
