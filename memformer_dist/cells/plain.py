"""A Transformer without memory: every segment is read on its own. What a memory must beat to be worth its price.

    segment s_t --> causal layers --> head, loss of s_t

The state carries nothing that is read: `segments` counts those read since the document began. All of the model is readout, so
that a readout group runs C segments as one batch.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from memformer_dist.cells.layers import Stack
from memformer_dist.cells.layers_cell import LayersCell
from memformer_dist.cells.layers_config import LayersConfig
from memformer_dist.segment import Segment


class PlainConfig(LayersConfig):
    cell: Literal["plain"] = Field(
        "plain", description="a Transformer without memory, which reads every segment on its own"
    )
    layers: PositiveInt = Field(12, description="causal layers")

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "Plain":
        return Plain(self, vocab_size=vocab_size, segment_length=segment_length)


class PlainState(NamedTuple):
    segments: Tensor  # int64 [B], read since the document began


class PlainFeatures(NamedTuple):
    segments: Tensor  # int64 [B]


class Plain(LayersCell[PlainState, PlainFeatures]):
    carries_gradient = False

    def __init__(self, config: PlainConfig, *, vocab_size: int, segment_length: int):
        super().__init__(config, vocab_size=vocab_size, segment_length=segment_length)
        self.layers = Stack(config.layers, config, causal=True, has_source=False)

    def empty_state(self, lanes: int, device: torch.device | None = None) -> PlainState:
        return PlainState(self.counts(lanes, device=device))

    def advance(self, segment: Segment, state: PlainState) -> tuple[PlainFeatures, PlainState]:
        segments = torch.where(segment.reset, 0, state.segments)
        return PlainFeatures(segments), PlainState(segments + 1)

    def hidden(self, segment: Segment, features: PlainFeatures) -> Tensor:
        return self.layers(self.embed(segment.tokens))
