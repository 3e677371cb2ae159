"""Recurrent Memory Transformer (Bulatov et al., arXiv 2207.06881): memory is tokens, read before a segment, written after it.

    positions   0 ... M-1      M ... M+S-1      M+S ... 2M+S-1
                M_{t-1}      | segment s_t |    M_{t-1}
                read tokens  |             |    write tokens
                    |               |               |
                +------ one stack of layers, masked as below ------+
                                    |               |
                               head, loss          M_t

With h = Transformer(.) of all layers and their norm, and ; for side by side (Section 3.2 of the paper):

    [read ; x ; write] = h([M_{t-1} ; emb(s_t) ; M_{t-1}])        (1)
    M_t = write                                                   (2)
    p(s_t) = softmax(x W)                                         (3)

Read and write tokens start as the same vectors. Read tokens see one another; a token sees them and the tokens up to itself; write
tokens see everything, and one another, but no padding. M_0 is learned. Nothing else goes from a segment to the next.

A memory has the norm of what the last norm makes, sqrt(D), and enters the residual stream as it is. So must what the layers
add to it: with `init_std` far below D^-1/2 a write token stays what was read, and nothing of a segment is written.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from memformer_dist.cells.layers import KeysValues, LearnedStart, Stack, segment_mask, within
from memformer_dist.cells.layers_cell import RewrittenCell
from memformer_dist.cells.layers_config import RewrittenConfig
from memformer_dist.segment import Segment


class RmtConfig(RewrittenConfig):
    cell: Literal["rmt"] = Field(
        "rmt", description="Recurrent Memory Transformer: memory tokens, read before a segment, written after it"
    )
    layers: PositiveInt = Field(12, description="layers, over read tokens, segment and write tokens")
    slots: PositiveInt = Field(16, description="M, memory tokens; each stands before a segment and after it")
    init_std: PositiveFloat = Field(
        0.044,
        description="as in the other cells, but about width^-0.5, or nothing is written: a memory token has norm"
        " sqrt(width)",
    )

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "Rmt":
        return Rmt(self, vocab_size=vocab_size, segment_length=segment_length)


class RmtState(NamedTuple):
    memory: Tensor  # [B, M, D]


class RmtFeatures(NamedTuple):
    hidden: Tensor  # [B, S, D], after the final norm


class RmtCache(NamedTuple):
    """A segment under way."""

    memory: Tensor  # [B, M, D], what it reads
    length: Tensor  # int64 [B], tokens so far
    past: KeysValues  # of read tokens, segment and write tokens


class Rmt(RewrittenCell[RmtState, RmtFeatures]):
    memory_leaves = ("memory",)

    def __init__(self, config: RmtConfig, *, vocab_size: int, segment_length: int):
        super().__init__(config, vocab_size=vocab_size, segment_length=segment_length)
        self.start = LearnedStart(config.slots, config.width, std=1.0)  # the size of what a norm makes
        self.layers = Stack(config.layers, config, causal=False, has_source=False)

    def empty_state(self, lanes: int, device: torch.device | None = None) -> RmtState:
        return RmtState(self.zeros(lanes, self.config.slots, self.config.width, device=device))

    def advance(self, segment: Segment, state: RmtState) -> tuple[RmtFeatures, RmtState]:
        memory = self.disturbed(self.start(state.memory, segment.reset | segment.reset_memory))
        tokens = self.embed(segment.tokens)
        slots, size = self.config.slots, self.segment_length
        read = memory.to(tokens.dtype)
        mask = segment_mask(segment.length, size, before=slots, after=slots)
        hidden = self.layers(torch.cat([read, tokens, read], dim=1), mask=mask)
        _, of_tokens, written = hidden.split((slots, size, slots), dim=1)
        return RmtFeatures(of_tokens), RmtState(written.to(memory.dtype))

    def hidden(self, segment: Segment, features: RmtFeatures) -> Tensor:
        return features.hidden

    # ------------------------------------------------------------------------------------------------------ generation

    @torch.no_grad()
    def open(self, state: RmtState, reset: Tensor) -> RmtCache:
        memory = self.start(state.memory, reset)
        length = torch.zeros(len(reset), dtype=torch.int64, device=reset.device)
        slots, size = self.config.slots, self.segment_length
        read = self._as_tokens(memory)
        past = self.layers.open(read, slots + size + slots)
        seen = within(torch.full_like(length, slots), slots + size + slots)
        self.layers.extend(read, length, past, mask=seen[:, None, None])
        return RmtCache(memory, length, past)

    @torch.no_grad()
    def extend(self, tokens: Tensor, cache: RmtCache) -> tuple[Tensor, RmtCache]:
        hidden = self.layers.extend(self.embedding(tokens), self.config.slots + cache.length, cache.past)
        return self.to_logits(hidden), cache._replace(length=cache.length + tokens.shape[1])

    @torch.no_grad()
    def close(self, cache: RmtCache) -> RmtState:
        slots, size = self.config.slots, self.segment_length
        first = torch.full_like(cache.length, slots + size)  # also where the segment is short
        seen = within(slots + cache.length, slots + size + slots) | ~within(first, slots + size + slots)
        written = self.layers.extend(self._as_tokens(cache.memory), first, cache.past, mask=seen[:, None, None])
        return RmtState(written.to(cache.memory.dtype))

    def _as_tokens(self, memory: Tensor) -> Tensor:
        return memory.to(next(self.parameters()).dtype)
