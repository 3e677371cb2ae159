"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, arXiv 2412.06464): a matrix per head, written by the delta rule at every token.

    tokens --> [ h + read of the memory ; h + feed-forward ] per layer --> head, loss

Each layer and head carries a memory M [K, K] over the whole document, zeros at its start. With row vectors (the paper's
S is M^T), per token t

    M_t = a_t (I - b_t k_t^T k_t) M_{t-1} + b_t k_t^T v_t                                            equation 10
    o_t = q_t M_t / sqrt(K)

what the key k_t finds is replaced by v_t, as far as b_t says, after everything has decayed by a_t. Keys and queries are
short convolutions of projections, SiLU, length 1; values the same without the last; b_t = sigmoid(x_t W_b) and
log a_t = -exp(A) softplus(x_t W_a + c), per head. The read is normalised per head, multiplied by SiLU(x_t W_g) and projected.

In chunks of C tokens, which change the order of additions alone, with g_t the running sum of log a in the chunk, D_tj =
exp(g_t - g_j) for j <= t, and M the memory before the chunk (section 3.3):

    U = (I + tril(diag(b) (K K^T * D), -1))^-1 diag(b) (V - diag(e^g) K M)
    O = (diag(e^g) Q M + (Q K^T * D) U) / sqrt(K)
    M <- e^{g_C} M + K^T diag(e^{g_C - g}) U

A padded token has log a = b = 0 and changes nothing. `advance` ends where the last layer has read and written its memory; what
becomes of that read is readout.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from memformer_dist.cells.layers import BranchOutput, FeedForward, Linear, ShortConvolution, full_precision, within
from memformer_dist.cells.layers_cell import LayersCell
from memformer_dist.cells.layers_config import BlocksConfig
from memformer_dist.cells.recomputation import recomputed
from memformer_dist.segment import Segment, Tensors


class GatedDeltaConfig(BlocksConfig):
    cell: Literal["gated_delta"] = Field(
        "gated_delta", description="Gated DeltaNet: a matrix per head, written by the delta rule at every token"
    )
    layers: PositiveInt = Field(12, description="layers, each with a memory per head")
    heads: PositiveInt = Field(4, description="H, memories of a layer, of K x K numbers each, K = D / H")
    convolution: PositiveInt = Field(
        4, description="tokens that the short convolutions of queries, keys and values see"
    )
    chunk: PositiveInt = Field(64, description="tokens worked on at once; changes the order of additions alone")

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "GatedDelta":
        return GatedDelta(self, vocab_size=vocab_size, segment_length=segment_length)


class GatedDeltaState(NamedTuple):
    memory: Tensor  # [B, layers, H, K, K], from keys to values
    tail: Tensor  # [B, layers, convolution - 1, 3 D], what the convolutions still see of the segments before


class GatedDeltaFeatures(NamedTuple):
    hidden: Tensor  # [B, S, D], what the last layer reads
    read: Tensor  # [B, S, H, K], what its memory gave


def start(state: Tensors, fresh: Tensor) -> Iterator[Tensor]:
    """The leaves of a state, zeros on the lanes bool [B] that start afresh."""
    return (torch.where(fresh.view(-1, *[1] * (leaf.dim() - 1)), 0, leaf) for leaf in state)


def unit(vectors: Tensor) -> Tensor:
    """[..., K] of length 1; what is shorter than 1e-3 stays shorter, and so its gradient finite."""
    return F.normalize(vectors, dim=-1, eps=1e-3)


def gated_delta_rule(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """queries, keys, values [B, S, H, K], log_decay and beta [B, S, H], memory [B, H, K, K] -> read [B, S, H, K], memory.

    In the precision of the memory, whatever the autocast.
    """
    lanes, size, heads, head_size = queries.shape
    chunk = min(chunk, size)
    shape, missing = memory.shape, -size % chunk  # tokens that change nothing fill the last chunk

    def chunks(x: Tensor) -> tuple[Tensor, ...]:
        """[B, S, H, ...] -> [B H, C, ...] each"""
        padded = F.pad(x.to(memory.dtype).transpose(1, 2), (0, 0) * (x.dim() - 3) + (0, missing))
        return padded.flatten(0, 1).split(chunk, 1)

    later = torch.ones(chunk, chunk, dtype=torch.bool, device=memory.device).triu(1)
    reads, memory = [], memory.flatten(0, 1)
    with full_precision(memory):
        for q, k, v, g, b in zip(*map(chunks, (queries, keys, values, log_decay[..., None], beta[..., None]))):
            total = g.cumsum(1)  # [B H, C, 1]
            since, left = total.exp(), (total[:, -1:] - total).exp()  # decay from the chunk's start, and to its end
            decay = (total - total.mT).masked_fill_(later, -torch.inf).exp()  # D
            overlap = b * decay * (k @ k.mT)
            update = torch.linalg.solve_triangular(  # U; reads overlap below the diagonal alone
                overlap, b * (v - since * (k @ memory)), upper=False, unitriangular=True
            )
            reads.append(since * (q @ memory) + (decay * (q @ k.mT)) @ update)
            memory = since[:, -1:] * memory + k.mT @ (left * update)
    read = torch.cat(reads, 1)[:, :size] / head_size**0.5
    return read.unflatten(0, (lanes, heads)).transpose(1, 2), memory.view(shape)


class DeltaGates(nn.Module):
    """From [B, S, D] to how much of M is kept, log a <= 0, and how far it is rewritten, 0 < b < 1: each [B, S, gates]."""

    def __init__(self, width: int, gates: int, std: float):
        super().__init__()
        self.projection = Linear(width, 2 * gates, std=std)
        self.log_rate = nn.Parameter(torch.empty(gates).uniform_(1, 16).log())  # A
        step = torch.empty(gates).uniform_(-3, -1).mul(2.302585).exp()  # a decay of exp(A) * .001 to .1 at first
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # c: softplus(c) = step

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        rate, beta = self.projection(hidden).to(self.bias.dtype).chunk(2, -1)
        return -self.log_rate.exp() * F.softplus(rate + self.bias), beta.sigmoid()


class QueriesKeysValues(nn.Module):
    """Projection, short convolution, SiLU; queries and keys then of length 1."""

    def __init__(self, config: BlocksConfig, convolution: int):
        super().__init__()
        self.heads = config.heads
        self.projection = Linear(config.width, 3 * config.width, std=config.init_std)
        self.convolution = ShortConvolution(convolution, 3 * config.width)

    def forward(self, normed: Tensor, tail: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, S, D], the convolution's tail -> queries, keys, values [B, S, H, K], the next tail."""
        mixed, tail = self.convolution(self.projection(normed), tail, length)
        queries_keys, values = F.silu(mixed).unflatten(-1, (3, self.heads, -1)).split((2, 1), 2)
        queries, keys = unit(queries_keys).unbind(2)
        return queries, keys, values.squeeze(2), tail


class DeltaMixer(nn.Module):
    """A layer's memory: written by every token, and read by it."""

    def __init__(self, config: GatedDeltaConfig):
        super().__init__()
        self.chunk = config.chunk
        self.norm = nn.LayerNorm(config.width)
        self.inputs = QueriesKeysValues(config, config.convolution)
        self.gates = DeltaGates(config.width, config.heads, config.init_std)

    def forward(self, hidden: Tensor, memory: Tensor, tail: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D], the layer's memory and tail -> what each token reads [B, S, H, K], memory, tail."""
        normed = self.norm(hidden)
        queries, keys, values, tail = self.inputs(normed, tail, length)
        real = within(length, hidden.shape[1])[..., None]
        log_decay, beta = (gate * real for gate in self.gates(normed))
        read, memory = gated_delta_rule(queries, keys, values, log_decay, beta, memory, self.chunk)
        return read.to(hidden.dtype), memory, tail


class GatedRead(nn.Module):
    """What a memory gave, normalised per head, times a gate, projected."""

    def __init__(self, config: BlocksConfig, output_std: float):
        super().__init__()
        self.read_norm = nn.RMSNorm(config.head_size, eps=1e-5)
        self.gate = Linear(config.width, config.width, std=config.init_std)
        self.output = BranchOutput(config.width, config.width, std=output_std)

    def forward(self, normed: Tensor, read: Tensor) -> Tensor:
        """[B, S, D], [B, S, H, K] -> [B, S, D]"""
        return self.output(self.read_norm(read).flatten(2) * F.silu(self.gate(normed)))


class Block(nn.Module):
    """What becomes of a read: `mix` brings it into the stream; then a feed-forward block."""

    def __init__(self, config: BlocksConfig, layers: int, mix: Callable[[Any, float], nn.Module] = GatedRead):
        super().__init__()
        output_std = config.init_std / (2 * layers) ** 0.5
        self.norm, self.mix = nn.LayerNorm(config.width), mix(config, output_std)
        self.feed_forward_norm, self.feed_forward = nn.LayerNorm(config.width), FeedForward(config, output_std)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, read: Tensor) -> Tensor:
        """[B, S, D], [B, S, H, K] -> [B, S, D]"""
        hidden = hidden + self.dropout(self.mix(self.norm(hidden), read))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


class GatedDelta(LayersCell[GatedDeltaState, GatedDeltaFeatures]):
    memory_leaves = ("memory", "tail")  # deeper tails hold what was read from the memory

    def __init__(self, config: GatedDeltaConfig, *, vocab_size: int, segment_length: int):
        super().__init__(config, vocab_size=vocab_size, segment_length=segment_length)
        self.mixers = nn.ModuleList(DeltaMixer(config) for _ in range(config.layers))
        self.blocks = nn.ModuleList(Block(config, config.layers) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()

    def empty_state(self, lanes: int, device: torch.device | None = None) -> GatedDeltaState:
        config, size = self.config, self.config.head_size
        memory = self.zeros(lanes, config.layers, config.heads, size, size, device=device)
        tail = self.zeros(lanes, config.layers, config.convolution - 1, 3 * config.width, device=device)
        return GatedDeltaState(memory, tail)

    def advance(self, segment: Segment, state: GatedDeltaState) -> tuple[GatedDeltaFeatures, GatedDeltaState]:
        memory, tail = start(state, segment.reset | segment.reset_memory)
        hidden = self.embed(segment.tokens)
        again = self.config.checkpoint_layers
        layers: list[tuple[Tensor, ...]] = []  # what each read, its memory and its tail
        for number, mixer in enumerate(self.mixers):
            if number > 0:
                hidden = recomputed(self.blocks[number - 1], hidden, layers[-1][0], when=again)
            layers.append(recomputed(mixer, hidden, memory[:, number], tail[:, number], segment.length, when=again))
        reads, *state_after = zip(*layers)
        return GatedDeltaFeatures(hidden, reads[-1]), GatedDeltaState(*(torch.stack(x, 1) for x in state_after))

    def hidden(self, segment: Segment, features: GatedDeltaFeatures) -> Tensor:
        return self.norm(recomputed(self.blocks[-1], *features, when=self.config.checkpoint_layers))
