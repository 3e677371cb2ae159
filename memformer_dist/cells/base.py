"""RecurrentCell: the contract between a model and what trains, evaluates or samples it. Start here to add a cell.

A cell reads a document one segment of S tokens at a time and carries a state from each segment to the next. It
works on L lanes, independent documents side by side, and is cut in two where the recurrence ends:

    state, segment --advance--> features, next state       all that the next segment waits for
           segment, features --readout--> nll [L, S]       all that no later segment waits for: decoder, head, loss

Memory replay (mrbp.py) runs `advance` alone, without gradient, through a whole window, and later recomputes it
segment by segment, last to first; `readout` runs once per segment, or once for several of them stacked as more
lanes. Hence the rules:

1.  State, features and cache are NamedTuples of tensors whose first dimension is the lane. A state's floating-point
    leaves carry gradient across segments and are kept in float32 (float64 in a float64 model), whatever the
    autocast; its integer leaves do not and may have any meaning. Lanes never see one another.
2.  A new document starts INSIDE advance: `where(segment.reset, learned initial state, state)`. Only so does the
    learned initial state get a gradient. `empty_state` therefore need not mean anything: a run's first tick resets
    every lane.
3.  Where `segment.reset_memory` is set, the memory is reset and the rest of the state kept: what is lost is the memory's
    worth.
4.  Padding (positions from segment.length on) changes nothing, and a lane of length 0 computes anything but NaN.
5.  All randomness is torch's global one: the engine seeds it before each call, so that the replay repeats the
    rollout.
6.  For ZeRO-3, which takes a module's parameters away outside its forward: a parameter is read in the forward of
    the module that owns it and nowhere else, modules are called, never their weights used from outside, and which
    modules run does not depend on data. No `.item()` and nothing else that waits for the device.

Generation goes through a second door, open/extend/close, which must give the numbers of evaluation mode: feeding a
segment to `extend` in any pieces yields the logits behind `readout`, and `close` the state that `advance` hands on.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memformer_dist.segment import Segment

State = Features = Cache = NamedTuple


class RecurrentCell(nn.Module):
    vocab_size: int
    segment_length: int  # S
    memory_leaves: tuple[str, ...] = ("memory",)  # of the state: what reset_memory resets; () for a cell without memory

    def forward(self, part: str, *arguments):
        """Run `advance`, `readout` or `diagnose`: the one entry, so that DeepSpeed's hooks see every call."""
        return getattr(self, part)(*arguments)

    def empty_state(self, lanes: int, device: torch.device | None = None) -> State:
        """Zeros in the shape of a state, made without reading a parameter; `device` defaults to the cell's own."""
        raise NotImplementedError

    def advance(self, segment: Segment, state: State) -> tuple[Features, State]:
        """Read what the next state needs of the segment. See rules 2 to 4."""
        raise NotImplementedError

    def readout(self, segment: Segment, features: Features) -> Tensor:
        """-> nll [L, S] in nats, float32 (float64 in a float64 model), 0 where the label is IGNORE."""
        raise NotImplementedError

    def diagnose(self, segment: Segment, state: State) -> dict[str, Tensor]:
        """Scalars for the log, without gradient, by name."""
        return {}

    def open(self, state: State, reset: Tensor) -> Cache:
        """Start a segment; `reset` bool [L] says where a document starts. Without gradient, as extend and close are."""
        raise NotImplementedError

    def extend(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Append int64 [L, n] tokens, each lane at its own position, which must leave room for n.

        -> logits [L, n, vocabulary] of the tokens that follow, and the cache to go on with. The one passed in is used
        up: its tensors may be written in place.
        """
        raise NotImplementedError

    def close(self, cache: Cache) -> State:
        """End a segment, full or not: the state for the next one."""
        raise NotImplementedError
