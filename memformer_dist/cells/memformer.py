"""Memformer (Wu et al., arXiv 2010.06891v2): memory slots, read in every layer, written once per segment.

    layout "encoder_decoder", the paper's                   layout "decoder", of its Table 3

    memory M_{t-1}  context s_{t-1}                         memory M_{t-1}   segment s_t
        |   |           |                                       |   |            |
        |  read --> encoder (bidirectional)                     |  read --> causal layers --> head, loss of s_t
        |               |   |                                   |                |
        +---- write ----+  decoder (causal) on s_t              +---- write -----+
                |           --> head, loss of s_t                       |
               M_t                                                     M_t

Memory enters the layers by cross-attention, through a LayerNorm of its own. The writer mixes slots with tokens,

    m'_i = A_i [m_i ; x W_V],   A_i = softmax(m_i W_Q [m_i W_K ; x W_K]^T / (sqrt(K) tau))             slot attention
    m_i <- (m'_i + v_i) / ||m'_i + v_i||,   m_i(0) = v_i / ||v_i||             biased memory normalisation (forgetting)

A slot sees itself and the tokens, never another slot. A slot that keeps to itself loses what is perpendicular to
v_i by a factor 1 / (1 + ||v_i||) per segment, and so does its gradient: `bmn_init_norm` sets how far back a model learns
at first.

In the first segment of a document there is no context: the encoder reads a single BOS. Where the paper
leaves something open (`memory_norm` and the fields after it, positions, norms, biases, initialisation) the defaults are ours.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from memformer_dist.cells.layers import KeysValues, Linear, Stack, key_mask, within
from memformer_dist.cells.layers_cell import RewrittenCell
from memformer_dist.cells.layers_config import RewrittenConfig
from memformer_dist.segment import Segment


class MemformerConfig(RewrittenConfig):
    cell: Literal["memformer"] = Field(
        "memformer", description="Memformer: memory slots, read in every layer, written once per segment"
    )
    layout: Literal["encoder_decoder", "decoder"] = Field(
        "encoder_decoder",
        description="the paper's: an encoder reads the segment before; decoder, its Table 3: causal layers alone",
    )
    width: PositiveInt = Field(512, description="D, of the hidden states and of a slot")
    encoder_layers: NonNegativeInt = Field(
        4, description="layers that read the memory and the segment before; 0 in the layout decoder"
    )
    decoder_layers: PositiveInt = Field(16, description="causal layers that predict the segment")
    heads: PositiveInt = Field(8, description="H, in every attention and in the writer")
    slots: PositiveInt = Field(512, description="M, memory slots per lane")
    temperature: PositiveFloat = Field(0.25, description="tau of the write attention; sharper below 1")
    bmn_init_norm: PositiveFloat = Field(0.1, description="initial ||v||; memory decays by 1 / (1 + ||v||) per segment")

    memory_norm: bool = Field(
        True, description="a LayerNorm on the memory before it is read: slots have norm 1, tokens sqrt(D)"
    )
    write_first_segment: bool = Field(
        True, description="false: write from the second segment of a document on (layout encoder_decoder only)"
    )
    write_projection: bool = Field(False, description="an output projection after the write attention")
    silent_start: bool = Field(
        False,
        description="the output projections of all attentions to memory and encoder start at zero: a new model reads every"
        " segment as a Transformer without memory would, and learns to listen",
    )

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.layout == "encoder_decoder" and self.encoder_layers == 0:
            problems.append("encoder_layers: found 0, expected at least 1 in the layout encoder_decoder")
        if self.layout == "decoder" and self.encoder_layers > 0:
            problems.append(f"encoder_layers: found {self.encoder_layers}, expected 0 in the layout decoder")
        if self.layout == "decoder" and not self.write_first_segment:
            problems.append("write_first_segment: found false, expected true in the layout decoder")
        return problems

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "Memformer":
        return Memformer(self, vocab_size=vocab_size, bos_id=bos_id, segment_length=segment_length)


class MemformerState(NamedTuple):
    """Layout encoder_decoder."""

    memory: Tensor  # [B, M, D], unit vectors
    context: Tensor  # int64 [B, S], the segment before
    context_length: Tensor  # int64 [B], tokens of it that are not padding


class DecoderState(NamedTuple):
    memory: Tensor  # [B, M, D], unit vectors


class MemformerFeatures(NamedTuple):
    """What the writer and the readout read: the encoded context, or in the layout decoder the segment itself."""

    hidden: Tensor  # [B, S, D], after the final norm
    length: Tensor  # int64 [B], rows of it that are not padding


class MemformerCache(NamedTuple):
    """A segment under way."""

    memory: Tensor  # encoder_decoder: the next memory, already written; decoder: the one that is being read
    trail: Tensor  # what close needs of the segment: tokens int64 [B, S]; decoder: its hidden states [B, S, D]
    length: Tensor  # int64 [B], tokens so far
    source_length: Tensor  # int64 [B], rows of the source that are not padding
    past: KeysValues


class BiasedMemoryNormalisation(nn.Module):
    """m_i -> (m_i + v_i) / ||m_i + v_i||, with a learned v_i for each slot. Of zeros it makes the initial memory."""

    def __init__(self, slots: int, width: int, init_norm: float):
        super().__init__()
        self.bias = nn.Parameter(init_norm * F.normalize(torch.randn(slots, width), dim=-1))

    def forward(self, memory: Tensor) -> Tensor:
        """[B, M, D], in the state's precision, which autocast leaves alone here."""
        biased = memory + self.bias.to(memory.dtype)
        return biased / torch.linalg.vector_norm(biased, dim=-1, keepdim=True)


class SlotWriter(nn.Module):
    """Slot attention: from a memory and hidden states to the mixed memory, before normalisation.

    No dropout in here: a slot whose weight on itself is dropped is gone, with all it carried from earlier segments.
    """

    def __init__(self, config: MemformerConfig):
        super().__init__()
        width, std, bias = config.width, config.init_std, config.attention_bias
        self.heads = config.heads
        self.scale = 1 / (math.sqrt(width // config.heads) * config.temperature)
        self.query = Linear(width, width, std=std, bias=bias)
        self.key = Linear(width, width, std=std, bias=bias)  # of slots and tokens
        self.value = Linear(width, width, std=std, bias=bias)  # of tokens: a slot's own value is the slot as it is
        self.output = Linear(width, width, std=std, bias=bias) if config.write_projection else nn.Identity()

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, S, D] -> [B, H, S, K]

    def attention(self, memory: Tensor, hidden: Tensor, length: Tensor) -> Tensor:
        """-> weights [B, H, M, 1 + S]: of a slot on itself, then on each token. One softmax, so they sum to 1."""
        slots = memory.to(hidden.dtype)
        queries, own_keys, token_keys = (self._split(x) for x in (self.query(slots), self.key(slots), self.key(hidden)))
        own = (queries * own_keys).sum(-1, keepdim=True)  # the diagonal of the [M, M] block
        padding = ~within(length, hidden.shape[1])[:, None, None]
        tokens = (queries @ token_keys.mT).masked_fill(padding, -math.inf)
        return (self.scale * torch.cat([own, tokens], dim=-1).to(memory.dtype)).softmax(dim=-1)

    def forward(self, memory: Tensor, hidden: Tensor, length: Tensor) -> Tensor:
        """memory [B, M, D], hidden [B, S, D] of which `length` int64 [B] rows are real -> [B, M, D]."""
        weights = self.attention(memory, hidden, length)
        token_values = self._split(self.value(hidden))
        taken = weights[..., 1:].to(token_values.dtype) @ token_values
        mixed = weights[..., :1] * self._split(memory) + taken  # in the state's precision: keeping loses nothing
        return self.output(mixed.transpose(1, 2).flatten(2)).to(memory.dtype)


class Memformer(RewrittenCell[Any, MemformerFeatures]):
    memory_leaves = ("memory",)

    def __init__(self, config: MemformerConfig, *, vocab_size: int, bos_id: int, segment_length: int):
        super().__init__(config, vocab_size=vocab_size, segment_length=segment_length)
        self.bos_id = bos_id
        self.normalise = BiasedMemoryNormalisation(config.slots, config.width, config.bmn_init_norm)
        self.memory_norm = nn.LayerNorm(config.width) if config.memory_norm else nn.Identity()
        self.encoder = None
        if config.layout == "encoder_decoder":
            self.encoder = Stack(config.encoder_layers, config, causal=False, silent_source=config.silent_start)
        self.writer = SlotWriter(config)
        self.decoder = Stack(config.decoder_layers, config, causal=True, silent_source=config.silent_start)

    # ------------------------------------------------------------------------------------------------ the recurrence

    def empty_state(self, lanes: int, device: torch.device | None = None) -> MemformerState | DecoderState:
        memory = self.zeros(lanes, self.config.slots, self.config.width, device=device)
        if self.encoder is None:
            return DecoderState(memory)
        context = self.counts(lanes, self.segment_length, device=device)
        return MemformerState(memory, context, self.counts(lanes, device=device))

    def advance(self, segment: Segment, state):
        memory = self._start(state, segment.reset | segment.reset_memory)
        if self.encoder is None:
            hidden = self.decoder(self.embed(segment.tokens), self._source(memory))
            features = MemformerFeatures(hidden, segment.length)
            return features, DecoderState(self._write(memory, features))
        features = self._encode(state, memory, segment.reset)
        written = self._write(memory, features, segment.reset)
        return features, MemformerState(written, segment.tokens, segment.length)

    def hidden(self, segment: Segment, features: MemformerFeatures) -> Tensor:
        if self.encoder is None:
            return features.hidden
        mask = key_mask(features.length, self.segment_length)
        return self.decoder(self.embed(segment.tokens), features.hidden, source_mask=mask)

    @torch.no_grad()
    def diagnose(self, segment: Segment, state) -> dict[str, Tensor]:
        """Means over lanes and slots (and heads): how far a slot moves, the entropy of its write attention in nats, and its
        weight on itself."""
        features, written = self.advance(segment, state)
        memory = self._start(state, segment.reset | segment.reset_memory)
        weights = self.writer.attention(memory, *features)
        return {
            "write_norm": torch.linalg.vector_norm(written.memory - memory, dim=-1).mean(),
            "slot_entropy": torch.special.entr(weights).sum(-1).mean(),
            "self_share": weights[..., 0].mean(),
        }

    # ------------------------------------------------------------------------------------------------------- its parts

    def _start(self, state, fresh: Tensor) -> Tensor:
        """The memory that the segment reads: the state's, or m(0) on the lanes bool [B] that start afresh."""
        initial = self.normalise(torch.zeros_like(state.memory[:1]))
        memory = torch.where(fresh[:, None, None], initial, state.memory)
        return F.normalize(self.disturbed(memory), dim=-1) if self.is_disturbed else memory

    def _source(self, memory: Tensor) -> Tensor:
        """The memory as the layers read it, in the precision of the parameters (a bf16 model's state is float32)."""
        return self.memory_norm(memory.to(next(self.parameters()).dtype))

    def _encode(self, state: MemformerState, memory: Tensor, reset: Tensor) -> MemformerFeatures:
        context = torch.where(reset[:, None], self.bos_id, state.context)
        length = torch.where(reset, 1, state.context_length)  # so all but the first BOS are padding
        mask = key_mask(length, self.segment_length)
        assert self.encoder is not None
        return MemformerFeatures(self.encoder(self.embed(context), self._source(memory), mask=mask), length)

    def _write(self, memory: Tensor, features: MemformerFeatures, reset: Tensor | None = None) -> Tensor:
        """`reset` bool [B]: lanes whose first segment this is; None where that makes no difference."""
        written = self.normalise(self.writer(memory, *features))
        if self.config.write_first_segment or reset is None:
            return written
        return torch.where(reset[:, None, None], memory, written)

    # ------------------------------------------------------------------------------------------------------ generation

    @torch.no_grad()
    def open(self, state, reset: Tensor) -> MemformerCache:
        memory = self._start(state, reset)
        lanes = len(reset)
        length = torch.zeros(lanes, dtype=torch.int64, device=reset.device)
        if self.encoder is None:
            source = self._source(memory)
            trail = source.new_zeros(lanes, self.segment_length, self.config.width)
            past = self.decoder.open(source, self.segment_length)
            return MemformerCache(memory, trail, length, torch.full_like(length, self.config.slots), past)
        features = self._encode(state, memory, reset)
        written = self._write(memory, features, reset)
        past = self.decoder.open(features.hidden, self.segment_length)
        return MemformerCache(written, torch.zeros_like(state.context), length, features.length, past)

    @torch.no_grad()
    def extend(self, tokens: Tensor, cache: MemformerCache) -> tuple[Tensor, MemformerCache]:
        lanes, count = tokens.shape
        source_mask = key_mask(cache.source_length, cache.past.source_keys.shape[2])
        hidden = self.decoder.extend(self.embedding(tokens), cache.length, cache.past, source_mask=source_mask)
        rows = torch.arange(lanes, device=tokens.device)[:, None]
        columns = cache.length[:, None] + torch.arange(count, device=tokens.device)
        cache.trail[rows, columns] = tokens if self.encoder else hidden.to(cache.trail.dtype)
        return self.to_logits(hidden), cache._replace(length=cache.length + count)

    @torch.no_grad()
    def close(self, cache: MemformerCache) -> MemformerState | DecoderState:
        if self.encoder is None:
            return DecoderState(self._write(cache.memory, MemformerFeatures(cache.trail, cache.length)))
        return MemformerState(cache.memory, cache.trail, cache.length)
