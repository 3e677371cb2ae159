"""Settings that can never take effect, or not as they are written: said at the start, in words.

    for sentence in advice(config, sizes):
        log.warning(sentence)    # optimizer.warmup_tokens: found 5,000,000 with training.tokens 2,000,000: ...

A configuration may be right in itself and still not do what it says, because the run, the corpus or a step has another size. Here
nothing is refused: a short trial of a long run has such settings too. What is impossible is refused by config.py.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from memformer_dist.config import RunConfig
from memformer_dist.curriculum import WindowByMetric, WindowByStep
from memformer_dist.data.open_data import DataConfig
from memformer_dist.optimizer import OptimizerConfig, decay_start, learning_rate
from memformer_dist.training_settings import CheckpointConfig, TrainingConfig
from memformer_dist.zero.settings import options_without_effect

MANY_EPOCHS = 100
LONG_EVALUATION = 0.2  # of the segments that are trained on
IDLE = 0.5  # of the lanes' time in an evaluation
ABOUT = 1.1  # steps are estimated: something is beyond the run's end from so many times as many on


class Source(NamedTuple):
    """A corpus of a mixture."""

    name: str
    weight: float
    documents: int


class Sizes(NamedTuple):
    """What the advice depends on besides the configuration."""

    tokens: int  # of an epoch
    labels: float  # share of them that count in the loss
    padding: float  # share of the positions that hold no token
    longest: int  # tokens of the longest document
    sources: Sequence[Source]
    shards: int | None  # None: shards are not shuffled
    evaluation_segments: int  # that an evaluation of the whole validation split reads per lane
    evaluation_tokens: int  # ... and over all lanes
    is_cut: bool  # whether it cuts documents
    is_remote: bool  # whether a corpus lies behind a URL
    replays: bool  # whether the cell's state carries a gradient


class Run(NamedTuple):
    """The size of a run, estimated from that of an epoch."""

    first_step: float  # labels
    segments: float  # per lane
    steps: float  # at most, where the window depends on a metric
    epochs: float

    @classmethod
    def of(cls, config: RunConfig, sizes: Sizes) -> "Run":
        data, plan, left = config.data, config.mrbp.window, float(config.training.tokens)
        labels = data.lanes * data.segment_length * (1 - sizes.padding) * sizes.labels  # of a segment of all lanes
        parts = list(plan.by_step.items()) if isinstance(plan, WindowByStep) else [(0, _smallest(config))]
        steps = 0.0
        for (start, window), (stop, _) in zip(parts, [*parts[1:], (math.inf, 0)], strict=True):
            taken = min(stop - start, left / (labels * window))
            steps, left = steps + taken, left - taken * labels * window
        epochs = config.training.tokens / (sizes.tokens * sizes.labels)
        return cls(labels * parts[0][1], config.training.tokens / labels, steps, epochs)


def advice(config: RunConfig, sizes: Sizes) -> list[str]:
    """One sentence for each setting that will not do what it says; it begins with the field."""
    run = Run.of(config, sizes)
    return [
        *_length(config.training, run, sizes),
        *_schedule(config.optimizer, config.training.tokens),
        *_evaluation(config.training, run, sizes),
        *_long_evaluations(config, run, sizes),
        *_checkpoints(config.checkpoint, config.training, run),
        *_documents(config, sizes),
        *_corpora(config.data, run, sizes),
        *_curriculum(config, run),
        *_memory(config, sizes),
        *_steps(config, run),
    ]


def _smallest(config: RunConfig) -> int:
    """Segments of the first window."""
    plan = config.mrbp.window
    return plan if isinstance(plan, int) else plan.first if isinstance(plan, WindowByMetric) else plan.by_step[0]


def _largest(config: RunConfig) -> int:
    plan = config.mrbp.window
    return plan if isinstance(plan, int) else plan.largest


def _is_default(section: OptimizerConfig | TrainingConfig | CheckpointConfig | DataConfig, field: str) -> bool:
    return getattr(section, field) == type(section).model_fields[field].default


def _length(training: TrainingConfig, run: Run, sizes: Sizes) -> Iterator[str]:
    if run.epochs > MANY_EPOCHS:
        yield (
            f"training.tokens: found {training.tokens:,}: {run.epochs:,.0f} epochs of a corpus of"
            f" {sizes.tokens * sizes.labels:,.0f} labels, which the model will know by heart; expected more text, or fewer"
            " tokens"
        )
    if run.first_step >= training.tokens:
        yield (
            f"training.tokens: found {training.tokens:,}, a step trains on about {run.first_step:,.0f}: the run is one step"
        )


def _schedule(optimizer: OptimizerConfig, tokens: int) -> Iterator[str]:
    warmup = optimizer.warmup_tokens
    if warmup >= tokens:
        yield (
            f"optimizer.warmup_tokens: found {warmup:,} with training.tokens {tokens:,}: the warm-up does not end within the"
            f" run, and the learning rate comes to {learning_rate(optimizer, tokens, tokens):.3g} at most"
        )
    if optimizer.schedule == "cosine" and not _is_default(optimizer, "decay_share"):
        yield (
            f"optimizer.decay_share: found {optimizer.decay_share:g}, which has no effect with optimizer.schedule 'cosine'"
        )
    if optimizer.schedule == "warmup_stable_decay" and decay_start(optimizer, tokens) == warmup < tokens and warmup:
        yield (
            f"optimizer.warmup_tokens: found {warmup:,}: the decay of the last {optimizer.decay_share:g} of {tokens:,} tokens"
            " would begin before, so no tokens are left for a constant learning rate"
        )


def _evaluation(training: TrainingConfig, run: Run, sizes: Sizes) -> Iterator[str]:
    every, segments = training.evaluate_every_tokens, training.evaluate_segments
    if every is not None and every >= training.tokens:
        yield (
            f"training.evaluate_every_tokens: found {every:,} with training.tokens {training.tokens:,}: no evaluation comes"
            " before the last"
        )
    elif every is not None and every < run.first_step / ABOUT:
        yield _every_step("training.evaluate_every_tokens", every, run, "evaluation")
    if segments is not None and every is None:
        yield (
            f"training.evaluate_segments: found {segments}, which has no effect without training.evaluate_every_tokens: it is"
            " about evaluations during training"
        )
    elif segments is not None and segments > sizes.evaluation_segments:
        yield (
            f"training.evaluate_segments: found {segments}, the validation split has {sizes.evaluation_segments} segments per"
            " lane: every evaluation reads all of it"
        )
    final, warmup = training.final_evaluate_segments, training.evaluate_warmup_segments
    if final is not None and final > sizes.evaluation_segments:
        yield (
            f"training.final_evaluate_segments: found {final}, the validation split has {sizes.evaluation_segments} segments"
            " per lane: the evaluation at the end reads all of it"
        )
    if warmup is not None and not sizes.is_cut:
        yield (
            f"training.evaluate_warmup_segments: found {warmup}, which has no effect: to cut documents of the validation"
            " split over the lanes would save less than a tenth of the time"
        )
    patience, there = training.early_stopping_patience, _evaluations(training, run)
    if patience is not None and patience >= there:
        yield (
            f"training.early_stopping_patience: found {patience}, the run has about {there} evaluations: it does not end"
            " before its time"
        )


def _long_evaluations(config: RunConfig, run: Run, sizes: Sizes) -> Iterator[str]:
    """Where nobody has chosen how much is read."""
    training, each = config.training, sizes.evaluation_segments
    on_the_way = (training.tokens - 1) // (training.evaluate_every_tokens or training.tokens)
    busy = sizes.evaluation_tokens / (each * config.data.lanes * config.data.segment_length)
    hint = ""
    if training.evaluate_warmup_segments is None and busy < IDLE:
        hint = (
            f"; lanes have nothing to read {1 - busy:.0%} of the time, since a few documents are long:"
            " training.evaluate_warmup_segments cuts these over the lanes"
        )
    for field, number, what in (
        ("final_evaluate_segments", 1, "the evaluation at the end reads"),
        ("evaluate_segments", on_the_way, f"the {on_the_way:,} evaluations on the way read"),
    ):
        share = number * each / run.segments
        if getattr(training, field) is None and share > LONG_EVALUATION:
            yield (
                f"training.{field}: found null: {what} {number * each:,} segments per lane, {share:.0%} of the"
                f" {run.segments:,.0f} that are trained on; a number of segments limits it{hint}"
            )


def _evaluations(training: TrainingConfig, run: Run) -> int:
    """How many a run has, with that at its end."""
    every = training.evaluate_every_tokens
    return 0 if every is None else 1 + math.ceil(min((training.tokens - 1) // every, ABOUT * run.steps))


def _checkpoints(checkpoint: CheckpointConfig, training: TrainingConfig, run: Run) -> Iterator[str]:
    every, anchors, keep = checkpoint.every_tokens, checkpoint.anchor_every_tokens, checkpoint.keep
    tokens, best = training.tokens, checkpoint.keep_best * _evaluations(training, run)  # best ones at evaluations
    if every is not None and every >= tokens:
        yield (
            f"checkpoint.every_tokens: found {every:,} with training.tokens {tokens:,}: no checkpoint comes before the last"
            + (", but for the best ones" if best > 1 else "")
        )
    elif every is not None and every < run.first_step / ABOUT:
        yield _every_step("checkpoint.every_tokens", every, run, "checkpoint")
    if anchors is not None:
        found = f"checkpoint.anchor_every_tokens: found {anchors:,}"
        if anchors > tokens:
            yield f"{found} with training.tokens {tokens:,}: no checkpoint is kept for good"
        elif every is None and best < 2:
            yield f"{found} without checkpoint.every_tokens: there is no checkpoint before the last that could be kept"
        elif every is not None and anchors < every:
            yield f"{found} with checkpoint.every_tokens {every:,}: every checkpoint is kept for good"
    made = max(best, 1) + (0 if every is None else (tokens - 1) // every)
    if not _is_default(checkpoint, "keep") and keep > made:
        yield f"checkpoint.keep: found {keep}, the run writes {made}"


def _every_step(field: str, every: int, run: Run, what: str) -> str:
    return (
        f"{field}: found {every:,}, a step trains on about {run.first_step:,.0f} tokens: there is one {what} per step"
    )


def _documents(config: RunConfig, sizes: Sizes) -> Iterator[str]:
    size, segments = config.data.segment_length, math.ceil(sizes.longest / config.data.segment_length)
    if segments == 1:
        yield (
            f"data.segment_length: found {size}, the longest document has {sizes.longest:,} tokens: each is one segment, and"
            " the memory is never read"
        )
    elif _smallest(config) > segments:
        yield (
            f"mrbp.window: {_smallest(config)} segments of {size} tokens are more than the {sizes.longest:,} tokens of the"
            f" longest document: gradients end where documents begin, so {segments} segments would reach as far"
        )


def _corpora(data: DataConfig, run: Run, sizes: Sizes) -> Iterator[str]:
    for source in sizes.sources:
        if source.weight * source.documents * math.ceil(run.epochs) < 1:
            yield (
                f"data.corpus: {source.name} has weight {source.weight:g} and {source.documents:,} documents, of which the"
                f" run's {run.epochs:,.2g} epochs deal none"
            )
    if data.shuffle_shards is not None and sizes.shards is not None and data.shuffle_shards >= sizes.shards:
        yield (
            f"data.shuffle_shards: found {data.shuffle_shards}, there are {sizes.shards}: the whole epoch is shuffled, as"
            " with null"
        )
    for field in ("cache", "cache_gib"):
        if not sizes.is_remote and not _is_default(data, field):
            yield f"data.{field}: found {getattr(data, field)}, which has no effect: no corpus lies behind a URL"


def _curriculum(config: RunConfig, run: Run) -> Iterator[str]:
    plan, training = config.mrbp.window, config.training
    if isinstance(plan, WindowByStep):
        late = [f"{step:,}" for step in plan.by_step if step > ABOUT * run.steps]
        if late:
            yield (
                f"mrbp.window: the run has about {run.steps:,.0f} steps, so the windows from step {', '.join(late)} on never"
                " come"
            )
    elif isinstance(plan, WindowByMetric) and plan.last > plan.first:
        growth = plan.last - plan.first
        if plan.metric == "loss/train":
            needed, there, what = growth * (plan.every_steps or 1), run.steps, "steps"
        else:
            every = training.evaluate_every_tokens or training.tokens
            needed, there, what = growth, (training.tokens - 1) // every, "evaluations"
        if needed > ABOUT * there:
            yield (
                f"mrbp.window: grows from {plan.first} to {plan.last} segments in {needed:,} {what} at the earliest, the run"
                f" has about {there:,.0f}"
            )


def _memory(config: RunConfig, sizes: Sizes) -> Iterator[str]:
    mrbp, largest = config.mrbp, _largest(config)
    if isinstance(mrbp.readout_group, int) and mrbp.readout_group > largest:
        yield (
            f"mrbp.readout_group: found {mrbp.readout_group}, a window has {largest} segments at most: it is one group"
        )
    if mrbp.keep_gathered != "all" and config.zero_stage < 3:
        yield f"mrbp.keep_gathered: found {mrbp.keep_gathered!r}, which has no effect at ZeRO {config.zero_stage}"
    for field in ("state_store", "state_stride"):
        value = getattr(mrbp, field)
        if value != type(mrbp).model_fields[field].default and not (mrbp.replay and sizes.replays):
            yield f"mrbp.{field}: found {value!r}, which has no effect: nothing is replayed, so no states are kept"
    if mrbp.replay and sizes.replays and mrbp.state_stride >= largest > 1:
        yield (
            f"mrbp.state_stride: found {mrbp.state_stride}, a window has {largest} segments at most: all of its states are"
            " kept, on the device"
        )
    if not mrbp.replay and not sizes.replays:
        yield "mrbp.replay: found false, which has no effect: the state of this cell carries no gradient"
    for option in options_without_effect(config.deepspeed):
        yield f"deepspeed.zero_optimization.{option}: has no effect at ZeRO {config.zero_stage}"
    if not _is_default(config.data, "prefetch") and config.data.prefetch > 2 * largest - 1:
        yield (
            f"data.prefetch: found {config.data.prefetch}, a window is {2 * largest - 1} visits to segments: so many are"
            " prepared ahead at most"
        )


def _steps(config: RunConfig, run: Run) -> Iterator[str]:
    if config.monitor.log_every_steps > max(1.0, ABOUT * run.steps):
        yield (
            f"monitor.log_every_steps: found {config.monitor.log_every_steps}, the run has about {max(1, run.steps):,.0f}"
            " steps: only the last is logged"
        )
    limit = config.training.skipped_steps_limit
    if not _is_default(config.training, "skipped_steps_limit") and limit > max(1.0, ABOUT * run.steps):
        yield f"training.skipped_steps_limit: found {limit}, the run has about {max(1, run.steps):,.0f} steps"
