"""Titans (Behrouz, Zhong and Mirrokni, arXiv 2501.00663): the memory is a small MLP, trained while the text is read.

    layout "mag", memory as a gate                       layout "lmm", the memory alone

    h --+-- attention to the segment and p --+           h --+-- gate ------+
        |                                    * --> h         |              * --> h
        +-- memory, SiLU --------------------+               +-- memory ----+

Each layer and head carries the weights M of an MLP of `memory_depth` matrices, M(k) = gelu(k W_1) W_2, and their momentum
S, over the whole document. M starts from learned weights, S from 0. Per token, with k, v, q as in cells/gated_delta.py,

    l(M; x_t) = |M(k_t) - v_t|^2                                                 equation 12
    S_t = eta_t S_{t-1} - theta_t grad l(M; x_t)                                 equation 14
    M_t = (1 - alpha_t) M_{t-1} + S_t                                            equation 13
    o_t = M_t(q_t)                                                               equation 15

the gradient taken at the weights before the chunk of c tokens (section 3.2). The gates are functions of the token, per head:
alpha = sigmoid(x w - 6), eta = sigmoid(x w), theta = sigmoid(x w) / (4 c), below which the inner training is stable.

The gradient of a matrix is an outer product of its input i_t and the error behind it e_t, so that no token's weights are ever
formed. With A_tj the product of (1 - alpha) over j < m <= t, E_tj that of eta, both lower triangular, b and n their products
from the chunk's start, G = A E diag(theta), f = A n, and W, S of before the chunk, each matrix is applied as

    x_t W_t = b_t x_t W + f_t x_t S - sum over j <= t of G_tj (x_t . i_j) e_j

and ends at W <- b_c W + f_c S - sum of G_cj i_j^T e_j and S <- n_c S - sum of E_cj theta_j i_j^T e_j. At a padded token
alpha = theta = 0, eta = 1, and its column of A is 0, as momentum alone would move M.

"mag" (equations 26 to 28): o = norm(y) * SiLU(norm(M(q))), y causal attention within the segment, whose keys and values begin
with `persistent` learned ones; "lmm" (section 4.3, without attention): o = norm(M(q)) * SiLU(x W_g). The paper's third layout,
memory as context, is not offered: there a token's output depends on what later tokens of its segment have written.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from memformer_dist.cells.gated_delta import Block, GatedRead, QueriesKeysValues
from memformer_dist.cells.layers import Linear, SelfAttention, attend, full_precision, rotary, within
from memformer_dist.cells.layers_cell import LayersCell
from memformer_dist.cells.layers_config import LayersConfig
from memformer_dist.cells.recomputation import recomputed
from memformer_dist.segment import Segment

KEPT = 6.0  # alpha's offset: at first a token takes 1 / 400 of the memory away


class TitansConfig(LayersConfig):
    cell: Literal["titans"] = Field(
        "titans", description="Titans: the memory is a small MLP, trained while the text is read"
    )
    layout: Literal["mag", "lmm"] = Field(
        "mag",
        description="mag: the memory gates attention within the segment; lmm: the memory alone, without attention",
    )
    layers: PositiveInt = Field(12, description="layers, each with a memory per head")
    heads: PositiveInt = Field(8, description="H, in the attention, and memories of a layer")
    memory_depth: PositiveInt = Field(1, description="matrices of a memory; 1 is linear")
    expansion: PositiveInt = Field(4, description="inner width of a memory of two or more matrices, in head sizes K")
    persistent: PositiveInt = Field(4, description="learned keys and values of each attention (layout mag)")
    convolution: PositiveInt = Field(
        4, description="tokens that the short convolutions of queries, keys and values see"
    )
    chunk: PositiveInt = Field(
        32, description="c, tokens whose inner gradients are taken at the same weights; part of the model"
    )

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of a memory's matrices."""
        size = self.head_size
        return list(pairwise([size, *[size * self.expansion] * (self.memory_depth - 1), size]))

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "Titans":
        return Titans(self, vocab_size=vocab_size, segment_length=segment_length)


class TitansState(NamedTuple):
    memory: Tensor  # [B, layers, H, P], the P weights of each memory, matrix by matrix
    momentum: Tensor  # [B, layers, H, P]
    tail: Tensor  # [B, layers, convolution - 1, 3 D], what the convolutions still see of the segments before


class TitansFeatures(NamedTuple):
    hidden: Tensor  # [B, S, D], what the last layer reads
    read: Tensor  # [B, S, H, K], what its memory gave


class Gates(NamedTuple):
    """Of each token, [B, S, H]. At padding: 0, 0, 0, 0."""

    log_kept: Tensor  # log (1 - alpha)
    log_momentum: Tensor  # log eta
    step: Tensor  # theta
    moves: Tensor  # 1, and 0 at padding


def memorise(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    chunk: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Train and read the memories of a layer.

    queries, keys, values [B, S, H, K], a memory's matrices and their momenta [B, H, inputs, outputs] -> read [B, S, H, K],
    matrices, momenta. In the precision of the matrices, whatever the autocast.
    """
    lanes, size, heads, _ = queries.shape
    dtype = weights[0].dtype
    chunk = min(chunk, size)

    def chunks(x: Tensor) -> tuple[Tensor, ...]:
        """[B, S, H, ...] -> [B H, C, ...] each, the last one filled with padding"""
        padded = F.pad(x.to(dtype).transpose(1, 2), (0, 0, 0, -size % chunk))
        return padded.flatten(0, 1).split(chunk, 1)

    later = torch.ones(chunk, chunk, dtype=torch.bool, device=queries.device).triu(1)
    reads = []
    weights, momenta = ([x.flatten(0, 1) for x in tensors] for tensors in (weights, momenta))
    columns = (queries, keys, values, *(gate[..., None] for gate in gates))
    with full_precision(queries):
        for q, k, v, log_kept, log_momentum, step, moves in zip(*map(chunks, columns)):
            log_kept, log_momentum = log_kept.cumsum(1), log_momentum.cumsum(1)  # [B H, C, 1]
            kept, momentum = log_kept.exp(), log_momentum.exp()  # b, n
            keeping, carrying = (  # A, E
                (x - x.mT).masked_fill_(later, -torch.inf).exp() for x in (log_kept, log_momentum)
            )
            keeping = keeping * moves.mT
            moved, learned = keeping @ momentum, (keeping @ carrying) * step.mT  # f, G
            carried = carrying[:, -1:] * step.mT  # the last row of E diag(theta)
            inputs, errors = inner_gradient(k, v, weights)
            x, after = q, []
            for number, (w, s, i, e) in enumerate(zip(weights, momenta, inputs, errors)):
                x = F.gelu(x) if number else x
                x = kept * (x @ w) + moved * (x @ s) - (learned * (x @ i.mT)) @ e
                w = kept[:, -1:] * w + moved[:, -1:] * s - (learned[:, -1:].mT * i).mT @ e
                after.append((w, momentum[:, -1:] * s - (carried.mT * i).mT @ e))
            reads.append(x)
            weights, momenta = map(list, zip(*after))
    read = torch.cat(reads, 1)[:, :size].unflatten(0, (lanes, heads)).transpose(1, 2)
    weights, momenta = ([x.unflatten(0, (lanes, heads)) for x in tensors] for tensors in (weights, momenta))
    return read, weights, momenta


def inner_gradient(keys: Tensor, values: Tensor, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of |M(k) - v|^2 -> input i and error e of each matrix, whose gradient is i^T e, summed over the tokens.

    In closed form: torch.func does not work under ZeRO-3.
    """
    inputs, slopes = [keys], []
    for w in weights[:-1]:
        z = inputs[-1] @ w
        slopes.append(torch.special.ndtr(z) + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5)  # gelu'
        inputs.append(F.gelu(z))
    errors = [2 * (inputs[-1] @ weights[-1] - values)]
    for w, slope in zip(reversed(weights[1:]), reversed(slopes)):
        errors.insert(0, (errors[0] @ w.mT) * slope)
    return inputs, errors


class MemoryStart(nn.Module):
    """The learned weights [H, P] that a layer's memories start a document with: their last matrices small."""

    def __init__(self, config: TitansConfig):
        super().__init__()
        stds = [config.head_size**-0.5] * (config.memory_depth - 1) + [config.init_std]
        drawn = [torch.randn(config.heads, a * b) * std for (a, b), std in zip(config.shapes, stds)]
        self.weights = nn.Parameter(torch.cat(drawn, -1))

    def forward(self, memory: Tensor, fresh: Tensor) -> Tensor:
        """The layer's memory [B, H, P], and the learned one on the lanes bool [B] that start afresh."""
        return torch.where(fresh[:, None, None], self.weights.to(memory.dtype), memory)


class TitansMixer(nn.Module):
    """A layer's memories: trained on every token, and read by it."""

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.heads, self.chunk, self.shapes = config.heads, config.chunk, config.shapes
        self.norm = nn.LayerNorm(config.width)
        self.inputs = QueriesKeysValues(config, config.convolution)
        self.gates = Linear(config.width, 3 * config.heads, std=config.init_std, bias=True)

    def forward(
        self, hidden: Tensor, memory: Tensor, momentum: Tensor, tail: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, S, D], the layer's memory, momentum and tail -> what each token reads [B, S, H, K], and the three after it."""
        normed = self.norm(hidden)
        queries, keys, values, tail = self.inputs(normed, tail, length)
        real = within(length, hidden.shape[1])[..., None].to(memory.dtype).expand(-1, -1, self.heads)
        forget, keep, learn = self.gates(normed).to(memory.dtype).chunk(3, -1)
        gates = Gates(
            F.logsigmoid(KEPT - forget) * real,
            F.logsigmoid(keep) * real,
            learn.sigmoid() / (4 * self.chunk) * real,
            real,
        )
        weights, momenta = self._matrices(memory), self._matrices(momentum)
        read, *after = memorise(queries, keys, values, gates, weights, momenta, self.chunk)
        memory, momentum = (torch.cat([x.flatten(2) for x in tensors], -1) for tensors in after)
        return read.to(hidden.dtype), memory, momentum, tail

    def _matrices(self, flat: Tensor) -> list[Tensor]:
        """[B, H, P] -> [B, H, inputs, outputs] each."""
        parts = flat.split([a * b for a, b in self.shapes], -1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes)]


class GatedAttention(SelfAttention):
    """Causal attention within the segment and to persistent vectors, gated by what the memory gave."""

    def __init__(self, config: TitansConfig, output_std: float):
        super().__init__(config, output_std)
        self.positions = config.positions
        shape = 2, config.persistent, config.heads, config.head_size
        self.persistent = nn.Parameter(torch.randn(shape) * config.init_std)
        self.norm, self.read_norm = (nn.RMSNorm(config.head_size, eps=1e-5) for _ in range(2))

    def forward(self, normed: Tensor, read: Tensor) -> Tensor:  # type: ignore[override]
        """[B, S, D], [B, S, H, K] -> [B, S, D]"""
        size, rotation = normed.shape[1], None
        if self.positions == "rotary":
            rotation = rotary(torch.arange(size, device=normed.device), read.shape[-1], normed.dtype)
        queries, *keys_values = self.project(normed, rotation)
        keys, values = (
            torch.cat([own.to(x.dtype).expand(len(x), -1, -1, -1), x], 1)
            for own, x in zip(self.persistent, keys_values)
        )
        mask = torch.ones(size, keys.shape[1], dtype=torch.bool, device=normed.device).tril(keys.shape[1] - size)
        mixed = attend(queries, keys, values, mask=mask, dropout=self.dropout if self.training else 0.0)
        return self.output((self.norm(mixed.view_as(read).to(read.dtype)) * F.silu(self.read_norm(read))).flatten(2))


class Titans(LayersCell[TitansState, TitansFeatures]):
    memory_leaves = ("memory", "momentum", "tail")  # deeper tails hold what was read from the memory

    def __init__(self, config: TitansConfig, *, vocab_size: int, segment_length: int):
        super().__init__(config, vocab_size=vocab_size, segment_length=segment_length)
        self.starts = nn.ModuleList(MemoryStart(config) for _ in range(config.layers))
        self.mixers = nn.ModuleList(TitansMixer(config) for _ in range(config.layers))
        mix = GatedAttention if config.layout == "mag" else GatedRead
        self.blocks = nn.ModuleList(Block(config, config.layers, mix) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()

    def empty_state(self, lanes: int, device: torch.device | None = None) -> TitansState:
        config = self.config
        count = sum(a * b for a, b in config.shapes)
        memory = self.zeros(lanes, config.layers, config.heads, count, device=device)
        tail = self.zeros(lanes, config.layers, config.convolution - 1, 3 * config.width, device=device)
        return TitansState(memory, torch.zeros_like(memory), tail)

    def advance(self, segment: Segment, state: TitansState) -> tuple[TitansFeatures, TitansState]:
        fresh = segment.reset | segment.reset_memory
        memory = torch.stack([start(x, fresh) for start, x in zip(self.starts, state.memory.unbind(1))], 1)
        momentum, tail = (torch.where(fresh[:, None, None, None], 0, x) for x in (state.momentum, state.tail))
        hidden = self.embed(segment.tokens)
        again = self.config.checkpoint_layers
        layers: list[tuple[Tensor, ...]] = []  # what each read, its memory, its momentum, its tail
        for number, mixer in enumerate(self.mixers):
            if number > 0:
                hidden = recomputed(self.blocks[number - 1], hidden, layers[-1][0], when=again)
            states = (leaf[:, number] for leaf in (memory, momentum, tail))
            layers.append(recomputed(mixer, hidden, *states, segment.length, when=again))
        reads, *after = zip(*layers)
        return TitansFeatures(hidden, reads[-1]), TitansState(*(torch.stack(x, 1) for x in after))

    def hidden(self, segment: Segment, features: TitansFeatures) -> Tensor:
        return self.norm(recomputed(self.blocks[-1], *features, when=self.config.checkpoint_layers))
