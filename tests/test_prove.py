"""launch/prove.py: what it trains, what it measures, and that a control stays at chance."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.commands import prove
from memformer_dist.commands.prove import Case, chosen, configured, parse, table, wanted
from memformer_dist.config import cell_configs
from memformer_dist.data.task_documents import TaskDocuments
from memformer_dist.errors import UserError
from memformer_dist.proof import Accuracy, interval, measure
from memformer_dist.segment import IGNORE
from memformer_dist.tasks.copying import CopyConfig
from memformer_dist.tasks.needle import NeedleConfig
from tests.helpers import ROOT
from tests.helpers.scripts import run_script
from tests.helpers.toy import ToyCell

# ---- accuracy --------------------------------------------------------------------------------------------------------


class Noted(NamedTuple):
    symbol: Tensor  # int64 [B], the one behind the last mark


class Notebook(RecurrentCell):
    """Writes down the symbol behind every mark and answers with it: a needle's perfect memory, without parameters."""

    memory_leaves = ("symbol",)
    MARK = 16

    def __init__(self, segment_length: int):
        super().__init__()
        self.vocab_size, self.segment_length = 18, segment_length
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def empty_state(self, lanes, device=None):
        return Noted(torch.zeros(lanes, dtype=torch.int64))

    def advance(self, segment, state):
        symbol = torch.where(segment.reset | segment.reset_memory, 0, state.symbol)
        behind = torch.roll(segment.tokens == self.MARK, 1, dims=1)
        place = torch.where(behind, torch.arange(self.segment_length), -1).amax(1)
        written = segment.tokens.gather(1, place.clamp(min=0)[:, None])[:, 0]
        return Noted(symbol), Noted(torch.where(place >= 0, written, symbol))

    def logits(self, segment, features):
        answer = torch.nn.functional.one_hot(features.symbol, self.vocab_size).float()
        return answer[:, None].expand(-1, self.segment_length, -1)


def test_a_perfect_memory_is_right_and_without_it_is_chance():
    cell, config = Notebook(8), NeedleConfig(place="random", needles=2)
    found = measure(cell, config, 40, documents=300, lanes=64)
    assert found == Accuracy(40, "carried", 1.0, *interval(1.0, 300), documents=300, answers=300)
    for memory in ("reset", "none"):
        found = measure(cell, config, 6, documents=300, lanes=64, memory=memory)
        assert found.accuracy == pytest.approx(1 / 16, abs=0.05) and found.low < 1 / 16 < found.high


def test_answers_are_counted_as_a_loop_counts_them():
    torch.manual_seed(0)
    config = CopyConfig(symbols=4)
    cell = ToyCell(dropout=0.5, segment_length=6)
    cell.train()
    right = answers = 0
    held_out = TaskDocuments(config, segment_length=6, seed=0, held_out=True)
    cell.eval()
    for number in range(20):
        state = cell.empty_state(1)
        for segment in held_out.segments(np.array([number]), 5):
            features, state = cell.advance(segment, state)
            logits = cell.logits(segment, features)[0]
            for label, scores in zip(segment.labels[0].tolist(), logits.tolist(), strict=True):
                if label != IGNORE:
                    right, answers = right + (label == max(range(len(scores)), key=scores.__getitem__)), answers + 1
    cell.train()
    found = measure(cell, config, 5, documents=20, lanes=7)
    assert (found.accuracy, found.answers, found.documents) == (right / answers, answers, 20) and answers == 80
    assert cell.training and 0 < right < answers


def test_a_measurement_stops_when_asked():
    asked = iter([False] * 10 + [True])
    assert measure(Notebook(8), NeedleConfig(), 6, documents=64, lanes=16, stop=lambda: next(asked)) is None


@pytest.mark.parametrize(
    "share, trials, expected", [(0.5, 10, (0.2366, 0.7634)), (0.0, 10, (0.0, 0.2775)), (1.0, 256, (0.9852, 1.0))]
)
def test_wilsons_interval(share, trials, expected):
    assert interval(share, trials) == pytest.approx(expected, abs=1e-4)


# ---- what is trained -------------------------------------------------------------------------------------------------


def test_every_cell_and_every_task_has_its_proof():
    assert prove.CELLS.keys() == cell_configs().keys()
    tasks = {path.stem for path in (ROOT / "configs").glob("*.json") if "task" in json.loads(path.read_text())["data"]}
    assert prove.REACH.keys() == tasks


def test_all_cases_have_folders_of_their_own_and_good_configurations():
    options = parse(["--all", "--seeds", "3"])
    cases = list(chosen(options))
    assert len({case.folder for case in cases}) == len(set(cases)) == len(cases)
    assert {case.task for case in cases} == prove.REACH.keys() and {case.cell for case in cases} == prove.CELLS.keys()
    sizes = {}
    for case in cases:
        if case.seed:
            continue
        config = configured(case, options)
        assert config.model.cell == case.cell and config.mrbp.replay == (case.control != "no_replay")
        cell = config.model.build(vocab_size=40, bos_id=1, segment_length=8)
        sizes[case.task, case.cell] = sum(x.numel() for x in cell.parameters())
    for task in prove.REACH:
        of_task = [size for (name, _), size in sizes.items() if name == task]
        assert max(of_task) < 2 * min(of_task), sizes


def test_options_change_the_configuration():
    options = parse(["--segments", "8", "--seeds", "2", "--set", "optimizer.learning_rate=0.5", "--lengths", "8", "9"])
    first, second = chosen(options)
    assert first == Case("needle", "memformer", "none", 8, 0) and str(first.folder) == "needle-8/memformer/seed-0"
    config = configured(second, options)
    assert (config.training.seed, config.data.seed, config.optimizer.learning_rate) == (1, 1, 0.5)
    assert config.mrbp.window.last == 8
    assert list(wanted(first, options.lengths)) == [(8, "carried"), (9, "carried"), (8, "reset")]
    fixed = configured(first, parse(["--set", "mrbp.window=3"]))
    assert fixed.mrbp.window == 3


def test_a_quick_proof_has_its_controls():
    cases = list(chosen(parse(["--quick"])))
    assert [(case.cell, case.control) for case in cases] == [
        ("memformer", "none"),
        ("memformer", "no_replay"),
        ("plain", "none"),
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "--seeds: found 0, expected at least 1"),
        (["--segments", "-1"], "--segments: found -1, expected at least 1"),
        (["--lengths", "3", "0"], "--lengths: found 0, expected at least 1"),
        (["--json", "no/such/folder.json"], "--json: found no folder no/such"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(arguments)


def test_mistakes_in_a_configuration_name_the_task_and_the_cell():
    options = parse(["--set", "optimizer.lr=1"])
    with pytest.raises(
        UserError, match=r"--task needle --cell memformer: 1 problem\n.*did you mean optimizer.learning_rate"
    ):
        configured(next(chosen(options)), options)


# ---- the table -------------------------------------------------------------------------------------------------------


def result(seed: int, accuracies: dict, cell: str = "memformer", control: str = "none") -> dict:
    measured = [
        Accuracy(segments, memory, accuracy, 0, 1, 256, 256)._asdict()
        for (segments, memory), accuracy in accuracies.items()
    ]
    of = dict(parameters=1234, processor_s=10.0 + seed, measured=measured)
    return Case("needle", cell, control, 8, seed)._asdict() | of


def test_a_table_has_the_worst_and_the_best_seed():
    results = [
        result(0, {(8, "carried"): 1.0, (32, "carried"): 0.9, (8, "reset"): 0.06}),
        result(1, {(8, "carried"): 1.0, (32, "carried"): 0.95, (8, "reset"): 0.07}),
        result(0, {(8, "carried"): 0.05}, control="no_replay"),
    ]
    assert table(results).splitlines() == [
        "needle, trained on at most 8 segments: accuracy by segments",
        "",
        "| cell | parameters | seeds | processor time | 8 | 32 | 8, memory reset |",
        "|---|---|---|---|---|---|---|",
        "| memformer | 1,234 | 2 | 11 s | 1.000 | 0.900 - 0.950 | 0.060 - 0.070 |",
        "| memformer, no replay | 1,234 | 1 | 10 s | 0.050 |  |  |",
    ]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_trained_and_measured_is_not_done_again(tmp_path):
    command = ["launch/prove.py", "--segments", 3, "--documents", 16, "--runs", tmp_path / "runs", "--json"]
    quickly = ["--set", "training.tokens=256", "--set", "data.task.held_out_segments=3"]
    first = run_script(*command, tmp_path / "first.json", "--lengths", 3, *quickly, timeout=300)
    assert first.returncode == 0, first.stderr
    (found,) = json.loads((tmp_path / "first.json").read_text())
    folder = tmp_path / "runs" / "needle-3" / "memformer" / "seed-0"
    assert found["steps"] == 4 and found["processor_s"] > 0 and found["commit"] and found["machine"]["torch"]
    assert found == json.loads((folder / "proof.json").read_text())
    before = {path: path.stat().st_mtime_ns for path in folder.glob("checkpoints/*/*")}
    again = run_script(*command, tmp_path / "again.json", "--lengths", 3, 5, *quickly, timeout=300)
    assert again.returncode == 0, again.stderr
    (more,) = json.loads((tmp_path / "again.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in folder.glob("checkpoints/*/*")} == before
    lengths = [(one["segments"], one["memory"]) for one in more["measured"]]
    assert lengths == [(3, "carried"), (3, "reset"), (5, "carried")]
    assert more["measured"][:2] == found["measured"] and more["processor_s"] == found["processor_s"]
    other = run_script(
        *command, tmp_path / "other.json", "--set", "optimizer.learning_rate=1", *quickly[2:], timeout=300
    )
    assert other.returncode == 0  # what may change does
    other = run_script(*command, tmp_path / "other.json", "--set", "model.width=32", *quickly, timeout=300)
    assert other.returncode == 2 and "model.width: found 32, the run has 64" in other.stderr


@pytest.mark.full
def test_a_quick_proof(tmp_path):
    """A memory is learned within a minute; without gradient between segments, or without memory, nothing but chance is."""
    command = ("launch/prove.py", "--quick", "--documents", 1024, "--runs", tmp_path)
    done = run_script(*command, "--json", tmp_path / "found.json", timeout=900)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "found.json").read_text())
    assert done.stdout.rstrip("\n") == table(results)
    memformer, no_replay, plain = (result["measured"] for result in results)
    assert memformer[0]["memory"] == "carried" and memformer[0]["low"] > 0.8
    deviation = math.sqrt(1 / 16 * 15 / 16 / no_replay[0]["documents"])
    for control in (no_replay[0], plain[0], memformer[-1]):
        assert abs(control["accuracy"] - 1 / 16) < 3.3 * deviation, (
            control
        )  # chance is further off once in a thousand times


def committed() -> list[Path]:
    return sorted((ROOT / "benchmarks" / "results").glob("proof*.json"))


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.stem)
def test_the_tables_of_the_documentation_are_those_of_committed_results(path):
    assert table(json.loads(path.read_text())) in (ROOT / "docs" / "proof.md").read_text()
