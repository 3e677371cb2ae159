"""The section `deepspeed` of a configuration: which keys it may have. Does not import DeepSpeed."""

from collections.abc import Callable
from typing import Any

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
}
# Keys that are allowed. DeepSpeed itself ignores a misspelt key silently, hence the list.
PASSED_THROUGH = (
    "zero_optimization",
    "aio",
    "comms_logger",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
)


def zero_stage(section: Any) -> Any:
    """Return the ZeRO stage as written in the section; None if the section is malformed."""
    zero = section.get("zero_optimization", {}) if isinstance(section, dict) else None
    return zero.get("stage", 0) if isinstance(zero, dict) else None


def deepspeed_problems(section: Any, nearest: Callable[[str], str]) -> list[str]:
    """Return what is wrong with the section, one sentence per problem.

    Args:
        nearest: from an unknown key to the end of the sentence about it.
    """
    if not isinstance(section, dict):
        return [f"deepspeed: found {section!r}, expected an object"]
    problems = [f"deepspeed.{key}: not allowed here; {SET_BY_US[key]}" for key in section if key in SET_BY_US]
    unknown = [key for key in section if key not in SET_BY_US and key not in PASSED_THROUGH]
    problems += [f"deepspeed.{key}: unknown key{nearest(key)}" for key in unknown]
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict):
        problems.append(f"deepspeed.zero_optimization: found {zero!r}, expected an object with a stage")
    elif (stage := zero.get("stage", 0)) not in (0, 1, 2, 3):
        problems.append(f"deepspeed.zero_optimization.stage: found {stage!r}, expected 0, 1, 2 or 3")
    return problems
