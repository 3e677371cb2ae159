"""Transformer-XL (Dai et al., arXiv 1901.02860): every layer also attends to what it read before, without gradient.

    segment s_t --> embedding --> layer --> ... --> layer --> head, loss of s_t
                                    |                 |
                                  memory            memory       the layer's own inputs at the M positions before s_t

With SG(.) for "no gradient", section 3.2 for the recurrence and 3.3 for relative positions, in every layer and head:

    h~ = [SG(m) ; h]         q = LN(h) W_q,   k = LN(h~) W_k,   v = LN(h~) W_v
    A_ij = q_i . k_j  +  q_i . R_{i-j} W_R  +  b . k_j  +  c . R_{i-j} W_R           the paper's terms (a) (b) (c) (d)
    h <- h + softmax_{j <= i}(A_i / sqrt(K)) v W_o,   h <- h + FFN(LN(h)),   m <- the last M rows of h~

R_d is the sinusoid of a distance d. b and c (the paper's u and v) are vectors of every layer and head. Norms come before
the branches, as in all cells here; the paper's come after. While M reaches back to a document's start, its logits are
those of causal attention over the whole of it, wherever it was cut.

The memory is right-aligned: its last row is the position before the segment, however short the segments before were, and
`filled` counts its rows. So distances are the same on all lanes.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from memformer_dist.cells.layers import ROTARY_BASE, BranchOutput, FeedForward, Linear
from memformer_dist.cells.layers_cell import LayersCell
from memformer_dist.cells.layers_config import LayersConfig
from memformer_dist.cells.recomputation import recomputed
from memformer_dist.segment import Segment, Tensors

State = TypeVar("State", bound=Tensors)


class RelativeConfig(LayersConfig):
    """What cells with relative positions have in common."""

    positions: Literal["relative"] = Field(  # type: ignore[assignment]  # those of the other cells are of no use here
        "relative", description="distances between query and key, as sinusoids in every layer"
    )
    memory_length: PositiveInt = Field(512, description="M, positions before the segment that every layer attends to")

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.width % 2:
            problems.append(f"width: found {self.width}, expected an even number (a sine and a cosine per frequency)")
        return problems


class TransformerXLConfig(RelativeConfig):
    cell: Literal["transformer_xl"] = Field(
        "transformer_xl", description="Transformer-XL: layers attend to their own inputs at the positions before"
    )
    layers: PositiveInt = Field(12, description="causal layers")

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "TransformerXL":
        return TransformerXL(self, vocab_size=vocab_size, segment_length=segment_length)


class TransformerXLState(NamedTuple):
    memory: Tensor  # [B, layers, M, D], the inputs of every layer; zeros where there is no position
    filled: Tensor  # int64 [B], rows of it that are positions


class TransformerXLFeatures(NamedTuple):
    hidden: Tensor  # [B, S, D], behind the last layer


class TransformerXLCache(NamedTuple):
    """A segment under way, with room for T = M + S positions."""

    inputs: Tensor  # [B, layers, T, D]
    filled: Tensor  # int64 [B], positions before the segment
    length: Tensor  # int64 [B], positions of the segment so far
    keys: Tensor  # [B, layers, T, H, K]
    values: Tensor  # [B, layers, T, H, K]
    distance_keys: Tensor  # [B, layers, T, H, K]


class Sight(NamedTuple):
    """Which of T keys the S queries see."""

    distance: Tensor  # int64 [B or 1, S, T], between query and key; anything where the key is not seen
    seen: Tensor  # bool [B, S, T]


class HeadBias(nn.Module):
    """Adds a learned vector to each head. A module of its own, as ZeRO-3 gathers modules."""

    def __init__(self, config: LayersConfig):
        super().__init__()
        self.bias = nn.Parameter(config.init_std * torch.randn(config.heads, config.head_size))

    def forward(self, queries: Tensor) -> Tensor:
        return queries + self.bias


class RelativeAttention(nn.Module):
    def __init__(self, config: LayersConfig, output_std: float):
        super().__init__()
        width, std, bias = config.width, config.init_std, config.attention_bias
        self.heads = config.heads
        self.query = Linear(width, width, std=std, bias=bias)
        self.key_value = Linear(width, 2 * width, std=std, bias=bias)
        self.distance = Linear(width, width, std=std)  # W_R
        self.content_bias = HeadBias(config)  # b
        self.distance_bias = HeadBias(config)  # c
        self.output = BranchOutput(width, width, std=output_std, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def queries(self, hidden: Tensor) -> Tensor:
        return self.query(hidden).unflatten(-1, (self.heads, -1))

    def keys_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.key_value(hidden).unflatten(-1, (2, self.heads, -1)).unbind(2)

    def distance_keys(self, waves: Tensor) -> Tensor:
        """R [T, D] of the distances 0 ... T - 1 -> R W_R, [1, T, H, K]."""
        return self.distance(waves).unflatten(-1, (self.heads, -1))[None]

    def scores(
        self, queries: Tensor, keys: Tensor, distance_keys: Tensor, sight: Sight, distance_bias: nn.Module
    ) -> Tensor:
        """A / sqrt(K) of [B, S, H, K] and [B, T, H, K] -> [B, H, S, T], in at least float32; the lowest number if not seen."""
        content = torch.einsum("bihk,bjhk->bhij", self.content_bias(queries), keys)
        by_distance = torch.einsum("bihk,bdhk->bhid", distance_bias(queries), distance_keys)
        distance = sight.distance.clamp(0, by_distance.shape[-1] - 1)[:, None]
        scores = content + by_distance.gather(-1, distance.expand_as(content))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / math.sqrt(keys.shape[-1])
        return scores.masked_fill(~sight.seen[:, None], torch.finfo(scores.dtype).min)

    def mix(self, scores: Tensor, values: Tensor) -> Tensor:
        """softmax(scores) values -> [B, S, H, K]."""
        weights = self.dropout(scores.softmax(dim=-1)).to(values.dtype)
        return torch.einsum("bhij,bjhk->bihk", weights, values)


class TransformerXLLayer(nn.Module):
    def __init__(self, config: LayersConfig, output_std: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = RelativeAttention(config, output_std)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config, output_std)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, memory: Tensor, waves: Tensor, sight: Sight) -> Tensor:
        """hidden [B, S, D], memory [B, M, D], sinusoids [T, D] -> [B, S, D]."""
        keys, values = self.keys_values(torch.cat([memory, hidden], dim=1))
        return self.read(hidden, keys, values, self.attention.distance_keys(waves), sight)

    def keys_values(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention.keys_values(self.attention_norm(inputs))

    def read(self, hidden: Tensor, keys: Tensor, values: Tensor, distance_keys: Tensor, sight: Sight) -> Tensor:
        """The layer on [B, n, D], whose own keys are among the T given."""
        attention = self.attention
        queries = attention.queries(self.attention_norm(hidden))
        scores = attention.scores(queries, keys, distance_keys, sight, attention.distance_bias)
        return self.add_branches(hidden, attention.mix(scores, values).flatten(2))

    def add_branches(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """From what attention has mixed, heads side by side, to what the next layer reads."""
        hidden = hidden + self.dropout(self.attention.output(mixed))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


class TransformerXL(LayersCell[TransformerXLState, TransformerXLFeatures]):
    memory_leaves = TransformerXLState._fields
    carries_gradient = False

    def __init__(self, config: TransformerXLConfig, *, vocab_size: int, segment_length: int):
        super().__init__(config, vocab_size=vocab_size, segment_length=segment_length)
        self.room = config.memory_length + segment_length  # T, positions that a segment's queries may see
        output_std = config.init_std / (2 * config.layers) ** 0.5
        made = [TransformerXLLayer(config, output_std) for _ in range(config.layers)]
        self.layers: Sequence[TransformerXLLayer] = nn.ModuleList(made)  # type: ignore[assignment]  # a list of these layers
        self.norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()

    def empty_state(self, lanes: int, device: torch.device | None = None) -> TransformerXLState:
        config = self.config
        memory = self.zeros(lanes, config.layers, config.memory_length, config.width, device=device)
        return TransformerXLState(memory, self.counts(lanes, device=device))

    def advance(self, segment: Segment, state: TransformerXLState) -> tuple[TransformerXLFeatures, TransformerXLState]:
        memory, filled = emptied(state, segment.reset | segment.reset_memory)
        hidden = self.embed(segment.tokens)
        sight = self._sight(self._rows(torch.zeros_like(filled[:1]), self.segment_length), filled)
        waves = sinusoids(self.room, hidden)
        inputs = []
        for number, layer in enumerate(self.layers):
            inputs.append(hidden.detach().to(memory.dtype))
            arguments = hidden, memory[:, number].to(hidden.dtype), waves, sight
            hidden = recomputed(layer, *arguments, when=self.config.checkpoint_layers)
        read = torch.cat([memory, torch.stack(inputs, dim=1)], dim=2)
        return TransformerXLFeatures(self.norm(hidden)), self._next_state(read, filled, segment.length)

    def hidden(self, segment: Segment, features: TransformerXLFeatures) -> Tensor:
        return features.hidden

    def _rows(self, start: Tensor, count: int) -> Tensor:
        """Among the T positions, `count` of the segment from `start` int64 [B] on: int64 [B, count]."""
        return self.config.memory_length + start[:, None] + torch.arange(count, device=start.device)

    def _sight(self, rows: Tensor, filled: Tensor) -> Sight:
        return left_of(rows, self.config.memory_length - filled, self.room)

    def _next_state(self, inputs: Tensor, filled: Tensor, length: Tensor) -> TransformerXLState:
        """From inputs [B, layers, T, D] of which `filled` before the segment and `length` of it are positions."""
        memory_length = self.config.memory_length
        return TransformerXLState(last_rows(inputs, length, memory_length), (filled + length).clamp(max=memory_length))

    # ------------------------------------------------------------------------------------------------------ generation

    @torch.no_grad()
    def open(self, state: TransformerXLState, reset: Tensor) -> TransformerXLCache:
        memory, filled = emptied(state, reset)
        lanes, layers, _, width = memory.shape
        inputs = torch.cat([memory, memory.new_zeros(lanes, layers, self.segment_length, width)], dim=2)
        hidden = inputs.to(next(self.parameters()).dtype)
        waves = sinusoids(self.room, hidden)
        keys, values = zip(*(layer.keys_values(hidden[:, number]) for number, layer in enumerate(self.layers)))
        distance_keys = [layer.attention.distance_keys(waves).expand(lanes, -1, -1, -1) for layer in self.layers]
        stacked = (torch.stack(tensors, dim=1) for tensors in (keys, values, distance_keys))
        return TransformerXLCache(inputs, filled, torch.zeros_like(filled), *stacked)

    @torch.no_grad()
    def extend(self, tokens: Tensor, cache: TransformerXLCache) -> tuple[Tensor, TransformerXLCache]:
        lanes, rows = (
            torch.arange(len(tokens), device=tokens.device)[:, None],
            self._rows(cache.length, tokens.shape[1]),
        )
        hidden, sight = self.embedding(tokens), self._sight(rows, cache.filled)
        for number, layer in enumerate(self.layers):
            cache.inputs[lanes, number, rows] = hidden.to(cache.inputs.dtype)
            cache.keys[lanes, number, rows], cache.values[lanes, number, rows] = layer.keys_values(hidden)
            keys, values, distance_keys = (x[:, number] for x in (cache.keys, cache.values, cache.distance_keys))
            hidden = layer.read(hidden, keys, values, distance_keys, sight)
        return self.to_logits(self.norm(hidden)), cache._replace(length=cache.length + tokens.shape[1])

    @torch.no_grad()
    def close(self, cache: TransformerXLCache) -> TransformerXLState:
        return self._next_state(cache.inputs, cache.filled, cache.length)


# ---- right-aligned memories ----------------------------------------------------------------------------------------------


def emptied(state: State, fresh: Tensor) -> State:
    """Zeros on the lanes `fresh` bool [B]."""
    return state._make(torch.where(fresh.view(-1, *[1] * (x.dim() - 1)), 0, x) for x in state)


def last_rows(rows: Tensor, length: Tensor, count: int) -> Tensor:
    """Of rows [B, ..., T, X], `count` of them old and `length` int64 [B] new, the last `count`: [B, ..., count, X]."""
    chosen = length[:, None] + torch.arange(count, device=length.device)
    return torch.take_along_dim(rows, chosen.view(-1, *[1] * (rows.dim() - 3), count, 1), dim=-2)


def left_of(rows: Tensor, empty: Tensor, room: int) -> Sight:
    """What queries at `rows` int64 [B or 1, S] of `room` see: themselves, and to their left all but `empty` int64 [B] rows."""
    columns = torch.arange(room, device=rows.device)
    distance = rows[..., None] - columns
    return Sight(distance, (distance >= 0) & (columns >= empty[:, None, None]))


def sinusoids(count: int, like: Tensor) -> Tensor:
    """R of the distances 0 ... count - 1, [count, D] for hidden states like `like` [..., D]."""
    width, dtype = like.shape[-1], torch.promote_types(like.dtype, torch.float32)
    frequencies = ROTARY_BASE ** -(torch.arange(0, width, 2, device=like.device, dtype=dtype) / width)
    angles = torch.arange(count, device=like.device, dtype=dtype)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)
