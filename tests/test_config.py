"""The configuration: what is refused, in which words, and what a resumed run may change."""

import json
import re

import pytest
from pydantic import BaseModel, ValidationError, field_validator, model_validator

from memformer_dist.cells.plain import PlainConfig
from memformer_dist.config import RunConfig, cell_configs, known_fields
from memformer_dist.curriculum import WindowByMetric, WindowByStep
from memformer_dist.errors import Problems, UserError, sentences
from memformer_dist.reference import reference
from memformer_dist.suggest import SYNONYMS
from memformer_dist.zero.settings import SET_BY_US
from tests.helpers import ROOT


def put(config: dict, name: str, value) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


def problems(config: dict, world_size: int = 1) -> list[str]:
    """The lines of the one message, without its first."""
    with pytest.raises(UserError) as caught:
        RunConfig.check(config, world_size)
    first, *lines = str(caught.value).splitlines()
    assert first == f"configuration: {len(lines)} problem{'s' * (len(lines) > 1)}"
    return [line.removeprefix("  ") for line in lines]


def test_the_configuration_of_the_other_tests_is_good(config):
    assert RunConfig.check(config).data.lanes == 4


# ---- single problems -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("mrbp.windows", 4, "mrbp.windows: unknown key, did you mean window?"),
        ("model.slot", 4, "model.slot: unknown key, did you mean slots?"),
        (
            "checkpoint.zzz",
            1,
            "checkpoint.zzz: unknown key, expected one of every_tokens, keep, before_job_ends_s, keep_best",
        ),
        (
            "training.early_stopping_patience",
            3,
            "training.early_stopping_patience: found 3, which counts evaluations during training; expected training.eval",
        ),
        ("optimiser.betas", [0.9, 0.99], "optimiser: unknown section, did you mean optimizer?"),
        ("zzz", {}, "zzz: unknown section, expected one of model, data, mrbp, optimizer, training, "),
        ("data", [1], "data: found [1]; input should be a valid dictionary"),
        ("data.lanes", "many", "data.lanes: found 'many'; input should be a valid integer"),
        ("data.lanes", 2.5, "data.lanes: found 2.5; input should be a valid integer"),
        ("data.segment_length", 0, "data.segment_length: found 0; input should be greater than 0"),
        ("data.corpus", 5, "data.corpus: found 5; expected a folder, a URL, or an object of weights"),
        ("data.corpus", {}, "data.corpus: found {}; expected a folder, a URL, or an object of weights"),
        ("data.corpus", {"s3://a/b": 0}, "data.corpus.s3://a/b: found 0; input should be greater than 0"),
        ("data.mode", "text", "data.mode: found 'text'; input should be 'documents' or 'stream'"),
        ("training.tokens", None, "training.tokens: found None; input should be a valid integer"),
        ("training.precision", "fp8", "training.precision: found 'fp8'; input should be 'fp32', 'bf16' or 'bf16_par"),
        ("mrbp.readout_group", 0, "mrbp.readout_group: found 0; input should be greater than 0"),
        ("mrbp.readout_group", "all", "mrbp.readout_group: found 'all'; expected an integer or \"auto\""),
        ("mrbp.readout_group", None, 'mrbp.readout_group: found None; expected an integer or "auto"'),
        ("mrbp.state_store", "disk", "mrbp.state_store: found 'disk'; input should be 'device' or 'host'"),
        ("mrbp.reduce", "step", "mrbp.reduce: found 'step'; input should be 'window' or 'segment'"),
        ("mrbp.keep_gathered", True, "mrbp.keep_gathered: found True; input should be 'none', 'readout' or 'all'"),
        ("optimizer.betas", [0.9], "optimizer.betas.1: missing"),
        ("data.lanes", 2**20 + 1, "data.lanes: found 1048577; input should be less than or equal to 1048576"),
        ("data.segment_length", 10**9, "data.segment_length: found 1000000000; input should be less than or equal to"),
        ("mrbp.window", 10**9, "mrbp.window: found 1000000000; input should be less than or equal to 1048576"),
        ("training.tokens", 10**25, "training.tokens: found 10000000000000000000000000, expected an integer that fits"),
        (
            "training.seed",
            2**63,
            "training.seed: found 9223372036854775808, expected an integer that fits into 64 bits",
        ),
        ("optimizer.epsilon", 1e-40, "optimizer.epsilon: found 1e-40; input should be greater than or equal to 0.0000"),
        ("optimizer.betas", [0.9, 1.0], "optimizer.betas.1: found 1.0; input should be less than 1"),
        ("optimizer.betas", [-0.1, 0.9], "optimizer.betas.0: found -0.1; input should be greater than or equal to 0"),
        ("optimizer.decay_share", 0, "optimizer.decay_share: found 0; input should be greater than 0"),
        ("optimizer.decay_share", 1.1, "optimizer.decay_share: found 1.1; input should be less than or equal to 1"),
        (
            "optimizer.schedule",
            "linear",
            "optimizer.schedule: found 'linear'; input should be 'cosine' or 'warmup_stable",
        ),
        (
            "optimizer.gradient_clipping",
            float("inf"),
            "optimizer.gradient_clipping: found inf; input should be a finite",
        ),
        ("checkpoint.keep", 1, "checkpoint.keep: found 1; input should be greater than or equal to 2"),
        ("model.heads", 3, "model.width: found 16, expected a multiple of heads (3)"),
        ("deepspeed", 3, "deepspeed: found 3, expected an object"),
        ("deepspeed.zero_optimization", 2, "deepspeed.zero_optimization: found 2, expected an object"),
        (
            "deepspeed.zero_optimization",
            {"stage": 4},
            "deepspeed.zero_optimization.stage: found 4, expected 0, 1, 2 or 3",
        ),
        (
            "deepspeed.zero_optimization",
            {"stage": "2"},
            "deepspeed.zero_optimization.stage: found '2', expected 0, 1, 2 or",
        ),
    ],
)
def test_a_mistake_is_named_with_what_was_found_and_expected(config, name, value, expected):
    put(config, name, value)
    (problem,) = problems(config)
    assert problem.startswith(expected)


@pytest.mark.parametrize("name", ["data.corpus", "data.lanes", "data.segment_length", "mrbp.window", "training.tokens"])
def test_what_has_no_default_must_be_there(config, name):
    section, field = name.split(".")
    del config[section][field]
    (problem,) = problems(config)
    assert problem.startswith(f"{name}: missing; ") and len(problem) > len(f"{name}: missing; ") + 10


def test_missing_sections_name_their_fields(config):
    del config["model"], config["mrbp"], config["training"]
    assert [problem.split(":")[0] for problem in problems(config)] == ["model", "mrbp.window", "training.tokens"]


def test_every_setting_that_does_not_fit_another_is_a_problem_of_its_own(config):
    config["model"] |= {"heads": 3, "encoder_layers": 0}
    assert [problem.split(", expected")[0] for problem in problems(config)] == [
        "model.width: found 16",
        "model.encoder_layers: found 0",
    ]


def test_misspelt_key_of_deepspeed(config):
    """DeepSpeed itself would pass over it in silence."""
    config["deepspeed"] = {"zero_optimisation": {"stage": 3}}
    assert problems(config) == ["deepspeed.zero_optimisation: unknown key, did you mean zero_optimization?"]


def test_mistakes_inside_zero_optimization_are_found_with_the_others(config):
    """DeepSpeed would name them one at a time, after every rank has started; tests/test_zero_options.py has more of them."""
    put(config, "data.lanes", 0)
    config["deepspeed"] = {
        "zero_optimization": {
            "stage": 2,
            "overlap_com": True,
            "reduce_bucket_size": -1,
            "round_robin_gradients": True,
            "offload_optimizer": {"device": "gpu", "pin_memori": True},
        }
    }
    lanes, *found = problems(config)
    assert lanes.startswith("data.lanes: ")
    expected = [
        "overlap_com: unknown key, did you mean overlap_comm?",
        "reduce_bucket_size: found -1, expected an integer > 0",
        "round_robin_gradients: found True, which is refused: DeepSpeed 0.19.8 then mixes up which weights",
        'offload_optimizer.device: found \'gpu\', expected "none" or "cpu"',
        "offload_optimizer.pin_memori: unknown key, did you mean pin_memory?",
    ]
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(f"deepspeed.zero_optimization.{start}")


def test_fp16_is_refused_with_the_reason(config):
    put(config, "training.precision", "fp16")
    put(config, "deepspeed.fp16", {"enabled": True})
    of_training, of_deepspeed = problems(config)
    assert of_training.startswith("training.precision: found 'fp16', expected 'fp32' or 'bf16'; ")
    assert of_deepspeed.startswith("deepspeed.fp16: not allowed here; set training.precision")
    assert all("loss scaling would multiply the memory's gradient" in text for text in (of_training, of_deepspeed))


def test_what_is_ours_is_refused_in_the_section_deepspeed(config):
    expected = "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping"
    assert {*expected.split(), "optimizer", "scheduler", "bf16", "fp16", "amp", "torch_autocast"} <= SET_BY_US.keys()
    config["deepspeed"] = dict.fromkeys(SET_BY_US, 1) | {
        "zero_optimization": {"stage": 2},
        "wall_clock_breakdown": True,
    }
    assert problems(config) == [f"deepspeed.{key}: not allowed here; {place}" for key, place in SET_BY_US.items()]
    # Where a place names fields of ours, these exist: a renamed field must be renamed here too.
    for place in SET_BY_US.values():
        for word in re.findall(r"[a-z_.]+", place):
            section, dot, field = word.partition(".")
            assert not dot or field in RunConfig.model_fields[section].annotation.model_fields, word


@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_is_taken(config, stage):
    config["deepspeed"] = {"zero_optimization": {"stage": stage}}
    assert RunConfig.check(config).zero_stage == stage


# ---- the cell --------------------------------------------------------------------------------------------------------


def test_the_cell_is_a_memformer_unless_another_is_named(config):
    assert "cell" not in config["model"]
    assert RunConfig.check(config) == RunConfig.check(config | {"model": {"cell": "memformer"} | config["model"]})
    config["model"] = {"cell": "plain", "width": 16, "heads": 2, "layers": 3}
    checked = RunConfig.check(config)
    assert isinstance(checked.model, PlainConfig) and checked.model.layers == 3
    assert RunConfig.model_validate_json(checked.to_json()) == RunConfig.check(json.loads(checked.to_json())) == checked


def cells_with(field: str) -> str:
    return ", ".join(name for name, config in cell_configs().items() if field in config.model_fields)


@pytest.mark.parametrize(
    "model, expected",
    [
        ({"cell": "gpt"}, f"model.cell: found 'gpt', expected one of {', '.join(cell_configs())}"),
        (
            {"cell": "rtm"},
            f"model.cell: found 'rtm', expected one of {', '.join(cell_configs())}; did you mean rmt?",
        ),
        (
            {"cell": "memfromer"},
            f"model.cell: found 'memfromer', expected one of {', '.join(cell_configs())}; did you mean memformer?",
        ),
        ({"cell": None}, f"model.cell: found None, expected one of {', '.join(cell_configs())}"),
        ({"cell": [1]}, f"model.cell: found [1], expected one of {', '.join(cell_configs())}"),
        ({"cell": "plain", "layer": 3}, "model.layer: unknown key, did you mean layers?"),
        ({"cell": "plain", "n_layers": 3}, "model.n_layers: unknown key, did you mean model.layers?"),
        ({"n_layers": 3}, "model.n_layers: unknown key, did you mean model.decoder_layers?"),
        (
            {"cell": "plain", "slots": 3},
            f"model.slots: unknown key, a field of other cells ({cells_with('slots')}), not of plain",
        ),
        (
            {"layers": 3},
            f"model.layers: unknown key, a field of other cells ({cells_with('layers')}), not of memformer",
        ),
        ({"cell": "plain", "layers": 0}, "model.layers: found 0; input should be greater than 0"),
    ],
)
def test_mistakes_are_those_of_the_named_cell(config, model, expected):
    config["model"] = {"width": 16, "heads": 2} | model
    assert problems(config) == [expected]


def test_a_resumed_run_keeps_its_cell(config):
    saved = RunConfig.check(config)
    config["model"] = {"cell": "plain", "width": 16, "heads": 2}
    with pytest.raises(UserError, match="  model.cell: found 'plain', the run has 'memformer'\n"):
        RunConfig.check(config).changes_since(saved)


# ---- did you mean ----------------------------------------------------------------------------------------------------

MEANT = {
    "data.lanes": ["batch_size", "per_device_train_batch_size", "global_batch_size"],
    "data.segment_length": ["seq_len", "block_size", "context_length", "max_seq_length", "n_ctx"],
    "data.corpus": ["dataset", "path", "data_path"],
    "mrbp.lanes_per_group": ["micro_batch_size", "gradient_accumulation_steps"],
    "mrbp.window": ["bptt", "n_segments"],
    "model.width": ["d_model", "n_embd", "hidden_size", "dim"],
    "model.heads": ["n_heads", "num_heads", "n_head", "num_attention_heads"],
    "model.feed_forward": ["d_ff", "ffn_dim", "intermediate_size"],
    "model.slots": ["mem_tokens", "mem_len", "n_mem", "num_mem_tokens"],
    "model.decoder_layers": ["n_layers", "n_layer", "num_hidden_layers"],
    "optimizer.learning_rate": ["lr", "max_lr"],
    "optimizer.warmup_tokens": ["warmup_steps", "warmup_iters", "warmup"],
    "optimizer.gradient_clipping": ["max_norm", "grad_clip", "max_grad_norm", "clip_grad"],
    "optimizer.betas": ["beta1", "beta2", "adam_beta1"],
    "optimizer.epsilon": ["eps", "adam_epsilon"],
    "training.tokens": ["max_steps", "steps", "epochs", "num_train_epochs", "max_iters"],
    "training.precision": ["dtype", "bf16", "fp16", "mixed_precision"],
    "training.evaluate_every_tokens": ["eval_every", "eval_steps", "eval_interval"],
    "checkpoint.every_tokens": ["save_every", "save_steps"],
    "--run-dir": ["output_dir", "out_dir"],
}


@pytest.mark.parametrize("field, word", [(field, word) for field, words in MEANT.items() for word in words])
def test_a_word_of_other_trainers_is_understood_wherever_it_stands(config, tmp_path, field, word):
    (tmp_path / "run.json").write_text(json.dumps(config))
    for section in ("model", "data", "mrbp", "optimizer", "training", "checkpoint", "monitor"):
        wrong = config | {section: config[section] | {word: 1}}
        assert problems(wrong) == [f"{section}.{word}: unknown key, did you mean {field}?"]
    assert problems(config | {word: 1}) == [f"{word}: unknown section, did you mean {field}?"]
    with pytest.raises(UserError) as caught:
        RunConfig.load(tmp_path / "run.json", [f"{word}=1"])
    assert str(caught.value).endswith(f"  --set {word}=1: expected section.field=value, did you mean {field}?")


@pytest.mark.parametrize(
    "name, meant",
    [
        ("training.window", "mrbp.window"),
        ("model.lanes", "data.lanes"),
        ("data.Lanes", "data.lanes"),
        ("training.num-train-epochs", "training.tokens"),
        ("model.learning-rate", "optimizer.learning_rate"),
        ("training.wieght_decay", "optimizer.weight_decay"),
        ("optimizer.gradient_accumulation_steps", "mrbp.lanes_per_group"),
        ("deepspeed.lr", "optimizer.learning_rate"),
        ("deepspeed.stage", "deepspeed.zero_optimization"),
        ("model.every_tokens", "checkpoint.every_tokens"),
    ],
)
def test_a_field_in_the_wrong_section(config, name, meant):
    put(config, name, 1)
    assert problems(config) == [f"{name}: unknown key, did you mean {meant}?"]


@pytest.mark.parametrize("name, meant", [("lr_scheduler", "optimizer"), ("wandb", "monitor"), ("seed", "data.seed")])
def test_a_section_that_is_not_there(config, name, meant):
    assert problems(config | {name: {}}) == [f"{name}: unknown section, did you mean {meant}?"]


@pytest.mark.parametrize(
    "override, meant",
    [("lanes=4", "data.lanes"), ("lanes", "data.lanes"), ("window=4", "mrbp.window"), ("seed=1", "data.seed")],
)
def test_set_without_a_section(config, tmp_path, override, meant):
    (tmp_path / "run.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        RunConfig.load(tmp_path / "run.json", [override])
    assert str(caught.value).endswith(f"  --set {override}: expected section.field=value, did you mean {meant}?")


def test_synonyms_are_of_fields_that_exist_and_are_no_fields_themselves():
    """A renamed field must be renamed in the table too, or its words would be lost silently."""
    cells = [known_fields({"cell": cell}) for cell in cell_configs()]
    for field, words in SYNONYMS.items():
        section, _, name = field.partition(".")
        assert field == "--run-dir" or any(section in known and (not name or name in known[section]) for known in cells)
        own = (
            {other for known in cells for other in (known[section] if name else known)}
            if section in cells[0]
            else set()
        )
        assert not own & set(words.split()), field
        assert len(set(words.split())) == len(words.split()), field
    elsewhere = [word for field, words in SYNONYMS.items() if not field.startswith("model.") for word in words.split()]
    assert len(set(elsewhere)) == len(elsewhere), "one word for two fields"


# ---- the translation of pydantic's errors ----------------------------------------------------------------------------


class Inner(BaseModel, extra="forbid"):
    size: int


class Outer(BaseModel, extra="forbid"):
    name: str
    inner: Inner
    several: list[Inner] = []

    @field_validator("name")
    @classmethod
    def _not_empty(cls, name: str) -> str:
        if not name:
            raise ValueError("found no name, expected one")
        return name

    @model_validator(mode="after")
    def _fits(self) -> "Outer":
        if self.inner.size < 0:
            raise Problems(["inner.size: found less than 0, expected more", "name: found another"])
        return self


def sentences_about(raw: dict, *arguments, **endings) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(raw)
    return sentences(caught.value, *arguments, **endings)


def test_one_sentence_for_each_problem():
    raw = {"name": "", "inner": {"size": "x"}, "several": [{"size": 1}, {"sise": 2}], "more": 1}
    assert sentences_about(raw) == [
        "name: found no name, expected one",
        "inner.size: found 'x'; input should be a valid integer, unable to parse string as an integer",
        "several.1.size: missing",
        "several.1.sise: unknown key",
        "more: unknown key",
    ]
    endings = {"unknown": lambda field: f", {field}!", "missing": lambda field: f", {field}?"}
    assert sentences_about(raw, "file", **endings)[2:4] == [
        "file.several.1.size: missing, file.several.1.size?",
        "file.several.1.sise: unknown key, file.several.1.sise!",
    ]


def test_several_problems_of_one_validator():
    raw = {"name": "a", "inner": {"size": -1}}
    expected = ["inner.size: found less than 0, expected more", "name: found another"]
    assert sentences_about(raw) == expected
    assert sentences_about(raw, "model") == [f"model.{problem}" for problem in expected]


def test_a_long_value_is_cut_off():
    (sentence,) = sentences_about({"name": ["x" * 1000], "inner": {"size": 1}})
    assert len(sentence) < 200 and " ...; input should be a valid string" in sentence


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


# ---- the window as a schedule ----------------------------------------------------------------------------------------

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


# ---- relations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes, world_size, would_do", [(8, 3, 9), (7, 3, 6), (2, 5, 5), (30, 4, 32)])
def test_the_world_size_must_divide_the_lanes(config, lanes, world_size, would_do):
    config["data"]["lanes"] = lanes
    (problem,) = problems(config, world_size)
    assert problem == (
        f"data.lanes: found {lanes}, expected a multiple of the {world_size} ranks, {would_do} for example"
    )
    config["data"]["lanes"] = would_do
    RunConfig.check(config, world_size)


@pytest.mark.parametrize("field, value", [("checkpoint_layers", True), ("loss_chunk", 64)])
def test_what_a_backward_takes_is_not_measured(config, field, value):
    config["model"][field] = value
    assert getattr(RunConfig.check(config).model, field) == value
    config["mrbp"]["readout_group"] = "auto"
    (problem,) = problems(config)
    assert problem.startswith(f"mrbp.readout_group: found 'auto' with model.{field}, ")
    config["model"][field] = {"checkpoint_layers": False, "loss_chunk": None}[field]
    assert RunConfig.check(config).mrbp.readout_group == "auto"


def test_readout_parts_are_for_single_readouts_of_enough_lanes(config):
    config["mrbp"] |= {"readout_parts": 4}
    assert RunConfig.check(config, 1).mrbp.readout_parts == 4
    with pytest.raises(UserError, match="mrbp.readout_parts: found 4, expected at most the 2 lanes"):
        RunConfig.check(config, 2)
    config["mrbp"]["readout_group"] = "auto"
    with pytest.raises(UserError, match="mrbp.readout_parts: found 4 with mrbp.readout_group 'auto'"):
        RunConfig.check(config, 1)


def test_evaluations_read_more_than_their_warmup(config):
    config["training"] |= {"evaluate_warmup_segments": 8, "evaluate_segments": 8, "final_evaluate_segments": 9}
    (problem,) = problems(config, 1)
    assert problem == (
        "training.evaluate_segments: found 8, expected more than training.evaluate_warmup_segments (8), whose losses are"
        " not counted"
    )
    config["training"] |= {"evaluate_segments": None, "final_evaluate_segments": 1}
    (problem,) = problems(config, 1)
    assert problem.startswith("training.final_evaluate_segments: found 1, expected more than")
    config["training"]["evaluate_warmup_segments"] = 0
    RunConfig.check(config)
    config["training"]["evaluate_warmup_segments"] = -1
    (problem,) = problems(config, 1)
    assert problem.startswith("training.evaluate_warmup_segments: found -1; ")


@pytest.mark.parametrize(
    "field, value, found",
    [("corpus", {"a": 0.5, "b": 1}, "{'a': 0.5}"), ("min_tokens", 3, "3"), ("shuffle_shards", 2, "2")],
)
def test_what_a_stream_cannot_use(config, monkeypatch, field, value, found):
    monkeypatch.setattr("memformer_dist.config._missing_shards", lambda *_: [])
    config["data"][field] = value
    RunConfig.check(config, 1)
    config["data"]["mode"] = "stream"
    assert [problem.partition(",")[0] for problem in problems(config, 1)] == [
        f"data.{field}: found {found} with data.mode 'stream'"
    ]


def test_lanes_per_group_must_divide_the_lanes_of_a_rank(config):
    config["data"]["lanes"] = 8
    assert RunConfig.check(config, 2).lanes_per_group(2) == 4
    config["mrbp"]["lanes_per_group"] = 4
    assert RunConfig.check(config, 1).lanes_per_group(1) == RunConfig.check(config, 2).lanes_per_group(2) == 4
    (problem,) = problems(config, 4)
    assert problem.startswith("mrbp.lanes_per_group: found 4, expected a divisor of the 2 lanes of a rank")


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("reduce", ["window", "segment"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_parameters"])
def test_reductions_and_precisions_that_need_a_stage_that_shards(config, stage, reduce, precision):
    put(config, "mrbp.reduce", reduce)
    put(config, "training.precision", precision)
    put(config, "deepspeed.zero_optimization", {"stage": stage})
    expected = []
    if reduce == "segment" and stage < 2:
        expected.append(f"mrbp.reduce: found 'segment' with deepspeed.zero_optimization.stage {stage}, which does not")
    if precision == "bf16_parameters" and (reduce == "window" or stage < 2):
        expected.append("training.precision: found 'bf16_parameters', whose fp32 gradients are sharded; expected with")
    if not expected:
        assert RunConfig.check(config).mrbp.reduce == reduce
    else:
        found = problems(config)
        assert len(found) == len(expected) and all(map(str.startswith, found, expected))


def test_a_corpus_without_shards(config, tmp_path):
    config["data"]["corpus"] = str(tmp_path)
    assert problems(config) == [
        f"data.corpus: no token shards in {tmp_path / split}; tokenizer/shard.py writes them"
        for split in ("train", "valid")
    ]


# ---- several at once -------------------------------------------------------------------------------------------------


def test_all_problems_come_in_one_message(config, tmp_path):
    put(config, "model.slot", 3)
    put(config, "model.width", "wide")
    put(config, "mrbp.window", -1)
    put(config, "zzz", 1)
    put(config, "training.precision", "fp16")
    put(config, "deepspeed.optimizer", {})
    put(config, "data.corpus", str(tmp_path / "gone"))
    put(config, "data.lanes", 4)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        RunConfig.load(file, ["checkpoint.keep=1", "monitor", "data.lanes.x=1"], world_size=3)
    first, *lines = str(caught.value).splitlines()
    starts = [
        "--set monitor: expected section.field=value",
        "--set data.lanes.x=1: lanes is not a section",
        "zzz: unknown section",
        "model.width: found 'wide'",
        "model.slot: unknown key",
        "mrbp.window: found -1",
        "training.precision: found 'fp16'",
        "checkpoint.keep: found 1",
        "deepspeed.optimizer: not allowed here",
        "data.lanes: found 4, expected a multiple of the 3 ra",
        f"data.corpus: no token shards in {tmp_path / 'gone' / 'train'}",
        f"data.corpus: no token shards in {tmp_path / 'gone' / 'valid'}",
    ]
    assert first == f"{file}: 12 problems" and len(lines) == 12
    assert [line[2 : 2 + len(start)] for line, start in zip(lines, starts, strict=True)] == starts


# ---- the file and --set ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, name, expected",
    [
        ("mrbp.window=64", "mrbp.window", 64),
        ("training.tokens=2e6", "training.tokens", 2_000_000),
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("optimizer.betas=[0.8,0.9]", "optimizer.betas", (0.8, 0.9)),
        ("mrbp.lanes_per_group=null", "mrbp.lanes_per_group", None),
        ("mrbp.readout_group=auto", "mrbp.readout_group", "auto"),
        ("mrbp.readout_group=4", "mrbp.readout_group", 4),
        ("training.init_from=runs/old", "training.init_from", "runs/old"),
        ("training.init_from=runs/a=b.c", "training.init_from", "runs/a=b.c"),
        ('training.init_from="7"', "training.init_from", "7"),
        ("model.memory_norm=false", "model.memory_norm", False),
        ("deepspeed.zero_optimization.stage=2", "deepspeed", {"zero_optimization": {"stage": 2}}),
        (
            'deepspeed.zero_optimization={"stage":1,"overlap_comm":true}',
            "deepspeed",
            {"zero_optimization": {"stage": 1, "overlap_comm": True}},
        ),
    ],
)
def test_set_overrides_a_field(config, tmp_path, override, name, expected):
    config["mrbp"]["lanes_per_group"] = 2
    (tmp_path / "run.json").write_text(json.dumps(config))

    def value(overrides):
        found = RunConfig.load(tmp_path / "run.json", overrides)
        for part in name.split("."):
            found = getattr(found, part)
        return found

    assert value([override]) == expected and type(value([override])) is type(expected)
    assert value([]) != expected


def test_of_two_overrides_the_later_holds(config, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(config))
    loaded = RunConfig.load(tmp_path / "run.json", ["mrbp.window=3", "data.seed=5", "mrbp.window=7"])
    assert (loaded.mrbp.window, loaded.data.seed) == (7, 5)


@pytest.mark.parametrize(
    "content, expected", [(b"{", "not JSON: "), (b"\xff{}", "not JSON: "), (b"[]", "found list, expected an object")]
)
def test_a_file_that_is_no_configuration(tmp_path, content, expected):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        RunConfig.load(tmp_path / "run.json")
    assert str(caught.value).startswith(f"{tmp_path / 'run.json'}: {expected}")


def test_a_path_that_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "gone.json"):
        with pytest.raises(UserError, match=f"--config: cannot read {path}: "):
            RunConfig.load(path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_configurations_of_the_repository(path, corpus_dir):
    """Nothing is wrong with them but that the corpus, or a task's text, may not be there yet."""
    task = json.loads(path.read_text())["data"].get("task")
    overrides = [] if task else [f"data.corpus={corpus_dir}"]
    if task and "texts" in task:
        overrides = [f'data.task.texts=["{path}"]']
    RunConfig.load(path, overrides)


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
