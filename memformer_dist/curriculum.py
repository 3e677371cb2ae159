"""The window curriculum: how many segments the next window has.

`mrbp.window` is a number of segments, or a schedule:

    {"by_step": {"0": 2, "1000": 8, "5000": 16}}    2 segments a window from step 0, 8 from step 1000, 16 from step 5000
    {"first": 1, "last": 10, "metric": "loss/train", "threshold": 1.2, "every_steps": 50}
                                                    one segment more whenever the mean loss of 50 steps is below 1.2

A dependency over many segments is often found only by a model that has learned it over few. Elsewhere such a curriculum
is a chain of runs; here it is part of one.

Every rank comes to the same window, and a resumed run to the one it would have had: the metrics are sums over all
ranks, equal to the last bit on each, and what has been added up of them is part of the checkpoint. Neither data nor
learning rate know of the window: the one goes on by ticks, the other by tokens.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, Discriminator, Field, PositiveInt, Tag, ValidationInfo, field_validator


class WindowByStep(BaseModel, extra="forbid", frozen=True):
    """The window may also shrink. A step is one window trained on, skipped ones included."""

    by_step: dict[int, PositiveInt] = Field(description='segments per window from a step on, e.g. {"0": 2, "1000": 8}')

    @field_validator("by_step")
    @classmethod
    def _begins_at_0_and_increases(cls, by_step: dict[int, int]) -> dict[int, int]:
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


class WindowByMetric(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    first: PositiveInt = Field(description="segments of the first window")
    last: PositiveInt = Field(description="segments beyond which the window does not grow")
    metric: Literal["loss/train", "eval/loss", "eval/gap"] = Field(
        description="the window grows by one segment when a loss is below the threshold, or the gap above it"
    )
    threshold: float = Field(description="value of the metric at which the window grows")
    every_steps: PositiveInt | None = Field(
        None,
        validate_default=True,
        description="steps over which loss/train is averaged before it is compared; null for the metrics of evaluations,"
        " which are compared at each evaluation",
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
        if metric == "loss/train" and every_steps is None:
            raise ValueError("missing; steps that loss/train is averaged over")
        if metric in ("eval/loss", "eval/gap") and every_steps is not None:
            raise ValueError(f"found {every_steps}, expected none: {metric} is compared at each evaluation")
        return every_steps

    @property
    def largest(self) -> int:
        return self.last

    def passes(self, value: float) -> bool:
        return value > self.threshold if self.metric == "eval/gap" else value < self.threshold

    def __str__(self) -> str:
        side = "above" if self.metric == "eval/gap" else "below"
        return f"from {self.first} to {self.last}, one more whenever {self.metric} is {side} {self.threshold:g}"


# Names of the shapes in pydantic's account of where an error lies; no key of a configuration looks like them.
SHAPES: dict[str, type[BaseModel] | None] = {"<number>": None, "<by step>": WindowByStep, "<by metric>": WindowByMetric}


def _shape(value) -> str | None:
    """Which one is meant: the errors are then of that one alone."""
    if isinstance(value, (int, float)):
        return "<number>"
    if isinstance(value, WindowByStep) or (isinstance(value, dict) and "by_step" in value):
        return "<by step>"
    if isinstance(value, WindowByMetric) or (isinstance(value, dict) and value.keys() & WindowByMetric.model_fields):
        return "<by metric>"
    return None


WindowPlan = Annotated[
    Annotated[PositiveInt, Tag("<number>")]
    | Annotated[WindowByStep, Tag("<by step>")]
    | Annotated[WindowByMetric, Tag("<by metric>")],
    Discriminator(
        _shape,
        custom_error_type="window",
        custom_error_message='expected an integer, or {"by_step": {"0": 2, "1000": 8}}, or {"first": 1, "last": 10,'
        ' "metric": "loss/train", "threshold": 1.2, "every_steps": 50}',
    ),
]


class Progress(BaseModel, extra="forbid"):
    """Of a curriculum, as a checkpoint holds it. The sums are over all ranks, those of the mean that is under way."""

    window: int  # segments of the next window
    steps: int = 0  # applied
    nll: float = 0.0
    labels: float = 0.0


class Curriculum:
    """The window of the next step. Told of every step and evaluation, in the same words on every rank.

    Args:
        plan: mrbp.window.
        step: windows trained on so far.
        saved: of the checkpoint that the run goes on from.
        changed: whether the checkpoint was written under another mrbp.window. A number and a schedule by step are
            followed from here as if they had always been there; one by metric goes on from the window that the run had,
            brought into first ... last, with a new mean.
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
        """Segments of the longest window to come."""
        return self.plan if isinstance(self.plan, int) else self.plan.largest

    def after_step(self, step: int, nll: float, labels: float) -> str | None:
        """What changes, in words, after `step` windows.

        Args:
            nll, labels: of the last window, over all ranks. A skipped step (0 labels) and a loss that is not finite count in
                no mean.
        """
        plan, progress = self.plan, self.progress
        if isinstance(plan, WindowByStep):
            return self._continue_with(plan.at(step), "by the schedule")
        if isinstance(plan, int) or plan.metric != "loss/train" or progress.window == plan.last:
            return None
        if labels == 0 or not math.isfinite(nll):
            return None
        progress.steps += 1
        progress.nll += nll
        progress.labels += labels
        assert plan.every_steps is not None  # WindowByMetric has one for this metric
        if progress.steps < plan.every_steps:
            return None
        mean = progress.nll / progress.labels
        self.progress = Progress(window=progress.window)
        return self._compare(plan, mean, f" over {plan.every_steps} steps")

    def after_evaluation(self, loss: float, gap: float) -> str | None:
        """What changes, in words, after an evaluation during training, by eval/loss or eval/gap."""
        plan = self.plan
        if not isinstance(plan, WindowByMetric) or plan.metric == "loss/train" or self.window == plan.last:
            return None
        return self._compare(plan, gap if plan.metric == "eval/gap" else loss, "")

    def _compare(self, plan: WindowByMetric, value: float, of: str) -> str | None:
        if not plan.passes(value):  # nor does nan
            return None
        side = "above" if plan.metric == "eval/gap" else "below"
        because = f"{plan.metric} was {value:.4f}{of}, {side} {plan.threshold:g}"
        return self._continue_with(self.window + 1, because)

    def _continue_with(self, window: int, because: str) -> str | None:
        before, self.progress.window = self.progress.window, window
        return None if window == before else f"windows of {window} segments from here, {before} until now: {because}"
