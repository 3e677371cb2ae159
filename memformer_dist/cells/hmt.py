"""Hierarchical Memory Transformer (He et al., arXiv 2405.06067) in a causal form: one vector per segment, recalled by attention.

    tail c_t of the text before s_t                        latest N memory embeddings m_{t-1}, m_{t-2}, ...
        |                                                        |
    backbone([T ; c_t ; T]) -- summary S_t -- asks --> recall ---+
                                                         |
                                                        P_t
                                                         |
    backbone([P_t ; c_t ; s_t ; P_t]) --> head, loss of s_t;  last row --> m_t

With c_t the last k = `sensory_tokens` tokens before the segment, T and e learned vectors, W_q and W_k of size D x D:

    S_t = last row of h([T ; emb(c_t) ; T])                                                       (1)  summary
    P_t = softmax(S_t W_q (C_t W_k)^T / sqrt(D)) C_t,   C_t = [e ; m_{t-1} ; ... ; m_{t-N}]       (2)  recall
    [. ; . ; x ; m_t] = h([P_t ; emb(c_t) ; emb(s_t) ; P_t])                                      (3)
    p(s_t) = softmax(x W)                                                                         (4)

h is one causal stack with its norm, the same in (1) and (3). The last row of (3) sees everything but padding.

As printed, S_t is made of the first half of s_t itself, and P_t stands before all of s_t: every token would see half a segment
that it has to predict. Here the summary is that of the tail, which costs less as well. e stands among the memory embeddings
always, not only where there are none: a softmax over nothing is no number.

m_t has norm sqrt(D), as all that the last norm makes, and enters the residual stream as it is: `init_std` as in rmt.py.
"""

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from memformer_dist.cells.layers import LearnedTokens, Linear, Stack, segment_mask, within
from memformer_dist.cells.layers_cell import RewrittenCell
from memformer_dist.cells.layers_config import RewrittenConfig
from memformer_dist.segment import Segment


class HmtConfig(RewrittenConfig):
    cell: Literal["hmt"] = Field(
        "hmt", description="Hierarchical Memory Transformer: one memory embedding per segment, recalled by attention"
    )
    layers: PositiveInt = Field(12, description="causal layers")
    slots: PositiveInt = Field(300, description="N, memory embeddings that are kept: those of the latest segments")
    sensory_tokens: PositiveInt = Field(
        32, description="k, tokens before a segment that are read again with it, and of which the recall is made"
    )
    init_std: PositiveFloat = Field(
        0.044, description="as in the other cells, but about width^-0.5: a memory embedding has norm sqrt(width)"
    )

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "Hmt":
        return Hmt(self, vocab_size=vocab_size, segment_length=segment_length)


class HmtState(NamedTuple):
    memory: Tensor  # [B, N, D], written in turns: the embedding of segment t is row t mod N
    written: Tensor  # int64 [B], segments since the memory was empty
    context: Tensor  # int64 [B, k], the last tokens, at the end of the row
    context_length: Tensor  # int64 [B], how many there are


class HmtFeatures(NamedTuple):
    hidden: Tensor  # [B, S, D], after the final norm


class Recall(nn.Module):
    """(2): from a summary [B, D] and the first `held` int64 [B] rows of a memory [B, N, D] to a vector [B, D]."""

    def __init__(self, config: HmtConfig):
        super().__init__()
        self.query = Linear(config.width, config.width, std=config.init_std)
        self.key = Linear(config.width, config.width, std=config.init_std)
        self.start = LearnedTokens(1, config.width, std=1.0)

    def forward(self, summary: Tensor, memory: Tensor, held: Tensor) -> Tensor:
        candidates = self.start(memory, before=True)
        scores = (self.key(candidates.to(summary.dtype)) @ self.query(summary)[..., None]).squeeze(-1)
        absent = ~within(1 + held, candidates.shape[1])
        weights = (scores.to(memory.dtype) / math.sqrt(memory.shape[-1])).masked_fill(absent, -math.inf).softmax(-1)
        return (weights[:, None] @ candidates).squeeze(1)


class Hmt(RewrittenCell[HmtState, HmtFeatures]):
    memory_leaves = ("memory", "written")

    def __init__(self, config: HmtConfig, *, vocab_size: int, segment_length: int):
        super().__init__(config, vocab_size=vocab_size, segment_length=segment_length)
        self.summary = LearnedTokens(1, config.width, std=config.init_std)
        self.recall = Recall(config)
        self.layers = Stack(config.layers, config, causal=False, has_source=False)  # masked by _mask

    def empty_state(self, lanes: int, device: torch.device | None = None) -> HmtState:
        memory = self.zeros(lanes, self.config.slots, self.config.width, device=device)
        context = self.counts(lanes, self.config.sensory_tokens, device=device)
        return HmtState(memory, self.counts(lanes, device=device), context, self.counts(lanes, device=device))

    def advance(self, segment: Segment, state: HmtState) -> tuple[HmtFeatures, HmtState]:
        fresh, size, sensory = segment.reset | segment.reset_memory, self.segment_length, self.config.sensory_tokens
        memory = state.memory.masked_fill(fresh[:, None, None], 0)
        written = state.written.masked_fill(fresh, 0)
        context = state.context.masked_fill(segment.reset[:, None], 0)
        context_length = state.context_length.masked_fill(segment.reset, 0)

        tail = self.embed(context)
        summary = self.layers(
            self.summary(tail, before=True, after=True), mask=self._mask(context_length, torch.zeros_like(written), 0)
        )
        recalled = self.recall(summary[:, -1], self.disturbed(memory), written.clamp(max=self.config.slots))
        ends = recalled.to(tail.dtype)[:, None]
        hidden = self.layers(
            torch.cat([ends, tail, self.embed(segment.tokens), ends], dim=1),
            mask=self._mask(context_length, segment.length, size),
        )
        _, of_tokens, embedding = hidden.split((1 + sensory, size, 1), dim=1)

        turn = torch.arange(self.config.slots, device=memory.device) == (written % self.config.slots)[:, None]
        text = torch.cat([context, segment.tokens], dim=1)
        last = segment.length[:, None] + torch.arange(sensory, device=text.device)  # before any padding
        after = HmtState(
            torch.where(turn[..., None], embedding.to(memory.dtype), memory),
            written + 1,
            text.gather(1, last),
            (context_length + segment.length).clamp(max=sensory),
        )
        return HmtFeatures(of_tokens), after

    def hidden(self, segment: Segment, features: HmtFeatures) -> Tensor:
        return features.hidden

    def _mask(self, context_length: Tensor, length: Tensor, size: int) -> Tensor:
        """[B, 1, T, T] of one vector, the tail, a segment of `size` tokens, one vector; padding is hidden at both ends."""
        sensory = self.config.sensory_tokens
        mask = segment_mask(sensory + length, sensory + size, before=1, after=1)
        positions = torch.arange(mask.shape[-1], device=length.device)
        absent = (positions >= 1) & (positions < 1 + sensory - context_length[:, None])
        return mask & ~absent[:, None, None]
