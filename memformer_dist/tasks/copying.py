"""Copy and reverse: symbols spread over the document, all of them asked for at its end, in their order or backwards.

    segment 0                 segment 1                 ...   the last segments
    [! a b n n n n n]         [! c d n n n n n]               [? a b c d ... -> the one after each, up to the last]

with 2 symbols per segment, n noise from the same alphabet. Where the symbols fill their segments there is neither mark nor
noise: RMT's tasks (arXiv 2207.06881) are 8 symbols per segment of 8, twice over for copy24 with 9 segments, and reversed
for reverse24 with 6. As many segments as the answer needs are the answer's, the others hold symbols.
"""

from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt

from memformer_dist.segment import IGNORE
from memformer_dist.tasks.base import Documents, Draws, Task, TaskConfig


class CopyConfig(TaskConfig):
    name: Literal["copy"] = Field(
        "copy", description="symbols spread over the document, all of them asked for at its end"
    )
    symbols: int = Field(16, ge=2, description="symbols in the alphabet: chance is 1 / symbols")
    per_segment: PositiveInt = Field(1, description="symbols in each segment but those of the answer")
    order: Literal["same", "reversed"] = Field("same", description="the order in which they are asked for")
    times: PositiveInt = Field(1, description="how often the whole answer is given")

    def build(self, segment_length: int, *, held_out: bool = False) -> "Copy":
        return Copy(self, segment_length)


class Copy(Task):
    def __init__(self, config: CopyConfig, segment_length: int):
        super().__init__(config.name, segment_length)
        self.config = config
        self.names = [*(f"symbol {i}" for i in range(config.symbols)), "!", "?"]
        self.mark, self.question = config.symbols, config.symbols + 1

    def sources(self, segments: int) -> int:
        """How many of the document's segments hold symbols: as many as leave room for the answer."""
        answer = self.config.per_segment * self.config.times  # tokens for each of them
        return segments * self.segment_length // (answer + self.segment_length)

    def problem(self, segments: int) -> str | None:
        config, size = self.config, self.segment_length
        if config.per_segment > size:
            return f"found {config.per_segment} symbols per segment of {size} tokens, expected at most {size}"
        if segments >= self.least and self.sources(segments) == 0:
            least = -(-(config.per_segment * config.times + size) // size)
            return f"found {segments} segments, expected at least {least}: the answer takes all but one of them"
        return super().problem(segments)

    def documents(self, keys: np.ndarray, segments: int) -> Documents:
        config, draws, size, sources = self.config, Draws(keys), self.segment_length, self.sources(segments)
        tokens = draws.integers(config.symbols, segments, size)
        first = int(config.per_segment < size)  # behind the mark
        if first:
            tokens[:, :sources, 0] = self.mark
        asked = tokens[:, :sources, first : first + config.per_segment].reshape(len(keys), -1)
        if config.order == "reversed":
            asked = asked[:, ::-1]
        answer = np.tile(asked, config.times)
        tokens, labels = tokens.reshape(len(keys), -1), np.full((len(keys), segments * size), IGNORE)
        start, length = sources * size, answer.shape[1]
        tokens[:, start] = self.question
        tokens[:, start + 1 : start + length + 1] = answer[:, : tokens.shape[1] - start - 1]
        labels[:, start : start + length] = answer
        return Documents(tokens, labels)
