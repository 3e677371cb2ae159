"""launch/train.py --resume RUN: the settings of the run's latest start, and what --set may change of them."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from memformer_dist.commands.train import load_config, parse
from memformer_dist.config import RunConfig
from memformer_dist.errors import UserError
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import STEP_TOKENS, last_checkpoint, records, run_rank, settings, tensors
from tests.helpers.scripts import run_script


@pytest.fixture
def run(config, tmp_path) -> Path:
    """The folder of a run that has been started, as far as its settings go."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(RunConfig.check(config).to_json())
    return tmp_path / "run"


def resumed(run: Path, *overrides: str, world_size: int = 1) -> RunConfig:
    options = [word for override in overrides for word in ("--set", override)]
    return load_config(parse(["--resume", str(run), *options]), world_size)


def test_the_recorded_settings_and_what_may_change(run, config):
    recorded = RunConfig.check(config)
    assert resumed(run) == recorded and parse(["--resume", str(run)]).run_dir == run
    changed = resumed(run, "training.tokens=900", "mrbp.window=3", "checkpoint.keep=4")
    assert (changed.training.tokens, changed.mrbp.window, changed.checkpoint.keep) == (900, 3, 4)
    assert changed.changes_since(recorded).keys() == {"training.tokens", "mrbp.window", "checkpoint.keep"}
    with pytest.raises(UserError) as caught:
        resumed(run, "model.width=32", "training.seed=1", "training.tokens=900")
    assert str(caught.value).splitlines()[:3] == [
        "a resumed run cannot change these fields:",
        "  model.width: found 32, the run has 16",
        "  training.seed: found 1, the run has 0",
    ]
    with pytest.raises(UserError, match=r"config.json: 1 problem\n  training.tokns: unknown key"):
        resumed(run, "training.tokns=900")


def test_other_ranks_and_a_corpus_that_has_moved(run, corpus_dir):
    """The settings were right where the run was started; here they are once --set has made them so."""
    raw = json.loads((run / "config.json").read_text())
    raw["mrbp"]["lanes_per_group"] = 4
    raw["data"]["corpus"] = "where/it/was"
    (run / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        UserError, match="3 problems\n  mrbp.lanes_per_group: found 4, expected a divisor of the 2 lanes"
    ):
        resumed(run, world_size=2)
    found = resumed(run, f"data.corpus={corpus_dir}", "mrbp.lanes_per_group=2", world_size=2)
    assert (found.data.corpus, found.mrbp.lanes_per_group) == (str(corpus_dir), 2)


def test_settings_of_an_earlier_version(run):
    raw = json.loads((run / "config.json").read_text())
    raw["training"]["evaluate_ticks"] = raw["training"].pop("evaluate_segments")
    del raw["model"]["cell"], raw["checkpoint"]["keep_best"], raw["training"]["early_stopping_patience"]
    expected = resumed(run, "training.tokens=900")
    (run / "config.json").write_text(json.dumps(raw))
    assert resumed(run, "training.tokens=900") == expected


@pytest.mark.parametrize("content", ["", "{", "[]", '{"training": {"tokens": "many"}}'])
def test_settings_that_are_damaged(run, content):
    (run / "config.json").write_text(content)
    with pytest.raises(UserError, match=str(run / "config.json")):
        resumed(run)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resume", "a", "--config", "b"], "argument --config: not allowed with argument --resume"),
        (["--resume", "a", "--run-dir", "a"], "argument --run-dir: not allowed with argument --resume, which names"),
        (["--run-dir", "a"], "one of the arguments --config --resume is required"),
    ],
)
def test_what_resume_takes_the_place_of(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def said(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr.partition("error: ")[2].rstrip("\n")


@pytest.mark.slow
def test_a_folder_that_is_no_run(tmp_path, trained_run):
    """One message, and nothing is made there: a folder with a log would look like a run."""
    (tmp_path / "empty").mkdir()
    for folder in tmp_path / "nowhere", tmp_path / "empty", last_checkpoint(trained_run):
        expected = f"--resume: found no {folder}/config.json, expected the folder of a run"
        assert said(run_script("launch/train.py", "--resume", folder)) == expected
    assert not (tmp_path / "nowhere").exists() and not list((tmp_path / "empty").iterdir())


def stopped_rank(world, raw: dict, parts) -> None:
    for folder, stop_after in parts:
        run_rank(world, raw, folder, stop_after)


@pytest.mark.slow
def test_a_run_is_resumed_by_its_folder(corpus_dir, tmp_path):
    """Stopped after some steps, and before its first one, where it starts from the beginning and says so."""
    raw = settings(corpus_dir, dropout=0.2, tokens=5 * STEP_TOKENS)
    whole, halves, nothing = (tmp_path / name for name in ("whole", "halves", "nothing"))
    run_ranks(1, stopped_rank, raw, [(whole, None), (halves, 3), (nothing, 0)])
    assert not (nothing / "checkpoints").exists()
    for folder in halves, nothing:
        done = run_script("launch/train.py", "--resume", folder)
        assert done.returncode == 0 and (folder / "summary.json").exists(), done.stderr
        assert records(folder, "loss/train") == records(whole, "loss/train")
        expected, found = (tensors(last_checkpoint(run), "weights") for run in (whole, folder))
        assert expected and all(torch.equal(expected[name], found[name]) for name in expected)
        afresh = f"{folder}: an earlier start has left no checkpoint, so the run starts from the beginning"
        assert (afresh in done.stderr) == (folder == nothing)
        assert json.loads((folder / "starts.jsonl").read_text().splitlines()[-1])["command"][-2:] == [
            "--resume",
            str(folder),
        ]
    again = run_script("launch/train.py", "--resume", halves)
    assert again.returncode == 0 and "this run is finished" in again.stderr
