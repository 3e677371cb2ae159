"""What a task is: documents made up from a number, whose answers lie segments behind.

    task = NeedleConfig().build(segment_length=8)
    documents = task.documents(keys(0, np.arange(64)), segments=10)
    documents.tokens                    # int64 [64, 80]
    documents.labels                    # the same shape: the next token where that is an answer, IGNORE elsewhere

A document is a pure function of its key and its length, so nothing is stored, every training step has new ones, and a
run that is resumed reads what it would have read. No answer can be told from the segment that it stands in: what is
asked for was read in an earlier one, and only a state that was carried from there has it.

Random numbers are hashes of (key, place), since a generator per document would take longer than a model's step.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from pydantic import Field, PositiveInt

from memformer_dist.section import Section
from memformer_dist.vocabulary import Vocabulary

TRAINING, HELD_OUT, CARRIED = range(
    3
)  # streams of keys, which never meet: of documents, and of what is carried to them
STREAMS = 3
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Documents(NamedTuple):
    tokens: np.ndarray  # int64 [B, N S]
    labels: np.ndarray  # int64 [B, N S], IGNORE where nothing is asked


class Task:
    """Makes documents. Tokens are numbered from 0; `names` says what they stand for.

    least   segments of the shortest document
    """

    names: list[str]
    least: int = 2

    def __init__(self, name: str, segment_length: int):
        self.name, self.segment_length = name, segment_length

    @property
    def vocabulary(self) -> Vocabulary:
        """No document holds BOS or EOS: both stand for what is read before a document, the last token."""
        last = len(self.names) - 1
        facts = "\n".join([self.name, *self.names])
        return Vocabulary(
            size=len(self.names), bos_id=last, eos_id=last, tokenizer_sha256=hashlib.sha256(facts.encode()).hexdigest()
        )

    def problem(self, segments: int) -> str | None:
        """Why there is no document of so many segments, in words; None if there is."""
        if segments < self.least:
            return f"found {segments} segments, expected at least {self.least}"
        return None

    def documents(self, keys: np.ndarray, segments: int) -> Documents:
        """Documents of uint64 [B] keys, each of `segments` segments, for which `problem` finds nothing."""
        raise NotImplementedError


class TaskConfig(Section):
    """What `data.task` may say of any task."""

    name: str
    carry: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of training documents that start from the memory that the lane's last document left, instead of"
        " an empty one (state passing, arXiv 2507.02782); what that document held no longer counts",
    )
    held_out_documents: PositiveInt = Field(256, description="documents of an evaluation in training and at its end")
    held_out_segments: PositiveInt = Field(32, description="segments of each of them")

    def build(self, segment_length: int, *, held_out: bool = False) -> Task:
        """The task; `held_out`: of the documents of an evaluation. Raises UserError where a text cannot be read."""
        raise NotImplementedError


def keys(seed: int, numbers: np.ndarray, stream: int = TRAINING) -> np.ndarray:
    """uint64 [B]: the keys of documents of one seed, by their numbers, int64 [B]."""
    start = _mixed(np.array([seed], np.uint64) * np.uint64(STREAMS) + np.uint64(stream) + GOLDEN)
    return _mixed(start + (numbers.astype(np.uint64) + np.uint64(1)) * GOLDEN)


class Draws:
    """Random numbers for B documents side by side. Each document's depend on its key and the calls so far alone."""

    def __init__(self, keys: np.ndarray):
        self._keys, self._place = keys, 0

    def bits(self, *shape: int) -> np.ndarray:
        """uint64 [B, *shape]"""
        count = int(np.prod(shape, dtype=np.int64))
        places = np.arange(self._place + 1, self._place + count + 1, dtype=np.uint64)
        self._place += count
        return _mixed(self._keys[:, None] + places * GOLDEN).reshape(-1, *shape)

    def integers(self, below: int | np.ndarray, *shape: int) -> np.ndarray:
        """int64 [B, *shape], 0 <= i < below; `below` broadcasts to that shape and is less than 2^31."""
        high = self.bits(*shape) >> np.uint64(33)
        return ((high * np.asarray(below).astype(np.uint64)) >> np.uint64(31)).astype(np.int64)

    def distinct(self, below: int, count: int) -> np.ndarray:
        """int64 [B, count]: different numbers 0 <= i < below, in random order."""
        return np.argsort(self.bits(below), axis=1, kind="stable")[:, :count]


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): neighbouring numbers to unrelated ones, none twice."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
