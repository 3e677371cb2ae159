"""Needle: one symbol among noise, asked for at the end of the document.

    segment 0              segment 1             ...   the last one
    [! y n n n n n n]      [n n n n n n n n]           [n n n n n n n ?]  -> y

! marks the symbol, n are other symbols, drawn from the same alphabet: what counts can be told by its mark alone. With
several needles the last one counts: the memory must overwrite what it holds.
"""

from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt

from memformer_dist.segment import IGNORE
from memformer_dist.tasks.base import Documents, Draws, Task, TaskConfig


class NeedleConfig(TaskConfig):
    name: Literal["needle"] = Field("needle", description="one symbol among noise, asked for at the document's end")
    symbols: int = Field(16, ge=2, description="symbols in the alphabet: chance is 1 / symbols")
    place: Literal["start", "random"] = Field(
        "start",
        description="where the first needle is: the document's first tokens, or anywhere before the last segment",
    )
    needles: PositiveInt = Field(1, description="needles in a document, the further ones anywhere; the last one counts")

    def build(self, segment_length: int, *, held_out: bool = False) -> "Needle":
        return Needle(self, segment_length)


class Needle(Task):
    def __init__(self, config: NeedleConfig, segment_length: int):
        super().__init__(config.name, segment_length)
        self.config = config
        self.names = [*(f"symbol {i}" for i in range(config.symbols)), "!", "?"]
        self.mark, self.question = config.symbols, config.symbols + 1

    def problem(self, segments: int) -> str | None:
        room = (segments - 1) * self.segment_length // 2
        if segments > 1 and room < self.config.needles:
            return f"found {segments} segments of {self.segment_length} tokens, which have no room for the needles"
        return super().problem(segments)

    def documents(self, keys: np.ndarray, segments: int) -> Documents:
        config, draws, lanes = self.config, Draws(keys), np.arange(len(keys))
        length, room = segments * self.segment_length, (segments - 1) * self.segment_length
        tokens = draws.integers(config.symbols, length)
        # Needles lie at different even places, so that a mark and its symbol do not overlap with another's.
        start = int(config.place == "start")  # needles that have their place
        drawn = start + draws.distinct(room // 2 - start, config.needles - start)
        places = 2 * np.concatenate([np.zeros((len(keys), start), np.int64), drawn], axis=1)  # [B, needles]
        tokens[lanes[:, None], places] = self.mark
        tokens[:, -1] = self.question
        labels = np.full_like(tokens, IGNORE)
        labels[:, -1] = tokens[lanes, places.max(1) + 1]
        return Documents(tokens, labels)
