"""The configuration: what is refused, and in which words."""

import json
import re

import pytest

from memformer_dist.cells.plain import PlainConfig
from memformer_dist.config import RunConfig, cell_configs
from memformer_dist.errors import UserError
from memformer_dist.zero.settings import SET_BY_US
from tests.helpers import ROOT
from tests.helpers.fields import problems, put


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
