"""Cells as their papers print them, for one lane at a time; `mistakes` are the rules that each can be made to break.

Built of tests/helpers/loops.py, for segments of SIZE tokens. They work on the real tokens alone: padding does not exist here.
"""

import math

import torch
from torch import Tensor

from memformer_dist.segment import Segment
from tests.helpers.loops import Loops
from tests.helpers.memformer import SIZE


class RmtReference(Loops):
    """Recurrent Memory Transformer: read tokens, the segment, write tokens."""

    mistakes = (
        "read tokens are causal",
        "tokens do not see the memory",
        "write tokens do not see one another",
        "write tokens behind the last token",
        "write tokens start as the learned vectors",
        "memory from the read tokens",
        "the memory is added up",
        "the memory is not normed",
        "a reset to zeros",
        "reset_memory ignored",
        "no positions",
    )

    def tick(self, segment: Segment, lane: int, state: Tensor | None) -> tuple[Tensor, tuple[Tensor], Tensor]:
        length, initial = int(segment.length[lane]), self.weights["start.value"]
        memory = initial if state is None or segment.reset[lane] or segment.reset_memory[lane] else state
        if self.mistake == "a reset to zeros" and segment.reset[lane]:
            memory = torch.zeros_like(initial)
        if self.mistake == "reset_memory ignored" and state is not None and not segment.reset[lane]:
            memory = state
        slots, end = len(memory), len(memory) + length

        def seen(i: int, j: int) -> bool:
            if i < slots:
                return j < slots if self.mistake != "read tokens are causal" else j <= i
            if i < end:
                return slots * (self.mistake == "tokens do not see the memory") <= j <= i
            return j <= (i if self.mistake == "write tokens do not see one another" else end + slots)

        first = end if self.mistake == "write tokens behind the last token" else slots + SIZE
        positions = [*range(end), *range(first, first + slots)]
        written = initial if self.mistake == "write tokens start as the learned vectors" else memory
        x = torch.cat([memory, self.embedded(segment.tokens[lane, :length].tolist()), written])
        for number in range(self.config.layers):
            x = self.layer(f"layers.layers.{number}", x, positions, seen)
        normed = x if self.mistake == "the memory is not normed" else self.norm("layers.norm", x)
        after = normed[:slots] if self.mistake == "memory from the read tokens" else normed[end:]
        after = after + memory if self.mistake == "the memory is added up" else after
        return self.losses(self.norm("layers.norm", x)[slots:end], segment.labels[lane].tolist()), (after,), after


class ArmtReference(Loops):
    """Associative Recurrent Memory Transformer: the segment, then the write tokens, which write one by one."""

    mistakes = (
        "one roll alone",
        "keys of any norm",
        "no normaliser",
        "no delta rule",
        "keys count every time",
        "write tokens one after another",
        "write tokens do not see one another",
        "write tokens behind the last token",
        "read behind the layer",
        "written from the layer's input",
        "reset_memory ignored",
    )

    def features(self, x: Tensor) -> Tensor:
        u = torch.cat([torch.where(x > 0, x, 0), torch.where(x < 0, -x, 0)])
        shifts = (1, 1, 1) if self.mistake == "one roll alone" else (1, 2, 3)
        products = torch.cat([u * torch.stack([u[i - shift] for i in range(len(u))]) for shift in shifts])
        return products if self.mistake == "keys of any norm" else products / torch.sqrt((products**2).sum() + 1e-30)

    def found(self, key: Tensor, associations: Tensor, keys: Tensor) -> Tensor:
        value = key @ associations
        return value if self.mistake == "no normaliser" else value / (key @ keys + 1e-5)

    def read(self, name: str, x: Tensor, associations: Tensor, keys: Tensor) -> Tensor:
        return torch.stack(
            [row + self.found(self.features(self.linear(f"{name}.query", row)), associations, keys) for row in x]
        )

    def write(self, name: str, rows: Tensor, associations: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        associations_before, keys_before = associations, keys
        for row in rows:
            if self.mistake == "write tokens one after another":
                associations_before, keys_before = associations, keys
            key, value = self.features(self.linear(f"{name}.key", row)), self.linear(f"{name}.value", row)
            strength = 1 / (1 + torch.exp(-self.linear(f"{name}.strength", row)))
            old = 0 if self.mistake == "no delta rule" else self.found(key, associations_before, keys_before)
            associations = associations + strength * key[:, None] * (value - old)[None]
            share = torch.clip(1 - key @ keys_before, 0, 1)
            if self.mistake != "a gradient through how often a key counts":
                share = share.detach()
            keys = keys + (1 if self.mistake == "keys count every time" else share) * key
        return associations, keys

    def tick(self, segment: Segment, lane: int, state: tuple | None) -> tuple[Tensor, tuple, tuple]:
        length, config = int(segment.length[lane]), self.config
        zeros = self.weights["embedding.weight"].new_zeros(config.layers, 6 * config.memory_width, config.width)
        associations, keys = state or (zeros, zeros[..., 0])
        if segment.reset[lane] or (segment.reset_memory[lane] and self.mistake != "reset_memory ignored"):
            associations, keys = zeros, zeros[..., 0]

        def seen(i: int, j: int) -> bool:
            return j <= i or (i >= length and self.mistake != "write tokens do not see one another")

        first = length if self.mistake == "write tokens behind the last token" else SIZE
        positions = [*range(length), *range(first, first + config.write_tokens)]
        x = torch.cat([self.embedded(segment.tokens[lane, :length].tolist()), self.weights["write_tokens.value"]])
        after = []
        for number, own in enumerate(zip(associations, keys, strict=True)):
            name, entering = f"memories.{number}", x
            if self.mistake != "read behind the layer":
                x = self.read(name, x, *own)
            x = self.layer(f"stack.layers.{number}", x, positions, seen)
            if self.mistake == "read behind the layer":
                x = self.read(name, x, *own)
            rows = entering if self.mistake == "written from the layer's input" else x
            after.append(self.write(name, rows[length:], *own))
        nll = self.losses(self.norm("stack.norm", x)[:length], segment.labels[lane].tolist())
        state = tuple(torch.stack(leaves) for leaves in zip(*after, strict=True))
        return nll, state, state


class HmtReference(Loops):
    """Hierarchical Memory Transformer, causal: a list of memory embeddings and a list of tokens."""

    mistakes = (
        "the segment's own beginning is summarised",
        "no recall",
        "nothing is overwritten",
        "no learned vector among others",
        "scores of any size",
        "keys are recalled",
        "the first row is remembered",
        "the last vector behind the last token",
        "the tail at the left",
        "a tail of the last segment alone",
        "a reset memory drops the tail",
        "reset_memory ignored",
        "no positions",
    )

    def backbone(self, x: Tensor, positions: list[int]) -> Tensor:
        for number in range(self.config.layers):
            x = self.layer(f"layers.layers.{number}", x, positions, lambda i, j: j <= i)
        return self.norm("layers.norm", x)

    def recall(self, summary: Tensor, embeddings: list[Tensor]) -> Tensor:
        start = self.weights["recall.start.value"][0]
        if self.mistake == "no recall":
            return start
        kept = embeddings if self.mistake == "nothing is overwritten" else embeddings[-self.config.slots :]
        candidates = torch.stack(kept if kept and self.mistake == "no learned vector among others" else [start, *kept])
        query, keys = self.linear("recall.query", summary), self.linear("recall.key", candidates)
        scale = 1 if self.mistake == "scores of any size" else math.sqrt(self.config.width)
        weights = torch.stack([torch.exp(query @ key / scale) for key in keys])
        values = keys if self.mistake == "keys are recalled" else candidates
        return sum(weight * value for weight, value in zip(weights / weights.sum(), values, strict=True))

    def tick(self, segment: Segment, lane: int, state: tuple[list, list] | None) -> tuple[Tensor, tuple, tuple]:
        embeddings, tail = state if state is not None and not segment.reset[lane] else ([], [])
        if segment.reset_memory[lane] and self.mistake != "reset_memory ignored":
            embeddings = []
            tail = [] if self.mistake == "a reset memory drops the tail" else tail
        tokens, sensory = segment.tokens[lane, : segment.length[lane]].tolist(), self.config.sensory_tokens
        first = 1 if self.mistake == "the tail at the left" else 1 + sensory - len(tail)
        before = [0, *range(first, first + len(tail))]

        end, summarised = self.weights["summary.value"], tail
        if self.mistake == "the segment's own beginning is summarised":
            summarised = (tokens + tail)[: len(tail)]
        summary = self.backbone(torch.cat([end, self.embedded(summarised), end]), [*before, 1 + sensory])[-1]
        ends = self.recall(summary, embeddings)[None]
        last = 1 + sensory + (len(tokens) if self.mistake == "the last vector behind the last token" else SIZE)
        positions = [*before, *range(1 + sensory, 1 + sensory + len(tokens)), last]
        hidden = self.backbone(torch.cat([ends, self.embedded(tail), self.embedded(tokens), ends]), positions)
        nll = self.losses(hidden[1 + len(tail) : -1], segment.labels[lane].tolist())

        embeddings = [*embeddings, hidden[0 if self.mistake == "the first row is remembered" else -1]]
        memory = [torch.zeros_like(hidden[0])] * self.config.slots
        for number, embedding in enumerate(embeddings):
            memory[number % len(memory)] = embedding
        text = tokens if self.mistake == "a tail of the last segment alone" else tail + tokens
        return nll, (torch.stack(memory),), (embeddings, text[-sensory:])
