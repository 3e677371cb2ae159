"""Associative retrieval: pairs of a key and a value, then keys whose values are asked for.

    segment 0              segment 1              ...   the last one
    [k3 v7 n n n n n n]    [n n k1 v2 n n n n]          [? k1 -> v2  k3 -> v7 ...]

Keys are their own alphabet and different within a document; values and noise share theirs, so that the value is what
comes after a key. With several queries (multi-query associative recall, arXiv 2312.04927) the keys that are asked for
are different ones too.
"""

from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt

from memformer_dist.segment import IGNORE
from memformer_dist.tasks.base import Documents, Draws, Task, TaskConfig


class RetrievalConfig(TaskConfig):
    name: Literal["retrieval"] = Field("retrieval", description="pairs of a key and a value, then keys asked for")
    pairs: PositiveInt = Field(4, description="pairs in a document, at different places before the last segment")
    queries: PositiveInt = Field(1, description="keys asked for in the last segment, at most `pairs`")
    keys: PositiveInt = Field(16, description="keys that there are, at least `pairs`")
    values: int = Field(16, ge=2, description="values that there are: chance is 1 / values")

    def build(self, segment_length: int, *, held_out: bool = False) -> "Retrieval":
        return Retrieval(self, segment_length)


class Retrieval(Task):
    def __init__(self, config: RetrievalConfig, segment_length: int):
        super().__init__(config.name, segment_length)
        self.config = config
        self.names = [*(f"value {i}" for i in range(config.values)), *(f"key {i}" for i in range(config.keys)), "?"]
        self.question = len(self.names) - 1

    def problem(self, segments: int) -> str | None:
        config, size = self.config, self.segment_length
        if config.queries > config.pairs or config.pairs > config.keys:
            return f"found {config.queries} queries, {config.pairs} pairs and {config.keys} keys, expected no more in this order"
        if 2 * config.queries > size:
            return f"found {config.queries} queries in a segment of {size} tokens, expected at most {size // 2}"
        if segments >= self.least and (segments - 1) * size // 2 < config.pairs:
            return f"found {segments} segments of {size} tokens, which have no room for the pairs"
        return super().problem(segments)

    def documents(self, keys: np.ndarray, segments: int) -> Documents:
        config, draws, size = self.config, Draws(keys), self.segment_length
        lanes = np.arange(len(keys))[:, None]
        tokens = draws.integers(config.values, segments * size)
        # Pairs lie at different even places, so that none overlaps with another.
        places = 2 * draws.distinct((segments - 1) * size // 2, config.pairs)  # [B, pairs]
        tokens[lanes, places] = config.values + draws.distinct(config.keys, config.pairs)
        asked = places[:, : config.queries]  # random ones: the order of places and keys is
        last = tokens[:, -size:]  # a view
        first = size - 2 * config.queries  # a question, then the first query; the last one is the document's last token
        last[:, first] = self.question
        last[:, first + 1 :: 2] = tokens[lanes, asked]
        last[:, first + 2 :: 2] = tokens[lanes, asked[:, :-1] + 1]
        labels = np.full_like(tokens, IGNORE)
        labels[:, -size:][:, first + 1 :: 2] = tokens[lanes, asked + 1]
        return Documents(tokens, labels)
