"""What an evaluation must come to: a loop over documents one at a time, segments in order, which counts by itself."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from memformer_dist.evaluate import evaluate, plan
from memformer_dist.metrics import AGES, Losses
from memformer_dist.segment import IGNORE, Segment
from memformer_dist.vocabulary import Vocabulary
from tests.helpers.memformer import memformer
from tests.helpers.toy import VOCABULARY, ToyCell

LENGTH = 6  # of a segment
LENGTHS = (13, 1, 40, 6, 3, 12, 25, 7, 5)  # of the documents: some shorter than a segment, some an exact number of them
TOKENIZER = Vocabulary(size=VOCABULARY, bos_id=1, eos_id=2, tokenizer_sha256="0" * 64)
EXACT = 1e-12  # relative, in float64


def new_cell(name: str):
    """A float64 cell whose losses are far from those of chance."""
    torch.manual_seed(5)
    cell = (ToyCell() if name == "toy" else memformer(name)).double().eval()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(3)
    return cell


def random_documents(lengths=LENGTHS, seed=0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and masks. The mask of the last document lets no label count."""
    generator = np.random.default_rng(seed)
    tokens = [generator.integers(4, VOCABULARY, length) for length in lengths]
    masks = [generator.integers(0, 2, length) for length in lengths]
    masks[-1][:] = 0
    return tokens, masks


class Row(NamedTuple):
    """One segment of one document."""

    document: int
    age: int
    nll: float  # summed over the labels
    labels: int


def cut(document, mask, age: int, *, reset: bool, reset_memory: bool = False) -> Segment:
    """A segment of one lane, cut out and padded here once more."""
    following = [*document[1:], TOKENIZER.eos_id]
    tokens, labels, start = [0] * LENGTH, [IGNORE] * LENGTH, age * LENGTH
    real = min(LENGTH, len(document) - start)
    for i in range(real):
        tokens[i] = int(document[start + i])
        if mask is None or mask[start + i]:
            labels[i] = int(following[start + i])
    return Segment(*map(torch.tensor, ([tokens], [labels], [real], [reset], [reset_memory], [0], [start])))


def read(cell, segment: Segment, state, document: int) -> tuple[Row, NamedTuple]:
    features, state = cell.advance(segment, state)
    nll, labels = float(cell.readout(segment, features).sum()), int((segment.labels != IGNORE).sum())
    return Row(document, int(segment.offset) // LENGTH, nll, labels), state


@torch.no_grad()
def document_by_document(cell, documents, masks=None, *, mode="carried", segments=10**9) -> list[Row]:
    """At most the first `segments` of every document."""
    rows = []
    for number, document in enumerate(documents):
        state, mask = cell.empty_state(1), None if masks is None else masks[number]
        for age in range(min(segments, math.ceil(len(document) / LENGTH))):
            reset = age == 0 or mode == "no_state"
            segment = cut(document, mask, age, reset=reset, reset_memory=mode == "no_memory")
            row, state = read(cell, segment, state, number)
            rows.append(row)
    return rows


def mean(rows: list[Row]) -> float:
    return sum(row.nll for row in rows) / sum(row.labels for row in rows)


def by_age(rows: list[Row]) -> dict[str, float]:
    """By what the names of the buckets say: "0", "2-3", "64+"."""
    found = {}
    for name in AGES:
        low, _, high = name.rstrip("+").partition("-")
        last = math.inf if name.endswith("+") else int(high or low)
        inside = [row for row in rows if int(low) <= row.age <= last]
        if sum(row.labels for row in inside):
            found[name] = mean(inside)
    return found


def assert_equal(found: Losses, rows: list[Row]) -> None:
    assert found.loss == pytest.approx(mean(rows), rel=EXACT)
    assert found.by_age == pytest.approx(by_age(rows), rel=EXACT)


def evaluate_documents(forward, cell, dataset, world, *, lanes, segment_length=LENGTH, warmup_segments=None, **options):
    """An evaluation of a dataset, planned and made."""
    reads = plan(dataset, world.size, lanes=lanes, segment_length=segment_length, warmup_segments=warmup_segments)
    return evaluate(forward, cell, reads, world, **options)
