"""Settings that will not do what they say, one by one; and that right configurations get no advice."""

import json

import pytest

from memformer_dist.advice import Run, Sizes, Source, advice
from memformer_dist.config import RunConfig
from tests.helpers import ROOT

# A run of 100,000 tokens in steps of 1,024 on a corpus of 50,000 tokens.
RAW = {
    "model": {"width": 16, "heads": 2, "feed_forward": 32, "slots": 4},
    "data": {"lanes": 8, "segment_length": 32},
    "mrbp": {"window": 4},
    "optimizer": {"learning_rate": 0.002, "warmup_tokens": 5000},
    "training": {"tokens": 100_000, "evaluate_every_tokens": 25_000, "evaluate_segments": 20},
    "checkpoint": {"every_tokens": 10_000, "anchor_every_tokens": 50_000, "keep": 4},
    "deepspeed": {"zero_optimization": {"stage": 1, "overlap_comm": True}},
}
SIZES = Sizes(
    tokens=50_000,
    labels=1.0,
    padding=0.0,
    longest=4000,
    sources=[Source("corpus", 1.0, 100)],
    shards=12,
    evaluation_segments=60,
    evaluation_tokens=14_000,
    is_cut=False,
    is_remote=False,
    replays=True,
)


def given(corpus, sizes: Sizes = SIZES, **fields) -> list[str]:
    """The advice about RAW with other fields, "section.field"."""
    raw = json.loads(json.dumps(RAW))
    raw["data"]["corpus"] = str(corpus)
    for name, value in fields.items():
        section, field = name.split("__")
        raw.setdefault(section, {})[field] = value
    return advice(RunConfig.check(raw), sizes)


def test_a_right_configuration_gets_none(corpus_dir):
    assert given(corpus_dir) == []


OF_CORPORA = [
    path for path in sorted((ROOT / "configs").glob("*.json")) if "task" not in json.loads(path.read_text())["data"]
]


@pytest.mark.parametrize("path", OF_CORPORA, ids=lambda path: path.stem)
def test_the_configurations_of_the_repository_get_none(path, corpus_dir):
    """With the sizes of what they are made for."""
    config = RunConfig.load(path, [f"data.corpus={corpus_dir}"])
    tokens = {"quickstart": 3_500_000, "books_cpu": 2_300_000, "paper_wikitext103": 118_000_000}.get(path.stem, 10**9)
    sizes = SIZES._replace(tokens=tokens, padding=0.02, longest=200_000, evaluation_segments=350)
    assert advice(config, sizes) == []


CASES = [
    (
        {"training__tokens": 6_000_000, "training__evaluate_every_tokens": 10**6},
        "training.tokens: found 6,000,000: 120 epo",
    ),
    (
        {"optimizer__warmup_tokens": 100_000},
        "optimizer.warmup_tokens: found 100,000 with training.tokens 100,000: the warm",
    ),
    (
        {"optimizer__decay_share": 0.5},
        "optimizer.decay_share: found 0.5, which has no effect with optimizer.schedule 'cosi",
    ),
    (
        {"optimizer__schedule": "warmup_stable_decay", "optimizer__warmup_tokens": 90_000},
        "optimizer.warmup_tokens: found 90,000: the decay of the last 0.2 of 100,000 tokens would begin before",
    ),
    (
        {"training__evaluate_every_tokens": 100_000},
        "training.evaluate_every_tokens: found 100,000 with training.tokens 100",
    ),
    (
        {"training__evaluate_every_tokens": 100},
        "training.evaluate_every_tokens: found 100, a step trains on about 1,024",
    ),
    ({"training__evaluate_every_tokens": None}, "training.evaluate_segments: found 20, which has no effect without"),
    (
        {"training__evaluate_segments": 61},
        "training.evaluate_segments: found 61, the validation split has 60 segments per",
    ),
    (
        {"training__final_evaluate_segments": 61},
        "training.final_evaluate_segments: found 61, the validation split has 60 segments per",
    ),
    (
        {"training__evaluate_warmup_segments": 4},
        "training.evaluate_warmup_segments: found 4, which has no effect: to cut documents",
    ),
    (
        {"checkpoint__every_tokens": 200_000, "checkpoint__anchor_every_tokens": None, "checkpoint__keep": 2},
        "checkpoint.every_tokens: found 200,000 with training.tokens 100,000: no checkpoint comes before the last",
    ),
    (
        {"checkpoint__every_tokens": 10},
        "checkpoint.every_tokens: found 10, a step trains on about 1,024 tokens: there is",
    ),
    (
        {"checkpoint__anchor_every_tokens": 200_000},
        "checkpoint.anchor_every_tokens: found 200,000 with training.tokens",
    ),
    (
        {"checkpoint__anchor_every_tokens": 9_999},
        "checkpoint.anchor_every_tokens: found 9,999 with checkpoint.every_tokens",
    ),
    (
        {"checkpoint__every_tokens": None, "checkpoint__keep": 2, "checkpoint__keep_best": False},
        "checkpoint.anchor_every_tokens: found 50,000 without checkpoint.every_tokens",
    ),
    ({"checkpoint__keep": 11, "checkpoint__keep_best": False}, "checkpoint.keep: found 11, the run writes 10"),
    ({"checkpoint__keep": 14}, "checkpoint.keep: found 14, the run writes 13"),
    (
        {"training__early_stopping_patience": 4},
        "training.early_stopping_patience: found 4, the run has about 4 evaluations",
    ),
    (
        {
            "data__segment_length": 4000,
            "data__lanes": 1,
            "mrbp__window": 1,
            "training__evaluate_segments": 1,
            "training__final_evaluate_segments": 1,
        },
        "data.segment_length: found 4000, the longest document has 4,000",
    ),
    (
        {"mrbp__window": 126, "data__lanes": 1},
        "mrbp.window: 126 segments of 32 tokens are more than the 4,000 tokens of",
    ),
    ({"data__shuffle_shards": 12}, "data.shuffle_shards: found 12, there are 12: the whole epoch is shuffled"),
    ({"data__cache": "/scratch"}, "data.cache: found /scratch, which has no effect: no corpus lies behind a URL"),
    ({"data__cache_gib": 1.5}, "data.cache_gib: found 1.5, which has no effect: no corpus lies behind a URL"),
    ({"data__prefetch": 8}, "data.prefetch: found 8, a window is 7 visits to segments: so many are prepared ahead"),
    (
        {"mrbp__window": {"by_step": {"0": 4, "50": 2, "120": 8, "5000": 16}}},
        "mrbp.window: the run has about 126 steps, so the windows from step 5,000 on never come",
    ),
    (
        {"mrbp__window": {"first": 4, "last": 10, "metric": "loss/train", "threshold": 5.0, "every_steps": 50}},
        "mrbp.window: grows from 4 to 10 segments in 300 steps at the earliest, the run has about 98",
    ),
    (
        {"mrbp__window": {"first": 4, "last": 10, "metric": "eval/gap", "threshold": 0.1}},
        "mrbp.window: grows from 4 to 10 segments in 6 evaluations at the earliest, the run has about 3",
    ),
    ({"mrbp__readout_group": 5}, "mrbp.readout_group: found 5, a window has 4 segments at most: it is one group"),
    ({"mrbp__keep_gathered": "none"}, "mrbp.keep_gathered: found 'none', which has no effect at ZeRO 1"),
    (
        {"mrbp__state_store": "host", "mrbp__replay": False},
        "mrbp.state_store: found 'host', which has no effect: nothing",
    ),
    ({"mrbp__state_stride": 2, "mrbp__replay": False}, "mrbp.state_stride: found 2, which has no effect: nothing"),
    ({"mrbp__state_stride": 4}, "mrbp.state_stride: found 4, a window has 4 segments at most: all of its states"),
    (
        {"deepspeed__zero_optimization": {"stage": 1, "stage3_max_live_parameters": 5}},
        "deepspeed.zero_optimization.stage3_max_live_parameters: has no effect at ZeRO 1",
    ),
    (
        {"monitor__log_every_steps": 200},
        "monitor.log_every_steps: found 200, the run has about 98 steps: only the last",
    ),
    ({"training__skipped_steps_limit": 200}, "training.skipped_steps_limit: found 200, the run has about 98 steps"),
]


@pytest.mark.parametrize("fields, expected", CASES)
def test_a_setting_without_effect_is_named(corpus_dir, fields, expected):
    (said,) = given(corpus_dir, **fields)
    assert said.startswith(expected)


@pytest.mark.parametrize(
    "sizes, fields, expected",
    [
        ({"labels": 0.005}, {}, "training.tokens: found 100,000: 400 epochs of a corpus of 250 labels"),
        (
            {"replays": False},
            {"mrbp__replay": False},
            "mrbp.replay: found false, which has no effect: the state of this",
        ),
        (
            {"longest": 96},
            {},
            "mrbp.window: 4 segments of 32 tokens are more than the 96 tokens of the longest document",
        ),
        ({"longest": 30}, {}, "data.segment_length: found 32, the longest document has 30 tokens"),
        (
            {"sources": [Source("large", 1.0, 100), Source("rare", 0.001, 100)]},
            {},
            "data.corpus: rare has weight 0.001 and 100 documents, of which the run's 2 epochs deal none",
        ),
        ({"padding": 0.99}, {"mrbp__window": {"by_step": {"0": 4, "5000": 8}}}, None),
        ({"is_remote": True}, {"data__cache_gib": 1.5, "data__cache": "/scratch"}, None),
        ({"shards": None}, {"data__shuffle_shards": 12}, None),
        ({"padding": 0.5}, {"monitor__log_every_steps": 190}, None),
    ],
)
def test_what_depends_on_the_corpus(corpus_dir, sizes, fields, expected):
    said = given(corpus_dir, SIZES._replace(**sizes), **fields)
    if "padding" in sizes:  # steps are smaller then: more than one reaches a checkpoint, not the other way round
        said = [sentence for sentence in said if not sentence.startswith(("checkpoint.", "training."))]
    assert [sentence[: len(expected or "")] for sentence in said] == ([expected] if expected else [])


LONG = SIZES._replace(evaluation_segments=781, evaluation_tokens=781 * 32)  # one book, which one of 8 lanes reads
END = (
    "training.final_evaluate_segments: found null: the evaluation at the end reads 781 segments per lane, 200% of the 391"
    " that are trained on; a number of segments limits it"
)
IDLE = (
    "; lanes have nothing to read 88% of the time, since a few documents are long: training.evaluate_warmup_segments cuts"
    " these over the lanes"
)
ON_THE_WAY = (
    "training.evaluate_segments: found null: the 3 evaluations on the way read 2,343 segments per lane, 600% of the 391 that"
    " are trained on; a number of segments limits it"
)


@pytest.mark.parametrize(
    "sizes, fields, expected",
    [
        (LONG, {}, [END + IDLE]),
        (LONG, {"training__evaluate_segments": None}, [END + IDLE, ON_THE_WAY + IDLE]),
        (LONG._replace(evaluation_tokens=781 * 32 * 8), {}, [END]),
        (LONG._replace(is_cut=True), {"training__evaluate_warmup_segments": 4}, [END]),
        (LONG, {"training__final_evaluate_segments": 700}, []),  # somebody wants it
        (SIZES, {"training__evaluate_segments": None}, [ON_THE_WAY.replace("2,343", "180").replace("600%", "46%")]),
        (
            LONG,
            {"training__tokens": 10**7, "checkpoint__every_tokens": 10**6, "checkpoint__anchor_every_tokens": None},
            [],
        ),
    ],
)
def test_evaluations_that_take_long_beside_the_training(corpus_dir, sizes, fields, expected):
    said = given(corpus_dir, sizes, **fields)
    assert [sentence for sentence in said if "evaluate_segments: found null" in sentence] == expected


def test_a_run_of_one_step(corpus_dir):
    said = given(corpus_dir, training__tokens=1000)
    assert said[0] == "training.tokens: found 1,000, a step trains on about 1,024: the run is one step"
    assert {sentence.split(":")[0] for sentence in said[1:]} == {
        "optimizer.warmup_tokens",
        "training.evaluate_every_tokens",
        "training.final_evaluate_segments",
        "checkpoint.every_tokens",
        "checkpoint.anchor_every_tokens",
        "checkpoint.keep",
        "monitor.log_every_steps",
    }


def test_steps_of_a_schedule(corpus_dir):
    raw = json.loads(json.dumps(RAW))
    raw["data"]["corpus"] = str(corpus_dir)
    raw["mrbp"]["window"] = {"by_step": {"0": 1, "10": 2, "20": 4}}
    run = Run.of(RunConfig.check(raw), SIZES._replace(padding=0.5, labels=0.25))
    segment = 8 * 32 * 0.5 * 0.25
    assert run.first_step == segment
    assert run.steps == pytest.approx(20 + (100_000 - segment * (10 + 20)) / (4 * segment))
    assert run.epochs == 8
