"""RecurrentCell: the contract between a model and what trains, evaluates or samples it. Start at docs/adding_a_cell.md.

A cell reads a document one segment of S tokens at a time and carries a state from each segment to the next. It works on
B lanes, independent documents side by side, and is cut in two where the recurrence ends:

    state, segment --advance--> features, next state       all that the next segment waits for
           segment, features --readout--> nll [B, S]       all that no later segment waits for: decoder, head, loss

Memory replay (mrbp/replay.py) runs `advance` alone, without gradient, through a whole window, and later recomputes it
segment by segment, last to first; `readout` runs once per segment, or once for several of them stacked as more lanes. Hence
the rules; check_cell (check.py) says which of them a cell breaks, and tests/test_cells.py checks all cells there are. What
breaks rules 1 and 5 in the rollout or the replay alone gives gradients of something else than the loss: a run stops where the
states of the two differ (mrbp.drift_limit).

1.  State, features and cache are NamedTuples of tensors whose first dimension is the lane; a state has at least one. Its
    floating-point leaves carry gradient across segments and are kept in float32 (float64 in a float64 model), whatever the
    autocast; its integer and bool leaves do not and may have any meaning. Lanes never see one another, nothing is written in
    place, and nothing but the state goes from one call to the next: no attribute in which a call leaves something for a later
    one, no buffer that a forward updates (running statistics, counters).
2.  A new document starts INSIDE advance: `where(segment.reset, learned initial state, state)`. Only so does the learned
    initial state get a gradient. `empty_state` therefore need not mean anything: a run's first segment resets every lane.
3.  Where `segment.reset_memory` is set, the state's `memory_leaves` are reset and the rest of it is kept: what is lost is what
    the memory is worth. Evaluation also exchanges these leaves between lanes. A cell without memory has none, ().
4.  Padding (positions from segment.length on) changes nothing, and a lane of length 0 computes anything but NaN.
5.  All randomness is torch's global one: it is seeded before each call, so that the replay repeats the rollout. No numpy, no
    random, no torch.Generator of the cell's own, no clock. In evaluation mode nothing is random.
6.  For ZeRO-3, which takes a module's parameters away outside its forward: a parameter is read in the forward of the module
    that owns it and nowhere else, modules are called, never their weights used from outside, and which modules run does not
    depend on data. No `.item()` and nothing else that waits for the device.
7.  A loss beside that of the labels (load balancing, say) is a leaf [B] of the features, each lane's own, which readout adds to
    nll as `penalty - penalty.detach()`: the values stay those of the labels, the gradient has it, on any number of ranks.
8.  Parameters are real, in float32, dense and of known size: complex weights are made of two real ones in the forward
    (torch.complex, torch.polar), and the trainer sees to lower precision. What is constant and no parameter, such as a random
    projection, is a persistent buffer: checkpoints hold those too.

Where the state carries no gradient (a cache of activations, no memory at all) the cell says `carries_gradient = False`: its
segments are then run first to last, once, without replay.

Generation goes through a second door, open / extend / close (prefill, decode, commit), which must give the numbers of evaluation
mode: feeding a segment to `extend` in any pieces yields the logits behind `readout`, and `close` the state that `advance`
hands on. The default recomputes the segment at every `extend`, which is right for every causal cell; a cell that is to be
fast overrides the three with a cache of keys and values.
"""

from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memformer_dist.section import Section
from memformer_dist.segment import IGNORE, Segment, Tensors

State = TypeVar("State", bound=Tensors)
Features = TypeVar("Features", bound=Tensors)
Cache = Any  # a NamedTuple of tensors, lane first, or of further NamedTuples


class CellConfig(Section):
    """The section `model` of a configuration: one subclass per kind of cell, which narrows `cell` to its name."""

    cell: str

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "RecurrentCell[Any, Any]":
        """A new cell, its weights drawn from torch's global generator."""
        raise NotImplementedError


class RecurrentCell(nn.Module, Generic[State, Features]):
    vocab_size: int
    segment_length: int  # S
    memory_leaves: ClassVar[tuple[str, ...]] = ()  # fields of the state that are its memory (rule 3)
    carries_gradient: bool = True  # whether a gradient can flow from a segment to the one before

    def forward(self, part: str, *arguments: Any) -> Any:
        """Run `advance`, `readout` or `diagnose`: the one entry, so that DeepSpeed's hooks see every call."""
        return getattr(self, part)(*arguments)

    def empty_state(self, lanes: int, device: torch.device | None = None) -> State:
        """Zeros in the shape of a state, made without reading a parameter; `device` defaults to the cell's own."""
        raise NotImplementedError

    def advance(self, segment: Segment, state: State) -> tuple[Features, State]:
        """Read what the next state needs of the segment. See rules 2 to 4."""
        raise NotImplementedError

    def logits(self, segment: Segment, features: Features) -> Tensor:
        """[B, S, vocabulary]: position i predicts the token behind it, from the tokens up to it alone."""
        raise NotImplementedError

    def readout(self, segment: Segment, features: Features) -> Tensor:
        """-> nll [B, S] in nats, float32 (float64 in a float64 model), 0 where the label is IGNORE."""
        return token_losses(self.logits(segment, features), segment.labels)

    def diagnose(self, segment: Segment, state: State) -> dict[str, Tensor]:
        """Scalars for the log, without gradient, by name."""
        return {}

    @torch.no_grad()
    def open(self, state: State, reset: Tensor) -> Cache:
        """Start a segment -> its cache; `reset` bool [B] says where a document starts. Without gradient, as the next two."""
        tokens = torch.zeros(len(reset), self.segment_length, dtype=torch.int64, device=reset.device)
        return OpenSegment(state, tokens, torch.zeros_like(tokens[:, 0]), reset)

    @torch.no_grad()
    def extend(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Append int64 [B, n] tokens, each lane at its own position, which must leave room for n.

        -> logits [B, n, vocabulary] of the tokens that follow, and the cache to continue with. The one passed in is used
        up: its tensors may be written in place.
        """
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        columns = cache.length[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        cache.tokens[rows, columns] = tokens
        cache = cache._replace(length=cache.length + tokens.shape[1])
        segment = cache.segment()
        features, _ = self.advance(segment, cache.state)
        return self.logits(segment, features)[rows, columns], cache

    @torch.no_grad()
    def close(self, cache: Cache) -> State:
        """End a segment, full or not: the state for the next one."""
        return self.advance(cache.segment(), cache.state)[1]


class OpenSegment(NamedTuple):
    """A segment in generation, of a cell that recomputes it."""

    state: Any  # before the segment
    tokens: Tensor  # int64 [B, S], those up to `length`
    length: Tensor  # int64 [B]
    reset: Tensor  # bool [B]

    def segment(self) -> Segment:
        no, zeros = torch.zeros_like(self.reset), torch.zeros_like(self.length)
        return Segment(self.tokens, torch.full_like(self.tokens, IGNORE), self.length, self.reset, no, zeros, zeros)


def persistent_buffers(cell: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a cell besides its parameters, by name."""
    kept = cell.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in cell.named_buffers() if name in kept}


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [B, S, vocabulary] at labels int64 [B, S] -> [B, S] in nats, in at least float32, 0 at IGNORE."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return nll.view_as(labels)
