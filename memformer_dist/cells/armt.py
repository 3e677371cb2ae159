"""Associative Recurrent Memory Transformer (Rodkin et al., arXiv 2407.04841): every layer has an associative memory of its own.

    emb(s_t) ; write tokens         the same learned vectors behind every segment
        |
     layer 1:  h <- h + read(h)  -->  attention, feed-forward  -->  h     rows of the write tokens --> write
        |                                                                                               |
     layer 2 ...                       A, z of each layer, from segment to segment <--------------------+
        |
     norm, head, loss of s_t

A layer's memory is a matrix A [F, D] and the sum z [F] of its keys, F = 6 `memory_width`, both 0 where a document starts, so that
nothing is read in its first segment. For a row y of D numbers (Section 2 of the paper):

    u = [relu(x) ; relu(-x)],   phi(x) ~ [u * roll(u, 1) ; u * roll(u, 2) ; u * roll(u, 3)],   |phi(x)| = 1     (1)  DPFP-3
    read:    q = phi(W_q y),   y <- y + (q A) / (q z + eps)                                                     (2)
    write:   k = phi(W_k y),   v = W_v y,   b = sigmoid(w_b y)
             v_old = (k A) / (k z + eps)                                                                        (3)
             A <- A + sum over write tokens of  b k (v - v_old)^T                                               (4)
             z <- z + sum over write tokens of  g k,   g = clip(1 - k z, 0, 1), without gradient                (5)

By (3) and (4) a new value replaces what its key held, as far as b says; by (5) a key counts once, however often it is written. A
segment's write tokens find the memory as it was before them; they see all of the segment and one another, but no padding.

Keys of norm 1 are those of the authors' program. With DPFP as printed their size goes with the square of the weights, and where
these are small eps drowns it. With few features, a `memory_width` below 16, q z may all but vanish, and gradients grow. Where
the paper leaves something open (the mask of the write tokens, W_v small as all that leads into the residual stream, no biases)
the defaults are ours.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from memformer_dist.cells.layers import BranchOutput, Layer, LearnedTokens, Linear, Stack, segment_mask
from memformer_dist.cells.layers_cell import LayersCell
from memformer_dist.cells.layers_config import LayersConfig
from memformer_dist.cells.recomputation import recomputed
from memformer_dist.segment import Segment

ROLLS = 3  # nu
EPSILON = 1e-5


class ArmtConfig(LayersConfig):
    cell: Literal["armt"] = Field(
        "armt", description="Associative Recurrent Memory Transformer: an associative memory in every layer"
    )
    layers: PositiveInt = Field(12, description="layers, over the segment and its write tokens")
    write_tokens: PositiveInt = Field(16, description="learned tokens behind every segment, from which layers write")
    memory_width: PositiveInt = Field(
        64,
        description="size of keys before DPFP-3, which makes it six times as large; state: 6 x this x width per layer",
    )

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "Armt":
        return Armt(self, vocab_size=vocab_size, segment_length=segment_length)


class ArmtState(NamedTuple):
    associations: Tensor  # A of all layers [B, layers, F, D]
    keys: Tensor  # z of all layers [B, layers, F]


class ArmtFeatures(NamedTuple):
    hidden: Tensor  # [B, S, D], after the final norm


def dpfp(x: Tensor) -> Tensor:
    """Deterministic parameter-free projection (Schlag et al., arXiv 2102.11174) [..., d] -> [..., 6 d], of norm 1."""
    u = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return F.normalize(torch.cat([u * u.roll(shift, dims=-1) for shift in range(1, ROLLS + 1)], dim=-1), dim=-1)


class AssociativeMemory(nn.Module):
    """One layer's read and write. A is [B, F, D], z [B, F]; z and its products stay in the state's precision."""

    def __init__(self, config: ArmtConfig):
        super().__init__()
        width, std = config.width, config.init_std
        self.query = Linear(width, config.memory_width, std=std)
        self.key = Linear(width, config.memory_width, std=std)
        self.value = BranchOutput(width, width, std=std / (2 * config.layers) ** 0.5)
        self.strength = Linear(width, 1, std=std)

    def read(self, hidden: Tensor, associations: Tensor, keys: Tensor) -> Tensor:
        """(2) without the sum: hidden [B, T, D] -> [B, T, D]."""
        queries = dpfp(self.query(hidden))
        found = queries @ associations.to(queries.dtype)
        return (found / ((queries * keys[:, None]).sum(-1, keepdim=True) + EPSILON)).to(hidden.dtype)

    def write(self, written: Tensor, associations: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(3) to (5): the rows of the write tokens [B, W, D] -> the next A and z."""
        key = dpfp(self.key(written).to(keys.dtype))
        value, strength = self.value(written), torch.sigmoid(self.strength(written))
        known = (key * keys[:, None]).sum(-1, keepdim=True)
        old = (key @ associations) / (known + EPSILON)
        new_share = (1 - known).clamp(0, 1).detach()
        return associations + (strength * key).mT @ (value - old), keys + (new_share * key).sum(1)


class Armt(LayersCell[ArmtState, ArmtFeatures]):
    memory_leaves = ("associations", "keys")

    def __init__(self, config: ArmtConfig, *, vocab_size: int, segment_length: int):
        super().__init__(config, vocab_size=vocab_size, segment_length=segment_length)
        self.write_tokens = LearnedTokens(config.write_tokens, config.width, std=config.init_std)
        self.stack = Stack(config.layers, config, causal=False, has_source=False)
        memories = nn.ModuleList(AssociativeMemory(config) for _ in range(config.layers))
        self.memories: Sequence[AssociativeMemory] = memories  # type: ignore[assignment]  # as in Stack

    def empty_state(self, lanes: int, device: torch.device | None = None) -> ArmtState:
        config = self.config
        keys = 2 * ROLLS * config.memory_width
        associations = self.zeros(lanes, config.layers, keys, config.width, device=device)
        return ArmtState(associations, torch.zeros_like(associations[..., 0]))

    def advance(self, segment: Segment, state: ArmtState) -> tuple[ArmtFeatures, ArmtState]:
        fresh, size = segment.reset | segment.reset_memory, self.segment_length
        before = ArmtState(*(leaf.masked_fill(fresh.view(-1, *[1] * (leaf.dim() - 1)), 0) for leaf in state))
        hidden = self.write_tokens(self.embed(segment.tokens), after=True)
        rotation = self.stack.rotation(torch.arange(hidden.shape[1], device=hidden.device), hidden.dtype)
        mask = segment_mask(segment.length, size, after=self.config.write_tokens)
        after = []
        for number, (layer, memory) in enumerate(zip(self.stack.layers, self.memories)):
            own = before.associations[:, number], before.keys[:, number]

            def run(hidden: Tensor, *own: Tensor, layer: Layer = layer, memory: AssociativeMemory = memory) -> tuple:
                hidden = layer(hidden + memory.read(hidden, *own), rotation=rotation, mask=mask)
                return hidden, *memory.write(hidden[:, size:], *own)

            hidden, *written_here = recomputed(run, hidden, *own, when=self.config.checkpoint_layers)
            after.append(written_here)
        written = ArmtState(*(torch.stack(leaves, dim=1) for leaves in zip(*after)))
        return ArmtFeatures(self.stack.norm(hidden[:, :size])), written

    def hidden(self, segment: Segment, features: ArmtFeatures) -> Tensor:
        return features.hidden
