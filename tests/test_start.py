"""How a run was started: starts.jsonl, config.json and tokenizer.model; what a resumed run says of its changes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch.nn import Linear, Module

from memformer_dist import start
from memformer_dist.config import RunConfig
from memformer_dist.errors import UserError
from memformer_dist.launcher import Launch
from memformer_dist.optimizer import OptimizerConfig
from memformer_dist.progress import Position
from memformer_dist.world import World
from tests.helpers.corpora import VOCABULARY

CPU = torch.device("cpu")


def test_record_of_the_start(tmp_path, monkeypatch):
    run_dir, tokenizer = tmp_path / "run", tmp_path / "some.model"
    run_dir.mkdir()
    tokenizer.write_bytes(b"model")
    config = SimpleNamespace(to_json=lambda: '{"data": {}}', paths={})
    monkeypatch.setattr("sys.argv", ["launch/train.py", "--run-dir", "runs/x"])
    monkeypatch.setenv("PATH", str(tmp_path))
    two = World(0, 2, CPU, Launch("srun", 0, 2, job="7"), ("a", "b"))
    start.record(run_dir, config, tokenizer, two, 0)  # on a machine without git
    git = tmp_path / "git"
    for step, script in enumerate(("echo 1a2b3c4-dirty", "echo fatal: not a git repository >&2; exit 128"), start=1):
        git.write_text(f"#!/bin/sh\n{script}\n")
        git.chmod(0o755)
        start.record(run_dir, config, tokenizer, World(0, 1, CPU), step)
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [(entry["launcher"], entry["hosts"], entry["job"]) for entry in starts[:2]] == [
        ("srun", ["a", "b"], "7"),
        ("nothing", [], None),
    ]
    assert [(entry["step"], entry["world_size"], entry["git"]) for entry in starts] == [
        (0, 2, None),
        (1, 1, "1a2b3c4-dirty"),
        (2, 1, None),
    ]
    assert starts[0]["command"][1:] == ["launch/train.py", "--run-dir", "runs/x"]
    versions = starts[0]["versions"]
    assert versions["numpy"] == numpy.__version__ and set(versions) == set(start.PACKAGES)
    assert (run_dir / "config.json").read_text() == '{"data": {}}'
    assert (run_dir / "tokenizer.model").read_bytes() == b"model"


def resumed_at(tokens: int, checkpoints: Path, **saved) -> SimpleNamespace:
    """A checkpoint, as much of it as the introduction reads; `saved`: fields of its `training` and `optimizer`."""
    contents = SimpleNamespace(position=Position(step=3, tokens=tokens), config=schedule_of(**saved))
    return SimpleNamespace(path=checkpoints / "step-00000003", contents=contents, trained={"weight", "bias"})


def schedule_of(tokens=1000, **optimizer) -> SimpleNamespace:
    return SimpleNamespace(training=SimpleNamespace(tokens=tokens), optimizer=OptimizerConfig(**optimizer))


@pytest.mark.parametrize(
    "at, saved, now, expected",
    [
        (1000, {}, {"tokens": 4000}, "training.tokens: the learning rate goes from 3e-05 to 0.0002605 at this step"),
        (500, {}, {"tokens": 600}, "training.tokens: the learning rate goes from 0.000165 to 4.809e-05 at this step"),
        (500, {}, {"tokens": 400}, "training.tokens: 500 are trained on already, so the run ends here"),
        (
            500,
            {},
            {"learning_rate": 6e-4},
            "optimizer.learning_rate: the learning rate goes from 0.000165 to 0.00033 at",
        ),
        (500, {}, {"warmup_tokens": 750}, "optimizer.warmup_tokens: the learning rate goes from 0.000165 to 0.0002 at"),
        (
            500,
            {},
            {"final_learning_rate_ratio": 0.5, "tokens": 500},
            "training.tokens: 500 are trained on already, so the run ends here",
        ),
        (
            500,
            {},
            {"schedule": "warmup_stable_decay", "tokens": 900},
            "training.tokens, optimizer.schedule: the learning rate goes from 0.000165 to 0.0003 at this step",
        ),
        (
            500,
            {"schedule": "warmup_stable_decay"},
            {"schedule": "warmup_stable_decay", "decay_share": 0.1},
            "optimizer.decay_share: the learning rate stays 0.0003 at this step",
        ),
        (500, {}, {"weight_decay": 0.2}, None),
    ],
)
def test_what_a_change_does_to_the_learning_rate(tmp_path, caplog, at, saved, now, expected):
    resumed, config = resumed_at(at, tmp_path, **saved), schedule_of(**now)
    changes = dict.fromkeys(("mrbp.replay", "optimizer.weight_decay"), (None, None))
    for name in start.OF_THE_SCHEDULE:
        section, field = name.split(".")
        one, other = (getattr(getattr(x, section), field) for x in (resumed.contents.config, config))
        changes |= {name: (one, other)} if one != other else {}
    with caplog.at_level("INFO"):
        start.introduce_resumed(resumed, config, changes, 2, Linear(2, 2))
    said = [record for record in caplog.records if "changed since" not in record.message]
    assert said.pop(0).message == f"resumed from {tmp_path}/step-00000003 at step 3, {at:,} tokens"
    assert [record.message.startswith(expected) for record in said] == ([True] if expected else [])
    for record in said:
        rates = re.search("from (.+) to (.+) at", record.message)
        rises = rates is not None and float(rates[2]) > float(rates[1])
        assert record.levelname == ("WARNING" if rises else "INFO")


def test_parameters_that_are_frozen_now_or_were(tmp_path, caplog):
    cell = Module()
    for name in "abcdefgh":
        cell.add_module(name, Linear(1, 1, bias=False))
    cell.a.requires_grad_(False)
    resumed = resumed_at(500, tmp_path)
    resumed.trained = {"a.weight", "b.weight"}
    start.introduce_resumed(resumed, schedule_of(), {}, 2, cell)
    thawed = "c.weight, d.weight, e.weight, f.weight, g.weight and 1 more"
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"trained from here on, frozen until now, Adam's moments start at zero: {thawed}",
        "frozen from here on, Adam's moments are dropped: a.weight",
    ]
    caplog.clear()
    resumed.trained = {f"{name}.weight" for name in "bcdefgh"}
    start.introduce_resumed(resumed, schedule_of(), {}, 2, cell)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    "model, expected",
    [
        (
            {"feed_forward": 10**13},
            "found 6[0-9,]* parameters, which take [0-9,.]* GiB on each rank when they are drawn; ",
        ),
        ({"width": 2**40, "heads": 8}, "its sizes are too large: "),
    ],
)
def test_a_model_that_is_larger_than_the_memory(config, model, expected):
    config["model"] |= model
    start.expect_trainable(RunConfig.check(config | {"model": {"width": 16, "heads": 2}}), VOCABULARY)
    with pytest.raises(UserError, match=f"^model: {expected}"):
        start.expect_trainable(RunConfig.check(config), VOCABULARY)
