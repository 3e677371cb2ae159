"""launch/continual.py: one corpus after another, four ways, resumed, and what is forgotten."""

import json
import math

import pytest
import torch

from memformer_dist.commands.continual import forgetting, matrix, mixed, parts, table
from memformer_dist.config import RunConfig
from memformer_dist.initial import freeze
from memformer_dist.prepare.build import shard
from tests.helpers.corpora import documents
from tests.helpers.runs import STEP_TOKENS, last_checkpoint, settings, tensors
from tests.helpers.scripts import run_script


def test_replayed_documents_take_an_equal_share():
    assert mixed(["a", "b", "c"], 0.5) == {"c": 0.5, "a": 0.25, "b": 0.25}
    assert mixed(["a", "b", "c"], 0) == "c"


def test_every_parameter_belongs_to_a_part_and_no_further_layer_does(corpus_dir):
    config = RunConfig.check(settings(corpus_dir))
    found = parts(config)
    assert {"embedding.weight", "encoder.layers.0", "decoder.layers.0", "decoder.layers.1"} <= set(found)
    larger = config.model.model_copy(update={"decoder_layers": 12})
    cell = larger.build(vocab_size=8, bos_id=0, segment_length=16)
    freeze(cell, found)
    trained = {name for name, parameter in cell.named_parameters() if parameter.requires_grad}
    further = tuple(f"decoder.layers.{number}." for number in range(2, 12))
    assert trained == {name for name, _ in cell.named_parameters() if name.startswith(further)}


def test_a_matrix_by_hand():
    """Rows: after corpus i; columns: corpus j. An expanding method reads what is known by the layers made for it."""
    found = [[2.0, 9.0, 9.0], [3.0, 4.0, 9.0], [5.0, 6.0, 1.0]]
    assert matrix("full", found) == found
    assert matrix("both", found) == [[2.0, 9.0, 9.0], [2.0, 4.0, 9.0], [2.0, 4.0, 1.0]]
    assert forgetting(found) == ((5 - 2) + (6 - 4)) / 2 and forgetting(matrix("expansion", found)) == 0
    assert table("full", found).splitlines()[-1] == "| corpus 2 | 5.00 | 6.00 | 1.00 |"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--corpora", "a"], "--corpora: found a, expected two or more different ones"),
        (["--corpora", "a", "a"], "--corpora: found a, a, expected two or more"),
        (
            ["--corpora", "a", "b", "--layers", "0", "--replay-share", "1"],
            "--layers: found 0.*\n--replay-share: found 1",
        ),
    ],
)
def test_options(arguments, message):
    from memformer_dist.commands.continual import parse
    from memformer_dist.errors import UserError

    with pytest.raises(UserError, match=message):
        parse(["--config", "small", *arguments])


@pytest.mark.slow
def test_two_corpora_four_ways(corpus_dir, tmp_path):
    other = tmp_path / "texts"
    other.mkdir()
    for number, text in enumerate(documents(40, seed=1)):
        (other / f"{number:02d}.txt").write_text(text)
    shard(tmp_path / "other", corpus_dir.parent / "small.model", [str(other)], valid_fraction=0.25)
    raw = settings(corpus_dir, tokens=6 * STEP_TOKENS, training={"final_evaluate_segments": 8})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    command = ("--config", tmp_path / "config.json", "--corpora", corpus_dir, tmp_path / "other")
    command += ("--runs", tmp_path / "runs", "--json", tmp_path / "found.json")
    done = run_script("launch/continual.py", *command)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["methods"]
    assert list(found) == ["full", "replay", "expansion", "both"]
    firsts = [one["perplexity"][0] for one in found.values()]
    assert all(row == firsts[0] and all(math.isfinite(value) for value in row) for row in firsts)
    for method in ("expansion", "both"):
        assert found[method]["forgetting"] == 0 and found[method]["perplexity"][1][0] == firsts[0][0]
    for method in ("full", "replay"):
        assert found[method]["forgetting"] != 0
    assert all(one["perplexity"][1][1] < firsts[0][1] for one in found.values()), "each has learned the new corpus"
    assert (
        "| corpus 1 |" in done.stdout and "expansion: perplexity per token by corpus; forgetting +0.00" in done.stdout
    )

    first, expanded = (
        tensors(last_checkpoint(tmp_path / "runs" / name), "weights") for name in ("first", "expansion/1")
    )
    assert all(torch.equal(tensor, expanded[name]) for name, tensor in first.items()) and len(expanded) > len(first)
    mixture = json.loads((tmp_path / "runs" / "both" / "1" / "config.json").read_text())["data"]["corpus"]
    assert mixture == {str(tmp_path / "other"): 0.5, str(corpus_dir): 0.5}

    again = run_script("launch/continual.py", *command)
    assert again.returncode == 0 and again.stdout == done.stdout
    records = [json.loads(line) for line in (tmp_path / "runs/full/1/metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss/train" in record]
    assert steps == sorted(set(steps)) and len(steps) > 4, "nothing is trained twice"
