"""Windows by a schedule: when they change; that a run does not notice a stop, nor data and learning rate the window."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from memformer_dist.config import RunConfig
from memformer_dist.curriculum import Curriculum, Progress, WindowPlan
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.open_data import open_corpora
from memformer_dist.data.windows import WindowReader
from memformer_dist.optimizer import learning_rate
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import last_checkpoint, records, run_rank, settings, tensors


def plan(window) -> WindowPlan:
    return TypeAdapter(WindowPlan).validate_python(window)


def by_metric(metric: str, threshold: float, first: int = 1, last: int = 4, **fields) -> WindowPlan:
    return plan(dict(first=first, last=last, metric=metric, threshold=threshold, **fields))


def saved_and_loaded(curriculum: Curriculum, window: WindowPlan, step: int) -> Curriculum:
    return Curriculum(window, step, Progress.model_validate_json(curriculum.progress.model_dump_json()))


# ---- when the window changes -----------------------------------------------------------------------------------------


@given(
    by_step=st.dictionaries(st.integers(1, 30), st.integers(1, 9)).map(
        lambda later: {0: 5} | dict(sorted(later.items()))
    ),
    stop=st.integers(0, 30),
)
def test_by_step(by_step, stop):
    """The window of step s is that of the last entry up to s, with or without a stop; each change is reported as it comes."""
    expected = [5]
    for step in range(1, 32):
        expected.append(by_step.get(step, expected[-1]))
    curriculum, windows = Curriculum(plan({"by_step": by_step})), []
    for step in range(1, 32):
        windows.append(curriculum.window)
        told = curriculum.after_step(step, 1.0, 1.0)
        assert (told is not None) == (expected[step] != expected[step - 1])
        assert not told or told.startswith(
            f"windows of {expected[step]} segments from here, {expected[step - 1]} until"
        )
        if step == stop:
            curriculum = saved_and_loaded(curriculum, curriculum.plan, step)
    assert windows == expected[:31] and curriculum.largest == max(by_step.values())


def grown_by_hand(window: WindowPlan, steps: list[tuple[float, float]]) -> list[int]:
    """The window of every step, from the whole history."""
    windows, mean = [window.first], []
    for nll, labels in steps:
        mean += [(nll, labels)] if labels and nll == nll else []
        passed = False
        if len(mean) == window.every_steps:
            passed = sum(nll for nll, _ in mean) / sum(labels for _, labels in mean) < window.threshold
            mean = []
        windows.append(min(windows[-1] + passed, window.last))
    return windows


@pytest.mark.parametrize("growth, windows", [(1, [2, 3, 4, 5]), (1.5, [2, 3, 4, 6, 9, 11]), (4, [2, 8, 11])])
def test_by_accuracy_and_by_a_factor(growth, windows):
    """The share of the labels of two steps together that were right; a stop in between is not noticed."""
    curriculum = Curriculum(by_metric("accuracy/train", 0.75, windows[0], windows[-1], every_steps=2, growth=growth))
    found = [curriculum.window]
    while curriculum.window < windows[-1]:
        for right, passes in ((3, False), (3, False), (3, False), (4, True)):  # 6 of 8 are too few
            told = curriculum.after_step(0, 9.0, 4.0, right)
            assert (told is not None) == passes
            assert not told or told.endswith("accuracy/train was 0.8750 over 2 steps, above 0.75")
            curriculum = saved_and_loaded(curriculum, curriculum.plan, 0)
        found.append(curriculum.window)
    assert found == windows


TRAINED = st.tuples(st.sampled_from([0.1, 0.7, 1.3, 2.9, math.nan]), st.sampled_from([1.0, 1.0, 3.0, 0.0]))


@given(
    steps=st.lists(TRAINED, max_size=40),
    every_steps=st.integers(1, 5),
    threshold=st.sampled_from([-1.0, 0.5, 1.0, 2.0, 9.0]),
    stops=st.sets(st.integers(1, 40)),
)
def test_by_training_loss(steps, every_steps, threshold, stops):
    """The mean over labels of `every_steps` applied steps at one window, wherever the run is stopped."""
    window = by_metric("loss/train", threshold, every_steps=every_steps)
    curriculum, windows = Curriculum(window), [1]
    for step, (nll, labels) in enumerate(steps, start=1):
        told = curriculum.after_step(step, nll, labels)
        assert curriculum.after_evaluation(-9.0, 9.0) is None
        windows.append(curriculum.window)
        assert (told is not None) == (windows[-1] != windows[-2])
        if step in stops:
            curriculum = saved_and_loaded(curriculum, window, step)
    assert windows == grown_by_hand(window, steps) and curriculum.largest == 4


def test_a_stop_that_forgets_the_mean_is_seen():
    """The control of the test above."""
    window, windows = by_metric("loss/train", 1.0, every_steps=3), {}
    for forgets in (False, True):
        curriculum = Curriculum(window)
        for step in range(1, 9):
            curriculum.after_step(step, 0.5, 1.0)
            if step == 5:
                saved = Progress(window=curriculum.window) if forgets else curriculum.progress
                curriculum = Curriculum(window, step, saved)
            windows.setdefault(forgets, []).append(curriculum.window)
    assert windows == {False: [1, 1, 2, 2, 2, 3, 3, 3], True: [1, 1, 2, 2, 2, 2, 2, 3]}


@pytest.mark.parametrize(
    "metric, passing, failing",
    [
        ("eval/loss", (0.99, 0.0), [(1.0, 5.0), (math.nan, math.nan), (1.01, 5.0)]),
        ("eval/gap", (9.0, 1.01), [(0.0, 1.0), (math.nan, math.nan), (0.0, -5.0)]),
    ],
)
def test_by_evaluation(metric, passing, failing):
    """A loss passes below the threshold of 1, the gap above it; training alone changes nothing."""
    window = by_metric(metric, 1.0, last=3)
    curriculum, windows = Curriculum(window), []
    for evaluated in (failing[0], passing, failing[1], failing[2], passing, passing):
        told = curriculum.after_evaluation(*evaluated)
        assert (told is not None) == (evaluated == passing and len(windows) < 5)
        assert curriculum.after_step(1, 0.0, 1.0) is None
        curriculum = saved_and_loaded(curriculum, window, 1)
        windows.append(curriculum.window)
    assert windows == [1, 2, 2, 2, 3, 3]


def test_what_is_told_says_why():
    curriculum = Curriculum(by_metric("loss/train", 1.2, every_steps=2))
    curriculum.after_step(1, 2.0, 2.0)
    assert curriculum.after_step(2, 1.0, 1.0) == (
        "windows of 2 segments from here, 1 until now: loss/train was 1.0000 over 2 steps, below 1.2"
    )
    told = Curriculum(by_metric("eval/gap", 0.01)).after_evaluation(3.0, 0.0625)
    assert told == "windows of 2 segments from here, 1 until now: eval/gap was 0.0625, above 0.01"


METRIC = {"first": 3, "last": 6, "metric": "loss/train", "threshold": 1.0, "every_steps": 4}


@pytest.mark.parametrize(
    "now, had, expected",
    [
        (7, 4, 7),
        ({"by_step": {0: 2, 10: 5, 20: 8}}, 4, 5),
        (METRIC, 4, 4),
        (METRIC, 2, 3),
        (METRIC, 9, 6),
    ],
)
def test_another_window_on_resume(now, had, expected):
    """At step 10, three steps into a mean. It goes on only under the configuration that it was begun under."""
    saved = Progress(window=had, steps=3, nll=0.3, labels=1.0)
    curriculum = Curriculum(plan(now), 10, saved, changed=True)
    assert curriculum.progress == Progress(window=expected)
    unchanged = Curriculum(plan(METRIC), 10, saved, changed=False)
    assert unchanged.progress == saved and unchanged.progress is not saved


# ---- whole runs ------------------------------------------------------------------------------------------------------

# Configuration, tokens of the run, windows of its steps, stops (before a change, at it, after it). When a window grows
# by a metric depends on what the run learns; the thresholds are such that some values pass and some do not.
PLANS = {
    "by_step": ({"by_step": {"0": 1, "3": 3, "6": 1}}, 1600, [1, 1, 1, 3, 3, 3, 1, 1], (3, 5)),
    "loss": (
        {"first": 1, "last": 3, "metric": "loss/train", "threshold": 5.93, "every_steps": 3},
        1900,
        [1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3],
        (5, 6, 7),
    ),
    "evaluation": ({"first": 2, "last": 4, "metric": "eval/loss", "threshold": 5.92}, 1700, [2, 2, 2, 2, 3, 4], (4,)),
}
WINDOWS = {name: windows for name, (_, _, windows, _) in PLANS.items()}


def followed_run(world, raw: dict, run_dir, stops=(None,), reset_memory: bool = False) -> None:
    """A run in parts, each stopped after a given step. Notes every window that is read; may forget the curriculum."""
    from memformer_dist import train
    from memformer_dist.data import open_data

    class Noting(WindowReader):
        def window(self, start_tick, segments, lanes):
            run_dir.mkdir(parents=True, exist_ok=True)
            with (run_dir / f"windows-{lanes.start}.txt").open("a") as file:
                file.write(f"{start_tick} {segments}\n")
            return super().window(start_tick, segments, lanes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_data, "WindowReader", Noting)
        for stop in stops:
            run_rank(world, raw, run_dir, stop)
            if reset_memory:
                patch.setattr(train, "Curriculum", lambda window, step, saved, changed: Curriculum(window, step))


def followed_runs(world, cases: dict, folder) -> None:
    for name, raw in cases.items():
        _, _, _, stops = PLANS[name]
        followed_run(world, raw, folder / name / "whole")
        followed_run(world, raw, folder / name / "parts", (*stops, None))
    followed_run(world, cases["loss"], folder / "loss" / "forgetful", (5, None), reset_memory=True)
    raw = cases["by_step"] | {"deepspeed": {"zero_optimization": {"stage": 3}}}
    followed_run(world, raw, folder / "by_step" / "stage3")


@pytest.fixture(scope="module")
def followed(corpus_dir, tmp_path_factory):
    """(folder, configuration by name): each plan with dropout on two ranks, in one go and in parts."""
    folder, cases = tmp_path_factory.mktemp("followed"), {}
    for (name, (window, tokens, _, _)), stage in zip(PLANS.items(), (3, 0, 2), strict=True):
        raw = settings(corpus_dir, stage=stage, dropout=0.2, tokens=tokens)
        raw["mrbp"] = {"window": window, "lanes_per_group": 2, "readout_group": 2}
        raw["optimizer"]["warmup_tokens"] = 200
        raw["monitor"]["log_every_steps"] = 2 if name == "by_step" else 1  # a stop, and a change, within an interval
        if name == "evaluation":
            raw["training"] |= {"evaluate_every_tokens": 400, "evaluate_segments": 2}
        cases[name] = raw
    run_ranks(2, followed_runs, cases, folder)
    return folder, cases


def windows_read(run_dir, lane: int = 0) -> list[tuple[int, int]]:
    """(start, segments) of every window that the group of lanes from `lane` on has read."""
    return [tuple(map(int, line.split())) for line in (run_dir / f"windows-{lane}.txt").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_windows_of_a_run(followed, name):
    folder, _ = followed
    assert [segments for _, segments in windows_read(folder / name / "whole")] == WINDOWS[name]


FIGURES = (
    "loss/train",
    "optim/grad_norm",
    "optim/lr",
    "mrbp/window",
    "memory/grad_norm_by_boundary",
    "data/pad_fraction",
)


def differences(expected, found) -> list[str]:
    """Where two finished runs differ by a bit."""
    names = ["step"] if last_checkpoint(expected).name != last_checkpoint(found).name else []
    for prefix in ("weights", "moments", "lanes"):
        x, y = (tensors(last_checkpoint(run), prefix) for run in (expected, found))
        assert x.keys() == y.keys() and x
        names += [name for name in x if not torch.equal(x[name], y[name])]
    x, y = (json.loads((last_checkpoint(run) / "checkpoint.json").read_text()) for run in (expected, found))
    names += ["curriculum"] if x["curriculum"] != y["curriculum"] else []
    names += ["records"] if records(expected, *FIGURES) != records(found, *FIGURES) else []
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_by_bit(followed, name):
    folder, _ = followed
    assert differences(folder / name / "whole", folder / name / "parts") == []
    assert len(records(folder / name / "whole", "loss/train")) >= 4


@pytest.mark.slow
def test_a_resume_that_forgets_the_curriculum_is_seen(followed):
    folder, _ = followed
    seen = differences(folder / "loss" / "whole", folder / "loss" / "forgetful")
    assert {"records", "embedding.weight"} <= set(seen)


@pytest.mark.slow
def test_parameters_that_a_short_window_does_not_use_stand_alike_at_every_stage(followed):
    """In a window of one segment nothing reads what is written: the writer has no gradient, and keeps no old one."""
    folder, _ = followed
    expected, found = (tensors(last_checkpoint(folder / "by_step" / part), "moments") for part in ("whole", "stage3"))
    names = [name for name in expected if "writer" in name]
    assert len(names) == 6
    for name in names:
        assert float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_neither_data_nor_learning_rate_know_of_the_window(followed, name):
    """Ticks 0, 1, 2 ... in turn, once each, on every lane; learning rate and what is logged follow from them."""
    folder, cases = followed
    config = RunConfig.check(cases[name], 2)
    train, _ = open_corpora(Path(config.data.corpus))
    schedule = LaneSchedule(train.lengths, seed=0, lanes=8, segment_length=16)
    reader = WindowReader(train, schedule, lanes=range(8))
    for part, lane in itertools.product(("whole", "parts"), (0, 2, 4, 6)):
        starts = list(itertools.accumulate(WINDOWS[name], initial=0))
        assert windows_read(folder / name / part, lane) == list(zip(starts[:-1], WINDOWS[name], strict=True))
    before = 0
    for step, tokens, rate, pad, window, states in records(
        folder / name / "whole", "optim/lr", "data/pad_fraction", "mrbp/window", "mrbp/state_bytes"
    ):
        assert tokens == reader.labels(0, starts[step])
        assert rate == learning_rate(config.optimizer, tokens, config.training.tokens)
        ticks = range(starts[before], starts[step])
        real = sum(int(reader.segment(tick).length.sum()) for tick in ticks)
        assert pad == 1 - real / (len(ticks) * 8 * 16)
        assert window == WINDOWS[name][step - 1]
        assert states == window * 2 * (4 * 16 * 4 + 16 * 8 + 8)  # lanes x (memory, context, its length)
        before = step
