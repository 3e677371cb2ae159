"""Stable Hadamard Memory (Le et al., arXiv 2410.10132): a matrix per head, calibrated entry by entry once per segment.

    h + attention within the segment; h + read of M_{t-1}; h + feed-forward      per layer --> head, loss
                  |
                  +-- write --> M_t

Each layer and head carries a memory M [K, K], zeros at the start of a document. With the tokens x of a segment, x* their mean,
* the product entry by entry (section 3 of the paper, whose memory takes one x per step)

    M_t = M_{t-1} * C + sum over x of eta(x) v(x) k(x)^T                 written once per segment
    C = 1 + tanh(theta v_c(x*)^T)                                        calibration: 0 < C < 2, 1 in the mean
    y = M_{t-1} q(x)                                                     read by every token

v and v_c are linear, eta = sigmoid(x w) per head, k and q = relu(x W) / (1e-5 + its sum). theta is a row of a learned table,
drawn at random for each lane, layer and segment: so the calibrations of successive segments are independent, and their product
has mean 1 however long the document. (The typical product is smaller: the mean of log C is below 0. Per token instead of per
segment, the memory would be forgotten as much faster.) In evaluation mode the rows are taken in turns.

Attention within the segment, the gate on the read, and the feed-forward blocks are ours: the paper's memory feeds a policy.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from memformer_dist.cells.gated_delta import Block
from memformer_dist.cells.layers import Linear, SelfAttention, full_precision, rotary, within
from memformer_dist.cells.layers_cell import LayersCell
from memformer_dist.cells.layers_config import LayersConfig
from memformer_dist.cells.recomputation import recomputed
from memformer_dist.segment import Segment


class HadamardConfig(LayersConfig):
    cell: Literal["hadamard"] = Field(
        "hadamard", description="Stable Hadamard Memory: a matrix per head, calibrated entry by entry once per segment"
    )
    layers: PositiveInt = Field(12, description="layers, each with a memory per head")
    heads: PositiveInt = Field(8, description="H, in the attention, and memories of a layer, of K x K numbers each")
    calibrations: PositiveInt = Field(
        128, description="rows of a layer's table, from which theta is drawn in each segment"
    )

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "Hadamard":
        return Hadamard(self, vocab_size=vocab_size, segment_length=segment_length)


class HadamardState(NamedTuple):
    memory: Tensor  # [B, layers, H, K, K], from keys to values: y = M q
    segments: Tensor  # int64 [B], read since the document began: the turn of the rows in evaluation mode


class HadamardFeatures(NamedTuple):
    hidden: Tensor  # [B, S, D], what the last layer's memory is asked with
    read: Tensor  # [B, S, H, K], what it gave


class Calibration(nn.Module):
    """C, from the mean of a segment's tokens and the number of a row."""

    def __init__(self, config: HadamardConfig):
        super().__init__()
        self.heads = config.heads
        self.table = nn.Parameter(torch.randn(config.calibrations, config.width) * config.init_std)
        self.projection = Linear(config.width, config.width, std=config.init_std)  # v_c

    def forward(self, mean: Tensor, turn: Tensor) -> Tensor:
        """[B, D], int64 [B] -> [B, H, K, K]. In training mode the row is drawn, whatever the turn."""
        rows = torch.randint_like(turn, len(self.table)) if self.training else turn % len(self.table)
        theta, along = (x.unflatten(-1, (self.heads, -1)) for x in (self.table[rows], self.projection(mean)))
        return 1 + torch.tanh(theta[..., :, None] * along[..., None, :])


class HadamardMixer(nn.Module):
    """Attention within the segment, then the layer's memory: read by every token, written by all of them together."""

    def __init__(self, config: HadamardConfig):
        super().__init__()
        width, std = config.width, config.init_std
        self.heads, self.positions = config.heads, config.positions
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(config, std / (2 * config.layers) ** 0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(width)
        self.query_key_value = Linear(width, 3 * width, std=std)
        self.rate = Linear(width, config.heads, std=std, bias=True)  # eta
        self.calibration = Calibration(config)

    def forward(self, hidden: Tensor, memory: Tensor, turn: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D], the layer's memory, int64 [B] twice -> hidden, what each token reads [B, S, H, K], memory."""
        size, dtype, rotation = hidden.shape[1], memory.dtype, None
        if self.positions == "rotary":
            rotation = rotary(torch.arange(size, device=hidden.device), memory.shape[-1], hidden.dtype)
        attended = self.attention(self.attention_norm(hidden), rotation, None, True)
        hidden = hidden + self.dropout(attended)
        normed = self.norm(hidden)
        real = within(length, size)[..., None]
        calibration = self.calibration((normed * real).sum(1) / length.clamp(min=1)[:, None], turn)
        queries_keys, values = self.query_key_value(normed).unflatten(-1, (3, self.heads, -1)).split((2, 1), 2)
        queries_keys = queries_keys.to(dtype).relu()
        queries, keys = (queries_keys / (1e-5 + queries_keys.sum(-1, keepdim=True))).transpose(1, 3).unbind(2)
        rates = (self.rate(normed).to(dtype).sigmoid() * real)[..., None]
        with full_precision(memory):
            read = queries @ memory.mT  # [B, H, S, K]
            written = (rates * values.squeeze(2).to(dtype)).permute(0, 2, 3, 1) @ keys  # [B, H, K, K]
            calibrated = torch.where(length[:, None, None, None] > 0, calibration.to(dtype) * memory, memory)
        return hidden, read.transpose(1, 2).to(hidden.dtype), calibrated + written


class Hadamard(LayersCell[HadamardState, HadamardFeatures]):
    memory_leaves = ("memory",)

    def __init__(self, config: HadamardConfig, *, vocab_size: int, segment_length: int):
        super().__init__(config, vocab_size=vocab_size, segment_length=segment_length)
        self.mixers = nn.ModuleList(HadamardMixer(config) for _ in range(config.layers))
        self.blocks = nn.ModuleList(Block(config, config.layers) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()

    def empty_state(self, lanes: int, device: torch.device | None = None) -> HadamardState:
        config = self.config
        memory = self.zeros(lanes, config.layers, config.heads, config.head_size, config.head_size, device=device)
        return HadamardState(memory, self.counts(lanes, device=device))

    def advance(self, segment: Segment, state: HadamardState) -> tuple[HadamardFeatures, HadamardState]:
        fresh = segment.reset | segment.reset_memory
        memory = torch.where(fresh[:, None, None, None, None], 0, state.memory)
        segments = torch.where(segment.reset, 0, state.segments)
        hidden = self.embed(segment.tokens)
        again = self.config.checkpoint_layers
        layers: list[tuple[Tensor, ...]] = []  # what comes in behind the attention, what it read, its memory
        for number, mixer in enumerate(self.mixers):
            if number > 0:
                hidden = recomputed(self.blocks[number - 1], *layers[-1][:2], when=again)
            layers.append(recomputed(mixer, hidden, memory[:, number], segments, segment.length, when=again))
        hidden, read, _ = layers[-1]
        return HadamardFeatures(hidden, read), HadamardState(torch.stack([x[2] for x in layers], 1), segments + 1)

    def hidden(self, segment: Segment, features: HadamardFeatures) -> Tensor:
        return self.norm(recomputed(self.blocks[-1], *features, when=self.config.checkpoint_layers))
