"""MoM, Mixture-of-Memories (Du et al., arXiv 2502.13685): several memories per layer, of which a router opens k to each token.

    tokens --> [ h + read of the memories ; h + feed-forward ] per layer --> head, loss

Each layer carries M routed memories and a shared one; each is a matrix per head that the gated delta rule writes
(cells/gated_delta.py), with keys, values and gates of its own. Per token x_t

    p = softmax(x_t W_r),  T = the k largest,  w_m = p_m / sum over T of p       for m in T; the shared one's is 1
    M^m <- a^m (I - b^m k^m^T k^m) M^m + b^m k^m^T v^m                            for m in T and the shared one
    o_t = q_t (sum of w_m M^m) / sqrt(K)

A memory that is not opened stays as it is: its log a and b are 0, so that all of them run over all tokens with shapes that do
not depend on the text, exactly as if each had read its own tokens alone. The short convolution comes before the router: over
the tokens of each memory, as in the authors' code, it would see the shape of the text that follows.

So that all memories are used, a load-balancing loss is added per lane and segment, weight `balance` per token: M times the
sum over m of (share of the opened memories that were m) (mean of p_m), mean over layers; 1 where the load is even.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from memformer_dist.cells.gated_delta import Block, DeltaGates, gated_delta_rule, start, unit
from memformer_dist.cells.layers import Linear, ShortConvolution, full_precision, within
from memformer_dist.cells.layers_cell import LayersCell
from memformer_dist.cells.layers_config import BlocksConfig
from memformer_dist.cells.recomputation import recomputed
from memformer_dist.segment import Segment


class MoMConfig(BlocksConfig):
    cell: Literal["mom"] = Field(
        "mom", description="Mixture-of-Memories: a router opens some of several memories to a token"
    )
    layers: PositiveInt = Field(12, description="layers, each with memories + 1 memories")
    heads: PositiveInt = Field(4, description="H, matrices of a memory, of K x K numbers each, K = D / H")
    memories: PositiveInt = Field(4, description="M, routed memories of a layer, beside the one that all tokens share")
    active: PositiveInt = Field(2, description="k, routed memories that each token opens")
    balance: float = Field(1e-3, ge=0, description="weight of the load-balancing loss, per token")
    convolution: PositiveInt = Field(4, description="tokens that the short convolution before the router sees")
    chunk: PositiveInt = Field(32, description="tokens worked on at once; changes the order of additions alone")

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.active > self.memories:
            problems.append(f"active: found {self.active}, expected at most memories ({self.memories})")
        return problems

    def build(self, *, vocab_size: int, bos_id: int, segment_length: int) -> "MoM":
        return MoM(self, vocab_size=vocab_size, segment_length=segment_length)


class MoMState(NamedTuple):
    memory: Tensor  # [B, layers, M + 1, H, K, K], from keys to values; the last is the shared one
    tail: Tensor  # [B, layers, convolution - 1, D], what the convolutions still see of the segments before


class MoMFeatures(NamedTuple):
    hidden: Tensor  # [B, S, D], what the last layer reads
    read: Tensor  # [B, S, H, K], what its memories gave
    penalty: Tensor  # [B], the load-balancing loss of a token, before its weight


class Router(Linear):
    """Which memories each token opens, and how much of each it reads. In full precision: rounding would make ties."""

    def __init__(self, config: MoMConfig):
        self.active = config.active
        super().__init__(config.width, config.memories, std=config.init_std)

    def forward(self, hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """[B, S, D], bool [B, S] -> opened bool [B, S, M + 1], weights [B, S, M + 1], the load-balancing loss [B]."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with full_precision(hidden):
            chances = F.linear(hidden.to(dtype), self.weight.to(dtype)).softmax(-1)
        opened = torch.zeros_like(chances).scatter(-1, chances.topk(self.active).indices, 1.0)
        weights = chances * opened
        weights = weights / weights.sum(-1, keepdim=True)
        tokens = real.sum(1, keepdim=True).clamp(min=1)
        loads, means = ((x * real[..., None]).sum(1) / tokens for x in (opened / self.active, chances))  # [B, M]
        shared = torch.ones_like(weights[..., :1])
        opened, weights = torch.cat([opened, shared], -1) > 0, torch.cat([weights, shared], -1)
        return opened & real[..., None], weights, self.out_features * (loads * means).sum(-1)


class MoMMixer(nn.Module):
    """A layer's memories: written by the tokens that they are open to, and read by them."""

    def __init__(self, config: MoMConfig):
        super().__init__()
        width, std, memories = config.width, config.init_std, config.memories + 1
        self.memories, self.heads, self.chunk = memories, config.heads, config.chunk
        self.norm = nn.LayerNorm(width)
        self.convolution = ShortConvolution(config.convolution, width)
        self.router = Router(config)
        self.query, self.key_value = Linear(width, width, std=std), Linear(width, 2 * memories * width, std=std)
        self.gates = DeltaGates(width, memories * config.heads, std)

    def forward(self, hidden: Tensor, memory: Tensor, tail: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        """[B, S, D], the layer's memory and tail -> what each token reads [B, S, H, K], memory, tail, penalty [B]."""
        mixed, tail = self.convolution(self.norm(hidden), tail, length)
        opened, weights, penalty = self.router(mixed, within(length, hidden.shape[1]))
        queries = unit(F.silu(self.query(mixed)).unflatten(-1, (self.heads, -1))).repeat(1, 1, self.memories, 1)
        keys, values = F.silu(self.key_value(mixed)).unflatten(-1, (2, self.memories * self.heads, -1)).unbind(2)
        log_decay, beta = (gate * opened.repeat_interleave(self.heads, -1) for gate in self.gates(mixed))
        reads, after = gated_delta_rule(queries, unit(keys), values, log_decay, beta, memory.flatten(1, 2), self.chunk)
        read = (reads.unflatten(2, (self.memories, self.heads)) * weights[..., None, None]).sum(2)
        return read.to(hidden.dtype), after.view_as(memory), tail, penalty


class MoM(LayersCell[MoMState, MoMFeatures]):
    memory_leaves = ("memory", "tail")  # deeper tails hold what was read from the memory

    def __init__(self, config: MoMConfig, *, vocab_size: int, segment_length: int):
        super().__init__(config, vocab_size=vocab_size, segment_length=segment_length)
        self.mixers = nn.ModuleList(MoMMixer(config) for _ in range(config.layers))
        self.blocks = nn.ModuleList(Block(config, config.layers) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()

    def empty_state(self, lanes: int, device: torch.device | None = None) -> MoMState:
        config, size = self.config, self.config.head_size
        memory = self.zeros(lanes, config.layers, config.memories + 1, config.heads, size, size, device=device)
        return MoMState(memory, self.zeros(lanes, config.layers, config.convolution - 1, config.width, device=device))

    def advance(self, segment: Segment, state: MoMState) -> tuple[MoMFeatures, MoMState]:
        memory, tail = start(state, segment.reset | segment.reset_memory)
        hidden = self.embed(segment.tokens)
        again = self.config.checkpoint_layers
        layers: list[tuple[Tensor, ...]] = []  # what each read, its memory, its tail, its penalty
        for number, mixer in enumerate(self.mixers):
            if number > 0:
                hidden = recomputed(self.blocks[number - 1], hidden, layers[-1][0], when=again)
            layers.append(recomputed(mixer, hidden, memory[:, number], tail[:, number], segment.length, when=again))
        reads, memories, tails, penalties = zip(*layers)
        features = MoMFeatures(hidden, reads[-1], torch.stack(penalties, 1).mean(1))
        return features, MoMState(torch.stack(memories, 1), torch.stack(tails, 1))

    def hidden(self, segment: Segment, features: MoMFeatures) -> Tensor:
        block = self.blocks[-1]
        return self.norm(recomputed(block, features.hidden, features.read, when=self.config.checkpoint_layers))

    def readout(self, segment: Segment, features: MoMFeatures) -> Tensor:
        nll = super().readout(segment, features)
        penalty = (features.penalty - features.penalty.detach()) * segment.length * self.config.balance
        return torch.cat([nll[:, :1] + penalty[:, None], nll[:, 1:]], 1)

    @torch.no_grad()
    def diagnose(self, segment: Segment, state: MoMState) -> dict[str, Tensor]:
        """The load-balancing loss, mean over lanes and layers: 1 where the load is even, at most M / k."""
        return {"balance": self.advance(segment, state)[0].penalty.mean()}
