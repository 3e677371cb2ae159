"""ZeroExecutor: one lane group of a window run through DeepSpeed's engine. It holds nothing that changes."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

from memformer_dist.mrbp.executor import reseed
from memformer_dist.segment import Tensors

if TYPE_CHECKING:
    from memformer_dist.zero.engine import Engine


class ZeroExecutor:
    """An Executor (mrbp/executor.py).

    Args:
        start: tick of the window's first segment; with the seed, the rank and the lane group it seeds every call.
        group: number of the lane group on this rank.
        is_last: whether the step has no lane group after this one.
    """

    def __init__(self, engine: "Engine", *, start: int, group: int, is_last: bool):
        self._engine, self._start, self._group, self._is_last = engine, start, group, is_last

    def rollout(self, t: int, segment: Tensors, state: Tensors) -> Tensors:
        return self._run("advance", t, 0, segment, state)[1]

    def advance(self, t: int, segment: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        if self._engine.gathering is not None:
            self._engine.gathering.begin_advance()
        return self._run("advance", t, 0, segment, state)

    def readout(self, t: int, part: int, segment: Tensors, features: Tensors) -> Tensor:
        return self._run("readout", t, part + 1, segment, features)

    def backward(self, scalar: Tensor, *, last: bool) -> None:
        self._engine.reduction.backward(scalar, is_last=last and self._is_last)

    def readout_scope(self) -> AbstractContextManager[object]:
        gathering = self._engine.gathering
        return nullcontext() if gathering is None else gathering.readout()

    def _run(self, part: str, t: int, phase: int, segment: Tensors, tensors: Tensors):
        """`phase`: 0 in advance, 1, 2, ... in the parts of a readout."""
        world = self._engine.world
        reseed(world.device, self._engine.seed, self._start + t, world.rank, self._group, phase)
        return self._engine(part, segment, tensors)
