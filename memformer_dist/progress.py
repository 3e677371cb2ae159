"""Where a run is, its sums since the last record of its log, and its best evaluation. All are part of every checkpoint."""

import math

from pydantic import BaseModel


class Position(BaseModel, extra="forbid"):
    """Where a run is. The tick is the whole state of the data, the tokens that of every schedule."""

    step: int = 0  # windows trained on, skipped ones included
    tick: int = 0  # segments consumed by every lane
    tokens: int = 0  # labels trained on, over all lanes
    updates: int = 0  # optimiser steps applied: Adam's own count
    evaluated: int = 0  # tokens at the last evaluation on the way
    seconds: float = 0.0  # in training steps, over all parts of a resumed run
    processor_s: float = 0.0  # processor time of rank 0 in training steps, over all parts of a resumed run
    wall_s: float = 0.0  # in all, over the parts of a resumed run up to the last checkpoint of each

    def add(self, *, segments: int, tokens: int, applied: bool, seconds: float, processor_s: float) -> None:
        """One step: a window of `segments` with `tokens` labels over all lanes; without labels nothing is applied."""
        self.step += 1
        self.tick += segments
        self.tokens += tokens
        self.updates += applied
        self.seconds += seconds
        self.processor_s += processor_s


class Interval(BaseModel, extra="forbid"):
    """Sums over the steps since the last record of the log, over all ranks.

    Saved, so that a resumed run logs what it would have logged without the interruption.
    """

    steps: int = 0
    ticks: int = 0  # segments consumed by every lane
    tokens: int = 0  # labels trained on
    input_tokens: int = 0  # tokens read, without padding
    documents: int = 0  # documents started
    skipped: int = 0  # steps whose gradient was not finite
    losses: list[float] = []  # metrics.LossByAge.sums, flat; without the skipped steps
    right: float = 0.0  # labels that were given more than half of the probability; without the skipped steps
    drift: float = 0.0  # the largest of a step, which is a sum over ranks: 0 if all of them repeated the rollout
    step_s: float = 0.0
    rollout_s: float = 0.0  # of rank 0
    wait_s: float = 0.0  # of rank 0

    def add(
        self,
        *,
        segments: int,
        tokens: int,
        input_tokens: int,
        documents: int,
        applied: bool,
        losses: list[float],
        right: float,
        drift: float,
        step_s: float,
        rollout_s: float,
        wait_s: float,
    ) -> None:
        """One step. `losses`, `right` and `drift` are over all ranks; a drift that is no number counts as infinite."""
        self.steps += 1
        self.ticks += segments
        self.tokens += tokens
        self.input_tokens += input_tokens
        self.documents += documents
        self.skipped += tokens > 0 and not applied
        if applied:
            self.losses = [x + y for x, y in zip(self.losses or [0.0] * len(losses), losses, strict=True)]
            self.right += right
        self.drift = max(self.drift, drift if math.isfinite(drift) else math.inf)
        self.step_s += step_s
        self.rollout_s += rollout_s
        self.wait_s += wait_s


class Evaluation(BaseModel, extra="forbid", frozen=True):
    """An evaluation during training."""

    step: int
    tokens: int
    loss: float  # held-out, with the memory carried


class HeldOut(BaseModel, extra="forbid"):
    """The best of the evaluations during training, and how many have followed it.

    Only evaluations that have read the same are compared: the fields from `corpus` on say what this was.
    """

    best: Evaluation | None = None
    without_improvement: int = 0  # evaluations since the best one
    corpus: str | None = None  # fingerprint of the validation split
    segments: int | None = None  # training.evaluate_segments
    warmup_segments: int | None = None  # training.evaluate_warmup_segments

    def add(self, found: Evaluation, *, corpus: str, segments: int | None, warmup_segments: int | None) -> None:
        """Count an evaluation. One that has read something else than those before is compared with none of them."""
        if (corpus, segments, warmup_segments) != (self.corpus, self.segments, self.warmup_segments):
            self.best, self.without_improvement = None, 0
            self.corpus, self.segments, self.warmup_segments = corpus, segments, warmup_segments
        if math.isfinite(found.loss) and (self.best is None or found.loss < self.best.loss):
            self.best, self.without_improvement = found, 0
        else:
            self.without_improvement += 1

    def is_exhausted(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row have not improved on the best one (training.early_stopping_patience)."""
        return patience is not None and self.without_improvement >= patience

    def __str__(self) -> str:
        """What the log says of an evaluation that is not the best one; "" of one that is."""
        if self.without_improvement == 0:
            return ""
        than = f", the best is {self.best.loss:.4f} of step {self.best.step}" if self.best else ""
        return f"evaluation {self.without_improvement} in a row without improvement{than}"
