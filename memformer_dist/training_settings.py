"""The sections `training`, `checkpoint` and `monitor` of a configuration."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from memformer_dist.section import Section
from memformer_dist.zero.settings import NO_FP16


class TrainingConfig(Section):
    """The section `training`."""

    tokens: PositiveInt = Field(
        description="labels to train on, over all lanes and epochs: the run ends with the step that reaches them"
    )
    seed: int = Field(0, ge=0, description="seed of the initial weights and of dropout")
    precision: Literal["fp32", "bf16", "bf16_parameters"] = Field(
        "fp32",
        description="fp32: everything in fp32; bf16: autocast over fp32 parameters, gradients in fp32; bf16_parameters:"
        " bf16 parameters with sharded fp32 master weights and gradients, for models whose fp32 parameters do not fit"
        ' (needs mrbp.reduce "segment")',
    )
    init_from: str | None = Field(
        None,
        description="run directory or checkpoint whose weights a fresh run starts from, and nothing else of it; null:"
        " random weights",
    )
    expand: bool = Field(
        False,
        description="the model has more layers than that of init_from: what is new adds nothing at first, so that a fresh"
        " run starts as the function that init_from has learned",
    )
    freeze: tuple[str, ...] = Field(
        (),
        description="parameters that are not trained, by the beginnings of their names up to a dot: embedding,"
        " decoder.layers.0",
    )
    evaluate_every_tokens: PositiveInt | None = Field(
        None, description="tokens between evaluations during training; null: evaluate only at the end"
    )
    evaluate_segments: PositiveInt | None = Field(
        None,
        description="segments per lane that an evaluation during training reads; null: the whole validation split",
    )
    final_evaluate_segments: PositiveInt | None = Field(
        None,
        description="segments per lane that the evaluation at the end reads; null: the whole validation split",
    )
    evaluate_warmup_segments: int | None = Field(
        None,
        ge=0,
        description="in evaluations, cut long documents over the lanes, and read so many segments before each piece"
        " without counting their losses; null: read every document as a whole, on one lane",
    )
    early_stopping_patience: PositiveInt | None = Field(
        None,
        description="the run ends after this many evaluations in a row that have not lowered the held-out loss; null:"
        " it trains on all of training.tokens",
    )
    skipped_steps_limit: PositiveInt = Field(
        10, description="the run ends with an error after this many steps in a row whose gradient is not finite"
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _not_fp16(cls, precision: Any) -> Any:
        if precision == "fp16":
            raise ValueError(f"found 'fp16', expected 'fp32' or 'bf16'; {NO_FP16}")
        return precision


class CheckpointConfig(Section):
    """The section `checkpoint`."""

    every_tokens: PositiveInt | None = Field(
        None,
        description="tokens between checkpoints; null: only at the end, when the run is stopped, and as keep_best says",
    )
    keep: int = Field(
        2, ge=2, description="how many of the newest checkpoints are kept; with two, one may turn out damaged"
    )
    before_job_ends_s: float = Field(
        120, ge=0, description="under SLURM the run saves and stops this many seconds before the job's end"
    )
    keep_best: bool = Field(
        True,
        description="write a checkpoint at every evaluation whose held-out loss is the lowest so far, and keep it until"
        " another one is",
    )
    anchor_every_tokens: PositiveInt | None = Field(
        None, description="the first checkpoint after each multiple of this many tokens is never removed; null: none"
    )


class MonitorConfig(Section):
    """The section `monitor`."""

    log_every_steps: PositiveInt = Field(10, description="steps per record in metrics.jsonl and TensorBoard")
    device_peak_tflops: PositiveFloat | None = Field(
        None, description="peak TFLOP/s of one device, for perf/mfu; null: looked up, for the GPUs that are known"
    )
