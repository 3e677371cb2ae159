"""The window curriculum: how many segments the next window has.

`mrbp.window` is a number of segments, or a schedule:

    {"by_step": {"0": 2, "1000": 8, "5000": 16}}    2 segments from step 0, 8 from step 1000, 16 from step 5000
    {"first": 1, "last": 10, "metric": "loss/train", "threshold": 1.2, "every_steps": 50}
                                                    one segment more whenever the mean loss of 50 steps is below 1.2
    {"first": 2, "last": 32, "growth": 1.5, "metric": "accuracy/train", "threshold": 0.95, "every_steps": 5}
                                                    half as long again whenever 95 % of the labels of 5 steps are right

    curriculum = Curriculum(config.mrbp.window)
    train_on(curriculum.window)                     # segments of the next step's window
    change = curriculum.after_step(step, nll, labels)

Models often learn a dependency over many segments only after they have learned it over few. Other programs need a chain
of runs for such a curriculum; here it is part of one run.

Every rank chooses the same window, and a resumed run the one that it would have had without the interruption: the
metrics are sums over all ranks, equal to the last bit on each of them, and a mean that is not complete yet is part of
the checkpoint. The window influences neither the order of the data, which advances by segments, nor the learning rate,
which depends on tokens.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, PositiveInt, Tag, ValidationInfo, field_validator

from memformer_dist.section import Extent


class WindowByStep(BaseModel, extra="forbid", frozen=True):
    """A schedule by step. The window may also shrink. Steps are counted with those whose update was skipped."""

    by_step: dict[int, Extent] = Field(
        description='segments per window from a step on, for example {"0": 2, "1000": 8}; the first step is 0'
    )

    @field_validator("by_step")
    @classmethod
    def _start_at_0_and_increase(cls, by_step: dict[int, int]) -> dict[int, int]:
        steps = list(by_step)
        if steps[:1] != [0] or steps != sorted(steps):
            found = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"found the steps {found}; expected 0 and then increasing ones")
        return by_step

    @property
    def largest(self) -> int:
        return max(self.by_step.values())

    def at(self, step: int) -> int:
        return [segments for first, segments in self.by_step.items() if first <= step][-1]

    def __str__(self) -> str:
        return ", ".join(f"{segments} from step {step}" for step, segments in self.by_step.items())


IN_TRAINING = ("loss/train", "accuracy/train")  # metrics of training steps; the others are of evaluations


class WindowByMetric(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A window that grows whenever a metric passes a threshold."""

    first: Extent = Field(description="segments of the first window")
    last: Extent = Field(description="segments of the longest window; at least `first`")
    growth: float = Field(
        1.0, ge=1, le=10, description="the window grows by this factor, rounded down, and by one segment at least"
    )
    metric: Literal["loss/train", "accuracy/train", "eval/loss", "eval/gap"] = Field(
        description="what is compared with the threshold: the window grows when a loss is below it, or when the accuracy or"
        " the gap is above it"
    )
    threshold: float = Field(description="threshold of the metric: nats per token, or a share of the labels")
    every_steps: PositiveInt | None = Field(
        None,
        validate_default=True,
        description="for loss/train and accuracy/train, steps of one window over which they are averaged before each"
        " comparison; null for the other two, which are compared at each evaluation",
    )

    @field_validator("last")
    @classmethod
    def _not_below_the_first(cls, last: int, info: ValidationInfo) -> int:
        if last < info.data.get("first", last):
            raise ValueError(f"found {last}, expected at least first ({info.data['first']})")
        return last

    @field_validator("every_steps")
    @classmethod
    def _where_there_is_a_mean(cls, every_steps: int | None, info: ValidationInfo) -> int | None:
        metric = info.data.get("metric")
        if metric in IN_TRAINING and every_steps is None:
            raise ValueError(f"missing; steps that {metric} is averaged over")
        if metric in ("eval/loss", "eval/gap") and every_steps is not None:
            raise ValueError(f"found {every_steps}, expected none: {metric} is compared at each evaluation")
        return every_steps

    @property
    def largest(self) -> int:
        return self.last

    @property
    def side(self) -> str:
        """On which side of the threshold the metric makes the window grow."""
        return "above" if self.metric in ("eval/gap", "accuracy/train") else "below"

    def passes(self, value: float) -> bool:
        return value > self.threshold if self.side == "above" else value < self.threshold

    def after(self, window: int) -> int:
        """The window that follows one of so many segments."""
        return min(self.last, max(window + 1, int(window * self.growth)))

    def __str__(self) -> str:
        more = "one more" if self.growth == 1 else f"{self.growth:g} times as many"
        return f"from {self.first} to {self.last}, {more} whenever {self.metric} is {self.side} {self.threshold:g}"


PLANS: dict[str, type[BaseModel]] = {"<by step>": WindowByStep, "<by metric>": WindowByMetric}  # by their tags


def smallest_window(plan: "WindowPlan") -> int:
    """Segments of the shortest window that a plan allows."""
    if isinstance(plan, WindowByStep):
        return min(plan.by_step.values())
    return plan if isinstance(plan, int) else plan.first


def plan_model(value: Any) -> type[BaseModel] | None:
    """Return which schedule a raw or validated `mrbp.window` is meant to be, None if it is not one."""
    return PLANS.get(_tag(value) or "")


def _tag(value: Any) -> str | None:
    """Which member of the union is meant, so that pydantic reports the errors of that one alone."""
    if isinstance(value, int | float):
        return "<number>"
    for tag, plan in PLANS.items():
        if isinstance(value, plan) or (isinstance(value, dict) and value.keys() & plan.model_fields):
            return tag
    return None


WindowPlan = Annotated[
    Annotated[Extent, Tag("<number>")]
    | Annotated[WindowByStep, Tag("<by step>")]
    | Annotated[WindowByMetric, Tag("<by metric>")],
    Discriminator(
        _tag,
        custom_error_type="window",
        custom_error_message='expected an integer, or {"by_step": {"0": 2, "1000": 8}}, or {"first": 1, "last": 10,'
        ' "metric": "loss/train", "threshold": 1.2, "every_steps": 50}',
    ),
]


class Progress(BaseModel, extra="forbid"):
    """The state of a curriculum, part of a checkpoint. The sums are over all ranks and belong to the current mean."""

    window: int  # segments of the next window
    steps: int = 0  # in the sums
    nll: float = 0.0  # sum over labels, in nats
    labels: float = 0.0
    right: float = 0.0  # labels that were given more than half of the probability


class Curriculum:
    """Chooses the window of the next step. Call `after_step` and `after_evaluation` with equal numbers on every rank.

    Args:
        plan: mrbp.window.
        step: windows trained on so far.
        saved: the progress held by the checkpoint that is resumed.
        changed: whether the checkpoint was written under another mrbp.window. A number or a schedule by step then holds
            from here as if the run had always had it. A schedule by metric continues from the run's window, clamped to
            first ... last, and starts a new mean.
    """

    def __init__(self, plan: WindowPlan, step: int = 0, saved: Progress | None = None, changed: bool = False):
        self.plan = plan
        if isinstance(plan, int):
            self.progress = Progress(window=plan)
        elif isinstance(plan, WindowByStep):
            self.progress = Progress(window=plan.at(step))
        elif saved is None:
            self.progress = Progress(window=plan.first)
        elif changed:
            self.progress = Progress(window=min(max(saved.window, plan.first), plan.last))
        else:
            self.progress = saved.model_copy()

    @property
    def window(self) -> int:
        return self.progress.window

    @property
    def largest(self) -> int:
        """Segments of the longest window that the plan allows."""
        return self.plan if isinstance(self.plan, int) else self.plan.largest

    def after_step(self, step: int, nll: float, labels: float, right: float = 0.0) -> str | None:
        """Count a step; return a message if the window changes, else None.

        Args:
            step: windows trained on so far.
            nll, labels: sum and count of the last window, over all ranks. Skipped steps (0 labels) and losses that are
                not finite do not enter the mean.
            right: how many of the labels were right.
        """
        plan, progress = self.plan, self.progress
        if isinstance(plan, WindowByStep):
            return self._continue_with(plan.at(step), "by the schedule")
        if isinstance(plan, int) or plan.metric not in IN_TRAINING or progress.window == plan.last:
            return None
        if labels == 0 or not math.isfinite(nll):
            return None
        progress.steps += 1
        progress.nll += nll
        progress.labels += labels
        progress.right += right
        assert plan.every_steps is not None  # WindowByMetric has one for this metric
        if progress.steps < plan.every_steps:
            return None
        mean = (progress.nll if plan.metric == "loss/train" else progress.right) / progress.labels
        self.progress = Progress(window=progress.window)
        return self._compare(plan, mean, f" over {plan.every_steps} steps")

    def after_evaluation(self, loss: float, gap: float) -> str | None:
        """Take eval/loss and eval/gap of an evaluation; return a message if the window changes, else None."""
        plan = self.plan
        if not isinstance(plan, WindowByMetric) or plan.metric in IN_TRAINING or self.window == plan.last:
            return None
        return self._compare(plan, gap if plan.metric == "eval/gap" else loss, "")

    def _compare(self, plan: WindowByMetric, value: float, of: str) -> str | None:
        if not plan.passes(value):  # nan does not pass either
            return None
        because = f"{plan.metric} was {value:.4f}{of}, {plan.side} {plan.threshold:g}"
        return self._continue_with(plan.after(self.window), because)

    def _continue_with(self, window: int, because: str) -> str | None:
        before, self.progress.window = self.progress.window, window
        return None if window == before else f"windows of {window} segments from here, {before} until now: {because}"
