"""What cells are built of: embedding, rotary positions, attention, feed-forward, stacks of such layers.

Layers are pre-LN with two or three residual branches, h + f(LN(h)): self-attention, cross-attention to a `source` (memory
slots, or the output of an encoder) where the stack has one, feed-forward. A decoder is a `causal` Stack, an encoder one that
is not.

Dimensions: B lanes, S positions of the stream, M positions of the source, D width, H heads, K = D / H. Tensors of heads are
[B, S, H, K]. Masks are bool, True where a key may be seen, and are passed only where something has to be hidden.

Generation keeps every layer's keys and values: `Stack.open` makes room and projects the source once, `Stack.extend` appends
positions. It has no dropout.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memformer_dist.cells.layers_config import BlocksConfig, LayersConfig
from memformer_dist.cells.recomputation import recomputed

ROTARY_BASE = 10000.0


class Linear(nn.Linear):
    """nn.Linear with weights from N(0, std^2) and biases 0.

    Drawn in reset_parameters, because under ZeRO-3 a parameter is out of reach once its module is built.
    """

    def __init__(self, inputs: int, outputs: int, *, std: float, bias: bool = False):
        self.std = std
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class BranchOutput(Linear):
    """The last projection of a residual branch: while it is zero, the branch adds nothing to the stream."""


class TokenEmbedding(nn.Module):
    """One matrix for both ends: tokens int64 [...] -> [..., D]; `as_head`, hidden [..., D] -> logits [..., vocab]."""

    def __init__(self, vocab_size: int, width: int, *, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width).normal_(std=std))

    def forward(self, inputs: Tensor, *, as_head: bool = False) -> Tensor:
        return F.linear(inputs, self.weight) if as_head else F.embedding(inputs, self.weight)


class LearnedStart(nn.Module):
    """A learned tensor that a state [B, *shape] starts from, drawn from N(0, std^2).

    It does the `where` itself, because ZeRO-3 shows a parameter to its own module alone.
    """

    def __init__(self, *shape: int, std: float):
        super().__init__()
        self.value = nn.Parameter(torch.empty(shape).normal_(std=std))

    def forward(self, state: Tensor, fresh: Tensor) -> Tensor:
        """The state, and the learned one on the lanes bool [B] that start afresh."""
        return torch.where(fresh.view(-1, *[1] * self.value.dim()), self.value.to(state.dtype), state)


class LearnedTokens(nn.Module):
    """Learned vectors [count, D], drawn from N(0, std^2), that stand beside the hidden states of every lane."""

    def __init__(self, count: int, width: int, *, std: float):
        super().__init__()
        self.value = nn.Parameter(torch.empty(count, width).normal_(std=std))

    def forward(self, hidden: Tensor, *, before: bool = False, after: bool = False) -> Tensor:
        """[B, S, D] -> the same with the learned ones before, after, or both."""
        own = self.value.to(hidden.dtype).expand(len(hidden), -1, -1)
        return torch.cat([own] * before + [hidden] + [own] * after, dim=1)


def rotary(positions: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864): int64 [...] -> unit complex numbers [..., 1, 1, K / 2].

    Computed when needed, in at least float32, rather than kept in a buffer, which would be rounded with the model.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=dtype) / head_size
    angles = positions.to(dtype)[..., None, None, None] * ROTARY_BASE**-exponents
    return torch.polar(torch.ones_like(angles), angles)


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of [B, S, ..., H, K]; in complex numbers, 4x faster than with sines."""
    pairs = torch.view_as_complex(heads.to(rotation.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(heads.dtype)


def within(length: Tensor, size: int) -> Tensor:
    """Which of `size` positions come before `length` int64 [...]: bool [..., size]."""
    return torch.arange(size, device=length.device) < length[..., None]


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of a tensor, where there is autocast: what is computed inside keeps its inputs' precision."""
    kind = like.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)


def key_mask(length: Tensor, size: int) -> Tensor:
    """Mask [B, 1, 1, size] that hides padded keys. An empty lane sees one, as a softmax over nothing is NaN."""
    return within(length.clamp(min=1), size)[:, None, None]


def segment_mask(length: Tensor, size: int, *, before: int = 0, after: int) -> Tensor:
    """Mask [B, 1, T, T] of a segment of `size` tokens, `length` int64 [B] of them real, with further vectors at both ends.

    T = before + size + after. Those before see one another, a token sees them and the tokens up to itself, those after see
    everything but padding.
    """
    positions = torch.arange(before + size + after, device=length.device)
    tokens = (positions >= before) & (positions < before + size)
    ends = torch.where(positions < before, before - 1, torch.where(tokens, positions, len(positions) - 1))
    padding = tokens & (positions >= before + length[:, None])  # [B, T]
    last = (positions >= before + size)[:, None] & padding[:, None]  # [B, T, T]
    return ((positions <= ends[:, None]) & ~last)[:, None]


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V of [B, S, H, K] over [B, M, H, K], heads side by side in the result: [B, S, D]."""
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, config: LayersConfig, output_std: float):
        super().__init__()
        width, bias = config.width, config.attention_bias
        self.heads, self.dropout = config.heads, config.dropout
        self.query_key_value = Linear(width, 3 * width, std=config.init_std, bias=bias)
        self.output = BranchOutput(width, width, std=output_std, bias=bias)

    def project(self, hidden: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] -> queries, keys, values, each [B, S, H, K]; queries and keys turned to their positions."""
        projected = self.query_key_value(hidden).unflatten(-1, (3, self.heads, -1))  # [B, S, 3, H, K]
        queries_keys, values = projected.split((2, 1), dim=2)
        if rotation is not None:
            queries_keys = rotate(queries_keys, rotation)
        return *queries_keys.unbind(2), values.squeeze(2)

    def forward(self, hidden: Tensor, rotation: Tensor | None, mask: Tensor | None, causal: bool) -> Tensor:
        queries, keys, values = self.project(hidden, rotation)
        dropout = self.dropout if self.training else 0.0
        return self.output(attend(queries, keys, values, mask=mask, causal=causal, dropout=dropout))


class CrossAttention(nn.Module):
    """Attention to a source: no positions on either side."""

    def __init__(self, config: LayersConfig, output_std: float):
        super().__init__()
        width, bias = config.width, config.attention_bias
        self.heads, self.dropout = config.heads, config.dropout
        self.query = Linear(width, width, std=config.init_std, bias=bias)
        self.key_value = Linear(width, 2 * width, std=config.init_std, bias=bias)
        self.output = BranchOutput(width, width, std=output_std, bias=bias)

    def project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, D] -> keys, values, each [B, M, H, K]."""
        return self.key_value(source).unflatten(-1, (2, self.heads, -1)).unbind(2)

    def read(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
        queries = self.query(hidden).unflatten(-1, (self.heads, -1))
        return self.output(attend(queries, keys, values, mask=mask, dropout=dropout))

    def forward(self, hidden: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        return self.read(hidden, *self.project(source), mask, self.dropout if self.training else 0.0)


class ShortConvolution(nn.Module):
    """y_i = sum over j < size of w_j * x_{i-j}, each of D channels for itself, across the borders of segments."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width).uniform_(-(size**-0.5), size**-0.5))

    def forward(self, inputs: Tensor, tail: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """inputs [B, S, D] of which `length` int64 [B] are real, and the `tail` [B, size - 1, D] of those before them
        -> outputs [B, S, D], the next tail."""
        size, segment = len(self.weight), inputs.shape[1]
        stream = torch.cat([tail.to(inputs.dtype), inputs], 1)
        outputs = sum(stream[:, i : i + segment] * weight for i, weight in enumerate(self.weight))
        last = length[:, None] + torch.arange(size - 1, device=length.device)  # of the stream's real positions
        kept = stream.gather(1, last[..., None].expand(-1, -1, stream.shape[2]))
        return outputs, kept.to(tail.dtype)


class FeedForward(nn.Sequential):
    def __init__(self, config: BlocksConfig, output_std: float):
        super().__init__(
            Linear(config.width, config.feed_forward, std=config.init_std, bias=True),
            nn.GELU(),
            BranchOutput(config.feed_forward, config.width, std=output_std, bias=True),
        )


class KeysValues(NamedTuple):
    """What a stack [B, layers, ..., H, K], or one layer of it [B, ..., H, K], keeps while a segment is generated."""

    keys: Tensor  # [B, layers, S, H, K], room for the whole segment
    values: Tensor
    source_keys: Tensor  # [B, layers, M, H, K]
    source_values: Tensor


class Layer(nn.Module):
    """With cross-attention to a source where there is a `source_std`, with which its output projection is drawn."""

    def __init__(self, config: LayersConfig, output_std: float, *, source_std: float | None):
        super().__init__()
        self.has_source = source_std is not None
        self.self_norm = nn.LayerNorm(config.width)
        self.self_attention = SelfAttention(config, output_std)
        if source_std is not None:
            self.cross_norm = nn.LayerNorm(config.width)
            self.cross_attention = CrossAttention(config, source_std)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config, output_std)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        source: Tensor | None = None,
        rotation: Tensor | None = None,
        mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        hidden = hidden + self.dropout(self.self_attention(self.self_norm(hidden), rotation, mask, causal))
        if source is not None:
            hidden = hidden + self.dropout(self.cross_attention(self.cross_norm(hidden), source, source_mask))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))

    def extend(
        self,
        hidden: Tensor,
        positions: Tensor,
        rotation: Tensor | None,
        mask: Tensor | None,
        source_mask: Tensor | None,
        past: KeysValues,
    ) -> Tensor:
        """The same for n more positions int64 [B, n] of a causal layer; `past` (of this layer) is written in place."""
        queries, keys, values = self.self_attention.project(self.self_norm(hidden), rotation)
        lanes = torch.arange(len(positions), device=positions.device)[:, None]
        past.keys[lanes, positions] = keys.to(past.keys.dtype)  # autocast makes others than the cache has
        past.values[lanes, positions] = values.to(past.values.dtype)
        hidden = hidden + self.self_attention.output(attend(queries, past.keys, past.values, mask=mask))
        if self.has_source:
            normed = self.cross_norm(hidden)
            hidden = hidden + self.cross_attention.read(normed, past.source_keys, past.source_values, source_mask)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class Stack(nn.Module):
    """Layers and the norm after the last. Projections into the residual stream start smaller by 1 / sqrt(2 layers).

    `silent_source`: those of the cross-attentions start at zero, as if there were no source.
    """

    def __init__(
        self, layers: int, config: LayersConfig, *, causal: bool, has_source: bool = True, silent_source: bool = False
    ):
        super().__init__()
        self.config, self.causal = config, causal
        output_std = config.init_std / (2 * layers) ** 0.5
        source_std = (0.0 if silent_source else output_std) if has_source else None
        made = [Layer(config, output_std, source_std=source_std) for _ in range(layers)]
        self.layers: Sequence[Layer] = nn.ModuleList(made)  # type: ignore[assignment]  # a list of Layers and nothing else
        self.norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        return rotary(positions, self.config.head_size, dtype) if self.config.positions == "rotary" else None

    def forward(
        self,
        hidden: Tensor,
        source: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden [B, S, D], source [B, M, D] -> [B, S, D]. A causal stack needs no mask: padding is at the end."""
        rotation = self.rotation(torch.arange(hidden.shape[1], device=hidden.device), hidden.dtype)
        for layer in self.layers:
            arguments = hidden, source, rotation, mask, source_mask, self.causal
            hidden = recomputed(layer, *arguments, when=self.config.checkpoint_layers)
        return self.norm(hidden)

    def open(self, source: Tensor, size: int) -> KeysValues:
        """Keys and values of the source [B, M, D], and room for `size` positions of the stream.

        Of the source of a stack that reads none, only the lanes, the precision and the device count.
        """
        lanes, layers, heads, head_size = len(source), len(self.layers), self.config.heads, self.config.head_size
        source_keys = source_values = source.new_zeros(lanes, layers, 0, heads, head_size)
        if projected := [layer.cross_attention.project(source) for layer in self.layers if layer.has_source]:
            source_keys, source_values = (torch.stack(tensors, dim=1) for tensors in zip(*projected))
        keys = source_keys.new_zeros(lanes, layers, size, heads, head_size)
        return KeysValues(keys, torch.zeros_like(keys), source_keys, source_values)

    def extend(
        self,
        hidden: Tensor,
        start: Tensor,
        past: KeysValues,
        *,
        mask: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """Append [B, n, D] at positions start int64 [B] and following; writes `past` in place. -> [B, n, D]

        `mask` [B, 1, n, size] or of a shape that expands to it; without one, each sees the positions up to itself.
        """
        positions = start[:, None] + torch.arange(hidden.shape[1], device=hidden.device)
        rotation = self.rotation(positions, hidden.dtype)
        if mask is None:
            mask = within(positions + 1, past.keys.shape[2])[:, None]
        for number, layer in enumerate(self.layers):
            of_layer = KeysValues(*(tensor[:, number] for tensor in past))
            hidden = layer.extend(hidden, positions, rotation, mask, source_mask, of_layer)
        return self.norm(hidden)
