"""LaMemo (Ji et al., arXiv 2204.07341): Transformer-XL whose memory is refreshed by what came after it.

    rows 0 ... M - 1      memory, embeddings  -->  layer  -->  ...  -->  layer
    rows M ... M + S - 1  segment, embeddings -->  layer  -->  ...  -->  layer  -->  last layer  -->  head, loss

In Transformer-XL a position knows nothing of what follows it for as long as it is remembered. Here all layers but the last,
whose memory nobody reads, work out the memory's rows anew. A row of the segment attends to its left, as in transformer_xl.py
(which has the letters),

    C_i = softmax_{j <= i}(A_i) v,   d_i = log sum_{j <= i} exp A_ij       A_ij with R_{i-j} and the vectors b and c, / sqrt(K)

and C_i, d_i are what is remembered of it, without gradient. In every later segment the row looks to its right,

    C'_i = softmax(A'_i) v,   d'_i = log sum exp A'_ij                A'_ij with R_{j-i} and, instead of c, a vector c' of its own
    C_i <- s C_i + (1 - s) C'_i,   s = sigmoid(d_i - d'_i),   d_i <- log(exp d_i + exp d'_i)

(look-ahead attention; memory interpolation, an online softmax; disentangled relative positions), and goes on to the next layer
through W_o and FFN, as the segment does. Where inputs stay as they are, in the first layer, this is one softmax over both sides.

It looks at what it has not seen yet: the rows that the segment before has brought, all but the first of them, and the first
token of this segment. More of this segment would leak, because every token reads the memory.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from memformer_dist.cells.layers_cell import LayersCell
from memformer_dist.cells.recomputation import recomputed
from memformer_dist.cells.transformer_xl import (
    HeadBias,
    RelativeConfig,
    Sight,
    TransformerXLLayer,
    emptied,
    last_rows,
    left_of,
    sinusoids,
)
from memformer_dist.segment import Segment


class LaMemoConfig(RelativeConfig):
    cell: Literal["lamemo"] = Field(
        "lamemo", description="LaMemo: Transformer-XL with a memory that attends to what came after it"
    )
    layers: int = Field(12, ge=2, description="causal layers; all but the last refresh their memory")

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "LaMemo":
        return LaMemo(self, vocab_size=vocab_size, segment_length=segment_length)


class LaMemoState(NamedTuple):
    """Right-aligned, as in transformer_xl.py; rows that are no positions hold anything."""

    embedded: Tensor  # [B, M, D], inputs of the first layer
    mixed: Tensor  # [B, layers - 1, M, D], C, heads side by side
    log_mass: Tensor  # [B, layers - 1, M, H], d
    filled: Tensor  # int64 [B], rows that are positions
    latest: Tensor  # int64 [B], those of them that the last segment brought


class LaMemoFeatures(NamedTuple):
    hidden: Tensor  # [B, S, D], behind the last layer


class LaMemoLayer(TransformerXLLayer):
    """All layers but the last."""

    def __init__(self, config: RelativeConfig, output_std: float):
        super().__init__(config, output_std)
        self.ahead_bias = HeadBias(config)  # c'

    def forward(  # type: ignore[override]
        self, hidden: Tensor, mixed: Tensor, log_mass: Tensor, waves: Tensor, left: Sight, ahead: Sight
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, M + S, D], mixed [B, M, D] and log_mass [B, M, H] of the memory -> the three, for all M + S rows."""
        attention, rows, seen = self.attention, mixed.shape[1], slice(ahead.seen.shape[-1])
        normed = self.attention_norm(hidden)
        queries, (keys, values) = attention.queries(normed), attention.keys_values(normed)
        distance_keys = attention.distance_keys(waves)

        scores = attention.scores(queries[:, rows:], keys, distance_keys, left, attention.distance_bias)
        own, own_mass = attention.mix(scores, values), scores.logsumexp(dim=-1).mT

        scores = attention.scores(queries[:, :rows], keys[:, seen], distance_keys[:, seen], ahead, self.ahead_bias)
        found, found_mass = attention.mix(scores, values[:, seen]), scores.logsumexp(dim=-1).mT
        old = mixed.unflatten(-1, (attention.heads, -1))
        share = torch.sigmoid(log_mass - found_mass)[..., None]
        interpolated = share * old + (1 - share) * found

        mixed = torch.cat([interpolated, own.to(interpolated.dtype)], dim=1).flatten(2)
        log_mass = torch.cat([torch.logaddexp(log_mass, found_mass), own_mass], dim=1)
        return self.add_branches(hidden, mixed.to(values.dtype)), mixed, log_mass


class LaMemo(LayersCell[LaMemoState, LaMemoFeatures]):
    memory_leaves = LaMemoState._fields
    carries_gradient = False

    def __init__(self, config: LaMemoConfig, *, vocab_size: int, segment_length: int):
        super().__init__(config, vocab_size=vocab_size, segment_length=segment_length)
        output_std = config.init_std / (2 * config.layers) ** 0.5
        made = [LaMemoLayer(config, output_std) for _ in range(config.layers - 1)]
        self.layers: Sequence[LaMemoLayer] = nn.ModuleList(made)  # type: ignore[assignment]  # a list of these layers
        self.last_layer = TransformerXLLayer(config, output_std)
        self.norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()

    def empty_state(self, lanes: int, device: torch.device | None = None) -> LaMemoState:
        config, rows, layers = self.config, self.config.memory_length, self.config.layers - 1
        return LaMemoState(
            embedded=self.zeros(lanes, rows, config.width, device=device),
            mixed=self.zeros(lanes, layers, rows, config.width, device=device),
            log_mass=self.zeros(lanes, layers, rows, config.heads, device=device),
            filled=self.counts(lanes, device=device),
            latest=self.counts(lanes, device=device),
        )

    def advance(self, segment: Segment, state: LaMemoState) -> tuple[LaMemoFeatures, LaMemoState]:
        embedded, mixed, log_mass, filled, latest = emptied(state, segment.reset | segment.reset_memory)
        memory_length, length, again = self.config.memory_length, segment.length, self.config.checkpoint_layers
        own = self.embed(segment.tokens)
        hidden = inputs = torch.cat([embedded.to(own.dtype), own], dim=1)
        room = hidden.shape[1]
        waves = sinusoids(room, hidden)
        left = left_of(torch.arange(memory_length, room, device=length.device)[None], memory_length - filled, room)
        ahead = right_of(memory_length, latest, length)
        all_mixed, all_masses = [], []
        for number, layer in enumerate(self.layers):
            of_memory = mixed[:, number], log_mass[:, number]
            hidden, both, mass = recomputed(layer, hidden, *of_memory, waves, left, ahead, when=again)
            all_mixed.append(both.detach())
            all_masses.append(mass.detach())
        memory, hidden = hidden.tensor_split([memory_length], dim=1)
        hidden = recomputed(self.last_layer, hidden, memory, waves, left, when=again)
        after = LaMemoState(
            embedded=last_rows(inputs.detach().to(embedded.dtype), length, memory_length),
            mixed=last_rows(torch.stack(all_mixed, dim=1), length, memory_length),
            log_mass=last_rows(torch.stack(all_masses, dim=1), length, memory_length),
            filled=(filled + length).clamp(max=memory_length),
            latest=length,
        )
        return LaMemoFeatures(self.norm(hidden)), after

    def hidden(self, segment: Segment, features: LaMemoFeatures) -> Tensor:
        return features.hidden


def right_of(memory_length: int, latest: Tensor, length: Tensor) -> Sight:
    """What the M rows of the memory see of themselves and of the segment's first token: to their right, and new to them.

    Of the `latest` int64 [B] rows the first is not new: the rows before it saw it as the first token of its segment. A
    segment of `length` 0 has none.
    """
    rows, columns = (torch.arange(count, device=latest.device) for count in (memory_length, memory_length + 1))
    distance = columns - rows[:, None]
    new = (columns > memory_length - latest[:, None]) & (columns < memory_length)
    new |= (columns == memory_length) & (length[:, None] > 0)
    return Sight(distance[None], (distance > 0) & new[:, None])
