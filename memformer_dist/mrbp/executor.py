"""Executor: how memory replay runs a cell. Memory replay knows the order of calls; an executor knows how one is made.

    TorchExecutor(cell)       plain torch, on whatever device the cell and the window are
    zero.executor             the same through DeepSpeed's engine

Randomness is stateless: before each call the executor seeds torch's generators from where the call stands in the window. So the
replay draws the dropout masks of the rollout, and no random state is ever stored.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from memformer_dist.segment import Tensors


class Cell(Protocol):
    """What memory replay needs to know of a cell; cells/base.py has the whole contract."""

    carries_gradient: bool

    def __call__(self, part: str, segment: Tensors, tensors: Tensors, /) -> Any: ...


class Executor(Protocol):
    """Run the parts of a cell on segment `t` of a window. Shapes are those of cells/base.py."""

    def rollout(self, t: int, segment: Tensors, state: Tensors) -> Tensors:
        """`advance` without gradient -> the next state."""

    def advance(self, t: int, segment: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        """`advance` with gradient, in the rollout's random state -> features, the next state."""

    def readout(self, t: int, part: int, segment: Tensors, features: Tensors) -> Tensor:
        """`readout` over C segments stacked as lanes, or over a part of them -> nll [rows, S].

        `t` is the first of the segments, `part` the number of the part.
        """

    def backward(self, scalar: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a scalar into the parameters and leaves; `last` of the window."""

    def readout_scope(self) -> AbstractContextManager[object]:
        """Around a readout's forward and backward, all parts of it."""


class TorchExecutor:
    """Plain torch. Dropout is right by default: one seed per executor, so use one executor per window.

    Args:
        cell: what is run; called as cell(part, segment, tensors).
        seed: of the window's random draws; None draws one from torch's generator, so that windows differ and a program
            that calls torch.manual_seed repeats itself. The generators' own states are left as they were.
    """

    def __init__(self, cell: Cell, seed: int | None = None):
        self.cell = cell
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed

    def rollout(self, t: int, segment: Tensors, state: Tensors) -> Tensors:
        return self.call("advance", segment, state, t, 0)[1]

    def advance(self, t: int, segment: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        return self.call("advance", segment, state, t, 0)

    def readout(self, t: int, part: int, segment: Tensors, features: Tensors) -> Tensor:
        return self.call("readout", segment, features, t, part + 1)

    def backward(self, scalar: Tensor, *, last: bool) -> None:
        scalar.backward()

    def readout_scope(self) -> AbstractContextManager[object]:
        return nullcontext()

    def call(self, part: str, segment: Tensors, tensors: Tensors, *coordinates: int) -> Any:
        """One call of the cell, in the random state that belongs to (seed, *coordinates)."""
        device = segment[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            reseed(device, self.seed, *coordinates)
            return self.cell(part, segment, tensors)


def reseed(device: torch.device, *coordinates: int) -> None:
    """Set torch's random state, the CPU's and that of `device`, from integers that say where in the run we are.

    Not by torch.manual_seed: without a GPU that queues a call for CUDA's late start, with a stack trace, every time.
    """
    seed = int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
