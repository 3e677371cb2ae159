"""Evaluation against a loop that reads one document at a time, segments in order, and counts tokens by itself."""

import json
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from memformer_dist.commands.evaluate import table
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.evaluate import MODES, evaluation_lanes, plan, summary
from memformer_dist.metrics import AGES, LossByAge, Losses, evaluation_scalars
from memformer_dist.segment import IGNORE, Segment
from tests.helpers import ROOT
from tests.helpers.corpora import make_corpus, write_split
from tests.helpers.evaluation import (
    EXACT,
    LENGTH,
    LENGTHS,
    TOKENIZER,
    Row,
    assert_equal,
    by_age,
    cut,
    document_by_document,
    evaluate_documents,
    mean,
    new_cell,
    random_documents,
    read,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.scripts import run_script
from tests.helpers.toy import ToyCell, ToyState


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return Corpus.open(write_split(tmp_path / "valid", random_documents()[0], vocabulary=TOKENIZER))


def run(cell, corpus, world, *, lanes=4, **options):
    return evaluate_documents(cell, cell, corpus, world, lanes=lanes, **options)


# ---- the reference ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def shuffled(cell, documents, lanes: int, *, away: int = 1) -> list[Row]:
    """Lane by lane over the schedule; a lane reads the memory that the lane `away` from it wrote last.

    Lanes that have run dry are not counted; one that is left alone has no figure.
    """
    schedule = LaneSchedule(
        [len(document) for document in documents], seed=0, lanes=lanes, segment_length=LENGTH, epochs=1
    )
    states, rows = [cell.empty_state(1) for _ in range(lanes)], []
    for tick in range(schedule.ticks):
        now = schedule.at(tick)
        memories = [state.memory for state in states]
        alive = [lane for lane in range(lanes) if now.document[lane] >= 0]
        if len(alive) < 2:
            continue
        for place, lane in enumerate(alive):
            document = int(now.document[lane])
            segment = cut(documents[document], None, int(now.segment[lane]), reset=bool(now.reset[lane]))
            state = states[lane]._replace(memory=memories[alive[(place + away) % len(alive)]])
            row, states[lane] = read(cell, segment, state, document)
            rows.append(row)
    return rows


def mean_of_means(rows: list[Row], field: str) -> float:
    """What the loss must not be: segments, or documents, that weigh alike."""
    parts = {}
    for row in rows:
        parts.setdefault((row.document, row.age) if field == "segment" else row.document, []).append(row)
    return float(np.mean([mean(part) for part in parts.values() if sum(row.labels for row in part)]))


# ---- exact losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder", "decoder"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_token_weighs_alike(tmp_path, world, cell_name, masked):
    tokens, masks = random_documents()
    masks = masks if masked else None
    corpus = Corpus.open(write_split(tmp_path / "valid", tokens, masks, vocabulary=TOKENIZER))
    cell = new_cell(cell_name)
    found = run(cell, corpus, world)
    assert tuple(found) == MODES
    for mode in ("carried", "no_memory", "no_state"):
        rows = document_by_document(cell, tokens, masks, mode=mode)
        assert_equal(found[mode], rows)
        assert found[mode].perplexity == pytest.approx(math.exp(mean(rows)), rel=1e-9)
        assert list(found[mode].by_age) == ["0", "1", "2-3", "4-7"]
        for wrong in (mean_of_means(rows, "segment"), mean_of_means(rows, "document")):
            assert abs(found[mode].loss / wrong - 1) > 1e-4
    different = {round(losses.loss, 6) for losses in found.values()}
    assert len(different) == 4 if cell_name != "decoder" else 3  # its state is the memory and nothing else


def assert_the_same_on(world, path, lanes_to_try) -> None:
    corpus, (tokens, _), cell = Corpus.open(path), random_documents(), new_cell("encoder_decoder")
    expected = {mode: document_by_document(cell, tokens, mode=mode) for mode in ("carried", "no_memory", "no_state")}
    for lanes in lanes_to_try:
        found = run(cell, corpus, world, lanes=lanes)
        for mode, rows in expected.items():
            assert_equal(found[mode], rows)
        others = shuffled(cell, tokens, min(lanes, len(LENGTHS)))
        if lanes == 1:
            assert found["shuffled"].is_missing and not others
        else:
            assert_equal(found["shuffled"], others)


def test_any_number_of_lanes_gives_the_same(corpus, world):
    """More lanes than documents, too."""
    assert_the_same_on(world, corpus.path, (1, 2, 3, 9, 20))
    assert evaluation_lanes(corpus, 20, 1) == len(LENGTHS)


@pytest.mark.slow
def test_two_ranks_give_the_same(corpus):
    """An odd number of lanes, and more lanes than documents, are rounded up; the last one is dry from the start."""
    assert [evaluation_lanes(corpus, lanes, 2) for lanes in (1, 6, 20)] == [2, 6, 10]
    run_ranks(2, assert_the_same_on, corpus.path, (1, 5, 6, 20))
    run_ranks(3, assert_the_same_on, corpus.path, (4,))


def test_the_first_segments_of_every_lane(corpus, world):
    cell, (tokens, _) = new_cell("toy"), random_documents()
    found = run(cell, corpus, world, lanes=len(LENGTHS), segments=3)  # a lane for every document
    assert_equal(found["carried"], document_by_document(cell, tokens, segments=3))
    assert found["carried"].loss != pytest.approx(mean(document_by_document(cell, tokens)), rel=1e-6)
    assert run(cell, corpus, world, segments=10**6) == run(cell, corpus, world)


def test_the_buckets_hold_the_ages_that_they_name():
    """A segment of each age has one label, with a loss of age + 1 nats: the mean tells which ages are in a bucket."""
    ages = torch.arange(200)
    rows = [Row(0, age, age + 1.0, 1) for age in ages.tolist()]
    losses = LossByAge(torch.device("cpu"))
    labels = torch.full((len(ages), LENGTH), IGNORE)
    labels[:, 2] = 5
    nll = torch.where(labels == 5, ages[:, None] + 1.0, 0.0)
    empty = torch.zeros(len(ages), dtype=torch.long)
    losses.add(Segment(labels, labels, empty, empty, empty, empty, ages * LENGTH), nll)
    assert_equal(Losses.of(losses.sums.flatten().tolist()), rows)
    assert list(by_age(rows)) == list(AGES)
    few = ("0", "1", "2+")
    losses = LossByAge(torch.device("cpu"), few)
    losses.add(Segment(labels, labels, empty, empty, empty, empty, ages * LENGTH), nll)
    found = Losses.of(losses.sums.flatten().tolist(), few)
    assert found.by_age == {"0": 1.0, "1": 2.0, "2+": pytest.approx(mean(rows[2:]), rel=EXACT)}


# ---- the memory of another document ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell_name", ["toy", "encoder_decoder", "decoder"])
def test_shuffled_reads_the_memory_of_the_next_lane(corpus, world, cell_name):
    cell, (tokens, _) = new_cell(cell_name), random_documents()
    found = run(cell, corpus, world, lanes=3)
    assert_equal(found["shuffled"], shuffled(cell, tokens, 3))
    for away in (0, 2):  # its own; the lane before
        assert abs(found["shuffled"].loss / mean(shuffled(cell, tokens, 3, away=away)) - 1) > 1e-6


def test_shuffled_is_carried_where_all_memories_are_equal(tmp_path, world):
    cell, document = new_cell("encoder_decoder"), random_documents()[0][2]
    found = run(cell, Corpus.open(write_split(tmp_path / "copies", [document] * 4, vocabulary=TOKENIZER)), world)
    assert found["shuffled"] == found["carried"] != found["no_memory"]
    reversed_once = [document, document, document, document[::-1]]
    found = run(cell, Corpus.open(write_split(tmp_path / "others", reversed_once, vocabulary=TOKENIZER)), world)
    assert abs(found["shuffled"].loss / found["carried"].loss - 1) > 1e-6


def one_document_rank(world, path) -> None:
    """What is not measured is None in JSON and missing in logs, whatever the number of ranks and lanes."""
    corpus, cell, document = Corpus.open(path), new_cell("encoder_decoder"), random_documents()[0][2]
    for lanes in (1, 3):
        found = run(cell, corpus, world, lanes=lanes)
        assert_equal(found["carried"], document_by_document(cell, [document]))
        assert found["shuffled"].is_missing
        figures = json.loads(json.dumps(summary(found)))
        assert figures["eval_loss_shuffled"] is figures["gap_shuffled"] is None and figures["gap"] != 0
        assert figures["eval_loss_by_segment_age"]["shuffled"] == dict.fromkeys(found["carried"].by_age)
        assert not [name for name in evaluation_scalars("eval", found) if "shuffled" in name]
        rows = [line.split() for line in table(found).splitlines() if line.startswith("memory shuffled")]
        ages = len(found["carried"].by_age)
        assert rows == [["memory", "shuffled", *["n/a"] * 4], ["memory", "shuffled", *["n/a"] * ages]]


def test_one_document_has_no_other_memory(tmp_path, world):
    """One rank read the document's own memory (a gap of +0.0000), two ranks an idle lane's zeros (+0.0826)."""
    path = write_split(tmp_path / "valid", [random_documents()[0][2]], vocabulary=TOKENIZER)
    one_document_rank(world, path)
    run_ranks(2, one_document_rank, path)


def two_documents_rank(world, path) -> None:
    """A long document and a short one: the segments that it reads alone have no figure, and no part in the gap."""
    corpus, cell, documents = Corpus.open(path), new_cell("encoder_decoder"), [random_documents()[0][i] for i in (2, 0)]
    found = run(cell, corpus, world, lanes=4)
    expected = shuffled(cell, documents, 2)
    assert sorted((row.document, row.age) for row in expected) == [(i, age) for i in (0, 1) for age in range(3)]
    assert_equal(found["shuffled"], expected)
    beside = mean(document_by_document(cell, documents, segments=3))
    assert found["shuffled"].carried == pytest.approx(beside, rel=EXACT)
    assert summary(found)["gap_shuffled"] == pytest.approx(mean(expected) - beside, rel=1e-9)
    assert abs(found["shuffled"].loss - found["carried"].loss - (mean(expected) - beside)) > 1e-6
    assert summary(found)["eval_loss_by_segment_age"]["shuffled"]["4-7"] is None
    note = f"Memory shuffled is measured where two or more documents are read side by side; memory carried has {beside:.4f}"
    assert f"n/a\n\n{note} there." in table(found)


def test_only_documents_side_by_side_exchange_their_memories(tmp_path, world):
    """An idle lane's memory was read, which depended on the number of ranks; three ranks have two idle lanes here."""
    path = write_split(tmp_path / "valid", [random_documents()[0][i] for i in (2, 0)], vocabulary=TOKENIZER)
    two_documents_rank(world, path)
    run_ranks(3, two_documents_rank, path)


# ---- cells of other kinds --------------------------------------------------------------------------------------------


class HiddenState(NamedTuple):
    hidden: torch.Tensor
    seen: torch.Tensor


class HiddenCell(ToyCell):
    """ToyCell, with another name for its memory."""

    memory_leaves = ("hidden",)

    def empty_state(self, lanes, device=None):
        return HiddenState(*super().empty_state(lanes, device))

    def advance(self, segment, state):
        features, state = super().advance(segment, ToyState(*state))
        return features, HiddenState(*state)


def exchanged_by_name_rank(world, path) -> None:
    """What is exchanged between lanes and ranks is what the cell names."""
    corpus, cell = Corpus.open(path), HiddenCell().double().eval()
    cell.load_state_dict(new_cell("toy").state_dict())
    assert run(cell, corpus, world) == run(new_cell("toy"), corpus, world)
    cell.memory_leaves = ("hidden", "seen")
    assert run(cell, corpus, world)["shuffled"] != run(new_cell("toy"), corpus, world)["shuffled"]


def test_a_memory_of_another_name(corpus, world):
    exchanged_by_name_rank(world, corpus.path)
    run_ranks(2, exchanged_by_name_rank, corpus.path)


class TwiceState(NamedTuple):
    memory: torch.Tensor
    seen: torch.Tensor
    other: torch.Tensor


class TwiceCell(ToyCell):
    """As an LSTM: two leaves, of which each is a part of the memory; `shared`: an empty state holds one tensor twice."""

    memory_leaves = ("memory", "other")
    shared = True

    def empty_state(self, lanes, device=None):
        state = super().empty_state(lanes, device)
        zeros = state.memory[:1].expand(lanes, -1) if self.shared else state.memory
        return TwiceState(zeros, state.seen, zeros if self.shared else zeros.clone())

    def advance(self, segment, state):
        features, after = super().advance(segment, ToyState(state.memory + state.other.roll(1, 1), state.seen))
        return features, TwiceState(after.memory, after.seen, after.memory.square())


def test_leaves_of_an_empty_state_may_share_their_memory(corpus, world):
    """`zeros, zeros` is how an LSTM's state begins: it was written to as if it were two, and figures were wrong in silence."""
    figures = []
    for shared in (False, True):
        torch.manual_seed(5)
        cell = TwiceCell().double().eval()
        cell.shared = shared
        figures.append(run(cell, corpus, world))
    assert figures[0] == figures[1]
    assert figures[0]["carried"].loss != figures[0]["no_state"].loss


def test_a_cell_without_memory(corpus, world):
    """Nothing to reset and nothing to exchange: its losses are those of `carried`; only no_state takes something away."""
    cell = new_cell("toy")
    expected = run(cell, corpus, world)
    cell.memory_leaves = ()
    found = run(cell, corpus, world)
    assert tuple(found) == MODES and found["no_memory"] == found["shuffled"] == found["carried"] != found["no_state"]
    for mode in ("carried", "no_state"):
        assert found[mode].loss == pytest.approx(expected[mode].loss, rel=EXACT)


# ---- what an evaluation leaves behind --------------------------------------------------------------------------------


def test_nothing_is_left_behind(corpus, world):
    """No gradient, not asked for either; parameters as they were, bit by bit; the same figures when asked again."""
    cell = new_cell("encoder_decoder")
    before = {name: parameter.clone() for name, parameter in cell.named_parameters()}
    recorded = []

    def forward(part, *arguments):
        result = cell(part, *arguments)
        recorded.append(torch.is_grad_enabled() or (part == "readout" and result.requires_grad))
        return result

    found = evaluate_documents(forward, cell, corpus, world, lanes=4, segment_length=LENGTH)
    assert recorded and not any(recorded) and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in cell.parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in cell.named_parameters())
    assert run(cell, corpus, world) == found


def test_a_stopped_evaluation_has_no_figures(corpus, world):
    cell, answers, shown = new_cell("toy"), iter([False, False, True]), []

    def show(ticks):
        for tick in ticks:
            shown.append((tick, len(ticks)))
            yield tick

    assert run(cell, corpus, world, lanes=9, show=show, stop=lambda: next(answers)) is None
    assert shown == [(0, 7), (1, 7), (2, 7)]  # the longest document has 7 segments


def test_summary_names_every_figure(corpus, world):
    found = run(new_cell("toy"), corpus, world)
    figures = summary(found)
    assert figures["eval_loss"] == found["carried"].loss and figures["eval_loss_shuffled"] == found["shuffled"].loss
    assert figures["gap"] == found["no_memory"].loss - found["carried"].loss != 0
    assert figures["eval_loss_by_segment_age"]["no_state"] == found["no_state"].by_age


# ---- launch/evaluate.py ----------------------------------------------------------------------------------------------


def figures_in(table: str) -> dict[str, list[float]]:
    """Rows of the printed table: "memory reset" -> numbers, twice."""
    rows = {}
    for line in table.splitlines():
        if line.startswith(("memory", "everything")):
            rows.setdefault(line[:18].strip(), []).append(
                [math.nan if word == "n/a" else float(word) for word in line[18:].split()]
            )
    return rows


@pytest.mark.slow
def test_figures_that_are_no_numbers_are_null(tmp_path, world):
    """Without labels, and of a model that has diverged: NaN is no JSON."""
    documents = random_documents()[0]
    masks = [np.zeros(len(document), int) for document in documents]
    masked = Corpus.open(write_split(tmp_path / "masked", documents, masks, vocabulary=TOKENIZER))
    whole = Corpus.open(write_split(tmp_path / "whole", documents, vocabulary=TOKENIZER))
    diverged = new_cell("toy")
    diverged.head.weight.data.fill_(math.nan)
    for cell, corpus in ((new_cell("toy"), masked), (diverged, whole)):
        losses = run(cell, corpus, world)
        figures = summary(losses)
        json.dumps(figures, allow_nan=False)
        assert figures["eval_loss"] is None and figures["gap"] is None
    assert "n/a: no label of these documents counts in the loss" in table(run(new_cell("toy"), masked, world))


def test_the_command_line_repeats_the_end_of_training(trained_run, tmp_path):
    """On one process and on two, and with other lanes: the figures of summary.json, which the engine computed."""
    expected = json.loads((trained_run / "summary.json").read_text())
    by_age = expected["eval_loss_by_segment_age"]
    one = ("launch/evaluate.py", "--run-dir", trained_run, "--json", tmp_path / "one.json")
    two = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        *one[:-1],
        tmp_path / "two.json",
        "--lanes",
        6,
    )
    for command in (one, two):
        done = run_script(*command, cold=True)
        assert done.returncode == 0, done.stderr
        assert "rank 0  evaluate: " in done.stderr and "(100%)\n" in done.stderr and "\r" not in done.stderr
        written = json.loads(command[command.index("--json") + 1].read_text())
        assert (written["step"], written["tokens"]) == (expected["steps"], expected["tokens"])
        modes = ("eval_loss", "eval_loss_no_memory", "eval_loss_no_state")
        assert [written[mode] for mode in modes] == pytest.approx([expected[mode] for mode in modes], rel=1e-6)
        assert written["eval_loss_by_segment_age"]["no_state"] == pytest.approx(by_age["no_state"], rel=1e-6)
        rows = figures_in(done.stdout)
        assert list(rows) == ["memory carried", "memory reset", "everything reset", "memory shuffled"]
        for (first, ages), mode, name in zip(rows.values(), by_age, (*modes, "eval_loss_shuffled"), strict=True):
            loss, bits = written[name], written[name.replace("loss", "bits_per_byte")]
            gap = [] if mode == "carried" else [loss - written["eval_loss"]]
            if mode == "shuffled":
                gap = [written["gap_shuffled"]]
            assert first == pytest.approx([loss, math.exp(loss), bits, *gap], abs=0.006)
            found = [math.nan if x is None else x for x in written["eval_loss_by_segment_age"][mode].values()]
            assert ages == pytest.approx(found, abs=6e-5, nan_ok=True)


def test_the_command_line_on_other_documents(trained_run, corpus_dir, tmp_path):
    """The training split, and of another corpus only one that was made with the run's tokenizer."""
    path = tmp_path / "train.json"
    done = run_script(
        *("launch/evaluate.py", "--run-dir", trained_run, "--corpus", corpus_dir, "--split", "train"),
        *("--max-segments", 2, "--json", path),
    )
    assert done.returncode == 0 and str(corpus_dir / "train") in done.stdout
    written = json.loads(path.read_text())
    assert set(written["eval_loss_by_segment_age"]["carried"]) == {"0", "1"} and written["max_segments"] == 2

    other = make_corpus(tmp_path, seed=1)
    done = run_script("launch/evaluate.py", "--run-dir", trained_run, "--corpus", other)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    found, expected = (Corpus.open(folder / "valid").vocabulary.tokenizer_sha256[:16] for folder in (other, corpus_dir))
    assert (
        f"{other / 'valid'} was made with another tokenizer than the run: found sha256 {found}, expected {expected}"
        in done.stderr
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ("--run-dir", ROOT / "tests"),
            f"{ROOT / 'tests'}: no checkpoint found, expected a run's or a checkpoint's folder",
        ),
        (("--run-dir", ROOT, "--lanes", "0"), "--lanes: found 0, expected at least 1"),
        (
            ("--run-dir", ROOT, "--warmup-segments", "-1"),
            "--warmup-segments: found -1, expected a number of segments, or none",
        ),
        (("--run-dir", ROOT, "--json", ROOT / "gone" / "x.json"), f"--json: found no folder {ROOT / 'gone'}"),
    ],
)
def test_mistakes_on_the_command_line(options, message):
    done = run_script("launch/evaluate.py", *options)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


# ---- the evaluations of a run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_whose_evaluations_are_limited_and_cut(config, corpus_dir, tmp_path):
    """What is said at the start, what the end comes to, and the same by launch/evaluate.py: with words, uncut, too short."""
    config["training"] |= {
        "evaluate_every_tokens": 250,
        "evaluate_segments": 4,
        "final_evaluate_segments": 9,
        "evaluate_warmup_segments": 1,
    }
    (tmp_path / "limited.json").write_text(json.dumps(config))
    where = ("--run-dir", tmp_path / "run")
    done = run_script("launch/train.py", "--config", tmp_path / "limited.json", *where)
    assert done.returncode == 0, done.stderr
    lines = [line.partition("rank 0  ")[2] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    valid, lanes, length = Corpus.open(corpus_dir / "valid"), config["data"]["lanes"], config["data"]["segment_length"]
    reads = plan(valid, 1, lanes=lanes, segment_length=length, warmup_segments=1)
    assert (
        reads.dataset is not valid and reads.segments() < plan(valid, 1, lanes=lanes, segment_length=length).segments()
    )
    assert (
        f"the evaluation at the end reads 9 segments per lane, {reads.tokens(9):,} tokens, in 4 ways; the 2 on the way"
        " read 4 segments per lane each" in lines
    )
    assert "final evaluation: 9 of 9 segments per lane (100%)" in lines, "progress"
    assert not [line for line in lines if line.startswith("evaluation: ")], "of those on the way only if they take long"

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    curve, (end,) = ([record for record in records if name in record] for name in ("eval/loss", "final/loss"))
    assert len(curve) == 3 and records[-2:] == [curve[-1], end] and curve[-1]["step"] == end["step"] == summary["steps"]
    assert end["final/loss"] == summary["eval_loss"]
    assert end["final/bits_per_byte"] == summary["eval_bits_per_byte"]
    names = (
        "eval_loss",
        "eval_loss_no_memory",
        "eval_loss_shuffled",
        "eval_bits_per_byte",
        "eval_tokens",
        "eval_bytes",
    )
    cases = {"9": [summary[name] for name in names], "4": [curve[-1]["eval/loss"], curve[-1]["eval/loss_no_memory"]]}
    for limit, expected in cases.items():
        path = tmp_path / f"{limit}.json"
        done = run_script("launch/evaluate.py", *where, "--max-segments", limit, "--words", "--json", path)
        assert done.returncode == 0, done.stderr
        written = json.loads(path.read_text())
        assert [written[name] for name in names][: len(expected)] == pytest.approx(expected, rel=1e-5)
        assert written["warmup_segments"] == 1 and written["eval_bytes"] > written["eval_words"] > 0
        nats = written["eval_loss"] * written["eval_tokens"]
        assert written["eval_perplexity_per_word"] == pytest.approx(math.exp(nats / written["eval_words"]))
        heading, carried = done.stdout.splitlines()[2:4]
        assert heading.split() == ["loss", "perplexity", "bits/byte", "per", "word", "gap"]
        assert carried.endswith(f"{written['eval_bits_per_byte']:11.4f}{written['eval_perplexity_per_word']:12.2f}")
        assert f" stand for {written['eval_bytes']:,} bytes of text, {written['eval_words']:,} words\n" in done.stdout

    whole = tmp_path / "whole.json"
    done = run_script("launch/evaluate.py", *where, "--warmup-segments", "none", "--json", whole)
    assert done.returncode == 0 and json.loads(whole.read_text())["eval_tokens"] == valid.total_tokens
    done = run_script("launch/evaluate.py", *where, "--max-segments", 1)
    assert done.returncode == 2
    assert "--max-segments: found 1, expected more than --warmup-segments (1), whose losses" in done.stderr
