"""The section `deepspeed` of a configuration: which keys and options it may have. Does not import DeepSpeed.

Every field of DeepSpeed 0.19.8's zero_optimization is either in OPTIONS, and then tests/test_zero_options.py proves gradients,
checkpoints and resuming with it, or in REFUSED, with the reason. `python -m memformer_dist.zero.settings` prints the tables of
docs/zero_options.md.
"""

import json
import math
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

NO_FP16 = "fp16 is refused: loss scaling would multiply the memory's gradient at every segment"
# Keys that are not allowed: what to set instead, or the reason.
SET_BY_US = {
    "train_batch_size": "set data.lanes",
    "train_micro_batch_size_per_gpu": "set data.lanes and mrbp.lanes_per_group",
    "gradient_accumulation_steps": "set mrbp.window and mrbp.lanes_per_group",
    "gradient_clipping": "set optimizer.gradient_clipping",
    "optimizer": "set the section optimizer",
    "scheduler": "set the section optimizer",
    "bf16": "set training.precision",
    "bfloat16": "set training.precision",
    "fp16": f"set training.precision; {NO_FP16}",
    "amp": "set training.precision",
    "torch_autocast": "set training.precision",
    "data_types": "set training.precision",
    "communication_data_type": "set training.precision",
    "managed_gradient_accumulation": "set mrbp.reduce",
    "gradient_predivide_factor": "the loss is normalised over all ranks",
    "prescale_gradients": "the loss is normalised over all ranks",
    "sparse_gradients": "it does not work under ZeRO",
    "zero_allow_untested_optimizer": "the engine sets it",
    "zero_force_ds_cpu_optimizer": "the engine sets it",
    "aio": "it serves offloading to NVMe alone, which is refused",
}


def _is_integer(value: Any) -> bool:
    """JSON writes 5e8 for 500000000, and DeepSpeed takes it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1


FLAG, OBJECT, DEVICE = "true or false", "an object or null", '"none" or "cpu"'
POSITIVE, COUNT, EVEN = "an integer > 0", "an integer >= 0", "an even integer > 0"
POSITIVE_OR_NULL, LEVEL, NUMBER = "an integer > 0 or null", "an integer >= -1", "a number >= 0"
FILE, NAMES = "the name of a file or null", "a list of names"
# What values take, by the words about them.
TAKES: dict[str, Callable[[Any], bool]] = {
    FLAG: lambda value: isinstance(value, bool),
    OBJECT: lambda value: value is None,  # what is in an object is looked at one by one
    DEVICE: lambda value: value in ("none", "cpu"),
    POSITIVE: lambda value: _is_integer(value) and value > 0,
    COUNT: lambda value: _is_integer(value) and value >= 0,
    EVEN: lambda value: _is_integer(value) and value > 0 and value % 2 == 0,
    POSITIVE_OR_NULL: lambda value: value is None or (_is_integer(value) and value > 0),
    LEVEL: lambda value: _is_integer(value) and value >= -1,
    NUMBER: lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf,
    FILE: lambda value: value is None or (isinstance(value, str) and value != "" and not Path(value).is_dir()),
    NAMES: lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}
# Keys that are allowed, with what they take; an object by its keys. DeepSpeed itself ignores many a misspelt key silently.
PASSED_THROUGH: dict[str, Any] = {
    "zero_optimization": {},  # OPTIONS
    "comms_logger": {"enabled": FLAG, "verbose": FLAG, "prof_all": FLAG, "prof_ops": NAMES, "debug": FLAG},
    "disable_allgather": FLAG,
    "dump_state": FLAG,
    "flops_profiler": {
        "enabled": FLAG,
        "recompute_fwd_factor": NUMBER,
        "profile_step": POSITIVE,
        "module_depth": LEVEL,
        "top_modules": POSITIVE,
        "detailed": FLAG,
        "output_file": FILE,
    },
    "memory_breakdown": FLAG,
    "steps_per_print": POSITIVE_OR_NULL,
    "timers": {"throughput": {"enabled": FLAG, "synchronized": FLAG}},
    "wall_clock_breakdown": FLAG,
}


class Option(NamedTuple):
    values: str  # what it takes, in words
    stages: tuple[int, ...]  # of ZeRO, where it does something; at the others it has no effect
    what: str

    def takes(self, value: Any) -> bool:
        return TAKES[self.values](value)


# Options of deepspeed.zero_optimization that are right here. DeepSpeed itself also takes some under their names without stage3_.
OPTIONS = {
    "stage": Option("0, 1, 2 or 3", (0, 1, 2, 3), "what is sharded over the ranks: optimiser, gradients, parameters"),
    "overlap_comm": Option(FLAG, (1, 2, 3), "reduce while the last backward runs; false unless given"),
    "reduce_bucket_size": Option(
        POSITIVE, (1, 2, 3), "numbers per reduction; by default the size of the model at most"
    ),
    "contiguous_gradients": Option(FLAG, (1, 2, 3), "copy gradients into one buffer as they come"),
    "reduce_scatter": Option(FLAG, (1, 2), "reduce to the owner of a gradient; ZeRO 2 with bf16_parameters: false"),
    "use_multi_rank_bucket_allreduce": Option(FLAG, (1, 2), "one all-reduce for the owners of a bucket"),
    "allgather_partitions": Option(FLAG, (1, 2), "gather updated parameters at once instead of rank by rank"),
    "allgather_bucket_size": Option(EVEN, (1, 2), "numbers per gathering of updated parameters"),
    "parameter_alignment": Option(FLAG, (1, 2), "start each parameter at a multiple of 16 bytes"),
    "ignore_unused_parameters": Option(FLAG, (2,), "every parameter has a gradient here, if only zeros"),
    "offload_optimizer": Option(OBJECT, (1, 2, 3), "where moments and fp32 weights lie and the update is computed"),
    "offload_optimizer.device": Option(DEVICE, (1, 2, 3), "cpu: in the host's memory, updated by torch's AdamW"),
    "offload_optimizer.pin_memory": Option(FLAG, (1, 2, 3), "in pinned memory"),
    "offload_param": Option(OBJECT, (3,), "where the shards of the parameters lie"),
    "offload_param.device": Option(DEVICE, (3,), "cpu: in the host's memory"),
    "offload_param.pin_memory": Option(FLAG, (3,), "in pinned memory"),
    "sub_group_size": Option(POSITIVE, (3,), "numbers that the optimiser updates at once"),
    "stage3_prefetch_bucket_size": Option(COUNT, (3,), "numbers gathered ahead of their use"),
    "stage3_param_persistence_threshold": Option(COUNT, (3,), "parameters below this size are never sharded"),
    "stage3_model_persistence_threshold": Option(COUNT, (3,), "numbers in all that are never sharded, at most"),
    "stage3_max_live_parameters": Option(COUNT, (3,), "numbers gathered at once, at most"),
    "stage3_max_reuse_distance": Option(COUNT, (3,), "keep what is used again within so many numbers"),
    "stage3_use_all_reduce_for_fetch_params": Option(FLAG, (3,), "gather by all-reduce"),
    "stage3_allgather_sequential": Option(FLAG, (3,), "gather parameter by parameter, without a bucket"),
    "memory_efficient_linear": Option(FLAG, (3,), "DeepSpeed's linear layer instead of torch's"),
    "enable_sanity_checks": Option(FLAG, (3,), "DeepSpeed checks itself"),
}
_OWN = "it is about DeepSpeed's own checkpoints; those of this project are independent of it"
_NVME = "offloading to NVMe needs compiled operators, and checkpoints could not read what lies there"
_CPU_ADAM = "it needs DeepSpeed's compiled CPU Adam; the optimiser here is torch's AdamW"
_ROUNDS = "what is sent is rounded to 8 bits or fewer: the gradient would not be that of back-propagation through time"
# Options that are not taken: the default, which may be written down, and the reason.
REFUSED: dict[str, tuple[Any, str]] = {
    "round_robin_gradients": (
        False,
        "DeepSpeed 0.19.8 then mixes up which weights and moments belong to which parameter, and checkpoints are garbage",
    ),
    "compute_grad_norm": (True, "the norm decides whether a step is applied, and is logged"),
    "zero_quantized_weights": (False, _ROUNDS),
    "zero_quantized_nontrainable_weights": (False, _ROUNDS),
    "zero_quantized_gradients": (False, _ROUNDS),
    "zero_hpz_partition_size": (1, "which parameters stay gathered is set by mrbp.keep_gathered"),
    "stage3_module_granularity_threshold": (
        0,
        "modules joined by it are not gathered when one part of the cell is called: the forward fails",
    ),
    "leaf_module": (None, "which parameters stay gathered is set by mrbp.keep_gathered"),
    "zenflow": (None, "it updates weights from gradients of earlier steps: training would not be the one described"),
    "load_from_fp32_weights": (True, _OWN),
    "elastic_checkpoint": (False, _OWN),
    "pipeline_loading_checkpoint": (False, _OWN),
    "stage3_gather_16bit_weights_on_model_save": (False, _OWN),
    "stage3_gather_fp16_weights_on_model_save": (False, _OWN),
    "legacy_stage1": (False, "DeepSpeed 0.19.8 has no such stage any more"),
    "override_module_apply": (True, "it is about building a model in shards; a cell is built whole"),
    "log_trace_cache_warnings": (False, "the trace of modules that it is about is switched off"),
    "save_muon_momentum_buffer_in_memory": (False, "the optimiser is AdamW"),
    "cpu_offload": (None, "DeepSpeed calls it offload_optimizer now"),
    "cpu_offload_param": (None, "DeepSpeed calls it offload_param now"),
    "cpu_offload_use_pin_memory": (None, "it is now pin_memory of offload_optimizer and of offload_param"),
    "offload_optimizer.nvme_path": (None, _NVME),
    "offload_optimizer.buffer_count": (4, _NVME),
    "offload_optimizer.pipeline_read": (False, _NVME),
    "offload_optimizer.pipeline_write": (False, _NVME),
    "offload_optimizer.fast_init": (False, _NVME),
    "offload_optimizer.ratio": (1.0, _CPU_ADAM),
    "offload_optimizer.super_offload": (False, _CPU_ADAM),
    "offload_optimizer.cpuadam_cores_perc": (0.8, _CPU_ADAM),
    "offload_param.nvme_path": (None, _NVME),
    "offload_param.buffer_count": (5, _NVME),
    "offload_param.buffer_size": (10**8, _NVME),
    "offload_param.max_in_cpu": (10**9, _NVME),
}


def zero_stage(section: Any) -> Any:
    """Return the ZeRO stage as written in the section; None if the section is malformed."""
    zero = section.get("zero_optimization", {}) if isinstance(section, dict) else None
    return zero.get("stage", 0) if isinstance(zero, dict) else None


def deepspeed_problems(section: Any, nearest: Callable[[str, Collection[str]], str]) -> list[str]:
    """Return what is wrong with the section, one sentence per problem.

    Args:
        nearest: from an unknown key and the keys that there are to the end of the sentence about it.
    """
    if not isinstance(section, dict):
        return [f"deepspeed: found {section!r}, expected an object"]
    problems = [f"deepspeed.{key}: not allowed here; {SET_BY_US[key]}" for key in section if key in SET_BY_US]
    unknown = [key for key in section if key not in SET_BY_US and key not in PASSED_THROUGH]
    problems += [f"deepspeed.{key}: unknown key{nearest(key, PASSED_THROUGH)}" for key in unknown]
    for key, value in section.items():
        if key in PASSED_THROUGH and key != "zero_optimization":
            problems += _value_problems(value, PASSED_THROUGH[key], f"deepspeed.{key}", nearest)
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict):
        problems.append(f"deepspeed.zero_optimization: found {zero!r}, expected an object with a stage")
    elif type(stage := zero.get("stage", 0)) is not int or stage not in (0, 1, 2, 3):
        problems.append(f"deepspeed.zero_optimization.stage: found {stage!r}, expected 0, 1, 2 or 3")
    else:
        problems += _option_problems(zero, "", nearest)
        problems += _stage_problems(zero)
    return problems


def _value_problems(
    value: Any, expected: str | dict[str, Any], place: str, nearest: Callable[[str, Collection[str]], str]
) -> Iterator[str]:
    """Problems of a value that PASSED_THROUGH says something about, and of what is in it."""
    if isinstance(expected, str):
        if not TAKES[expected](value):
            yield f"{place}: found {value!r}, expected {expected}"
    elif not isinstance(value, dict):
        yield f"{place}: found {value!r}, expected an object with {', '.join(expected)}"
    else:
        for key, inner in value.items():
            if key in expected:
                yield from _value_problems(inner, expected[key], f"{place}.{key}", nearest)
            else:
                yield f"{place}.{key}: unknown key{nearest(key, expected)}"


def _option_problems(
    options: dict[str, Any], prefix: str, nearest: Callable[[str, Collection[str]], str]
) -> Iterator[str]:
    """Problems of the options one by one; `prefix` is "" or the option whose object they are, with a dot behind it."""
    known = [name.removeprefix(prefix) for name in (*OPTIONS, *REFUSED) if name.startswith(prefix)]
    known = [name for name in known if "." not in name]
    for key, value in options.items():
        name, place = f"{prefix}{key}", f"deepspeed.zero_optimization.{prefix}{key}"
        if name in REFUSED:
            default, reason = REFUSED[name]
            if isinstance(default, bool) != isinstance(value, bool) or value != default:
                yield f"{place}: found {value!r}, which is refused: {reason}"
        elif name not in OPTIONS:
            alias = f"stage3_{key}"
            yield f"{place}: unknown key" + (f", did you mean {alias}?" if alias in known else nearest(key, known))
        elif OPTIONS[name].values == OBJECT and isinstance(value, dict):
            yield from _option_problems(value, f"{name}.", nearest)
        elif name != "stage" and not OPTIONS[name].takes(value):
            yield f"{place}: found {value!r}, expected {OPTIONS[name].values}"


def _stage_problems(zero: dict[str, Any]) -> Iterator[str]:
    """Offloading at a stage that has nothing to offload: DeepSpeed would fail, or hold in silence what is to be elsewhere."""
    for name in ("offload_optimizer", "offload_param"):
        found, stages = zero.get(name), OPTIONS[name].stages
        device = found.get("device", "none") if isinstance(found, dict) else "none"
        if device != "none" and zero.get("stage", 0) not in stages:
            expected = ", ".join(map(str, stages[:-1])) + f" or {stages[-1]}" if stages[1:] else str(stages[0])
            yield (
                f"deepspeed.zero_optimization.{name}: found device {device!r} with stage {zero.get('stage', 0)!r}, expected"
                f" stage {expected}"
            )


def options_without_effect(section: dict[str, Any]) -> list[str]:
    """Return the options of zero_optimization that DeepSpeed does not look at, at the stage of a section without problems."""
    zero = section.get("zero_optimization", {})
    return [
        name
        for name, value in zero.items()
        if name in OPTIONS and value is not None and zero.get("stage", 0) not in OPTIONS[name].stages
    ]


def tables() -> Iterator[str]:
    """Yield the lines of the tables of docs/zero_options.md."""
    yield from ("| option | takes | ZeRO 1 | ZeRO 2 | ZeRO 3 | what it does |", "|---|---|---|---|---|---|")
    for name, option in OPTIONS.items():
        cells = " | ".join("proven" if stage in option.stages else "no effect" for stage in (1, 2, 3))
        yield f"| `{name}` | {option.values} | {cells} | {option.what} |"
    yield from ("", "| refused | but for its default | reason |", "|---|---|---|")
    for name, (default, reason) in REFUSED.items():
        yield f"| `{name}` | `{json.dumps(default)}` | {reason} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join(tables()) + "\n")
