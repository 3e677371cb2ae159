"""Transformer-XL and LaMemo position by position, in loops over sums of exponentials: what their cells are compared with."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memformer_dist.cells.lamemo import LaMemo
from memformer_dist.cells.transformer_xl import HeadBias, TransformerXL
from memformer_dist.segment import IGNORE, Segment

Sums = list[tuple[Tensor, Tensor]]  # of each head: sum of exp A, sum of exp A v


class Loops:
    """The parts of a cell. `flaw` is a mistake that must show: "content bias", "distance bias", "distance", "memory"."""

    def __init__(self, cell: TransformerXL | LaMemo, flaw: str = ""):
        self.cell, self.flaw, self.head_size = cell, flaw, cell.config.head_size
        self.memory_length = cell.config.memory_length - (flaw == "memory")

    def _head(self, vector: Tensor, head: int) -> Tensor:
        return vector[head * self.head_size : (head + 1) * self.head_size]

    def wave(self, distance: int) -> Tensor:
        width = self.cell.config.width
        angles = [distance / 10000.0 ** (2 * pair / width) for pair in range(width // 2)]
        angles = torch.tensor(angles, dtype=torch.float64)
        return torch.cat([angles.sin(), angles.cos()])

    def sums(self, layer, query: Tensor, keys: Iterable[Tensor], distances: Iterable[int], bias: HeadBias) -> Sums:
        """Of a position whose input is `query` [D], over others at distances of at least 0."""
        attention, norm = layer.attention, layer.attention_norm
        totals = [(torch.zeros((), dtype=torch.float64), torch.zeros(self.head_size, dtype=torch.float64))]
        totals *= self.cell.config.heads
        for inputs, distance in zip(keys, distances, strict=True):
            key, value = (attention.key_value.weight @ _norm(norm, inputs)).chunk(2)
            relative = attention.distance.weight @ self.wave(distance + (self.flaw == "distance"))
            for head, (total, mixed) in enumerate(totals):
                q = self._head(attention.query.weight @ _norm(norm, query), head)
                k, r = self._head(key, head), self._head(relative, head)
                score = q @ k + q @ r
                score += 0 if self.flaw == "content bias" else attention.content_bias.bias[head] @ k
                score += 0 if self.flaw == "distance bias" else bias.bias[head] @ r
                weight = torch.exp(score / self.head_size**0.5)
                totals[head] = total + weight, mixed + weight * self._head(value, head)
        return totals

    def add_branches(self, layer, x: Tensor, sums: Sums) -> Tensor:
        x = x + layer.attention.output.weight @ torch.cat([mixed / total for total, mixed in sums])
        inner, outer = layer.feed_forward[0], layer.feed_forward[2]
        return x + outer.weight @ F.gelu(inner.weight @ _norm(layer.feed_forward_norm, x) + inner.bias) + outer.bias

    def logits(self, x: Tensor) -> Tensor:
        return self.cell.embedding.weight @ _norm(self.cell.norm, x)


def _norm(module, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape, module.weight, module.bias)


@torch.no_grad()
def transformer_xl_logits(cell: TransformerXL, document: Sequence[Sequence[int]], flaw: str = "") -> Tensor:
    """[tokens, vocabulary] of a document, given as the tokens of each segment."""
    loops, logits = Loops(cell, flaw), []
    read: list[list[Tensor]] = []  # the inputs of every layer, at every position
    for tokens in document:
        first = max(0, len(read) - loops.memory_length)
        for token in tokens:
            x, inputs = cell.embedding.weight[token], []
            for number, layer in enumerate(cell.layers):
                inputs.append(x)
                keys = [position[number] for position in read[first:]] + [x]
                distances = range(len(keys) - 1, -1, -1)
                x = loops.add_branches(layer, x, loops.sums(layer, x, keys, distances, layer.attention.distance_bias))
            read.append(inputs)
            logits.append(loops.logits(x))
    return torch.stack(logits)


@torch.no_grad()
def lamemo_logits(cell: LaMemo, document: Sequence[Sequence[int]], flaw: str = "") -> Tensor:
    """The same. Further flaws: "no look-ahead", and "seen twice": every look-ahead is over all of the right."""
    loops, layers, logits = Loops(cell, flaw), [*cell.layers, cell.last_layer], []
    embedded: list[Tensor] = []
    sums: list[list[Sums]] = [[] for _ in cell.layers]  # of every position, in every layer but the last
    looked: list[int] = []  # to which position each has looked ahead
    for tokens in document:
        start, first = len(embedded), max(0, len(embedded) - loops.memory_length)
        embedded += [cell.embedding.weight[token] for token in tokens]
        looked += range(start, len(embedded))
        ahead_to = min(start, len(embedded) - 1)  # the segment's first token, if it has one
        x = dict(enumerate(embedded[first:], first))
        for number, layer in enumerate(layers):
            found = {}
            for i in range(start, len(embedded)):
                keys, distances = [x[j] for j in range(first, i + 1)], [i - j for j in range(first, i + 1)]
                found[i] = loops.sums(layer, x[i], keys, distances, layer.attention.distance_bias)
                if layer is not cell.last_layer:
                    sums[number].append(found[i])
            if layer is not cell.last_layer:
                for i in range(first, start):
                    ahead = range(i + 1 if flaw == "seen twice" else max(i, looked[i]) + 1, ahead_to + 1)
                    ahead = [] if flaw == "no look-ahead" else ahead
                    new = loops.sums(layer, x[i], [x[j] for j in ahead], [j - i for j in ahead], layer.ahead_bias)
                    found[i] = [(a + c, b + d) for (a, b), (c, d) in zip(sums[number][i], new, strict=True)]
                    sums[number][i] = found[i]
            x = {i: loops.add_branches(layer, x[i], found[i]) for i in found}
        looked[first:start] = [ahead_to] * (start - first)
        logits += [loops.logits(x[i]) for i in range(start, len(embedded))]
    return torch.stack(logits)


@torch.no_grad()
def cell_logits(cell: TransformerXL | LaMemo, documents: Sequence[Sequence[Sequence[int]]]) -> list[Tensor]:
    """The same of the cell itself, documents side by side, each cut into as many segments in its own way."""
    state, pieces = cell.empty_state(len(documents)), [[] for _ in documents]
    for t, rows in enumerate(zip(*documents, strict=True)):
        length = torch.tensor([len(row) for row in rows])
        tokens = torch.tensor([[*row, *[0] * (cell.segment_length - len(row))] for row in rows])
        flags = [torch.full_like(length, flag, dtype=torch.bool) for flag in (t == 0, False)]
        segment = Segment(tokens, torch.full_like(tokens, IGNORE), length, *flags, length, length)
        features, state = cell("advance", segment, state)
        for lane, row in enumerate(cell.logits(segment, features)):
            pieces[lane].append(row[: length[lane]])
    return [torch.cat(rows) for rows in pieces]


def cut(seed: int, lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    """A random document in segments of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
