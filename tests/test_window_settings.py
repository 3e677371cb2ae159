"""The field mrbp.window as a schedule."""

import json

import pytest

from memformer_dist.config import RunConfig
from tests.helpers.fields import problems, put

BY_METRIC = {"first": 2, "last": 5, "metric": "loss/train", "threshold": 1.2, "every_steps": 50}
BY_GAP = {"first": 2, "last": 5, "metric": "eval/gap", "threshold": 0.01}


@pytest.mark.parametrize(
    "window",
    [7, {"by_step": {"0": 2}}, {"by_step": {"0": 2, "10": 8, "20": 3}}, BY_METRIC, BY_METRIC | {"last": 2}, BY_GAP],
)
def test_windows(config, window):
    put(config, "mrbp.window", window)
    put(config, "training.evaluate_every_tokens", 100)
    checked = RunConfig.check(config)
    assert RunConfig.model_validate_json(checked.to_json()) == RunConfig.check(json.loads(checked.to_json())) == checked
    put(config, "mrbp.window", 6)
    other = RunConfig.check(config)
    assert list(other.changes_since(checked)) == list(checked.changes_since(other)) == ["mrbp.window"]


@pytest.mark.parametrize(
    "window, expected",
    [
        (0, "mrbp.window: found 0; input should be greater than 0"),
        (2.5, "mrbp.window: found 2.5; input should be a valid integer"),
        ("long", 'mrbp.window: found \'long\'; expected an integer, or {"by_step": {"0": 2, "1000": 8}}, or {"first"'),
        ([2, 3], "mrbp.window: found [2, 3]; expected an integer, or {"),
        ({}, "mrbp.window: found {}; expected an integer, or {"),
        ({"by_steps": {"0": 2}}, "mrbp.window: found {'by_steps': {'0': 2}}; expected an integer, or {"),
        ({"by_step": {}}, "mrbp.window.by_step: found the steps none; expected 0 and then increasing ones"),
        ({"by_step": {"1": 2}}, "mrbp.window.by_step: found the steps 1; expected 0 and then increasing ones"),
        (
            {"by_step": {"0": 2, "9": 3, "8": 4}},
            "mrbp.window.by_step: found the steps 0, 9, 8; expected 0 and then incr",
        ),
        ({"by_step": {"0": 2, "-9": 3}}, "mrbp.window.by_step: found the steps 0, -9; expected 0 and then increasing"),
        ({"by_step": {"0": 2, "1e3": 3}}, "mrbp.window.by_step.1e3: found '1e3'; input should be a valid integer"),
        ({"by_step": {"0": 2, "9": 0}}, "mrbp.window.by_step.9: found 0; input should be greater than 0"),
        ({"by_step": [2, 3]}, "mrbp.window.by_step: found [2, 3]; input should be a valid dictionary"),
        ({"by_step": {"0": 2}, "last": 3}, "mrbp.window.last: unknown key, expected one of by_step"),
        (BY_METRIC | {"last": 1}, "mrbp.window.last: found 1, expected at least first (2)"),
        (BY_METRIC | {"first": 0}, "mrbp.window.first: found 0; input should be greater than 0"),
        (BY_METRIC | {"every_step": 3}, "mrbp.window.every_step: unknown key, did you mean every_steps?"),
        (BY_METRIC | {"threshold": float("nan")}, "mrbp.window.threshold: found nan; input should be a finite number"),
        (
            BY_METRIC | {"metric": "loss"},
            "mrbp.window.metric: found 'loss'; input should be 'loss/train', 'accuracy/train', 'eval/loss' or",
        ),
        (BY_METRIC | {"every_steps": None}, "mrbp.window.every_steps: missing; steps that loss/train is averaged over"),
        (
            {"first": 1, **BY_GAP, "every_steps": 3},
            "mrbp.window.every_steps: found 3, expected none: eval/gap is compared",
        ),
        (
            {k: v for k, v in BY_METRIC.items() if k != "last"},
            "mrbp.window.last: missing; segments of the longest win",
        ),
        (
            {k: v for k, v in BY_METRIC.items() if k != "every_steps"},
            "mrbp.window.every_steps: missing; steps that loss",
        ),
    ],
)
def test_mistakes_in_a_schedule_of_windows(config, window, expected):
    """Of the shape that was meant alone."""
    put(config, "mrbp.window", window)
    put(config, "training.evaluate_every_tokens", 100)
    (problem,) = problems(config)
    assert problem.startswith(expected)


@pytest.mark.parametrize("metric", ["eval/loss", "eval/gap"])
def test_a_window_that_grows_by_evaluations_needs_some(config, metric):
    put(config, "mrbp.window", BY_GAP | {"metric": metric})
    (problem,) = problems(config)
    assert problem.startswith(
        f"mrbp.window.metric: found '{metric}', which is measured during training only where traini"
    )
    put(config, "training.evaluate_every_tokens", 100)
    RunConfig.check(config)


@pytest.mark.parametrize(
    "in_file, override, expected",
    [
        ({"by_step": {"0": 2, "10": 8}}, "mrbp.window=64", 64),
        (BY_METRIC, "mrbp.window=64", 64),
        (7, 'mrbp.window={"by_step": {"0": 3}}', {"by_step": {0: 3}}),
        ({"by_step": {"0": 2, "10": 8}}, "mrbp.window.by_step.20=4", {"by_step": {0: 2, 10: 8, 20: 4}}),
        (BY_METRIC, "mrbp.window.last=20", BY_METRIC | {"last": 20, "growth": 1.0}),
        (BY_METRIC, "mrbp.window.every_steps=7", BY_METRIC | {"every_steps": 7, "growth": 1.0}),
    ],
)
def test_set_overrides_a_schedule_of_windows(config, tmp_path, in_file, override, expected):
    put(config, "mrbp.window", in_file)
    (tmp_path / "run.json").write_text(json.dumps(config))
    assert RunConfig.load(tmp_path / "run.json", [override]).model_dump()["mrbp"]["window"] == expected
