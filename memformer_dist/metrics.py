"""Every figure that a run logs: its name, unit, meaning and formula. Nothing here writes or talks to other ranks.

A record of training is computed from an `Observed` by the table TRAINING, one of an evaluation from the losses of its
modes by EVALUATION; monitor.py writes them. A name that ends in `*` stands for several, whose endings its formula
gives.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.config import RunConfig
from memformer_dist.mrbp.states import most_states
from memformer_dist.progress import Interval
from memformer_dist.segment import IGNORE, Segment, Tensors
from memformer_dist.token_texts import UNKNOWN_TEXT, TextCount
from memformer_dist.world import World

AGES = ("0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64+")  # segments since the document's start
LOGGED_AGES = (*AGES[:4], "8+")  # in records of training
# Dense bf16 tensor-core peaks of the makers' data sheets, in TFLOP/s, for perf/mfu.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}


# ---- losses by segment age -------------------------------------------------------------------------------------------


class LossByAge:
    """Sums of per-token losses and counts of labels by segment age, in float64, on one rank."""

    def __init__(self, device: torch.device, ages: tuple[str, ...] = AGES):
        self.sums = torch.zeros(2, len(ages), dtype=torch.float64, device=device)  # [nll | labels, age]

    def add(self, segment: Segment, nll: Tensor) -> None:
        """Count nll [B, S] of one segment."""
        age = segment.offset // nll.shape[1]  # [B]
        bucket = torch.frexp(age.double()).exponent.clamp(0, self.sums.shape[1] - 1).long()  # 0, 1, 2-3, 4-7 ...
        labels = (segment.labels != IGNORE).sum(1).double()
        bucket, labels = (x.to(nll.device, non_blocking=True) for x in (bucket, labels))
        self.sums[0].index_add_(0, bucket, nll.double().sum(1))
        self.sums[1].index_add_(0, bucket, labels)


def count_right(segment: Segment, nll: Tensor) -> Tensor:
    """How many labels were given more than half of the probability, by their nll [B, S].

    Such a label is the likeliest, so that this is a lower bound of those that are; it takes no logits.
    """
    return ((nll < math.log(2)) & (segment.labels != IGNORE).to(nll.device, non_blocking=True)).sum()


class Losses(NamedTuple):
    """Mean losses over all ranks, in nats per token."""

    loss: float  # nan without labels
    by_age: dict[str, float]  # of the ages that occur
    labels: float = 0  # that the loss is the mean of
    carried: float | None = None  # mode `carried` over the same labels, where these are not all of them
    text: TextCount = UNKNOWN_TEXT  # that the labels stand for

    @classmethod
    def of(cls, sums: list[float], ages: tuple[str, ...] = AGES) -> "Losses":
        """From LossByAge.sums, flat, added up over ranks."""
        nll, labels = sums[: len(ages)], sums[len(ages) :]
        # Without sums, as after steps that were all skipped, there are no ages.
        by_age = {age: n / count for age, n, count in zip(ages, nll, labels, strict=False) if count}
        return cls(sum(nll) / sum(labels) if any(labels) else math.nan, by_age, sum(labels))

    @property
    def is_missing(self) -> bool:
        """Nothing was measured: what is shown for it is n/a."""
        return math.isnan(self.loss) and not self.by_age

    @property
    def perplexity(self) -> float:
        return _exponential(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Of the text in UTF-8; None where its size is not known."""
        return _ratio(self.loss * self.labels / math.log(2), self.text.bytes)

    @property
    def perplexity_per_word(self) -> float | None:
        """None where words are not counted."""
        nats = _ratio(self.loss * self.labels, self.text.words)
        return None if nats is None else _exponential(nats)


def _exponential(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def _ratio(total: float, count: float) -> float | None:
    return total / count if count > 0 else None  # also where that is nan


def gap(losses: dict[str, Losses], mode: str) -> float | None:
    """How far a mode's loss lies above that of `carried` over the same labels; None where it was not measured."""
    found = losses[mode]
    if found.is_missing:
        return None
    return found.loss - (losses["carried"].loss if found.carried is None else found.carried)


# ---- records of training ---------------------------------------------------------------------------------------------


class Constants(NamedTuple):
    """What the figures of a run depend on and no step changes."""

    world_size: int
    positions: int  # per tick: lanes x segment length, padding included
    state_bytes: int  # of the states of one lane group
    flops_per_token: float
    peak_flops: float | None  # of one device; None: unknown
    state_stride: int = 1


def constants_of(config: RunConfig, world: World, state: Tensors, build_cell: Callable[[], RecurrentCell]) -> Constants:
    """Those of a run; `state` is that of one lane group."""
    data = config.data
    return Constants(
        world_size=world.size,
        positions=data.lanes * data.segment_length,
        state_bytes=sum(x.nbytes for x in state),
        flops_per_token=training_flops_per_token(build_cell, data.segment_length),
        peak_flops=peak_flops(world.device, config.monitor.device_peak_tflops),
        state_stride=config.mrbp.state_stride,
    )


class Observed(NamedTuple):
    """What a record of training is computed from."""

    constants: Constants
    interval: Interval  # the steps since the last record
    learning_rate: float
    gradient_norm: float  # of the last step
    state_gradient_squares: Sequence[float]  # of the last step: Accumulated's, added up over ranks
    diagnosis: dict[str, float]  # RecurrentCell.diagnose
    allocated_bytes: int | None = None  # None on a CPU
    allocation_retries: int | None = None

    @property
    def window(self) -> int:
        """Segments of the last step."""
        return len(self.state_gradient_squares)

    @property
    def losses(self) -> Losses:
        return Losses.of(self.interval.losses, LOGGED_AGES)

    @property
    def accuracy(self) -> float:
        labels = sum(self.interval.losses[len(LOGGED_AGES) :])
        return self.interval.right / labels if labels else math.nan

    @property
    def tokens_per_s(self) -> float:
        return self.interval.tokens / self.interval.step_s


class Metric(NamedTuple):
    name: str
    unit: str  # empty: a pure number
    meaning: str
    formula: Callable[[Any], float | dict[str, float] | None]  # None: not logged


def _mfu(observed: Observed) -> float | None:
    peak = observed.constants.peak_flops
    needed = observed.tokens_per_s * observed.constants.flops_per_token
    return None if peak is None else needed / (observed.constants.world_size * peak)


def _allocated_gib(observed: Observed) -> float | None:
    return None if observed.allocated_bytes is None else observed.allocated_bytes / 2**30


# "since the last record" is the interval of monitor.log_every_steps steps.
TRAINING = (
    Metric(
        "loss/train",
        "nats per token",
        "mean loss since the last record, over all ranks; skipped steps are left out",
        lambda o: o.losses.loss,
    ),
    Metric(
        "loss/by_segment_age/*",
        "nats per token",
        "the same for segments of one age, counted from the document's start; ages that do not occur are not logged",
        lambda o: o.losses.by_age,
    ),
    Metric(
        "accuracy/train",
        "",
        "share of the labels since the last record that were given more than half of the probability: a lower bound of"
        " those that were the likeliest token; skipped steps are left out",
        lambda o: o.accuracy,
    ),
    Metric("optim/lr", "", "learning rate", lambda o: o.learning_rate),
    Metric(
        "optim/grad_norm",
        "",
        "2-norm of the last step's gradient over all parameters, before clipping",
        lambda o: o.gradient_norm,
    ),
    Metric(
        "optim/skipped",
        "steps",
        "steps since the last record whose gradient was not finite and was not applied",
        lambda o: o.interval.skipped,
    ),
    Metric(
        "memory/*",
        "",
        "the cell's own diagnosis: the first lane group's last segment, read once more from the state that it left",
        lambda o: o.diagnosis,
    ),
    Metric("mrbp/window", "segments", "N of the last step", lambda o: o.window),
    Metric(
        "mrbp/replay_drift",
        "",
        "largest absolute difference between a state of the rollout and of the replay, added up over ranks;"
        " 0: the replay repeated the rollout bit by bit",
        lambda o: o.interval.drift,
    ),
    Metric(
        "mrbp/rollout_share",
        "",
        "share of the steps' time that went into rollouts, on rank 0",
        lambda o: o.interval.rollout_s / o.interval.step_s,
    ),
    Metric(
        "mrbp/state_bytes",
        "bytes",
        "of the states that a window of one lane group holds at a time: N, or fewer with mrbp.state_stride",
        lambda o: most_states(o.window, o.constants.state_stride) * o.constants.state_bytes,
    ),
    Metric(
        "data/pad_fraction",
        "",
        "share of the positions read since the last record that were padding",
        lambda o: 1 - o.interval.input_tokens / (o.interval.ticks * o.constants.positions),
    ),
    Metric(
        "data/wait_s",
        "s",
        "time that rank 0 waited for data since the last record",
        lambda o: o.interval.wait_s,
    ),
    Metric(
        "data/documents_started",
        "documents",
        "documents started since the last record, over all lanes",
        lambda o: o.interval.documents,
    ),
    Metric("perf/tokens_per_s", "tokens/s", "labels trained on per second of the steps", lambda o: o.tokens_per_s),
    Metric(
        "perf/tokens_per_s_per_device",
        "tokens/s",
        "the same per rank",
        lambda o: o.tokens_per_s / o.constants.world_size,
    ),
    Metric("perf/step_s", "s", "mean time per step", lambda o: o.interval.step_s / o.interval.steps),
    Metric(
        "perf/mfu",
        "",
        "model FLOPs utilisation: FLOPs that the model needs for what was trained on, over the devices' peak;"
        " the replay's second advance is not counted; not logged where the peak is unknown",
        _mfu,
    ),
    Metric(
        "device/max_allocated_gib",
        "GiB",
        "largest memory that torch has had allocated on rank 0's GPU",
        _allocated_gib,
    ),
    Metric(
        "device/alloc_retries",
        "",
        "times that torch had to free its cache to allocate on rank 0's GPU",
        lambda o: o.allocation_retries,
    ),
)
BOUNDARY_NORMS = "memory/grad_norm_by_boundary"  # the only curve; see training_curves

# Of an evaluation's losses by mode. It is logged as eval/... on the way and as final/... at the end.
EVALUATION = (
    Metric("loss", "nats per token", "held-out loss with the memory carried", lambda by: by["carried"].loss),
    Metric(
        "loss_no_memory", "nats per token", "with the memory reset at every segment", lambda by: by["no_memory"].loss
    ),
    Metric("loss_no_state", "nats per token", "with everything reset at every segment", lambda by: by["no_state"].loss),
    Metric(
        "loss_shuffled",
        "nats per token",
        "with the memory of another document, where two or more are read side by side; not logged where none are",
        lambda by: None if by["shuffled"].is_missing else by["shuffled"].loss,
    ),
    Metric(
        "gap",
        "nats per token",
        "loss_no_memory - loss: what the memory is worth",
        lambda by: gap(by, "no_memory"),
    ),
    Metric(
        "gap_shuffled",
        "nats per token",
        "loss_shuffled - loss over the same labels: what only the document's own memory gives",
        lambda by: gap(by, "shuffled"),
    ),
    Metric(
        "bits_per_byte",
        "bits per byte",
        "loss over the bytes of the text that the labels stand for; not logged where the tokenizer does not tell",
        lambda by: by["carried"].bits_per_byte,
    ),
)
FAMILIES = ("eval", "final")


def training_scalars(observed: Observed) -> dict[str, float]:
    """The scalars of one record of training, by name."""
    return _computed(TRAINING, observed)


def training_curves(observed: Observed) -> dict[str, list[float]]:
    """Norms over all lanes of dL/d(state at a boundary), L the mean loss of the last window, in which N > 1.

    The N - 1 boundaries from the window's start on: the last item depends on the last segment's loss alone. Read from
    there, the norms grow until losses further on no longer reach back: that is the gradient's real horizon. The engine
    scales the loss by the world size.
    """
    squares = observed.state_gradient_squares[1:]  # the first is that of the state which enters the window
    norms = [math.sqrt(square) / observed.constants.world_size for square in squares]
    return {BOUNDARY_NORMS: norms} if norms else {}


def description(name: str) -> str:
    """What a figure or a curve of that name is, and its unit; empty where no table has it."""
    if name == BOUNDARY_NORMS:
        return "norm of the gradient of the last window's mean loss with respect to the state, by segments to its end"
    named = [(metric.name, metric) for metric in TRAINING]
    named += [(f"{family}/{metric.name}", metric) for family in FAMILIES for metric in EVALUATION]
    for pattern, metric in named:
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return f"{metric.meaning} [{metric.unit}]" if metric.unit else metric.meaning
    return ""


def evaluation_scalars(family: str, losses: dict[str, Losses]) -> dict[str, float]:
    """The scalars of one evaluation, by name; `family` is "eval" or "final"."""
    return {f"{family}/{name}": value for name, value in _computed(EVALUATION, losses).items()}


def _computed(metrics: Sequence[Metric], argument: object) -> dict[str, float]:
    scalars: dict[str, float] = {}
    for metric in metrics:
        value = metric.formula(argument)
        if isinstance(value, dict):
            scalars |= {metric.name.removesuffix("*") + ending: x for ending, x in value.items()}
        elif value is not None:
            scalars[metric.name] = value
    return scalars


# ---- speed against the device's peak ---------------------------------------------------------------------------------


def peak_flops(device: torch.device, configured_tflops: float | None) -> float | None:
    """The device's peak in FLOP/s: what is configured, or known for its name, or None."""
    if configured_tflops:
        return configured_tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def training_flops_per_token(build_cell: Callable[[], RecurrentCell], segment_length: int) -> float:
    """FLOPs of forward and backward per token, counted by torch on one lane of one segment without computing anything.

    The replay's second advance is not counted: perf/mfu is about what the model needs, not what the method spends.
    """
    with torch.device("meta"):
        cell = build_cell()
        tokens = torch.zeros(1, segment_length, dtype=torch.long)
        lane, flag = torch.full((1,), segment_length), torch.zeros(1, dtype=torch.bool)
        segment = Segment(tokens, torch.full_like(tokens, IGNORE), lane, flag, flag, lane, lane)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            features, _ = cell("advance", segment, cell.empty_state(1, device=torch.device("meta")))
            cell("readout", segment, features)
    return 3 * counter.get_total_flops() / segment_length
