"""Memory replay through DeepSpeed on two ranks against full back-propagation in one process over the same global batch."""

import pytest
import torch

from memformer_dist.config import OptimizerConfig
from tests.ranks import run_ranks
from tests.test_mrbp import VOCABULARY, memformer
from tests.toy import ToyCell, full_bptt, labels_in, random_window, seeded_call

WORLD, LANES, LENGTH, SEGMENTS = 2, 4, 6, 4
STAGES = (0, 1, 2, 3)


def new_cell(name):
    torch.manual_seed(5)
    cell = ToyCell() if name == "toy" else memformer(name)
    for module in cell.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return cell


def windows(steps):
    return [random_window(SEGMENTS, LANES, LENGTH, seed=step) for step in range(steps)]


class Rows:
    """Some lanes of a window, with the `start` that the engine seeds dropout by."""

    def __init__(self, window, rows, start):
        self.window, self.rows, self.start = window, rows, start

    def __len__(self):
        return len(self.window)

    def __getitem__(self, t):
        return self.window[t].rows(self.rows)


def make_optimizer(kind, cell, learning_rate):
    if kind == "sgd":
        return torch.optim.SGD(cell.parameters(), lr=learning_rate)
    from memformer_dist.engine import adamw

    return adamw(cell, OptimizerConfig(learning_rate=learning_rate, weight_decay=0.1))


def reference_run(name, kind, learning_rate, steps, clipping=0.0):
    """Plain torch, one process, full BPTT: losses, gradient norms and the parameters at the end."""
    cell = new_cell(name)
    optimizer = make_optimizer(kind, cell, learning_rate)
    state, losses, norms = cell.empty_state(LANES), [], []
    for window in windows(steps):
        optimizer.zero_grad()
        state, loss = full_bptt(seeded_call(cell), window, state, loss_scale=1 / labels_in(window))
        norm = torch.nn.utils.clip_grad_norm_(cell.parameters(), clipping or float("inf"))
        optimizer.step()
        losses.append(float(loss))
        norms.append(float(norm))
    return losses, norms, dict(cell.named_parameters())


def engine_run(process, name, kind, learning_rate, steps, *, stage, groups=1, readout_group=1, clipping=0.0, engine=None, skip=()):
    """The same through the engine; `groups` lane groups a rank. Steps in `skip` see a window whose loss is not finite."""
    from memformer_dist.engine import Engine

    if engine is None:
        cell = new_cell(name)
        settings = {"zero_optimization": {"stage": stage}}
        engine = Engine(cell, make_optimizer(kind, cell, learning_rate), process, settings=settings, gradient_clipping=clipping)
    share = LANES // process.world_size // groups
    states = [engine.module.empty_state(share) for _ in range(groups)]
    losses, norms = [], []
    for step, window in enumerate(windows(steps)):
        total = 0.0

        def observe(t, segment, nll):
            nonlocal total
            total += float(nll.double().sum())

        first = process.rank * share * groups
        parts = [
            Rows(window, slice(first + g * share, first + (g + 1) * share), start=step * SEGMENTS) for g in range(groups)
        ]
        for broken in range(step in skip):
            poisoned = [state._replace(memory=state.memory * float("nan")) for state in states]
            engine.accumulate(parts, poisoned, valid_tokens=labels_in(window), readout_group=readout_group)
            result = engine.step(learning_rate)
            assert not result.applied and not torch.isfinite(torch.tensor(result.gradient_norm))
        accumulated = engine.accumulate(
            parts, states, valid_tokens=labels_in(window), readout_group=readout_group, observe=observe
        )
        states = accumulated.states
        result = engine.step(learning_rate)
        assert result.applied and accumulated.drift == 0
        losses.append(process.sum([total])[0] / labels_in(window))
        norms.append(result.gradient_norm)
    return losses, norms, engine


def weights_of(engine):
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_stage == 0:
        return {name: parameter.detach() for name, parameter in engine.module.named_parameters()}
    return {name: safe_get_full_fp32_param(parameter) for name, parameter in engine.module.named_parameters()}


def largest_difference(found, expected):
    return max(float((found[name] - expected[name]).detach().abs().max()) for name in expected)


# ---- parameters after several SGD steps, every stage ---------------------------------------------------------------------


def sgd_rank(process, name, batchings):
    _, norms, expected = reference_run(name, "sgd", 0.2, steps=4)
    initial = dict(new_cell(name).named_parameters())
    assert largest_difference(initial, expected) > 1e-2  # the steps move the parameters far more than the tolerance
    for stage in STAGES:
        for groups, readout_group in batchings:
            _, found_norms, engine = engine_run(
                process, name, "sgd", 0.2, 4, stage=stage, groups=groups, readout_group=readout_group
            )
            difference = largest_difference(weights_of(engine), expected)
            assert difference <= 1e-6, f"ZeRO {stage}, {groups} lane groups, readout group {readout_group}: {difference}"
            assert found_norms == pytest.approx(norms, rel=1e-4), f"ZeRO {stage}"


@pytest.mark.parametrize(
    "name, batchings", [("toy", ((1, 1), (2, 2), (1, 4))), ("encoder_decoder", ((1, 2),)), ("decoder", ((2, 1),))]
)
def test_parameters_after_sgd_steps_equal_full_bptt(name, batchings):
    """batchings: (lane groups of a rank, readout group)."""
    run_ranks(WORLD, sgd_rank, name, batchings)


# ---- losses under AdamW with clipping ------------------------------------------------------------------------------------


def adamw_rank(process):
    expected, _, _ = reference_run("encoder_decoder", "adamw", 3e-3, steps=8, clipping=0.5)
    assert expected[0] - expected[-1] > 0.05
    for stage in STAGES:
        losses, norms, _ = engine_run(process, "encoder_decoder", "adamw", 3e-3, 8, stage=stage, clipping=0.5)
        assert max(norms) > 0.5, "clipping never happened"
        assert max(abs(x - y) for x, y in zip(losses, expected)) <= 1e-5, f"ZeRO {stage}"


def test_losses_under_adamw_equal_full_bptt():
    run_ranks(WORLD, adamw_rank)


# ---- a window whose gradient is not finite -------------------------------------------------------------------------------


def skipped_step_rank(process):
    for stage in STAGES:
        clean, _, engine = engine_run(process, "encoder_decoder", "adamw", 3e-3, 4, stage=stage, clipping=1.0)
        skipping, _, other = engine_run(process, "encoder_decoder", "adamw", 3e-3, 4, stage=stage, clipping=1.0, skip=(0, 2))
        assert skipping == clean, f"ZeRO {stage}"
        assert largest_difference(weights_of(other), weights_of(engine)) == 0, f"ZeRO {stage}"


def test_a_gradient_that_is_not_finite_leaves_no_trace():
    """The step is dropped on every rank, and training goes on bit by bit as if the window had not been."""
    run_ranks(WORLD, skipped_step_rank)


# ---- Adam's moments out and in, from each stage to another ---------------------------------------------------------------


def moments_rank(process):
    from memformer_dist.engine import Engine

    saved = {}
    for stage in STAGES:
        _, _, engine = engine_run(process, "toy", "adamw", 1e-2, 3, stage=stage)
        saved[stage] = {name: (weight.clone(), {k: m.clone() for k, m in both.items()}) for name, weight, both in engine.tensors()}
        assert all(
            largest_difference({"": saved[stage][name][1][key]}, {"": saved[0][name][1][key]}) < 1e-7
            for name in saved[0]
            for key in ("exp_avg", "exp_avg_sq")
        )
    expected, _, _ = engine_run(process, "toy", "adamw", 1e-2, 3, stage=2, engine=engine_run(process, "toy", "adamw", 1e-2, 3, stage=2)[2])
    for stage in STAGES:
        tensors = saved[(stage + 1) % 4]
        cell = new_cell("toy")
        for name, parameter in cell.named_parameters():
            parameter.data.copy_(tensors[name][0])
        engine = Engine(cell, make_optimizer("adamw", cell, 1e-2), process, settings={"zero_optimization": {"stage": stage}})
        engine.load_moments(3, lambda name, key: tensors[name][1][key])
        losses, _, _ = engine_run(process, "toy", "adamw", 1e-2, 3, stage=stage, engine=engine)
        assert max(abs(x - y) for x, y in zip(losses, expected)) < 1e-6, f"ZeRO {stage}"
        forgetful = new_cell("toy")
        for name, parameter in forgetful.named_parameters():
            parameter.data.copy_(tensors[name][0])
        fresh = Engine(forgetful, make_optimizer("adamw", forgetful, 1e-2), process, settings={"zero_optimization": {"stage": stage}})
        losses, _, _ = engine_run(process, "toy", "adamw", 1e-2, 3, stage=stage, engine=fresh)
        assert max(abs(x - y) for x, y in zip(losses, expected)) > 1e-4, "without the moments training must differ"


def test_moments_move_between_stages():
    run_ranks(WORLD, moments_rank)
