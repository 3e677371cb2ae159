"""The settings that cells built of cells/layers.py have in common."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from memformer_dist.cells.base import CellConfig
from memformer_dist.errors import Problems


class BlocksConfig(CellConfig):
    """What cells of residual blocks have in common, with attention or without."""

    width: PositiveInt = Field(512, description="D, of the hidden states")
    heads: PositiveInt = Field(8, description="H, in every attention")
    feed_forward: PositiveInt = Field(2048, description="inner width of the feed-forward blocks")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="rate of dropout on embeddings, attention weights and residual branches"
    )
    final_norm: bool = Field(True, description="a LayerNorm after the last layer of a stack")
    tie_embeddings: bool = Field(True, description="use the embedding as the head's weights")
    init_std: PositiveFloat = Field(
        0.02, description="standard deviation of initial weights; those into the residual stream / sqrt(2 layers)"
    )
    checkpoint_layers: bool = Field(
        False,
        description="keep the inputs of every layer alone and compute what is inside it again in the backward; in the"
        " layers that lead to the next state this is a third forward, besides rollout and replay",
    )
    loss_chunk: PositiveInt | None = Field(
        None,
        description="positions whose logits exist at a time: head and loss are computed in chunks, and again in the"
        " backward, so that vocabulary x positions are never held; null: all of them",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := self.problems():
            raise Problems(problems)
        return self

    def problems(self) -> list[str]:
        """What is wrong with values that must fit together, a sentence each."""
        if self.width % self.heads:
            return [f"width: found {self.width}, expected a multiple of heads ({self.heads})"]
        return []

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class LayersConfig(BlocksConfig):
    """What cells have in common whose layers attend within the segment."""

    positions: Literal["rotary", "none"] = Field(
        "rotary", description="position embedding of self-attention; cross-attention has none"
    )
    attention_bias: bool = Field(False, description="biases in the projections of all attentions")

    def problems(self) -> list[str]:
        problems = super().problems()
        if not problems and self.positions == "rotary" and self.head_size % 2:
            return [f"width / heads: found {self.head_size}, expected an even number (rotary positions turn pairs)"]
        return problems


class RewrittenConfig(LayersConfig):
    """What cells have in common whose memory lasts because they write again what they have read of it."""

    memory_noise: float = Field(
        0.0,
        ge=0,
        description="in training, Gaussian noise is added to each vector of the memory that a segment reads, of up to this many"
        " times the vector's norm (drawn per lane, from 0 on): only what is restored all the time outlasts it, and that"
        " outlasts documents far longer than those of training too",
    )
