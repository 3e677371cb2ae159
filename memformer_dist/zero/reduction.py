"""When the gradients of a window are averaged over the ranks, in ways that DeepSpeed 0.19.8 was measured to get right.

    "window"    every backward adds to one full local gradient, which is reduced once, however many segments and lane groups
                there are: the bytes of plain data parallelism
    "segment"   ZeRO 2 and 3: the gradient of every backward is reduced and accumulated, in fp32, by the rank that owns it:
                no rank holds a full gradient, at the price of one reduction per backward

Under "window", ZeRO 1-3 use `coalesce_grad_reduction()`, which reduces when its block ends. ZeRO 0 does not support it: the
accumulation boundary is held off there, and the reduction is requested explicitly. With `overlap_comm: true` the last backward
(that of the first segment's advance) runs after the block instead of inside it: gradients that it does not touch, which are
all of the readout's, start to be reduced before it, the others as they become final, in DeepSpeed's buckets. With overlap, at
ZeRO-3 and under "segment", all ranks must run the same modules (rule 6 of cells/base.py).

Every trained parameter must have a gradient when the reduction comes, if only zeros. DeepSpeed skips a parameter that has none:
ZeRO-3 would keep the previous step's gradient, and if another rank has one, the ranks would reduce different things.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memformer_dist.mrbp.settings import Reduce


class Reduction:
    """Averages the gradients of `engine`, which is DeepSpeed's."""

    def __init__(self, engine, reduce: Reduce):
        self.engine, self.optimizer, self.reduce = engine, engine.optimizer, reduce
        self.stage = engine.zero_optimization_stage()
        self.parameters: list[Any] = [p for p in engine.module.parameters() if p.requires_grad]
        self.overlaps = reduce == "window" and self.stage > 0 and bool(engine.zero_overlap_comm())

    @contextlib.contextmanager
    def of_a_step(self) -> Iterator[None]:
        """The context of all backwards of a step. When it ends, gradients are averaged over the ranks."""
        if self.reduce == "segment":
            if self.stage == 2:
                self._forget_offloaded()
            else:
                # Otherwise the backwards of the first forward overwrite the buffer, and leave stale what they do not reach.
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
        """Accumulate the gradient of a scalar. `is_last`: it is the last backward of the step."""
        if self.reduce == "segment" and self.stage == 2:
            self.optimizer.setup_buckets()  # missing after a backward that reached no parameter
        if self.overlaps and is_last:
            self._start_others(scalar)
        self.engine.backward(scalar, scale_wrt_gas=False)

    def _forget_offloaded(self) -> None:
        """Zero the gradients of the step before that ZeRO-2 with offload_optimizer has on the host.

        DeepSpeed starts a sum afresh in the first backward of a step alone. A parameter that a later one is the first to
        reach, as all of advance's are, would be added to the sum of the step before, and one that none reaches would keep it.
        """
        if self.optimizer.cpu_offload:
            self.optimizer._wait_for_offload_copies()
            for gradient in self.optimizer.accumulated_grads_in_cpu.values():
                gradient.zero_()
            for partition in self.optimizer.single_partition_of_fp32_groups:
                partition.grad.zero_()
            for group in self.optimizer.averaged_gradients:  # of bf16 parameters; a step that was skipped leaves them
                self.optimizer.averaged_gradients[group] = None

    def _start_others(self, scalar: Tensor) -> None:
        """Start to reduce the gradients that the backward of `scalar` does not touch; its own follow without coalescing."""
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
        """Do what `coalesce_grad_reduction()` does at its start; at its end it would reduce everything at once."""
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
    """The ids of the leaves to which a backward of `scalar` gives a gradient."""
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
