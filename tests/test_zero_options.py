"""Every option of deepspeed.zero_optimization that a configuration may have: gradient, skipped step, checkpoint, resume.

Each is set to values other than DeepSpeed's defaults, at every stage at which it does something and under both kinds of
mrbp.reduce, and compared with full back-propagation in one process.
"""

import json
import math
from typing import Any

import pytest
import torch

from memformer_dist.config import RunConfig
from memformer_dist.errors import UserError
from memformer_dist.mrbp.executor import TorchExecutor
from memformer_dist.optimizer import OptimizerConfig, adamw
from memformer_dist.zero.settings import OPTIONS, REFUSED, deepspeed_problems, tables
from tests.helpers import ROOT
from tests.helpers.engines import (
    LANES,
    STAGES,
    WORLD,
    Rows,
    Scale,
    engine_run,
    largest_difference,
    make_engine,
    make_optimizer,
    new_cell,
    reference_run,
    weights_of,
    windows,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import full_bptt, labels_in, random_window

CPU, CPU_UNPINNED = {"device": "cpu"}, {"device": "cpu", "pin_memory": False}
# For each option the values that it is tried with.
VALUES: dict[str, tuple[Any, ...]] = {
    "overlap_comm": (True,),
    "reduce_bucket_size": (20, 1e9),
    "contiguous_gradients": (False,),
    "reduce_scatter": (False,),
    "use_multi_rank_bucket_allreduce": (False,),
    "allgather_partitions": (False,),
    "allgather_bucket_size": (10,),
    "parameter_alignment": (True,),
    "ignore_unused_parameters": (False,),
    "offload_optimizer": (CPU, CPU_UNPINNED),
    "offload_param": (CPU,),
    "sub_group_size": (50,),
    "stage3_prefetch_bucket_size": (0,),
    "stage3_param_persistence_threshold": (0, 1e9),
    "stage3_model_persistence_threshold": (0,),
    "stage3_max_live_parameters": (0,),
    "stage3_max_reuse_distance": (0,),
    "stage3_use_all_reduce_for_fetch_params": (True,),
    "stage3_allgather_sequential": (True,),
    "memory_efficient_linear": (False,),
    "enable_sanity_checks": (True,),
}
TOGETHER: list[dict[str, Any]] = [
    {"offload_optimizer": CPU, "overlap_comm": True},
    {"offload_optimizer": CPU, "reduce_bucket_size": 20, "contiguous_gradients": False, "parameter_alignment": True},
    {"offload_optimizer": CPU, "offload_param": CPU, "sub_group_size": 50, "stage3_param_persistence_threshold": 0},
    {"contiguous_gradients": False, "reduce_scatter": False, "overlap_comm": True},
    {"use_multi_rank_bucket_allreduce": False, "overlap_comm": True, "reduce_bucket_size": 20},
]


def cases(stage: int, *, gathering_at_once: bool = False) -> list[dict[str, Any]]:
    """`gathering_at_once`: the options about what ZeRO-3 gathers, stage3_..., in one case."""
    alone = [{name: value} for name, values in VALUES.items() if stage in OPTIONS[name].stages for value in values]
    if gathering_at_once and stage == 3:
        at_once = {name: value for one in alone for name, value in one.items() if name.startswith("stage3_")}
        alone = [at_once] + [one for one in alone if not one.keys() & at_once.keys()]
    return alone + [one for one in TOGETHER if all(stage in OPTIONS[name].stages for name in one)]


# ---- the classification ----------------------------------------------------------------------------------------------


def fields_rank(world):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    fields = {}
    for prefix, section in (
        ("", DeepSpeedZeroConfig),
        ("offload_optimizer.", DeepSpeedZeroOffloadOptimizerConfig),
        ("offload_param.", DeepSpeedZeroOffloadParamConfig),
    ):
        fields |= {f"{prefix}{field.alias or name}": field.default for name, field in section.model_fields.items()}
    assert fields.keys() == OPTIONS.keys() | REFUSED.keys(), "DeepSpeed has other options than those that were judged"
    assert not OPTIONS.keys() & REFUSED.keys()
    for name, (default, _) in REFUSED.items():
        assert name == "leaf_module" or fields[name] == default, name


def test_every_field_of_deepspeed_is_allowed_or_refused():
    run_ranks(1, fields_rank)


def test_the_page_has_the_tables():
    """docs/zero_options.md; `python -m memformer_dist.zero.settings` prints what belongs there."""
    page = (ROOT / "docs" / "zero_options.md").read_text()
    for table in "\n".join(tables()).split("\n\n"):
        assert table in page


def test_every_option_that_is_let_through_is_tried():
    assert VALUES.keys() == {name for name in OPTIONS if "." not in name} - {"stage"}


def problems(zero: dict[str, Any]) -> list[str]:
    found = deepspeed_problems({"zero_optimization": zero}, lambda key, keys: ", did you mean another?")
    return [problem.removeprefix("deepspeed.zero_optimization.") for problem in found]


def test_what_is_tried_is_let_through_and_what_is_refused_names_its_reason():
    for stage in STAGES:
        for zero in cases(stage):
            assert problems({"stage": stage} | zero) == []
    for name, (default, reason) in REFUSED.items():
        option, _, inner = name.partition(".")
        for value, refused in ((default, False), ("something else", True)):
            zero = {"stage": 3, option: {inner: value} if inner else value}
            assert problems(zero) == ([f"{name}: found {value!r}, which is refused: {reason}"] if refused else []), name
    # 1 is True for Python, and not the flag that was meant.
    assert problems({"stage": 1, "round_robin_gradients": True}) and problems({"stage": 1, "round_robin_gradients": 0})


@pytest.mark.parametrize(
    "zero, expected",
    [
        ({"stage": 1, "overlap_com": True}, "overlap_com: unknown key, did you mean another?"),
        (
            {"stage": 3, "prefetch_bucket_size": 5},
            "prefetch_bucket_size: unknown key, did you mean stage3_prefetch_bucket_size?",
        ),
        ({"stage": 1, "overlap_comm": "true"}, "overlap_comm: found 'true', expected true or false"),
        ({"stage": 1, "overlap_comm": 1}, "overlap_comm: found 1, expected true or false"),
        ({"stage": 1, "overlap_comm": None}, "overlap_comm: found None, expected true or false"),
        ({"stage": 1, "reduce_bucket_size": 0}, "reduce_bucket_size: found 0, expected an integer > 0"),
        ({"stage": 1, "reduce_bucket_size": "5e8"}, "reduce_bucket_size: found '5e8', expected an integer > 0"),
        ({"stage": 1, "reduce_bucket_size": 0.5}, "reduce_bucket_size: found 0.5, expected an integer > 0"),
        (
            {"stage": 1, "reduce_bucket_size": math.inf},
            "reduce_bucket_size: found inf, expected an integer > 0",
        ),
        ({"stage": 1, "reduce_bucket_size": True}, "reduce_bucket_size: found True, expected an integer > 0"),
        ({"stage": 1, "allgather_bucket_size": 3}, "allgather_bucket_size: found 3, expected an even integer > 0"),
        ({"stage": 3, "sub_group_size": 0}, "sub_group_size: found 0, expected an integer > 0"),
        (
            {"stage": 3, "stage3_max_live_parameters": -1},
            "stage3_max_live_parameters: found -1, expected an integer >= 0",
        ),
        ({"stage": 2, "offload_optimizer": True}, "offload_optimizer: found True, expected an object or null"),
        ({"stage": 2, "offload_optimizer": {"devise": "cpu"}}, "offload_optimizer.devise: unknown key"),
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme"}},
            'offload_optimizer.device: found \'nvme\', expected "none" or "cpu"',
        ),
        (
            {"stage": 2, "offload_optimizer": {"device": ["cpu"]}},
            'offload_optimizer.device: found [\'cpu\'], expected "none" or "cpu"',
        ),
        ({"stage": 2, "offload_param": CPU}, "offload_param: found device 'cpu' with stage 2, expected stage 3"),
        (
            {"offload_optimizer": CPU},
            "offload_optimizer: found device 'cpu' with stage 0, expected stage 1, 2 or 3",
        ),
    ],
)
def test_mistakes_inside_zero_optimization(zero, expected):
    """DeepSpeed names some of them, one at a time, when every rank has started; others it takes without a word."""
    (problem,) = problems(zero)
    assert problem.startswith(expected)


# ---- gradient, checkpoint, resume ------------------------------------------------------------------------------------


def engine_of(world, kind, rate, settings, cell=None, **options):
    cell = cell or new_cell("toy")
    settings = {"zero_optimization": json.loads(json.dumps(settings))}
    return make_engine(cell, make_optimizer(kind, cell, rate), world, settings=settings, **options)


def saved_of(engine):
    """Copies of what a checkpoint holds: (weights, moments by the name of the parameter)."""
    found = [(name, weight.clone(), {k: m.clone() for k, m in both.items()}) for name, weight, both in engine.tensors()]
    return {name: weight for name, weight, _ in found}, {name: both for name, _, both in found}


def resumed_from(world, weights, moments, settings, cell=None, **options):
    """An engine after two steps of AdamW, made of what `saved_of` returned."""
    cell = cell or new_cell("toy")
    for name, parameter in cell.named_parameters():
        parameter.data.copy_(weights[name])
    engine = engine_of(world, "adamw", 1e-2, settings, cell, **options)
    engine.load_moments(2, lambda name, key: moments[name].get(key))
    return engine


def check_resumed(engine, resumed, run, case):
    """The two hold the same numbers, and the same after another step."""
    (weights, moments), (again, moments_again) = saved_of(engine), saved_of(resumed)
    assert largest_difference(again, weights) == 0, case
    assert all(largest_difference(moments_again[name], moments[name]) == 0 for name in moments), case
    for one in (engine, resumed):
        engine_run(**run, kind="adamw", learning_rate=1e-2, steps=1, engine=one)
    assert largest_difference(saved_of(resumed)[0], saved_of(engine)[0]) == 0, case


def options_rank(world, stage, reduce, chosen):
    _, norms, expected = reference_run("toy", "sgd", 0.2, steps=3)
    _, _, expected_adamw = reference_run("toy", "adamw", 1e-2, steps=2)
    run = {"world": world, "name": "toy", "stage": stage}
    for options in chosen:
        zero = {"stage": stage} | options
        case = f"{zero}, mrbp.reduce {reduce}"
        engine = engine_of(world, "sgd", 0.2, zero, reduce=reduce)
        engine_run(**run, kind="sgd", learning_rate=0.2, steps=3, groups=2, engine=engine, skip=(1,))
        assert largest_difference(weights_of(engine), expected) <= 1e-6, case

        engine = engine_of(world, "adamw", 1e-2, zero, reduce=reduce)
        _, found_norms, _ = engine_run(**run, kind="adamw", learning_rate=1e-2, steps=2, engine=engine)
        assert found_norms[0] == pytest.approx(norms[0], rel=1e-4), case
        weights, moments = saved_of(engine)
        assert largest_difference(weights, expected_adamw) <= 1e-4, case
        assert all(largest_difference({"": both["exp_avg"]}, {"": torch.zeros(())}) > 0 for both in moments.values())

        resumed = resumed_from(world, weights, moments, zero, reduce=reduce)
        check_resumed(engine, resumed, run, case)


@pytest.mark.slow
@pytest.mark.parametrize("stage, reduce", [(1, "window"), (2, "window"), (2, "segment"), (3, "window"), (3, "segment")])
def test_every_option_equals_full_bptt_and_resumes_bit_by_bit(stage, reduce):
    run_ranks(WORLD, options_rank, stage, reduce, cases(stage, gathering_at_once=reduce == "segment"))


def test_offloaded_gradients_of_zero_2_reduced_at_every_backward():
    """Once gradients of the step before were added to those of parameters that the first backward does not reach: norms of
    3.13 and 3.43 for 1.69 and 1.76."""
    run_ranks(WORLD, options_rank, 2, "segment", [{"offload_optimizer": CPU}])


# ---- the precision bf16_parameters -----------------------------------------------------------------------------------


def thirds_rank(world):
    """Gradients of 1 on rank 0 and of 2^-9 on the others: exact in bf16, as a third of them is not."""
    for stage in (2, 3):
        cell = Scale()
        settings = {"zero_optimization": {"stage": stage}}
        optimizer = torch.optim.SGD(cell.parameters(), lr=1.0)
        engine = make_engine(cell, optimizer, world, settings=settings, precision="bf16_parameters", reduce="segment")
        tick = random_window(1, 1, 1, seed=0)[0]._replace(tokens=torch.full((1, 1), 1 if world.rank == 0 else 2))
        engine.accumulate([Rows([tick], slice(0, 1), start=0)], [engine.module.empty_state(1)], valid_tokens=world.size)
        engine.step(1.0)
        expected = (1 + (world.size - 1) * 2.0**-9) / world.size
        assert 1 - float(weights_of(engine)["weight.weight"]) == pytest.approx(expected, rel=1e-6), f"ZeRO {stage}"


@pytest.mark.slow
def test_bf16_parameters_on_three_ranks_divide_in_fp32():
    """ZeRO-2 divided by the number of ranks in bf16: 0.33529 for 0.33464."""
    run_ranks(3, thirds_rank)


def bf16_parameters_rank(world, stage):
    """What an option does to bf16 parameters is what its default does to them, within the rounding of sums in fp32."""
    run = {"world": world, "name": "decoder", "stage": stage}
    engine_of_case = {"precision": "bf16_parameters", "reduce": "segment"}

    def weights_after(zero, steps):
        engine = engine_of(world, "adamw", 1e-2, zero, new_cell("decoder"), **engine_of_case)
        engine_run(**run, kind="adamw", learning_rate=1e-2, steps=steps, engine=engine, skip=(1,))
        return engine, *saved_of(engine)

    _, expected, _ = weights_after({"stage": stage}, 2)
    for options in cases(stage, gathering_at_once=True):
        zero = {"stage": stage} | options
        engine, weights, moments = weights_after(zero, 2)
        assert largest_difference(weights, expected) <= 1e-5, zero
        resumed = resumed_from(world, weights, moments, zero, new_cell("decoder"), **engine_of_case)
        check_resumed(engine, resumed, run, zero)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_every_option_is_right_with_bf16_parameters(stage):
    run_ranks(WORLD, bf16_parameters_rank, stage)


def test_a_division_in_bf16_is_refused(config):
    config["deepspeed"] = {"zero_optimization": {"stage": 2, "reduce_scatter": True}}
    config["mrbp"]["reduce"] = "segment"
    config["training"]["precision"] = "bf16_parameters"
    with pytest.raises(UserError, match="reduce_scatter: found True with training.precision 'bf16_parameters'"):
        RunConfig.check(config)
    config["deepspeed"]["zero_optimization"]["reduce_scatter"] = False
    RunConfig.check(config)


# ---- frozen parameters -----------------------------------------------------------------------------------------------


def with_frozen(name, frozen):
    cell = new_cell(name)
    for parameter_name, parameter in cell.named_parameters():
        parameter.requires_grad_(not parameter_name.startswith(frozen))
    return cell


def frozen_reference(frozen):
    cell = with_frozen("toy", frozen)
    optimizer = torch.optim.SGD([p for p in cell.parameters() if p.requires_grad], lr=0.2)
    state = cell.empty_state(LANES)
    for window in windows(3):
        optimizer.zero_grad()
        state, _ = full_bptt(TorchExecutor(cell, 0), window, state, loss_scale=1 / labels_in(window))
        optimizer.step()
    return {name: parameter.detach() for name, parameter in cell.named_parameters()}


def frozen_rank(world, name, frozen, ways):
    initial = {name: parameter.detach().clone() for name, parameter in new_cell(name).named_parameters()}
    expected = frozen_reference(frozen) if name == "toy" else None
    for stage, options in ways:
        case = f"ZeRO {stage}, {options}"
        options = dict(options)
        zero = {"stage": stage} | options.pop("zero", {})
        run = {"world": world, "name": name, "stage": stage, "steps": 3}
        if expected is not None:
            engine = engine_of(world, "sgd", 0.2, zero, with_frozen(name, frozen), **options)
            engine_run(**run, kind="sgd", learning_rate=0.2, engine=engine)
            assert largest_difference(saved_of(engine)[0], expected) <= 1e-6, case

        engine = engine_of(world, "adamw", 1e-2, zero, with_frozen(name, frozen), **options)
        assert saved_of(engine)[0].keys() == initial.keys(), case  # before the first update
        engine_run(**run | {"steps": 2}, kind="adamw", learning_rate=1e-2, engine=engine, skip=(1,))
        weights, moments = saved_of(engine)
        for parameter_name, before in initial.items():
            still = torch.equal(weights[parameter_name].cpu(), before)
            assert weights[parameter_name].dtype == torch.float32
            assert still == parameter_name.startswith(frozen), f"{case}: {parameter_name}"
            assert bool(moments[parameter_name]) == (not still), f"{case}: {parameter_name}"
        resumed = resumed_from(world, weights, moments, zero, with_frozen(name, frozen), **options)
        for one in (engine, resumed):
            engine_run(**run, kind="adamw", learning_rate=1e-2, engine=one)
        assert largest_difference(saved_of(resumed)[0], saved_of(engine)[0]) == 0, case


FROZEN_WAYS: list[tuple[int, dict[str, Any]]] = [(stage, {}) for stage in STAGES]
FROZEN_WAYS += [(1, {"zero": {"overlap_comm": True}}), (3, {"zero": {"stage3_param_persistence_threshold": 0}})]
FROZEN_WAYS += [(2, {"reduce": "segment", "zero": {"offload_optimizer": CPU}}), (3, {"reduce": "segment"})]
BF16_WAYS = [(stage, {"reduce": "segment", "precision": "bf16_parameters"}) for stage in (2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, frozen, ways",
    [
        ("toy", ("embedding", "write.bias"), FROZEN_WAYS),
        ("toy", ("mix.weight", "write.weight", "initial.weight", "head.weight"), FROZEN_WAYS),  # all that decays
        ("decoder", ("embedding",), BF16_WAYS),
    ],
)
def test_frozen_parameters(name, frozen, ways):
    """They keep their bits and have no moments; the others are trained, saved and resumed. The first save once failed."""
    run_ranks(WORLD, frozen_rank, name, frozen, ways)


def thawed_rank(world):
    """Two steps with some parameters frozen, and one with others: against torch's AdamW with moments of zero for the former."""
    before, after = ("embedding", "write.bias"), ("head", "mix.bias")
    for stage in STAGES:
        engine = engine_of(world, "adamw", 1e-2, {"stage": stage}, with_frozen("toy", before))
        engine_run(world, "toy", "adamw", 1e-2, 2, stage=stage, engine=engine)
        weights, moments = saved_of(engine)
        zero = {"stage": (stage + 1) % 4}
        resumed = resumed_from(world, weights, moments, zero, with_frozen("toy", after))
        for name, both in saved_of(resumed)[1].items():
            if name.startswith(after):
                assert both == {}
            else:
                assert all(bool(x.any()) == (not name.startswith(before)) for x in both.values()), (stage, name)
        engine_run(world, "toy", "adamw", 1e-2, 1, stage=zero["stage"], engine=resumed)

        cell = with_frozen("toy", after)
        optimizer = make_optimizer("adamw", cell, 1e-2)
        for name, parameter in cell.named_parameters():
            parameter.data.copy_(weights[name])
            optimizer.state[parameter] = {
                "step": torch.tensor(2.0),
                **{
                    key: moments[name].get(key, torch.zeros_like(parameter)).clone()
                    for key in ("exp_avg", "exp_avg_sq")
                },
            }
        (window,) = windows(1)
        full_bptt(TorchExecutor(cell, 0), window, cell.empty_state(LANES), loss_scale=1 / labels_in(window))
        optimizer.step()
        expected = {name: parameter.detach() for name, parameter in cell.named_parameters()}
        assert largest_difference(saved_of(resumed)[0], expected) <= 1e-4, stage
        assert largest_difference(weights, {n: x for n, x in expected.items() if n.startswith(before)}) > 1e-3


@pytest.mark.slow
def test_parameters_that_are_frozen_or_trained_from_a_resume_on():
    """A parameter whose moments no checkpoint has starts with moments of zero; it once was a KeyError."""
    run_ranks(WORLD, thawed_rank)


def test_a_cell_without_anything_to_train():
    with pytest.raises(UserError, match="model: found no parameter that is trained"):
        adamw(with_frozen("toy", ("",)), OptimizerConfig())


def test_what_decays():
    """Neither a frozen weight nor an embedding's that a linear layer shares; such a head once made it decay."""
    cell = torch.nn.ModuleDict(
        {"embedding": torch.nn.Embedding(5, 4), "head": torch.nn.Linear(4, 5), "other": torch.nn.Linear(4, 4)}
    )
    cell["head"].weight = cell["embedding"].weight
    cell["other"].bias.requires_grad_(False)
    decaying, others = adamw(cell, OptimizerConfig(weight_decay=0.1)).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert [id(p) for p in decaying["params"]] == [id(cell["other"].weight)]
    assert [id(p) for p in others["params"]] == [id(cell["embedding"].weight), id(cell["head"].bias)]
    cell["other"].weight.requires_grad_(False)
    (only,) = adamw(cell, OptimizerConfig(weight_decay=0.1)).param_groups
    assert only["weight_decay"] == 0
