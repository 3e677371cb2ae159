"""What the section `deepspeed` may say besides zero_optimization: every key and value is tried, mistakes are found early."""

from typing import Any

import pytest

from memformer_dist.zero.settings import PASSED_THROUGH, deepspeed_problems
from tests.helpers.engines import engine_run, largest_difference, make_engine, make_optimizer, new_cell, weights_of
from tests.helpers.ranks import run_ranks


def problems(section: dict[str, Any]) -> list[str]:
    found = deepspeed_problems(section, lambda key, keys: f", expected one of {', '.join(keys)}")
    return [problem.removeprefix("deepspeed.") for problem in found]


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("steps_per_print", 0, "steps_per_print: found 0, expected an integer > 0 or null"),
        ("steps_per_print", "5", "steps_per_print: found '5', expected an integer > 0 or null"),
        ("steps_per_print", True, "steps_per_print: found True, expected an integer > 0 or null"),
        ("steps_per_print", 1.5, "steps_per_print: found 1.5, expected an integer > 0 or null"),
        ("wall_clock_breakdown", "yes", "wall_clock_breakdown: found 'yes', expected true or false"),
        ("memory_breakdown", 1, "memory_breakdown: found 1, expected true or false"),
        ("dump_state", None, "dump_state: found None, expected true or false"),
        ("timers", True, "timers: found True, expected an object with throughput"),
        ("timers", {"throughputs": {}}, "timers.throughputs: unknown key, expected one of throughput"),
        (
            "timers",
            {"throughput": None},
            "timers.throughput: found None, expected an object with enabled, synchronized",
        ),
        (
            "timers",
            {"throughput": {"enable": True}},
            "timers.throughput.enable: unknown key, expected one of enabled, sy",
        ),
        (
            "comms_logger",
            None,
            "comms_logger: found None, expected an object with enabled, verbose, prof_all, prof_ops",
        ),
        ("comms_logger", {"enabeld": True}, "comms_logger.enabeld: unknown key, expected one of enabled, verbose"),
        ("comms_logger", {"prof_ops": "all"}, "comms_logger.prof_ops: found 'all', expected a list of names"),
        ("comms_logger", {"prof_ops": [1]}, "comms_logger.prof_ops: found [1], expected a list of names"),
        ("flops_profiler", [], "flops_profiler: found [], expected an object with enabled, recompute_fwd_factor"),
        ("flops_profiler", {"profile_stop": 3}, "flops_profiler.profile_stop: unknown key, expected one of enabled"),
        ("flops_profiler", {"profile_step": 0}, "flops_profiler.profile_step: found 0, expected an integer > 0"),
        ("flops_profiler", {"module_depth": -2}, "flops_profiler.module_depth: found -2, expected an integer >= -1"),
        (
            "flops_profiler",
            {"recompute_fwd_factor": -1},
            "flops_profiler.recompute_fwd_factor: found -1, expected a numb",
        ),
        (
            "flops_profiler",
            {"output_file": "/"},
            "flops_profiler.output_file: found '/', expected the name of a file or",
        ),
        ("flops_profiler", {"output_file": ""}, "flops_profiler.output_file: found '', expected the name of a file or"),
        ("zero_optimization", {"stage": True}, "zero_optimization.stage: found True, expected 0, 1, 2 or 3"),
        ("zero_optimization", {"stage": 2.0}, "zero_optimization.stage: found 2.0, expected 0, 1, 2 or 3"),
        ("zero_optimization", {"stage": [1]}, "zero_optimization.stage: found [1], expected 0, 1, 2 or 3"),
    ],
)
def test_mistakes(key, value, expected):
    """DeepSpeed fails at some of them when it starts or later, and takes others without a word."""
    (problem,) = problems({key: value})
    assert problem.startswith(expected)


def test_several_mistakes_come_together():
    found = problems({"steps_per_print": 0, "timers": {"a": 1, "b": 2}, "zero_optimization": {"stage": 5}, "fp16": {}})
    assert [problem.split(":")[0] for problem in found] == [
        "fp16",
        "steps_per_print",
        "timers.a",
        "timers.b",
        "zero_optimization.stage",
    ]


RIGHT: list[dict[str, Any]] = [
    {"steps_per_print": 1},
    {"steps_per_print": None, "timers": {}},
    {"steps_per_print": 2.0, "timers": {"throughput": {"enabled": True, "synchronized": False}}},
    {"comms_logger": {"enabled": True, "verbose": True, "prof_all": False, "prof_ops": ["all_reduce"], "debug": True}},
    {"flops_profiler": {"enabled": True, "profile_step": 2, "module_depth": -1, "top_modules": 3, "detailed": False}},
    # memory_breakdown collects garbage at every call: minutes.
    {"wall_clock_breakdown": True, "dump_state": True, "disable_allgather": True, "memory_breakdown": False},
]


def keys_rank(world):
    """The keys are DeepSpeed's own, and what they do leaves the numbers as they are."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    assert PASSED_THROUGH["comms_logger"].keys() == CommsLoggerConfig.model_fields.keys()
    assert PASSED_THROUGH["timers"]["throughput"].keys() == DeepSpeedThroughputTimerConfig.model_fields.keys()
    assert PASSED_THROUGH["flops_profiler"].keys() == vars(DeepSpeedFlopsProfilerConfig({})).keys()
    assert {key for section in RIGHT for key in section} | {"zero_optimization"} == PASSED_THROUGH.keys()

    expected = None
    for section in [{}, *RIGHT]:
        assert problems(section) == []
        cell = new_cell("toy")
        settings = {"zero_optimization": {"stage": 2}} | section
        engine = make_engine(cell, make_optimizer("sgd", cell, 0.2), world, settings=settings)
        engine_run(world, "toy", "sgd", 0.2, 3, stage=2, engine=engine)
        found = {name: weight.clone() for name, weight in weights_of(engine).items()}
        expected = expected or found
        assert largest_difference(found, expected) == 0, section


@pytest.mark.slow
def test_what_is_passed_through_leaves_the_numbers_as_they_are():
    run_ranks(1, keys_rank)
