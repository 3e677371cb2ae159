"""Documents cut over the lanes of an evaluation: what is read, and what it does to the figures."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer_dist.data.corpus import Corpus
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.pieces import Pieces, cut, lay_out
from memformer_dist.data.stream import Stream
from memformer_dist.data.windows import WindowReader
from memformer_dist.evaluate import MODES, lanes_of_other_documents, plan
from memformer_dist.segment import IGNORE
from tests.helpers import evaluation
from tests.helpers.corpora import random_split, write_split
from tests.helpers.evaluation import (
    EXACT,
    LENGTH,
    TOKENIZER,
    Row,
    assert_equal,
    by_age,
    document_by_document,
    evaluate_documents,
    mean,
    new_cell,
    random_documents,
    read,
)
from tests.helpers.memformer import memformer
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import ToyCell

LONG = (119, 13, 28, 1, 55)  # tokens of documents, of which one keeps a lane busy for as long as all others together

# ---- where documents are cut -----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(segments=st.lists(st.integers(1, 70), min_size=1, max_size=8), lanes=st.integers(1, 9), warmup=st.integers(0, 9))
def test_every_segment_counts_once_in_about_an_even_share_of_ticks(segments, lanes, warmup):
    layout = lay_out(np.array(segments), lanes, warmup, most_ticks=sum(segments))
    counted = [[] for _ in segments]
    for document, start, first, stop in zip(*layout, strict=True):
        counted[document] += range(first, stop)
        assert start == (first - warmup if first else 0) >= 0, "it is never the whole beginning that is read again"
    assert [sorted(numbers) for numbers in counted] == [list(range(number)) for number in segments]
    cost = layout.stop - layout.start
    dealt = LaneSchedule(
        cost,
        lanes=lanes,
        segment_length=1,
        epochs=1,
        order=lambda epoch: np.arange(len(cost)),
        dealt=min(lanes, len(cost)),
    )
    assert dealt.ticks <= -(-sum(segments) // lanes) + 2 * warmup


def test_one_long_book():
    """7,212 segments that one of 16 lanes read while the others idled."""
    layout = lay_out(np.array([7212]), lanes=16, warmup=8, most_ticks=7212)
    assert len(layout.document) == 16 and (layout.first - layout.start).tolist() == [0] + [8] * 15
    assert max(layout.stop - layout.start) == 459 == -(-(7212 + 15 * 8) // 16)


@pytest.mark.parametrize("lengths", [(60, 61, 59, 60), (100, 10), (7,)])
def test_documents_that_keep_all_lanes_busy_are_not_cut(tmp_path, lengths):
    """Nor any for less than a tenth of the ticks."""
    corpus, *_ = random_split(tmp_path / "valid", lengths)
    lanes = 2 if len(lengths) > 1 else 1
    reads = plan(corpus, 1, lanes=lanes, segment_length=LENGTH, warmup_segments=2)
    assert (reads.dataset is corpus) == (lengths != (100, 10))
    stream = Stream(corpus, lanes)
    assert plan(stream, 1, lanes=lanes, segment_length=LENGTH, warmup_segments=0).dataset is stream
    assert plan(corpus, 1, lanes=8, segment_length=LENGTH).dataset is corpus, "unless it is asked for"


# ---- what is read ----------------------------------------------------------------------------------------------------


def expected_labels(documents, masks) -> dict[tuple[int, int], int]:
    """By document and position, of all labels that count."""
    return {
        (number, position): label
        for number, (document, mask) in enumerate(zip(documents, masks, strict=True))
        for position, label in enumerate([*document.tolist()[1:], TOKENIZER.eos_id])
        if mask[position]
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_labels_count_once_in_segments_as_they_were(tmp_path, masked, warmup):
    corpus, documents, masks = random_split(tmp_path / "valid", LONG, masked)
    pieces = cut(corpus, lanes=4, segment_length=LENGTH, warmup_segments=warmup, ticks=20)
    schedule = LaneSchedule(pieces.lengths, lanes=4, segment_length=LENGTH, epochs=1, order=pieces.order)
    reader = WindowReader(pieces, schedule, lanes=range(4))
    assert reader.prepare(0, schedule.ticks) is None
    found, warmed_up = {}, 0
    for tick in range(schedule.ticks):
        segment, reading = pieces.in_documents(reader.segment(tick)), schedule.at(tick).document
        for lane in range(4):
            number, offset, length = (int(x[lane]) for x in (segment.document, segment.offset, segment.length))
            assert pieces.documents_of(reading)[lane] == number and (length > 0) == (number >= 0)
            if length == 0:
                continue
            assert offset % LENGTH == 0 and length == min(LENGTH, LONG[number] - offset)
            assert segment.tokens[lane, :length].tolist() == documents[number][offset : offset + length].tolist()
            assert int(segment.reset[lane]) == (schedule.at(tick).segment[lane] == 0)
            labels = {(number, offset + i): int(x) for i, x in enumerate(segment.labels[lane]) if x != IGNORE}
            assert not labels.keys() & found.keys(), "counted twice"
            found |= labels
            warmed_up += not labels and all(masks[number][offset : offset + length])
    assert found == expected_labels(documents, masks)
    of_lanes = [reader.labels(0, schedule.ticks, range(lane, lane + 1)) for lane in range(4)]
    assert reader.labels(0, schedule.ticks) == len(found) == sum(of_lanes)
    inside = int((pieces.lengths.sum() - sum(LONG)) / LENGTH)
    assert inside == warmup * (len(pieces.lengths) - len(LONG)) and (masked or warmed_up == inside)
    assert pieces.place(0) == corpus.place(0)


def test_a_piece_ends_with_the_token_behind_it(tmp_path):
    corpus, (document,), _ = random_split(tmp_path / "valid", [100])
    pieces = cut(corpus, lanes=3, segment_length=LENGTH, warmup_segments=1, ticks=17)
    ends = np.cumsum(pieces.lengths - np.array([0, LENGTH, LENGTH]))
    assert pieces.last_labels(np.arange(3)).tolist() == [*document[ends[:2]].tolist(), TOKENIZER.eos_id]


# ---- what it does to losses ------------------------------------------------------------------------------------------


class ForgetfulState(NamedTuple):
    memory: torch.Tensor  # [B, 2 D]: of the last two segments, and of nothing before


class ForgetfulCell(ToyCell):
    """Knows the last two segments exactly, and nothing else."""

    def empty_state(self, lanes, device=None):
        return ForgetfulState(torch.zeros(lanes, 2 * self.width, dtype=self.dtype))

    def advance(self, segment, state):
        toy = super().empty_state(len(state.memory))
        fresh = self.initial(torch.ones(1, 1, dtype=self.dtype)).repeat(1, 2).expand_as(state.memory)
        memory = torch.where((segment.reset | segment.reset_memory)[:, None], fresh, state.memory)
        last, before = memory.chunk(2, 1)
        never = torch.zeros_like(segment.reset)
        features, _ = super().advance(
            segment._replace(reset=never, reset_memory=never), toy._replace(memory=last + 0.5 * before)
        )
        _, alone = super().advance(segment._replace(reset=~never, reset_memory=never), toy)
        return features._replace(seen=torch.zeros_like(features.seen)), ForgetfulState(
            torch.cat([alone.memory, last], 1)
        )


def forgetful() -> ForgetfulCell:
    torch.manual_seed(5)
    cell = ForgetfulCell().double().eval()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(3)
    return cell


@pytest.fixture
def long_documents(tmp_path):
    documents, _ = random_documents(LONG)
    return Corpus.open(write_split(tmp_path / "valid", documents, vocabulary=TOKENIZER)), documents


def run(cell, corpus, world, *, lanes=4, forward=None, **options):
    return evaluate_documents(forward or cell, cell, corpus, world, lanes=lanes, **options)


def test_a_cell_that_forgets_within_the_warmup_loses_nothing(world, long_documents):
    corpus, documents = long_documents
    cell = forgetful()
    for warmup, is_exact in ((2, True), (5, True), (1, False), (0, False)):
        found = run(cell, corpus, world, warmup_segments=warmup)
        for mode in ("carried", "no_memory", "no_state"):
            rows = document_by_document(cell, documents, mode=mode)
            assert found[mode].labels == sum(row.labels for row in rows)
            if is_exact or mode != "carried":
                assert_equal(found[mode], rows)
            else:
                assert abs(found[mode].loss / mean(rows) - 1) > 1e-6, warmup


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder"])
def test_a_memformer_comes_closer_with_the_warmup(world, long_documents, layout):
    """Segment by segment. What does not depend on the memory needs no warm-up, or that of the context."""
    corpus, documents = long_documents
    torch.manual_seed(3)
    cell = memformer(layout).double().eval()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(0.6)
    modes = ("carried", "no_memory", "no_state")
    expected = {mode: document_by_document(cell, documents, mode=mode) for mode in modes}
    errors = []
    for warmup in (0, 2, 8):
        carried = {}

        def forward(part, segment, tensors):
            result = cell(part, segment, tensors)
            if part == "readout":
                for row in range(len(result) // len(MODES)):  # `carried` comes first
                    if (segment.labels[row] != IGNORE).any():
                        place = int(segment.document[row]), int(segment.offset[row]) // LENGTH
                        carried[place] = float(result[row].sum())
            return result

        found = evaluate_documents(forward, cell, corpus, world, lanes=4, segment_length=LENGTH, warmup_segments=warmup)
        assert len(carried) == len(expected["carried"])
        errors.append(sum(abs(carried[row.document, row.age] - row.nll) for row in expected["carried"]))
        assert found["carried"].by_age.keys() == by_age(expected["carried"]).keys()
        assert_equal(found["no_state"], expected["no_state"])
        if warmup or layout == "decoder":
            assert_equal(found["no_memory"], expected["no_memory"])
        else:
            assert found["no_memory"].loss != pytest.approx(mean(expected["no_memory"]), rel=1e-6)
    assert errors[0] > 0.1 and errors[0] / 2 > errors[1] and errors[1] / 4 > errors[2] > 0


# ---- the memory of another document ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reading, held, expected",
    [
        ([3, 5, 7], [-1, -1, -1], [1, 2, 0]),
        ([3, 5, -1, 7], [3, 5, 4, 7], [1, 3, -1, 0]),  # never an idle lane
        ([3, 3, 3], [3, 3, 3], [-1, -1, -1]),
        ([3, -1, -1], [3, 5, 7], [-1, -1, -1]),
        ([3, 3, 5, 3], [3, 3, 5, 3], [2, 2, 3, 2]),
        ([3, 3, 5, 7], [3, 3, 3, 7], [3, 3, 3, 0]),  # lane 2 has ended a piece of 3 and holds that memory still
        ([3, 3, 5], [3, 3, 3], [-1, -1, 0]),
        ([3, 3, 5], [5, 3, 5], [2, 2, 1]),  # lane 0 has ended a piece of 5
    ],
)
def test_whose_memory_is_of_another_document(reading, held, expected):
    assert lanes_of_other_documents(np.array(reading), np.array(held)).tolist() == expected


@torch.no_grad()
def shuffled(cell, documents, lanes, warmup, *, own_memory=False) -> tuple[list[Row], list[Row]]:
    """Lane by lane: the rows read with another document's memory, and the same read with their own.

    `own_memory`: what a lane has written may be of the document that another one goes on with. The control.
    """
    reads = plan(StandIn(documents), 1, lanes=lanes, segment_length=LENGTH, warmup_segments=warmup)
    pieces: Pieces = reads.dataset
    states, others = ([cell.empty_state(1) for _ in range(lanes)] for _ in range(2))
    held, rows, carried = [None] * lanes, [], []
    for tick in range(reads.schedule.ticks):
        now = reads.schedule.at(tick)
        alive = [lane for lane in range(lanes) if now.document[lane] >= 0]
        document = {lane: int(pieces.document[now.document[lane]]) for lane in alive}
        partner = {}
        for place, lane in enumerate(alive):
            for other in alive[place + 1 :] + alive[:place]:
                if document[other] != document[lane] and (own_memory or held[other] != document[lane]):
                    partner.setdefault(lane, other)
        exchanged, memories = len(partner) == len(alive), [state.memory for state in others]
        for lane in alive:
            number = document[lane]
            layout = int(now.document[lane])
            age = int(now.segment[lane]) + int(pieces._offset[layout]) // LENGTH
            is_warmup = int(now.segment[lane]) * LENGTH < int(pieces._masked[layout])
            mask = np.zeros(len(documents[number])) if is_warmup else None
            segment = evaluation.cut(documents[number], mask, age, reset=bool(now.reset[lane]))
            row, states[lane] = read(cell, segment, states[lane], number)
            start = others[lane]._replace(memory=memories[partner[lane]]) if exchanged else others[lane]
            other_row, others[lane] = read(cell, segment, start, number)
            if exchanged:
                carried.append(row)
                rows.append(other_row)
            held[lane] = number
    return rows, carried


class StandIn:
    """The lengths of documents."""

    def __init__(self, documents):
        self.lengths = np.array([len(document) for document in documents])
        self.path = self.fingerprint = self.folder = self.is_remote = self.vocabulary = self.token_dtype = None
        self.total_tokens, self.has_mask = int(self.lengths.sum()), False


def assert_others_memory(world, path, cell_name, cases) -> None:
    corpus, cell = Corpus.open(path), new_cell(cell_name)
    documents, _ = random_documents(LONG)
    for lanes, warmup in cases:
        found = run(cell, corpus, world, lanes=lanes, warmup_segments=warmup)
        rows, carried = shuffled(cell, documents, lanes, warmup)
        assert 0 < sum(row.labels for row in rows) == found["shuffled"].labels
        assert_equal(found["shuffled"], rows)
        expected = None if found["shuffled"].labels == found["carried"].labels else mean(carried)
        assert found["shuffled"].carried == (expected and pytest.approx(expected, rel=EXACT))


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder"])
def test_pieces_of_one_document_do_not_exchange_its_memory(world, long_documents, cell_name):
    corpus, documents = long_documents
    assert_others_memory(world, corpus.path, cell_name, [(4, 2), (3, 1)])
    wrong, _ = shuffled(new_cell(cell_name), documents, 3, 1, own_memory=True)
    assert (
        abs(run(new_cell(cell_name), corpus, world, lanes=3, warmup_segments=1)["shuffled"].loss / mean(wrong) - 1)
        > 1e-6
    )


def test_one_document_has_no_other_memory_however_it_is_cut(world, tmp_path):
    path = write_split(tmp_path / "valid", [random_documents(LONG)[0][0]], vocabulary=TOKENIZER)
    found = run(new_cell("toy"), Corpus.open(path), world, warmup_segments=2)
    assert found["shuffled"].is_missing and found["carried"].labels == LONG[0]


# ---- on several ranks ------------------------------------------------------------------------------------------------


def same_on_ranks(world, path, expected) -> None:
    corpus, cell = Corpus.open(path), new_cell("encoder_decoder")
    for (lanes, warmup), losses in expected.items():
        found = run(cell, corpus, world, lanes=lanes, warmup_segments=warmup)
        for mode, (loss, labels, carried) in losses.items():
            assert found[mode].labels == labels and found[mode].loss == pytest.approx(loss, rel=EXACT)
            assert found[mode].carried == (carried and pytest.approx(carried, rel=EXACT))


@pytest.mark.slow
def test_two_and_three_ranks_give_the_same(world, long_documents):
    corpus, cell = long_documents[0], new_cell("encoder_decoder")
    expected = {
        (lanes, warmup): {
            mode: (found.loss, found.labels, found.carried)
            for mode, found in run(cell, corpus, world, lanes=lanes, warmup_segments=warmup).items()
        }
        for lanes, warmup in ((3, 1), (20, 0))
    }
    for ranks in 2, 3:
        run_ranks(ranks, same_on_ranks, corpus.path, expected)


@pytest.mark.parametrize("warmup", [None, 1])
def test_what_is_read_is_known_beforehand(world, long_documents, warmup):
    """How many segments and tokens, of all documents and of a part: what the start of a run says."""
    corpus, cell = long_documents[0], new_cell("toy")
    reads = plan(corpus, 1, lanes=4, segment_length=LENGTH, warmup_segments=warmup)
    for limit in (None, 5, 9, 10**6):
        tokens = []

        def forward(part, segment, tensors):
            if part == "advance":
                tokens.append(int(segment.length.sum()) // len(MODES))
            return cell(part, segment, tensors)

        assert run(cell, corpus, world, segments=limit, warmup_segments=warmup, forward=forward) is not None
        assert len(tokens) == reads.segments(limit) <= (limit or 20) and sum(tokens) == reads.tokens(limit)
    assert reads.tokens() == sum(LONG) + (0 if warmup is None else LENGTH * (len(reads.dataset.lengths) - len(LONG)))
