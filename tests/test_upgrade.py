"""Configurations and checkpoints of version 1, written by the last commit that wrote them, in tests/data/version_1:

corpus/      8 documents          run/        stopped at step 7 of 14, dropout 0.1, ZeRO-1, an evaluation every 150 tokens
expected/    metrics.jsonl, summary.json and the weights of the same run when it went on by that commit
"""

import json
import logging
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from memformer_dist.checkpoint import Checkpoint, open_one
from memformer_dist.config import RunConfig
from memformer_dist.errors import UserError
from memformer_dist.upgrade import CHECKPOINT_VERSION, upgrade
from tests.helpers.scripts import run_script

OLD = Path(__file__).parent / "data" / "version_1"
CLOCKS = ("time", "data/wait_s", "perf/", "mrbp/rollout_share")


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def records(path: Path) -> list[dict]:
    """Without times; the values of a curve have keys of their own, for pytest.approx."""
    lines = map(json.loads, path.read_text().splitlines())
    found = [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in lines]
    for record in found:
        for key in [key for key, value in record.items() if isinstance(value, list)]:
            record |= {f"{key}[{number}]": value for number, value in enumerate(record.pop(key))}
    return found


def test_a_configuration_of_version_1_loads(folder, caplog):
    raw = json.loads((folder / "run" / "config.json").read_text())
    assert "cell" not in raw["model"] and raw["training"]["evaluate_ticks"] == 3
    raw["data"]["corpus"] = str(folder / "corpus")
    config = RunConfig.check(raw)
    assert config.model.cell == "memformer" and config.training.evaluate_segments == 3
    assert "evaluate_ticks" in raw["training"], "the argument was changed"
    where = f"data.corpus={folder / 'corpus'}"
    with caplog.at_level(logging.WARNING):
        assert RunConfig.load(folder / "run" / "config.json", [where, "training.evaluate_ticks=3"]) == config
    (record,) = caplog.records
    assert record.getMessage().startswith("training.evaluate_ticks is now called training.evaluate_segments;")
    (folder / "today.json").write_text(config.to_json())
    assert RunConfig.load(folder / "today.json") == config and len(caplog.records) == 1


def test_set_takes_an_old_name(folder):
    path = folder / "run" / "config.json"
    where = f"data.corpus={folder / 'corpus'}"
    old, new = "training.evaluate_ticks", "training.evaluate_segments"
    for overrides, expected in (
        ([f"{old}=9"], 9),
        ([f"{new}=9"], 9),
        ([f"{new}=9", f"{old}=8"], 8),
        ([f"{old}=9", f"{new}=8"], 8),
    ):
        assert RunConfig.load(path, [where, *overrides]).training.evaluate_segments == expected
    with pytest.raises(UserError, match=r"training.evaluate_tick: unknown key, did you mean evaluate_"):
        RunConfig.load(path, [where, "training.evaluate_tick=9"])


def test_what_is_of_today_is_left_as_it_is(folder):
    (path,) = folder.glob("run/checkpoints/*/checkpoint.json")
    raw = json.loads(path.read_text())
    once = upgrade(raw)
    assert raw["version"] == 1 and once["version"] == CHECKPOINT_VERSION
    assert upgrade(once) == once and upgrade(once["config"]) == once["config"]
    assert upgrade([1]) == [1] and upgrade({"model": 3}) == {"model": 3}


def test_a_checkpoint_of_version_1(folder):
    """Every number where it belongs: what version 1 called labels and tokens changed names."""
    checkpoint = open_one(folder / "run")
    raw = json.loads((checkpoint.path / "checkpoint.json").read_text())
    contents = checkpoint.contents
    assert (
        contents.version == CHECKPOINT_VERSION
        and contents.position.model_dump(exclude={"processor_s"}) == raw["position"]
    )
    assert contents.interval.tokens == raw["interval"]["labels"]
    assert contents.interval.input_tokens == raw["interval"]["tokens"]
    weights = load_file(checkpoint.path / "weights-00000.safetensors")
    assert all((parameter == weights[name]).all() for name, parameter in checkpoint.cell("cpu").named_parameters())


def test_a_run_of_version_1_resumes(folder):
    """To the losses and weights that commit 1e99b32 came to; the last digits may be those of another processor."""
    started = load_file(folder / "run" / "checkpoints" / "step-00000007" / "weights-00000.safetensors")
    done = run_script(
        *("launch/train.py", "--config", folder / "run" / "config.json", "--run-dir", folder / "run"),
        *("--set", f"data.corpus={folder / 'corpus'}"),
    )
    assert done.returncode == 0, done.stderr
    found, expected = records(folder / "run" / "metrics.jsonl"), records(OLD / "expected" / "metrics.jsonl")
    expected = [record for record in expected if record["step"] > 7]
    last = found.pop(-2)  # the end of the curve of evaluations, which that commit did not record
    assert (last["step"], last["tokens"]) == (found[-1]["step"], found[-1]["tokens"]) and "eval/loss" in last
    assert "final/loss" in found[-1]
    assert [record["step"] for record in found] == [record["step"] for record in expected] and len(found) > 7
    for one, other in zip(found, expected, strict=True):
        new = {f"{family}/{name}" for family in ("eval", "final") for name in ("gap_shuffled", "bits_per_byte")}
        new.add("accuracy/train")
        assert one.keys() - new == other.keys()
        # What is exchanged between lanes of which some are idle is not what it was: see CHANGELOG.md, 0.2.0.
        for name in other.keys() - {"eval/loss_shuffled", "final/loss_shuffled"}:
            is_loss = name.startswith(("loss/", "eval/loss"))
            rel, least = (1e-6, 0.0) if is_loss else (1e-5, 1e-6)  # norms, ratios and differences amplify rounding
            assert one[name] == pytest.approx(other[name], rel=rel, abs=least), name
    weights = load_file(OLD / "expected" / "weights-00000.safetensors")
    last = Checkpoint(max((folder / "run" / "checkpoints").glob("step-*")))
    assert last.contents.version == CHECKPOINT_VERSION and last.contents.config.model.cell == "memformer"
    for name, tensor in load_file(last.path / "weights-00000.safetensors").items():
        assert (tensor - weights[name]).abs().max() < 1e-5, name
    assert max(float((weights[name] - tensor).abs().max()) for name, tensor in started.items()) > 1e-3


def test_evaluate_and_generate_open_it(folder):
    where = ("--run-dir", folder / "run")
    done = run_script("launch/evaluate.py", *where, "--corpus", folder / "corpus")
    assert done.returncode == 0, done.stderr
    done = run_script("launch/generate.py", *where, "--prompt", "abc", "--tokens", "5")
    assert done.returncode == 0 and done.stdout.startswith("abc"), done.stderr
