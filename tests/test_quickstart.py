"""The quickstart on folders so small that nothing fits: the whole path in one command; and its parts."""

import json
import math
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from launch import quickstart
from memformer_dist.data import open_data
from memformer_dist.errors import UserError
from tests.helpers import ROOT
from tests.helpers.corpora import documents
from tests.helpers.scripts import run_script


@pytest.fixture
def tiny(tmp_path):
    """Three short files, one empty, one not UTF-8."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for number, text in enumerate(documents(3)):
        (folder / f"{number}.txt").write_text(text[:200])
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    return folder


@pytest.fixture
def start(tmp_path, monkeypatch):
    """As launch/quickstart.sh starts it once the environment is there, but in this process: that saves seconds."""
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")

    def start(path) -> None:
        quickstart.main([str(path), "--runs", str(tmp_path / "runs")])

    return start


@pytest.mark.slow
def test_a_tiny_folder_from_text_to_sample(tiny, start, tmp_path, capfd):
    """Trained, evaluated, sampled; after that the training step finds the run finished."""
    start(tiny)
    shown = capfd.readouterr().out
    for told in (
        "1 empty",
        "1 unreadable",
        "memory carried",
        "memory reset",
        "everything reset",
        "tensorboard --logdir",
    ):
        assert told in shown, told
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"quickstart-tiny-[0-9a-f]{6}", run.name)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["tokens_per_s"] > 0 and summary["wall_s"] > 0
    losses = [summary[key] for key in ("eval_loss", "eval_loss_no_memory", "eval_loss_no_state")]
    assert all(0 < loss < 2 * math.log(2048) for loss in losses)
    assert summary["gap"] == summary["eval_loss_no_memory"] - summary["eval_loss"]

    records = (run / "metrics.jsonl").read_text()
    again = run_script("launch/train.py", "--config", run / "config.json", "--run-dir", run)
    assert again.returncode == 0 and "this run is finished" in again.stdout + again.stderr
    assert (run / "metrics.jsonl").read_text() == records


def test_a_folder_that_is_not_there(start, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        start(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_folders_of_one_name_and_texts_that_have_changed(tiny, start, tmp_path, monkeypatch, capfd):
    """As far as the corpus."""
    monkeypatch.setattr(quickstart, "train", lambda corpus, folder: sys.exit(0))
    other = tmp_path / "elsewhere" / "tiny"
    other.parent.mkdir()
    tiny.rename(other)
    tiny.mkdir()
    (tiny / "book.txt").write_text("one book alone\n")
    for path, code in (other, 0), (tiny, 2), (other, 0):
        with pytest.raises(SystemExit) as ended:
            start(path)
        assert ended.value.code == code
    shown = capfd.readouterr()
    assert "exists already" in shown.out and "one usable document" in shown.err and "rm -r" not in shown.err
    assert len(list((tmp_path / "runs").iterdir())) == 2

    (other / "new.txt").write_text("something new\n")
    with pytest.raises(SystemExit) as ended:
        start(other)
    hint = re.search(r"rm -r (\S+)", capfd.readouterr().err)
    assert ended.value.code == 2 and (ROOT / hint[1] / "corpus").exists()


@pytest.mark.parametrize(
    "lengths, segment_length, expected",
    [
        ([32_000] * 100, 32, 1_600_000),  # enough text, whole segments: what the configuration says
        ([32 * 50 + 16] * 10_000, 32, 1_600_000 * 1616 // 1632),  # the same number of steps
        ([8] * 1_000_000, 32, 400_000),  # a quarter of each segment is filled
        ([100, 50], 32, 40 * 150),  # a tiny corpus: so many epochs
        ([1], 32, 40),
    ],
)
def test_budget(monkeypatch, tmp_path, lengths, segment_length, expected):
    split = SimpleNamespace(lengths=np.array(lengths))
    monkeypatch.setattr(open_data, "open_corpora", lambda corpus: (split, None))
    config = {"training": {"tokens": 1_600_000}, "data": {"segment_length": segment_length}}
    assert quickstart.budget(tmp_path, config) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("ranks, lanes", [(1, 32), (2, 32), (3, 33), (8, 32), (24, 48), (64, 64)])
def test_lanes_on_any_number_of_gpus(ranks, lanes):
    assert quickstart.lanes_for(ranks, {"data": {"lanes": 32}}) == lanes


def test_the_summary_of_a_shorter_run_is_none_of_this_one(tmp_path):
    assert quickstart.finished(tmp_path, 100) is None
    (tmp_path / "summary.json").write_text(json.dumps({"tokens": 110}))
    assert quickstart.finished(tmp_path, 100) == {"tokens": 110}
    assert quickstart.finished(tmp_path, 111) is None


def test_table(tmp_path):
    figures = {"eval_loss": 3.0, "eval_loss_no_memory": 3.25, "eval_loss_no_state": 1000.0}
    facts = {"tokens": 1_234_567, "wall_s": 61.7, "tokens_per_s": 20_000.4, "world_size": 2}
    lines = quickstart.table(figures | facts, tmp_path).splitlines()
    assert lines[1].split()[-2:] == ["3.0000", "20.09"]
    assert lines[2].split()[-3:] == ["3.2500", "25.79", "+0.2500"]
    assert lines[3].endswith("+997.0000")  # of a model gone wrong: no overflow
    assert lines[4] == "1,234,567 tokens in 62 s, 20,000 tokens/s on 2 ranks"
    assert lines[6].endswith(f"--logdir {os.path.relpath(tmp_path)}/tensorboard")
