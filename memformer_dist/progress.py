"""Where a run is, and what it has added up since its log's last record."""

from pydantic import BaseModel


class Position(BaseModel, extra="forbid"):
    """Where a run is. The tick is the whole state of the data, the tokens that of every schedule."""

    step: int = 0  # windows trained on, skipped ones included
    tick: int = 0  # segments consumed by every lane
    tokens: int = 0  # labels trained on, over all lanes
    updates: int = 0  # optimiser steps applied: Adam's own count
    evaluated: int = 0  # tokens at the last evaluation on the way
    seconds: float = 0.0  # in training steps, over all the parts of a resumed run
    wall_s: float = 0.0  # all the time that these parts have run


class Interval(BaseModel, extra="forbid"):
    """Sums over the steps since the last record of the log, over all ranks. Saved, so that a resumed log repeats the run's."""

    steps: int = 0
    ticks: int = 0
    tokens: int = 0  # labels trained on
    input_tokens: int = 0  # read, padding left out
    documents: int = 0  # started
    skipped: int = 0
    losses: list[float] = []  # LossByAge's sums, flat; steps that were skipped are left out
    drift: float = 0.0  # the largest of a step, added up over the ranks: 0 where all of them repeated the rollout
    step_s: float = 0.0
    rollout_s: float = 0.0  # of rank 0
    wait_s: float = 0.0  # of rank 0
