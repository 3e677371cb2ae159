"""Memory replay through DeepSpeed on two ranks against full back-propagation in one process over the same global batch."""

import math

import pytest
import torch

from memformer_dist.mrbp.executor import TorchExecutor
from memformer_dist.optimizer import OptimizerConfig
from memformer_dist.segment import select_rows
from tests.helpers.engines import make_engine
from tests.ranks import run_ranks
from tests.test_mrbp import memformer
from tests.toy import ToyCell, ToyFeatures, full_bptt, labels_in, random_window

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
        return select_rows(self.window[t], self.rows)


def make_optimizer(kind, cell, learning_rate):
    if kind == "sgd":
        return torch.optim.SGD(cell.parameters(), lr=learning_rate)
    from memformer_dist.optimizer import adamw

    return adamw(cell, OptimizerConfig(learning_rate=learning_rate, weight_decay=0.1))


def reference_run(name, kind, learning_rate, steps, clipping=0.0):
    """Plain torch, one process, full BPTT: losses, gradient norms and the parameters at the end."""
    cell = new_cell(name)
    optimizer = make_optimizer(kind, cell, learning_rate)
    state, losses, norms = cell.empty_state(LANES), [], []
    for window in windows(steps):
        optimizer.zero_grad()
        state, loss = full_bptt(TorchExecutor(cell, 0), window, state, loss_scale=1 / labels_in(window))
        norm = torch.nn.utils.clip_grad_norm_(cell.parameters(), clipping or float("inf"))
        optimizer.step()
        losses.append(float(loss))
        norms.append(float(norm))
    return losses, norms, dict(cell.named_parameters())


def engine_run(
    world,
    name,
    kind,
    learning_rate,
    steps,
    *,
    stage,
    groups=1,
    readout_group=1,
    readout_parts=1,
    clipping=0.0,
    engine=None,
    skip=(),
    between=lambda engine: None,
):
    """The same through the engine; `groups` lane groups a rank. Steps in `skip` see a window whose loss is not finite;
    `between(engine)` is called after each."""

    if engine is None:
        cell = new_cell(name)
        settings = {"zero_optimization": {"stage": stage}}
        engine = make_engine(
            cell, make_optimizer(kind, cell, learning_rate), world, settings=settings, gradient_clipping=clipping
        )
    engine.mrbp = engine.mrbp.model_copy(update={"readout_parts": readout_parts})
    share = LANES // world.size // groups
    states = [engine.module.empty_state(share) for _ in range(groups)]
    losses, norms = [], []
    for step, window in enumerate(windows(steps)):
        total = 0.0

        def observe(t, segment, nll):
            nonlocal total
            total += float(nll.double().sum())

        first = world.rank * share * groups
        parts = [
            Rows(window, slice(first + g * share, first + (g + 1) * share), start=step * SEGMENTS)
            for g in range(groups)
        ]
        if step in skip:  # a memory that is not finite, on one rank alone: all of them must drop the step
            factor = float("nan") if world.rank == 1 else 1.0
            poisoned = [state._replace(memory=state.memory * factor) for state in states]
            started = [segment._replace(reset=torch.zeros_like(segment.reset)) for segment in window]
            read = [Rows(started, part.rows, part.start) for part in parts]
            engine.accumulate(read, poisoned, valid_tokens=labels_in(window), readout_group=readout_group)
            result = engine.step(learning_rate)
            assert not result.applied and not math.isfinite(result.gradient_norm)
        accumulated = engine.accumulate(
            parts,
            states,
            valid_tokens=labels_in(window),
            readout_group=readout_group,
            observe=observe,
        )
        states = accumulated.states
        result = engine.step(learning_rate)
        assert result.applied and accumulated.drift == 0
        losses.append(world.all_reduce_sum([total])[0] / labels_in(window))
        norms.append(result.gradient_norm)
        between(engine)
    return losses, norms, engine


def weights_of(engine):
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_stage == 0:
        return {name: parameter.detach() for name, parameter in engine.module.named_parameters()}
    return {name: safe_get_full_fp32_param(parameter) for name, parameter in engine.module.named_parameters()}


def largest_difference(found, expected):
    return max(float((found[name] - expected[name]).detach().abs().max()) for name in expected)


# ---- parameters after several SGD steps, every stage ---------------------------------------------------------------------


def sgd_rank(world, name, batchings):
    _, norms, expected = reference_run(name, "sgd", 0.2, steps=4)
    initial = dict(new_cell(name).named_parameters())
    assert largest_difference(initial, expected) > 1e-2  # the steps move the parameters far more than the tolerance
    for stage in STAGES:
        for groups, readout_group in batchings:
            _, found_norms, engine = engine_run(
                world, name, "sgd", 0.2, 4, stage=stage, groups=groups, readout_group=readout_group
            )
            difference = largest_difference(weights_of(engine), expected)
            assert difference <= 1e-6, (
                f"ZeRO {stage}, {groups} lane groups, readout group {readout_group}: {difference}"
            )
            assert found_norms == pytest.approx(norms, rel=1e-4), f"ZeRO {stage}"


@pytest.mark.parametrize(
    "name, batchings", [("toy", ((1, 1), (2, 2), (1, 4))), ("encoder_decoder", ((1, 2),)), ("decoder", ((2, 1),))]
)
def test_parameters_after_sgd_steps_equal_full_bptt(name, batchings):
    """batchings: (lane groups of a rank, readout group)."""
    run_ranks(WORLD, sgd_rank, name, batchings)


# ---- losses under AdamW with clipping ------------------------------------------------------------------------------------


def adamw_rank(world):
    expected, _, _ = reference_run("encoder_decoder", "adamw", 3e-3, steps=8, clipping=0.5)
    assert expected[0] - expected[-1] > 0.05
    for stage in STAGES:
        losses, norms, _ = engine_run(world, "encoder_decoder", "adamw", 3e-3, 8, stage=stage, clipping=0.5)
        assert max(norms) > 0.5, "clipping never happened"
        assert max(abs(x - y) for x, y in zip(losses, expected)) <= 1e-5, f"ZeRO {stage}"


def test_losses_under_adamw_equal_full_bptt():
    run_ranks(WORLD, adamw_rank)


# ---- a window whose gradient is not finite -------------------------------------------------------------------------------


def skipped_step_rank(world):
    for stage in STAGES:
        clean, _, engine = engine_run(world, "encoder_decoder", "adamw", 3e-3, 4, stage=stage, clipping=1.0)
        skipping, _, other = engine_run(
            world, "encoder_decoder", "adamw", 3e-3, 4, stage=stage, clipping=1.0, skip=(0, 2)
        )
        assert skipping == clean, f"ZeRO {stage}"
        assert largest_difference(weights_of(other), weights_of(engine)) == 0, f"ZeRO {stage}"


def test_a_gradient_that_is_not_finite_leaves_no_trace():
    """The step is dropped on every rank, and training goes on bit by bit as if the window had not been."""
    run_ranks(WORLD, skipped_step_rank)


# ---- Adam's moments out and in, from each stage to another ---------------------------------------------------------------


def moments_rank(world):

    saved = {}
    for stage in STAGES:
        _, _, engine = engine_run(world, "toy", "adamw", 1e-2, 3, stage=stage)
        saved[stage] = {
            name: (weight.clone(), {k: m.clone() for k, m in both.items()}) for name, weight, both in engine.tensors()
        }
        assert all(
            largest_difference({"": saved[stage][name][1][key]}, {"": saved[0][name][1][key]}) < 1e-7
            for name in saved[0]
            for key in ("exp_avg", "exp_avg_sq")
        )
    expected, _, _ = engine_run(
        world, "toy", "adamw", 1e-2, 3, stage=2, engine=engine_run(world, "toy", "adamw", 1e-2, 3, stage=2)[2]
    )
    for stage in STAGES:
        tensors = saved[(stage + 1) % 4]
        cell = new_cell("toy")
        for name, parameter in cell.named_parameters():
            parameter.data.copy_(tensors[name][0])
        engine = make_engine(
            cell, make_optimizer("adamw", cell, 1e-2), world, settings={"zero_optimization": {"stage": stage}}
        )
        engine.load_moments(3, lambda name, key: tensors[name][1][key])
        losses, _, _ = engine_run(world, "toy", "adamw", 1e-2, 3, stage=stage, engine=engine)
        assert max(abs(x - y) for x, y in zip(losses, expected)) < 1e-6, f"ZeRO {stage}"
        forgetful = new_cell("toy")
        for name, parameter in forgetful.named_parameters():
            parameter.data.copy_(tensors[name][0])
        fresh = make_engine(
            forgetful,
            make_optimizer("adamw", forgetful, 1e-2),
            world,
            settings={"zero_optimization": {"stage": stage}},
        )
        losses, _, _ = engine_run(world, "toy", "adamw", 1e-2, 3, stage=stage, engine=fresh)
        assert max(abs(x - y) for x, y in zip(losses, expected)) > 1e-4, "without the moments training must differ"


def test_moments_move_between_stages():
    run_ranks(WORLD, moments_rank)


def no_update_rank(world):
    """Moments are asked for before any step was applied: every step so far was skipped."""
    for stage in STAGES:
        cell = new_cell("toy")
        settings = {"zero_optimization": {"stage": stage}}

        engine = make_engine(cell, make_optimizer("adamw", cell, 1e-2), world, settings=settings)
        found = list(engine.tensors())
        assert len(found) == len(list(cell.parameters()))
        assert all(
            (moment == 0).all() and moment.shape == weight.shape
            for _, weight, both in found
            for moment in both.values()
        )
        losses, _, _ = engine_run(world, "toy", "adamw", 1e-2, 3, stage=stage, engine=engine)
        expected, _, _ = engine_run(world, "toy", "adamw", 1e-2, 3, stage=stage)
        assert losses == expected, f"ZeRO {stage}: asking for the moments changed the training"


def test_a_checkpoint_before_the_first_update():
    run_ranks(WORLD, no_update_rank)


# ---- accumulation in bf16 ------------------------------------------------------------------------------------------------


class Scale(ToyCell):
    """One weight w, loss w * x: the gradient is the sum of the x of all segments, here 1 and 65 times 2^-9.

    bf16 has 8 significant bits: 1 + 2^-9 is 1 there, so an accumulator in bf16 ends at 1.000; and the sum, 1.126953125, is
    1.125 there, so a reduction in bf16 shows as well.
    """

    def __init__(self):
        super().__init__()
        del self.embedding, self.mix, self.write, self.initial, self.head
        self.weight = torch.nn.Linear(1, 1, bias=False)
        self.weight.weight.data.fill_(1.0)

    def advance(self, segment, state):
        return ToyFeatures(state.memory, state.seen), state._replace(seen=state.seen + 1)

    def readout(self, segment, features):
        value = torch.where(segment.tokens == 1, 1.0, 2.0**-9)[..., None]
        product = self.weight(value.to(self.weight.weight.dtype))
        self.computed_in = product.dtype
        return product.squeeze(-1).float()


def ones_and_crumbs() -> list:
    """The big contribution is replayed first: it is the last segment's."""
    tick = random_window(1, 1, 1, seed=0)[0]
    crumb, one = (tick._replace(tokens=torch.full((1, 1), token)) for token in (2, 1))
    return [crumb] * 65 + [one]


def accumulated_gradient(world, settings: dict, precision: str) -> float:
    """What one step of SGD at learning rate 1 takes off the weight."""

    cell = Scale()
    engine = make_engine(
        cell, torch.optim.SGD(cell.parameters(), lr=1.0), world, settings=settings, precision=precision
    )
    window = Rows(ones_and_crumbs(), slice(0, 1), start=0)
    engine.accumulate([window], [engine.module.empty_state(1)], valid_tokens=world.size)
    engine.step(1.0)
    assert cell.computed_in == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return 1.0 - float(weights_of(engine)["weight.weight"])


def accumulation_rank(world):
    import deepspeed

    for stage in STAGES:
        for precision in ("fp32", "bf16"):
            found = accumulated_gradient(world, {"zero_optimization": {"stage": stage}}, precision)
            assert found == 1.126953125, f"ZeRO {stage}, {precision}: {found}"

    initialize = deepspeed.initialize

    def with_config(change):
        def changed(*, config, **arguments):
            change(config)
            return initialize(config=config, **arguments)

        deepspeed.initialize = changed

    def parameters_in_bf16(config):
        del config["torch_autocast"]
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}

    with_config(parameters_in_bf16)
    found = accumulated_gradient(world, {"zero_optimization": {"stage": 2}}, "bf16")
    assert found == pytest.approx(1.0, abs=0.01), "DeepSpeed has changed: bf16 parameters accumulate in fp32"
    with_config(lambda config: config["torch_autocast"].pop("lower_precision_safe_modules"))
    found = accumulated_gradient(world, {"zero_optimization": {"stage": 2}}, "bf16")
    assert found == 1.125, "DeepSpeed has changed: under autocast it reduces in fp32"


def test_gradients_accumulate_and_reduce_in_fp32_in_every_mode():
    """And two settings that look right do not: bf16 with grad_accum_dtype fp32, and autocast with its default modules."""
    run_ranks(WORLD, accumulation_rank)


# ---- what DeepSpeed does with many backwards a step: the ways not taken --------------------------------------------------


def many_backwards_rank(world):
    import contextlib

    expected = reference_run("toy", "sgd", 0.2, steps=4)[2]
    for stage in (1, 2):
        cell = new_cell("toy")
        settings = {"zero_optimization": {"stage": stage}}
        engine = make_engine(cell, make_optimizer("sgd", cell, 0.2), world, settings=settings)
        engine.reduction.of_a_step = contextlib.nullcontext
        engine_run(world, "toy", "sgd", 0.2, 4, stage=stage, engine=engine)
        assert largest_difference(weights_of(engine), expected) > 1e-3, f"ZeRO {stage}"


def test_backwards_outside_one_reduction_are_wrong():
    """The control of test_parameters_after_sgd_steps: many backwards before one step, as DeepSpeed takes them by default.

    When this comes out right, DeepSpeed has changed, and engine.py may become simpler.
    """
    run_ranks(WORLD, many_backwards_rank)


# ---- the other ways of reducing ------------------------------------------------------------------------------------------


def other_reductions_rank(world, name, cases):

    _, norms, expected = reference_run(name, "sgd", 0.2, steps=3)
    for stage, reduce, overlap, groups, readout_group in cases:
        cell = new_cell(name)
        zero = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": 100}  # many buckets
        engine = make_engine(
            cell, make_optimizer("sgd", cell, 0.2), world, settings={"zero_optimization": zero}, reduce=reduce
        )
        _, found_norms, _ = engine_run(
            world,
            name,
            "sgd",
            0.2,
            3,
            stage=stage,
            groups=groups,
            readout_group=readout_group,
            readout_parts=2 if groups == 1 else 1,
            engine=engine,
        )
        case = f"ZeRO {stage}, {reduce}, overlap_comm {overlap}, {groups} lane groups"
        assert largest_difference(weights_of(engine), expected) <= 1e-6, case
        assert found_norms == pytest.approx(norms, rel=1e-4), case


@pytest.mark.parametrize("name", ["toy", "encoder_decoder"])
def test_overlapped_and_sharded_reductions_equal_full_bptt(name):
    """The last backward reduced as it goes (overlap_comm), and every backward reduced where its owner adds it up."""
    cases = [(1, "window", True, 1, 2), (2, "window", True, 2, 1), (3, "window", True, 1, 2)]
    cases += [(2, "segment", False, 2, 2), (3, "segment", True, 1, 1), (2, "segment", True, 1, 4)]
    run_ranks(WORLD, other_reductions_rank, name, cases)
