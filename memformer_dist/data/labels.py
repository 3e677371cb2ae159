"""Labels that count in the loss: how many a dataset has, before anything is trained on it.

Only loss masks take labels away. Where they take away all, a run would read on for ever without coming closer to its budget.

    share, facts = expect_labels(train, train.sources(), ["corpora/chats"])
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.sampler import WeightedDocuments
from memformer_dist.errors import UserError

SAMPLE_DOCUMENTS, SAMPLE_TOKENS = 1_000, 20_000_000  # of each corpus


class Counted(NamedTuple):
    documents: int  # that were looked at
    without: int  # those of them that have no label
    tokens: int
    labels: int


def expect_labels(
    dataset: TokenDataset, sources: Sequence[WeightedDocuments], names: Sequence[str]
) -> tuple[float, list[str]]:
    """The share of the tokens of an epoch whose label counts, by a sample; and sentences about documents without any.

    Shards behind a URL are not fetched for this: of them nothing is known.

    Args:
        sources: what epochs are drawn from, one for each of the corpora called `names`.

    Raises UserError if no document of any corpus has a label: then all masks have been read.
    """
    if not dataset.has_mask or dataset.is_remote:
        return 1.0, []
    tokens = labels = 0.0
    facts, empty = [], []
    for source, name in zip(sources, names, strict=True):
        found = count_labels(dataset, _sample(source.documents))
        if not found.labels:
            found = _until_a_label(dataset, source.documents)
        if found.documents and not found.labels:
            empty.append(
                f"data.corpus: no label of {name} counts in the loss: {found.documents:,} documents, all masked"
            )
        elif found.without:
            facts.append(
                f"data.corpus: {found.without:,} of {found.documents:,} documents of {name} that were looked at have no label"
                " that counts in the loss; they are read, and nothing is learnt from them"
            )
        of_an_epoch = float(source.weight) * float(dataset.lengths[source.documents].sum())
        tokens += of_an_epoch
        labels += of_an_epoch * found.labels / max(1, found.tokens)
    if not labels:
        raise UserError("\n".join(empty) + "\nexpected some with a label, or there is nothing to train on")
    return labels / tokens, empty + facts


def expect_labels_ahead(schedule: LaneSchedule, sources: Sequence[WeightedDocuments], *, since: int, tick: int) -> None:
    """Raises UserError where every document was read since a tick without a label: of remote ones it is known no sooner."""
    then, now = schedule.at(since).epoch.max(), schedule.at(tick).epoch.min()
    if now - then > max(math.ceil(1 / source.weight) for source in sources):  # so many whole epochs lie between
        raise UserError(
            f"data.corpus: found no label that counts in the loss in {tick - since:,} segments of each lane, {now - then:,}"
            " epochs; expected some: the loss masks leave nothing to train on"
        )


def count_labels(dataset: TokenDataset, documents: Iterable[int]) -> Counted:
    """Reads the loss masks of some documents, in their order, up to SAMPLE_TOKENS."""
    looked, without, tokens, labels = 0, 0, 0, 0
    for document in documents:
        length = int(dataset.lengths[document])
        found = int(np.count_nonzero(dataset.mask(document, 0, length)))
        looked, without, tokens, labels = looked + 1, without + (found == 0), tokens + length, labels + found
        if tokens >= SAMPLE_TOKENS:
            break
    return Counted(looked, without, tokens, labels)


def _sample(documents: np.ndarray) -> list[int]:
    """Up to SAMPLE_DOCUMENTS of them, in order; always the same ones."""
    if len(documents) > SAMPLE_DOCUMENTS:
        generator = np.random.Generator(np.random.PCG64(0))
        documents = documents[np.sort(generator.choice(len(documents), SAMPLE_DOCUMENTS, replace=False))]
    return documents.tolist()


def _until_a_label(dataset: TokenDataset, documents: np.ndarray) -> Counted:
    """One document after the other, until one has a label."""
    looked, tokens = 0, 0
    for document in documents.tolist():
        found = count_labels(dataset, [document])
        looked, tokens = looked + 1, tokens + found.tokens
        if found.labels:
            return Counted(looked, looked - 1, tokens, found.labels)
    return Counted(looked, looked, tokens, 0)
