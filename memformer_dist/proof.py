"""Does a trained cell remember? Its accuracy on the documents of a task, of any number of segments.

    config = NeedleConfig()
    found = measure(cell, config, segments=1024)        # documents that no training reads, the same for every cell
    found.accuracy, found.low, found.high               # 0.9727, 0.9446, 0.9867

An answer counts as right where it is the likeliest token, each in sight of the right ones before it. With `memory="reset"`
the cell's memory is reset at every segment, with "none" everything is: what is right then was not remembered.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.data.task_documents import TaskDocuments
from memformer_dist.segment import IGNORE, Segment
from memformer_dist.tasks.base import TaskConfig

Memory = Literal["carried", "reset", "none"]
NORMAL_95 = 1.959964  # two-sided quantile of the normal distribution


class Accuracy(NamedTuple):
    segments: int
    memory: Memory
    accuracy: float
    low: float  # bounds of a 95 % interval
    high: float
    documents: int
    answers: int


@torch.no_grad()
def measure(
    cell: RecurrentCell,
    config: TaskConfig,
    segments: int,
    *,
    documents: int = 256,
    lanes: int = 64,
    memory: Memory = "carried",
    stop: Callable[[], bool] = lambda: False,
) -> Accuracy | None:
    """The accuracy over `documents` held-out documents of `segments` segments; None if stopped.

    Args:
        cell: in plain torch, on any device; left in the mode that it is in.
        lanes: documents read at once.
        stop: asked before every segment.
    """
    held_out = TaskDocuments(config, segment_length=cell.segment_length, seed=0, held_out=True)
    training = cell.training
    cell.eval()
    right = answers = 0
    for first in range(0, documents, lanes):
        numbers = np.arange(first, min(first + lanes, documents))
        state = cell.empty_state(len(numbers))
        for segment in held_out.segments(numbers, segments, device=state[0].device):
            if stop():
                return None
            features, state = cell("advance", _with(segment, memory), state)
            asked = segment.labels != IGNORE
            if asked.any():
                likeliest = cell.logits(segment, features).argmax(-1)
                right += int((likeliest == segment.labels)[asked].sum())
                answers += int(asked.sum())
    cell.train(training)
    return Accuracy(segments, memory, right / answers, *interval(right / answers, documents), documents, answers)


def _with(segment: Segment, memory: Memory) -> Segment:
    always = torch.ones_like(segment.reset)
    if memory == "reset":
        return segment._replace(reset_memory=always)
    return segment._replace(reset=always) if memory == "none" else segment


def interval(share: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of independent trials.

    The answers of one document are not independent, so that documents are the trials: with several answers in each the
    interval is wider than it need be.
    """
    z = NORMAL_95
    centre, spread = share + z * z / (2 * trials), z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
