"""Segment: what the data hands to a cell at one tick, a row of S tokens for each of B lanes.

A lane is an endless sequence of documents cut into segments; rows of one lane at consecutive ticks are contiguous text until
`reset` says that a new document starts. Labels cross segment boundaries, so that every token but a document's first is
predicted exactly once, and the end of the document (EOS) as well.

Segments, states and features are NamedTuples of tensors whose first dimension is the lane: DeepSpeed's hooks rebuild tuples
of tensors, and change dicts in place.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

IGNORE = -100  # the label of padding and of positions that the corpus masks out of the loss


class Tensors(Protocol):
    """Any NamedTuple of tensors whose first dimension is the lane."""

    @property
    def _fields(self) -> tuple[str, ...]: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...
    @property
    def _make(self) -> Any: ...  # mypy's idea of the method has one argument too many
    @property
    def _replace(self) -> Any: ...
    def _asdict(self) -> dict[str, Any]: ...


Some = TypeVar("Some", bound=Tensors)


class Segment(NamedTuple):
    """One tick of B lanes. `labels[i] = document[offset + i + 1]`; the last label of a document is EOS."""

    tokens: Tensor  # int64 [B, S], padded with 0
    labels: Tensor  # int64 [B, S], IGNORE where nothing is to be predicted
    length: Tensor  # int64 [B], tokens that are not padding; 0 only on a lane that has run dry
    reset: Tensor  # bool [B], a new document starts here
    reset_memory: Tensor  # bool [B], the memory alone is reset, the rest of the state kept (ablations)
    document: Tensor  # int64 [B], the document's number, -1 on a lane that has run dry
    offset: Tensor  # int64 [B], the position of the row's first token in its document

    def to(self, device: torch.device) -> "Segment":
        return Segment(*(column.to(device, non_blocking=True) for column in self))

    def pin_memory(self) -> "Segment":
        """A copy in page-locked memory, from which `to` does not block."""
        return Segment(*(column.pin_memory() for column in self))


def concatenate(parts: Sequence[Some]) -> Some:
    """The lanes of several NamedTuples of one kind in one, in order; segments must have equal S."""
    return parts[0]._make(map(torch.cat, zip(*parts)))


def select_rows(tensors: Some, rows: slice | Tensor) -> Some:
    """The same of some of the lanes."""
    return tensors._make(column[rows] for column in tensors)


def differentiable(tensor: Tensor) -> bool:
    """Whether a gradient can flow through it: floating-point and complex leaves, not integers and bools."""
    return tensor.is_floating_point() or tensor.is_complex()
