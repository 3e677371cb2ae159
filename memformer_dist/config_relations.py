"""What is wrong between fields of several sections, or between a field and the number of ranks: a function per subject."""

from collections.abc import Iterator
from typing import Any

from memformer_dist.cells.base import CellConfig
from memformer_dist.curriculum import IN_TRAINING, WindowByMetric, smallest_window
from memformer_dist.data.open_data import DataConfig
from memformer_dist.errors import UserError
from memformer_dist.mrbp.settings import MrbpConfig
from memformer_dist.training_settings import TrainingConfig
from memformer_dist.zero.settings import zero_stage


def relations(sections: dict[str, Any], world_size: int) -> Iterator[str]:
    """Problems between fields, or between a field and the number of ranks. A section with problems of its own is None."""
    data, mrbp, training = (sections.get(name) for name in ("data", "mrbp", "training"))
    stage = zero_stage(sections["deepspeed"])
    if data is not None:
        yield from _lanes_and_ranks(data, mrbp, world_size)
        yield from _stream(data)
        yield from _task(data, mrbp)
    if training is not None:
        yield from _warmup(training)
    if mrbp is not None and mrbp.readout_group == "auto":
        yield from _measured(sections.get("model"))
    if mrbp is not None:
        yield from _readout(data, mrbp, world_size)
    if training is not None:
        yield from _early_stopping(training)
        yield from _expansion(training)
    if mrbp is not None and training is not None:
        yield from _window(mrbp, training)
        yield from _sharded_gradients(mrbp, training, stage)
        yield from _reduction_in_bf16(training, sections["deepspeed"], stage)


def _lanes_and_ranks(data: DataConfig, mrbp: MrbpConfig | None, world_size: int) -> Iterator[str]:
    share, rest = divmod(data.lanes, world_size)
    if rest:
        multiple = max(world_size, round(data.lanes / world_size) * world_size)
        yield f"data.lanes: found {data.lanes}, expected a multiple of the {world_size} ranks, {multiple} for example"
    elif mrbp is not None and mrbp.lanes_per_group and share % mrbp.lanes_per_group:
        yield (
            f"mrbp.lanes_per_group: found {mrbp.lanes_per_group}, expected a divisor of the {share} lanes of a rank"
            f" (data.lanes {data.lanes} on {world_size} ranks)"
        )


def _stream(data: DataConfig) -> Iterator[str]:
    if data.mode != "stream":
        return
    for field, value, expected in (
        ("corpus", {name: weight for name, weight in data.corpora.items() if weight != 1}, "weights of 1"),
        ("min_tokens", data.min_tokens if data.min_tokens > 1 else None, "1"),
        ("shuffle_shards", data.shuffle_shards, "null"),
    ):
        if value:
            yield (
                f"data.{field}: found {value} with data.mode 'stream', which joins all documents in their order; expected"
                f" {expected}, or mode 'documents'"
            )


def _warmup(training: TrainingConfig) -> Iterator[str]:
    warmup = training.evaluate_warmup_segments
    for field in "evaluate_segments", "final_evaluate_segments":
        limit = getattr(training, field)
        if warmup is not None and limit is not None and limit <= warmup:
            yield (
                f"training.{field}: found {limit}, expected more than training.evaluate_warmup_segments ({warmup}), whose"
                " losses are not counted"
            )


def _task(data: DataConfig, mrbp: MrbpConfig | None) -> Iterator[str]:
    if data.task is None:
        return
    for field in ("mode", "min_tokens", "shuffle_shards"):
        value, default = getattr(data, field), DataConfig.model_fields[field].default
        if value != default:
            yield f"data.{field}: found {value!r} with data.task, which makes its own documents; expected {default!r}"
    try:
        task = data.task.build(data.segment_length)
    except UserError as error:
        yield str(error)
        return
    if problem := task.problem(data.task.held_out_segments):
        yield f"data.task.held_out_segments: {problem}"
    if mrbp is not None and (problem := task.problem(smallest_window(mrbp.window))):
        yield f"mrbp.window: a window is a document of data.task: {problem}"


def _readout(data: DataConfig | None, mrbp: MrbpConfig, world_size: int) -> Iterator[str]:
    if mrbp.readout_parts > 1 and mrbp.readout_group != 1:
        yield (
            f"mrbp.readout_parts: found {mrbp.readout_parts} with mrbp.readout_group {mrbp.readout_group!r}: one divides a"
            " readout, the other joins several; expected one of them to be 1"
        )
    if data is None:
        return
    lanes = mrbp.lanes_per_group or data.lanes // world_size
    if mrbp.readout_parts > max(1, lanes):
        yield (
            f"mrbp.readout_parts: found {mrbp.readout_parts}, expected at most the {lanes} lanes that are worked on at once"
        )


def _measured(model: CellConfig | None) -> Iterator[str]:
    """What `readout_group: "auto"` cannot measure: memory that only a backward takes."""
    for field in ("checkpoint_layers", "loss_chunk"):
        if getattr(model, field, None):
            yield (
                f"mrbp.readout_group: found 'auto' with model.{field}, whose memory is taken in the backward, where it is not"
                " measured; expected a number"
            )


def _window(mrbp: MrbpConfig, training: TrainingConfig) -> Iterator[str]:
    window = mrbp.window
    if not isinstance(window, WindowByMetric) or window.metric in IN_TRAINING:
        return
    if not training.evaluate_every_tokens:
        yield (
            f"mrbp.window.metric: found {window.metric!r}, which is measured during training only where"
            " training.evaluate_every_tokens is set"
        )


def _expansion(training: TrainingConfig) -> Iterator[str]:
    if training.expand and training.init_from is None:
        yield "training.expand: found true, expected training.init_from with it: a run with fewer layers"


def _early_stopping(training: TrainingConfig) -> Iterator[str]:
    if training.early_stopping_patience and not training.evaluate_every_tokens:
        yield (
            f"training.early_stopping_patience: found {training.early_stopping_patience}, which counts evaluations during"
            " training; expected training.evaluate_every_tokens with it"
        )


def _sharded_gradients(mrbp: MrbpConfig, training: TrainingConfig, stage: Any) -> Iterator[str]:
    if mrbp.reduce == "segment" and stage in (0, 1):
        yield (
            f"mrbp.reduce: found 'segment' with deepspeed.zero_optimization.stage {stage}, which does not shard"
            " gradients; expected 'window', or stage 2 or 3"
        )
    if training.precision == "bf16_parameters" and (mrbp.reduce != "segment" or stage in (0, 1)):
        yield (
            "training.precision: found 'bf16_parameters', whose fp32 gradients are sharded; expected with it"
            " mrbp.reduce 'segment' and deepspeed.zero_optimization.stage 2 or 3"
        )


def _reduction_in_bf16(training: TrainingConfig, deepspeed: Any, stage: Any) -> Iterator[str]:
    if training.precision == "bf16_parameters" and stage == 2 and deepspeed["zero_optimization"].get("reduce_scatter"):
        yield (
            "deepspeed.zero_optimization.reduce_scatter: found True with training.precision 'bf16_parameters' at stage 2,"
            " where DeepSpeed would divide the gradients by the number of ranks in bf16; expected false, or stage 3"
        )
