"""Count the collectives that a rank issues: calls and bytes, by kind and dtype.

    with Collectives() as seen:
        engine.accumulate(...)
    seen.bytes("all_reduce", torch.float32), seen.calls("all_gather")

Every collective of torch.distributed ends in an operator of the namespace c10d, whatever function it was called by, and
a dispatch mode sees operators: also those of DeepSpeed's hooks, because the autograd engine takes the modes of the
thread that calls backward along into its own. Replacing the functions of torch.distributed would miss what DeepSpeed
took hold of when it was imported (its all_gather_into_tensor and reduce_scatter_tensor).

Bytes are those of the payload, the whole tensor that the ranks deal with: the input of all_reduce, reduce and
reduce_scatter, the output of all_gather, the tensor of broadcast. What a ring moves over the wire is proportional:
2 (W - 1) / W of it for all_reduce, (W - 1) / W for reduce_scatter and all_gather. A coalesced collective is one call.
Slow (every operator passes through Python): for counting, never around what is timed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operator -> (kind, argument that holds the payload).
OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "gather_": ("gather", 1),  # this rank's part
    "scatter_": ("scatter", 0),  # this rank's part
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "recv_any_source_": ("recv", 0),
}
WITHOUT_PAYLOAD = {"barrier": "barrier", "monitored_barrier_": "barrier"}


class Collective(NamedTuple):
    """One call on this rank."""

    kind: str  # of OPERATORS or WITHOUT_PAYLOAD
    dtype: torch.dtype | None  # None for a barrier
    bytes: int


class Collectives(TorchDispatchMode):
    """A context that records what this rank issues; `calls` and `bytes` add up, `record` is the list in order."""

    def __init__(self):
        super().__init__()
        self.record: list[Collective] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.record.append(_collective(func.overloadpacket.__name__, args))
        elif func.namespace == "_c10d_functional" and func is not torch.ops._c10d_functional.wait_tensor.default:
            raise NotImplementedError(f"{func}: functional collectives are not counted")
        return func(*args, **(kwargs or {}))

    def calls(self, kind: str | None = None, dtype: torch.dtype | None = None) -> int:
        """Collectives of a kind and dtype; None: of any."""
        return sum(1 for _ in self._matching(kind, dtype))

    def bytes(self, kind: str | None = None, dtype: torch.dtype | None = None) -> int:
        """Bytes of their payloads."""
        return sum(collective.bytes for collective in self._matching(kind, dtype))

    def clear(self) -> None:
        self.record.clear()

    def _matching(self, kind: str | None, dtype: torch.dtype | None) -> Iterator[Collective]:
        for collective in self.record:
            if kind in (None, collective.kind) and dtype in (None, collective.dtype):
                yield collective


def _collective(operator: str, arguments: tuple) -> Collective:
    if operator in WITHOUT_PAYLOAD:
        return Collective(WITHOUT_PAYLOAD[operator], None, 0)
    if operator not in OPERATORS:
        raise NotImplementedError(f"c10d::{operator}: not known to benchmarks/collectives.py, so it would go uncounted")
    kind, position = OPERATORS[operator]
    payload: list[Tensor] = tree_leaves(arguments[position])
    dtype = payload[0].dtype
    assert all(tensor.dtype == dtype for tensor in payload), f"{operator}: payload of several dtypes"
    return Collective(kind, dtype, sum(tensor.nbytes for tensor in payload))
