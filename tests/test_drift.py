"""Replay drift: measured over all leaves of a state, relative to their size, and the run stops where it is no rounding."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from memformer_dist.config import RunConfig
from memformer_dist.errors import UserError
from memformer_dist.mrbp.drift import Drift, drift_problem, exceeds
from memformer_dist.mrbp.replay import memory_replay
from memformer_dist.mrbp.settings import DRIFT_LIMITS
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import STEP_TOKENS, records, run_rank, settings
from tests.helpers.toy import OscillatorCell, ToyCell, ToyState, random_window


def relative(found: ToyState, expected: ToyState) -> list[float]:
    """By leaf, of a window of two segments."""
    drift = Drift(2, expected)
    drift.compare(0, found, expected)
    assert drift.relative[1].tolist() == [0.0, 0.0]
    return drift.relative[0].tolist()


MEMORY, SEEN = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([2, 1])
STATE = ToyState(MEMORY, SEEN)


def test_relative_to_the_size_of_each_leaf():
    assert relative(STATE, STATE) == [0.0, 0.0]
    assert relative(STATE._replace(memory=MEMORY + torch.tensor([[0.0, 0.3], [0.4, 0.0]])), STATE) == pytest.approx(
        [0.1, 0.0]
    )
    assert relative(STATE._replace(seen=torch.tensor([2, 2])), STATE) == pytest.approx([0.0, 5**-0.5])
    nothing = ToyState(torch.zeros(2, 0), torch.zeros(2, dtype=torch.bool))
    assert relative(nothing, nothing) == [0.0, 0.0]
    assert relative(nothing._replace(seen=torch.tensor([True, False])), nothing) == [0.0, math.inf]


def test_the_size_is_that_of_the_largest_state_of_the_window():
    """A leaf that passes through zero is not measured by its rounding there."""
    drift, tiny = Drift(2, STATE), STATE._replace(memory=MEMORY * 1e-8)
    drift.compare(1, STATE, STATE)
    drift.compare(0, tiny._replace(memory=tiny.memory * 2), tiny)
    assert drift.relative[0].tolist() == pytest.approx([1e-8, 0.0])
    assert drift.largest == pytest.approx(4e-8)


def test_large_integers_are_told_apart():
    large = ToyState(MEMORY, torch.tensor([2**60, 2**60]))
    assert relative(large._replace(seen=torch.tensor([2**60, 2**60 + 1])), large)[1] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_finite_in_neither_is_no_drift(value):
    """The memory of a step that will be skipped; the other leaves still count. In one of them alone it is infinite."""
    broken = STATE._replace(memory=MEMORY.clone())
    broken.memory[0, 1] = value
    assert relative(broken, broken) == [0.0, 0.0]
    assert relative(broken._replace(seen=SEEN + 1), broken)[1] > 0.1
    for found, expected in ((broken, STATE), (STATE, broken)):
        assert exceeds(relative(found, expected)[0], 1e9)


def test_the_message_names_leaf_and_segment():
    figures = torch.tensor([[0.0, 0.2], [math.nan, 0.0], [0.5, 0.3]])
    message = drift_problem(figures, ToyState._fields, 0.05)
    assert "memory behind segment 1 of the window differs by nan of its size, expected at most 0.05" in message
    figures[1, 0] = 0.0
    figures[2, 1] = 0.6
    message = drift_problem(figures, ToyState._fields, 0.05)
    assert drift_problem(figures, ToyState._fields, 0.61) is None
    assert (
        message.startswith("mrbp.drift_limit: ") and "seen behind segment 2 of the window differs by 0.6 of" in message
    )
    assert "check_cell(cell)" in message and "cells/base.py" in message


# ---- cells that replay cannot repeat -----------------------------------------------------------------------------------


class FromNumpy(ToyCell):
    scale = 0.1

    def advance(self, segment, state):
        features, state = super().advance(segment, state)
        noise = torch.from_numpy(np.random.standard_normal(state.memory.shape)).to(state.memory.dtype)
        return features, state._replace(memory=state.memory + self.scale * noise)


class Rounding(FromNumpy):
    """As kernels that are not deterministic do it."""

    scale = 1e-6


class CountsCalls(ToyCell):
    """An attribute that a call changes, seen in an integer leaf alone."""

    calls = 0

    def advance(self, segment, state):
        self.calls += 1
        features, state = super().advance(segment, state)
        return features, state._replace(seen=state.seen + self.calls)


class RunningMean(ToyCell):
    """A buffer that a call updates, as batch normalisation does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(self.width))

    def advance(self, segment, state):
        features, state = super().advance(segment, state)
        self.mean = 0.9 * self.mean + 0.1 * state.memory.detach().mean(0)
        return features, state._replace(memory=state.memory - self.mean)


class FromTheRollout(ToyCell):
    """What the rollout has cached stands where the replay recomputes."""

    cached: Tensor | None = None

    def advance(self, segment, state):
        features, state = super().advance(segment, state)
        if not torch.is_grad_enabled():
            self.cached = state.memory
        return features, state._replace(memory=state.memory if self.cached is None else state.memory + self.cached)


class Turned(OscillatorCell):
    """Noise in a complex leaf."""

    def advance(self, segment, state):
        features, state = super().advance(segment, state)
        return features, state._replace(memory=state.memory * complex(1, 0.1 * np.random.standard_normal()))


LIMIT = DRIFT_LIMITS["fp32"]


@pytest.mark.parametrize(
    "cell, breaks",
    [
        (lambda: ToyCell(dropout=0.3), False),
        (lambda: OscillatorCell(dropout=0.3), False),
        (Rounding, False),
        (FromNumpy, True),
        (CountsCalls, True),
        (RunningMean, True),
        (FromTheRollout, True),
        (Turned, True),
    ],
)
def test_what_replay_cannot_see_is_beyond_the_limit(cell, breaks):
    torch.manual_seed(0)
    cell, window = cell(), random_window(5, 3, 6, seed=0)
    replayed = memory_replay(cell, window, cell.empty_state(3), loss_scale=0.01)
    assert exceeds(float(replayed.relative_drift.max()), LIMIT) == breaks
    assert replayed.relative_drift.shape == (5, len(cell.empty_state(3))) and not replayed.relative_drift[-1].any()
    assert (replayed.drift > 0) == (breaks or isinstance(cell, Rounding))


# ---- runs ------------------------------------------------------------------------------------------------------------


def drifting_rank(world, raw, folder) -> None:
    """Memformer with noise from numpy on rank 1 alone; and one whose memory is not finite in some steps."""
    from memformer_dist.cells.memformer import Memformer

    advance, noise = Memformer.advance, np.random.default_rng(world.rank)

    def noisy(cell, segment, state):
        features, state = advance(cell, segment, state)
        scale = 0.1 * (world.rank == 1)
        return features, state._replace(memory=state.memory * (1 + scale * noise.standard_normal()))

    def infinite(cell, segment, state):
        features, state = advance(cell, segment, state)
        return features, state._replace(memory=state.memory / (segment.offset != 32)[:, None, None])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Memformer, "advance", noisy)
        with pytest.raises(UserError) as caught:
            run_rank(world, raw, folder / "noisy")
        (message,) = set(world.gather(str(caught.value)))
        assert message.startswith("rank 1 on ") and message.endswith(
            "This was step 1; the last checkpoint is of step 0"
        )
        assert ": mrbp.drift_limit: the replay does not repeat the rollout: memory behind segment " in message
        run_rank(world, raw | {"mrbp": raw["mrbp"] | {"drift_limit": 1e9}}, folder / "unlimited")
        patch.setattr(Memformer, "advance", infinite)
        run_rank(world, raw | {"training": raw["training"] | {"skipped_steps_limit": 99}}, folder / "infinite")


@pytest.mark.slow
def test_a_run_stops_at_the_first_step_on_all_ranks(corpus_dir, tmp_path):
    raw = settings(corpus_dir, tokens=3 * STEP_TOKENS, dropout=0.1, mrbp={"lanes_per_group": 2})
    run_ranks(2, drifting_rank, raw, tmp_path)
    assert not (tmp_path / "noisy" / "checkpoints").exists()
    names = ("optim/skipped", "mrbp/replay_drift")
    found = {
        name: [row[2:] for row in records(tmp_path / name, *names, having=names[0])]
        for name in ("unlimited", "infinite")
    }
    assert all(drift > 0.01 and skipped == 0 for skipped, drift in found["unlimited"])
    assert sum(skipped for skipped, _ in found["infinite"]) >= 3 and all(drift == 0 for _, drift in found["infinite"])


def test_the_limit_depends_on_the_precision(config):
    assert RunConfig.check(config).drift_limit == DRIFT_LIMITS["fp32"]
    config["training"]["precision"] = "bf16"
    assert RunConfig.check(config).drift_limit == DRIFT_LIMITS["bf16"] > LIMIT
    config["mrbp"]["drift_limit"] = 0
    assert RunConfig.check(config).drift_limit == 0
