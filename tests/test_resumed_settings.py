"""The configuration as it is saved, what a resumed run may change of it, and the reference that says so."""

import json

import pytest
from pydantic import BaseModel

from memformer_dist.config import RunConfig, cell_configs
from memformer_dist.curriculum import WindowByMetric, WindowByStep
from memformer_dist.errors import UserError
from memformer_dist.reference import reference
from memformer_dist.zero.settings import SET_BY_US
from tests.helpers import ROOT
from tests.helpers.fields import put

# ---- saved and resumed -----------------------------------------------------------------------------------------------


def test_round_trip(config):
    for name, value in {"deepspeed.zero_optimization": {"stage": 3}, "optimizer.betas": [0.8, 0.9]}.items():
        put(config, name, value)
    checked = RunConfig.check(config)
    assert RunConfig.model_validate_json(checked.to_json()) == RunConfig.check(json.loads(checked.to_json())) == checked
    assert checked.changes_since(checked) == {}


def every_field(config: BaseModel) -> list[str]:
    sections = {name: section for name, section in config if name != "deepspeed"}
    return [f"{name}.{field}" for name, section in sections.items() for field, _ in section] + ["deepspeed"]


ALLOWED = {
    *("model.checkpoint_layers", "model.loss_chunk"),
    *("mrbp.window", "mrbp.readout_group", "mrbp.readout_parts", "mrbp.lanes_per_group"),
    *("mrbp.replay", "mrbp.state_store", "mrbp.state_stride", "mrbp.reduce", "mrbp.keep_gathered", "mrbp.drift_limit"),
    *("optimizer.learning_rate", "optimizer.final_learning_rate_ratio", "optimizer.warmup_tokens", "optimizer.betas"),
    *("optimizer.schedule", "optimizer.decay_share"),
    *("optimizer.epsilon", "optimizer.weight_decay", "optimizer.gradient_clipping"),
    *("checkpoint.every_tokens", "checkpoint.keep", "checkpoint.before_job_ends_s", "checkpoint.keep_best"),
    "checkpoint.anchor_every_tokens",
    *("monitor.log_every_steps", "monitor.device_peak_tflops"),
    *("deepspeed", "data.corpus", "data.prefetch", "data.cache", "data.cache_gib"),
    *(
        "training.tokens",
        "training.freeze",
        "training.evaluate_every_tokens",
        "training.evaluate_segments",
        "training.final_evaluate_segments",
        "training.evaluate_warmup_segments",
        "training.early_stopping_patience",
        "training.skipped_steps_limit",
    ),
}


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # "other" is of no field's type
def test_a_resumed_run_may_change_these_fields_and_no_others(config):
    """Written out here once more: a field that joins them by its prefix must be put down on purpose."""
    saved = RunConfig.check(config)
    names = every_field(saved)
    assert set(names) > ALLOWED
    for name in names:
        section, _, field = name.partition(".")
        if field:
            now = saved.model_copy(update={section: getattr(saved, section).model_copy(update={field: "other"})})
            then = getattr(getattr(saved, section), field)
        else:
            now, then = saved.model_copy(update={section: "other"}), saved.deepspeed
        if name in ALLOWED:
            assert now.changes_since(saved) == {name: (then, "other")}
        else:
            with pytest.raises(UserError) as caught:
                now.changes_since(saved)
            assert f"\n  {name}: found 'other', the run has {then!r}\n" in str(caught.value)


def test_all_refused_changes_come_in_one_message(config):
    saved = RunConfig.check(config)
    put(config, "data.seed", 3)
    put(config, "model.slots", 5)
    put(config, "mrbp.window", 9)
    with pytest.raises(UserError) as caught:
        RunConfig.check(config).changes_since(saved)
    text = str(caught.value)
    assert "  data.seed: found 3, the run has 0\n" in text and "  model.slots: found 5, the run has 4\n" in text
    assert "mrbp.window" not in text


# ---- the reference ---------------------------------------------------------------------------------------------------


def test_the_reference_is_current():
    """Else: python -m memformer_dist.reference > docs/configuration.md."""
    assert (ROOT / "docs" / "configuration.md").read_text().splitlines() == list(reference())


def test_the_reference_has_every_field(config):
    text = "\n".join(reference())
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    configs = [RunConfig.check(config), RunConfig.check(config | {"model": {"cell": "plain"}})]
    names = [field for one in configs for name, section in one if name != "deepspeed" for field, _ in section]
    assert all(any(row.startswith(f"| `{name}`") for row in rows) for name in [*names, *SET_BY_US])
    starred = sum(" \\* |" in row for row in rows)
    # The fields that a resume may change, without the section deepspeed, those of `model` once per cell, and those of the
    # schedules of windows.
    of_model = sum(name.startswith("model.") for name in ALLOWED)
    of_windows = len(WindowByStep.model_fields) + len(WindowByMetric.model_fields)
    assert starred == len(ALLOWED) - 1 + of_model * (len(cell_configs()) - 1) + of_windows
