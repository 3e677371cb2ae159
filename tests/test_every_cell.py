"""Whole runs of every cell but Memformer, which the other tests run: trained, resumed, evaluated, made to write a text.

A new cell takes one line in MODELS of helpers/runs.py.
"""

import json
import math

import pytest
import torch

from memformer_dist.config import cell_configs
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import MODELS, STEP_TOKENS, interrupted_rank, last_checkpoint, records, settings, tensors
from tests.helpers.scripts import run_script

ON_TWO_RANKS = "rmt"


def test_no_cell_is_left_out():
    assert MODELS.keys() | {"memformer"} == cell_configs().keys()


@pytest.mark.slow
@pytest.mark.parametrize("cell", MODELS)
def test_trained_resumed_evaluated_and_made_to_write(cell, corpus_dir, tmp_path):
    """The stopped and resumed run has the bits of the whole one; `launch/train.py` ends with what the memory is worth,
    which `launch/evaluate.py` finds again; `launch/generate.py` continues a prompt."""
    raw = settings(corpus_dir, stage=3 if cell == ON_TWO_RANKS else 1, tokens=6 * STEP_TOKENS)
    raw["model"] = {"cell": cell} | MODELS[cell]
    run_ranks(2 if cell == ON_TWO_RANKS else 1, interrupted_rank, [(raw, tmp_path)])
    whole, parts = (last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole.name == parts.name and int(whole.name.removeprefix("step-")) > 6
    for prefix in ("weights", "moments", "lanes"):
        expected, found = tensors(whole, prefix), tensors(parts, prefix)
        assert expected.keys() == found.keys() and expected
        assert all(torch.equal(expected[name], found[name]) for name in expected), prefix
    losses = [loss for _, _, loss in records(tmp_path / "whole", "loss/train")]
    assert records(tmp_path / "parts", "loss/train", "optim/grad_norm") == records(
        tmp_path / "whole", "loss/train", "optim/grad_norm"
    )
    assert losses[-1] < losses[0]

    (tmp_path / "config.json").write_text(json.dumps(raw))
    done = run_script("launch/train.py", "--config", tmp_path / "config.json", "--run-dir", tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    trained = json.loads((tmp_path / "parts" / "summary.json").read_text())
    done = run_script("launch/evaluate.py", "--run-dir", tmp_path / "parts", "--json", tmp_path / "evaluated.json")
    assert done.returncode == 0, done.stderr
    evaluated = json.loads((tmp_path / "evaluated.json").read_text())
    for figure in ("eval_loss", "eval_loss_no_memory", "eval_loss_no_state", "eval_loss_shuffled"):
        assert 0 < evaluated[figure] == pytest.approx(trained[figure], rel=1e-6) and math.isfinite(evaluated[figure])
    remembers = bool(cell_configs()[cell](**MODELS[cell]).build(vocab_size=9, bos_id=1, segment_length=4).memory_leaves)
    assert (evaluated["eval_loss_no_memory"] != evaluated["eval_loss"]) == remembers
    done = run_script("launch/generate.py", "--run-dir", tmp_path / "parts", "--prompt", "ba be", "--tokens", "40")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ba be") and len(done.stdout) > 20
