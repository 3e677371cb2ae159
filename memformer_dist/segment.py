"""Segment: what the data hands to a cell at one tick, a row of S tokens for each of some lanes.

A lane is an endless sequence of documents cut into segments; rows of one lane at consecutive ticks are contiguous text until
`reset` says that a new document starts. Labels cross segment boundaries, so that every token but a document's first is
predicted exactly once, and the end of the document (EOS) as well.

A NamedTuple, because DeepSpeed's hooks rebuild tuples of tensors and change dicts in place.
"""

from typing import NamedTuple, Sequence, TypeVar

import torch
from torch import Tensor

Tensors = TypeVar("Tensors", bound=NamedTuple)
IGNORE = -100  # the label of padding and of positions that the corpus masks out of the loss


class Segment(NamedTuple):
    """One tick of L lanes. `labels[i] = document[offset + i + 1]`; the last label of a document is EOS."""

    tokens: Tensor  # int64 [L, S], padded with 0
    labels: Tensor  # int64 [L, S], IGNORE where nothing is to be predicted
    length: Tensor  # int64 [L], tokens that are not padding; 0 only on a lane that has run dry
    reset: Tensor  # bool [L], a new document starts here
    reset_memory: Tensor  # bool [L], the memory alone is reset, the rest of the state kept (ablations)
    document: Tensor  # int64 [L], the document's number, -1 on a lane that has run dry
    offset: Tensor  # int64 [L], the position of the row's first token in its document

    def to(self, device: torch.device) -> "Segment":
        return Segment(*(column.to(device, non_blocking=True) for column in self))

    def pin_memory(self) -> "Segment":
        """A copy in page-locked memory, from which `to` does not block."""
        return Segment(*(column.pin_memory() for column in self))


def concatenate(segments: Sequence[Tensors]) -> Tensors:
    """Several segments of equal length S as one of more rows. Any NamedTuple of lane-first tensors will do."""
    return segments[0]._make(map(torch.cat, zip(*segments)))


def select_rows(tensors: Tensors, rows: slice | Tensor) -> Tensors:
    """The same of some of the lanes. Any NamedTuple of lane-first tensors will do."""
    return tensors._make(column[rows] for column in tensors)
