"""When the gradients of a window are averaged over the ranks: the ways that DeepSpeed 0.19.8 was measured to do right.

    "window"    every backward adds to one full local gradient, which is reduced once, whatever the number of segments and
                lane groups: the bytes of plain data parallelism
    "segment"   ZeRO 2 and 3: every backward's gradient is reduced and added up, in fp32, where its owner keeps it: no
                full gradient anywhere, for one reduction a backward

Of "window", ZeRO 1-3 go through `coalesce_grad_reduction()`, which reduces when the block ends. ZeRO 0 does not support it:
there the accumulation boundary is held off and the reduction asked for by hand. With `overlap_comm: true`, the last
backward (of the first segment's advance) runs after the block instead of in it: what it does not touch, all that belongs
to the readout, sets out before it, and the rest as it becomes final, in DeepSpeed's buckets. There, at ZeRO-3 and under
"segment", all ranks must run the same modules (rule 6 of cells/base.py).

Every parameter must have a gradient when the reduction comes, if only zeros. DeepSpeed passes over one that has none: at ZeRO-3
it would keep the step's before, and where another rank has one, the ranks would reduce different things.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memformer_dist.mrbp.settings import Reduce


class Reduction:
    """Of the gradients of `engine`, DeepSpeed's."""

    def __init__(self, engine, reduce: Reduce):
        self.engine, self.optimizer, self.reduce = engine, engine.optimizer, reduce
        self.stage = engine.zero_optimization_stage()
        self.parameters: list[Any] = list(engine.module.parameters())
        self.overlaps = reduce == "window" and self.stage > 0 and bool(engine.zero_overlap_comm())

    @contextlib.contextmanager
    def of_a_step(self) -> Iterator[None]:
        """Around all backwards of a step. The average over the ranks is there when it ends."""
        if self.reduce == "segment":
            if self.stage == 3:
                # The first forward's backwards would overwrite what is there, and leave what they do not reach as it was.
                self.optimizer.grad_partitions_flat_buffer.zero_()
                self.optimizer.micro_step_id = 1
            yield
        elif self.overlaps:
            self._coalesce(True)
            yield
        elif self.stage > 0:
            with self.engine.coalesce_grad_reduction():
                yield
                self._fill_in_zeros(self.parameters)
        else:
            self.engine.set_gradient_accumulation_boundary(False)
            yield
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()

    def backward(self, scalar: Tensor, *, is_last: bool) -> None:
        """Accumulate the gradient of a scalar; `is_last` of the step."""
        if self.reduce == "segment" and self.stage == 2:
            self.optimizer.setup_buckets()  # DeepSpeed misses them after a backward that reaches no parameter
        if self.overlaps and is_last:
            self._set_out(scalar)
        self.engine.backward(scalar, scale_wrt_gas=False)

    def _set_out(self, scalar: Tensor) -> None:
        """Reduce the gradients that the backward of `scalar` leaves alone; its own then go as without coalescing."""
        self._coalesce(False)
        touched = parameters_of(scalar)
        final = [parameter for parameter in self.parameters if id(parameter) not in touched]
        self._fill_in_zeros(final)
        self.optimizer.set_gradient_accumulation_boundary(True)
        if self.stage < 3:
            self.optimizer.setup_buckets()
        groups = self.optimizer.fp16_groups if self.stage == 3 else self.optimizer.bit16_groups
        for number, group in enumerate(groups):
            for parameter in group:
                if id(parameter) not in touched:
                    where = () if self.stage == 3 else (number,)
                    self.optimizer.reduce_ready_partitions_and_remove_grads(parameter, *where)

    def _coalesce(self, on: bool) -> None:
        """As `coalesce_grad_reduction()` does, which would reduce all at once when it ends."""
        self.optimizer._coalesce_grad_reduction = self.engine.inside_no_sync_ctxt = on

    def _fill_in_zeros(self, parameters: list[Any]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                present = parameter.data  # at ZeRO-3 it may be empty, and torch wants a gradient of the same shape
                shape = parameter.ds_shape if self.stage == 3 else parameter.shape
                parameter.data = torch.zeros(shape, dtype=present.dtype, device=present.device)
                parameter.grad = torch.zeros_like(parameter)
                parameter.data = present


def parameters_of(scalar: Tensor) -> set[int]:
    """Identities of the leaves that a backward of `scalar` gives a gradient to."""
    leaves, seen, stack = set(), set(), [scalar.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        stack += [following for following, _ in node.next_functions]
    return leaves
