"""What a run records, read back: TensorBoard's curves and metrics.jsonl."""

import math
import resource
import time
from contextlib import contextmanager

import numpy
import pytest
from tensorboard import data_compat
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util
from torch.utils.tensorboard import SummaryWriter

from memformer_dist import monitor
from memformer_dist.monitor import Monitor
from memformer_dist.progress import Position
from tests.helpers.runs import metrics

STEP_TOKENS = 1000


def at(step: int) -> Position:
    return Position(step=step, tokens=STEP_TOKENS * step)


def value(step: int) -> float:
    return 1 / (1 + step)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(first, last): one process, from the checkpoint of step `first` to the end of step `last`."""
    clock = 1e9

    def part(first: int, last: int, close: bool = True) -> Monitor:
        nonlocal clock
        clock += 60  # TensorBoard reads the files of a folder in the order of the second in which they were begun
        monkeypatch.setattr(time, "time", lambda: clock)
        running = Monitor(tmp_path, at(first), is_main=True)
        for step in range(first + 1, last + 1):
            running.log(at(step), {"loss/train": value(step), "perf/step_s": float(step)})
        if close:
            running.close()
        return running

    return part


def curve(folder, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


INTERRUPTED = {
    "never": [(0, 6)],
    "stopped and saved": [(0, 3), (3, 6)],
    "killed after a checkpoint": [(0, 5), (3, 6)],
    "killed before the first": [(0, 2), (0, 6)],
    "killed twice": [(0, 4), (2, 5), (3, 6)],
    "killed without a new step": [(0, 4), (2, 2), (2, 6)],
}


@pytest.mark.parametrize("parts", INTERRUPTED.values(), ids=INTERRUPTED)
def test_every_point_once(parts, train, tmp_path):
    for part in parts:
        train(*part)
    steps = range(1, 7)
    for folder, prefix, x in (("steps", "", 1), ("tokens", "tokens/", STEP_TOKENS)):
        folder = tmp_path / "tensorboard" / folder
        assert curve(folder, f"{prefix}loss/train") == [(x * step, value(step)) for step in steps]
        assert curve(folder, f"{prefix}perf/step_s") == [(x * step, step) for step in steps]
        assert len(EventAccumulator(str(folder)).Reload().Tags()["scalars"]) == 2
    assert [(r["step"], r["tokens"], r["loss/train"]) for r in metrics(tmp_path)] == [
        (step, STEP_TOKENS * step, value(step)) for step in steps
    ]


def test_every_point_once_needs_a_purge_of_its_own_for_each_axis(train, tmp_path, monkeypatch):
    """The control: without purging, points are doubled; in one folder, the steps' purge takes the tokens' curves."""
    monkeypatch.setattr(monitor, "SummaryWriter", lambda path, purge_step: SummaryWriter(path))
    train(0, 5), train(3, 6)
    assert [x for x, _ in curve(tmp_path / "tensorboard/steps", "loss/train")] == [1, 2, 3, 4, 5, 4, 5, 6]
    together = str(tmp_path / "together")
    monkeypatch.setattr(
        monitor, "SummaryWriter", lambda path, purge_step: SummaryWriter(together, purge_step=purge_step)
    )
    train(0, 5), train(3, 6)
    assert [x for x, _ in curve(together, "tokens/loss/train")] == [4000, 5000, 6000]


def test_last_record_torn(train, tmp_path):
    train(0, 5)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for left in (len(whole) - 1, len(whole) - 20):  # even where only the newline is missing
        path.write_text(whole[:left])
        train(4, 6)
        assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    path.write_text(whole[:20])
    train(0, 1)
    assert [record["step"] for record in metrics(tmp_path)] == [1]


def test_values_that_are_not_finite(train, tmp_path):
    running = train(0, 0, close=False)
    running.log(at(1), {"nan": math.nan, "above": math.inf, "below": -math.inf, "finite": 0.5})
    running.close()
    (record,) = metrics(tmp_path)
    assert record == {"step": 1, "tokens": STEP_TOKENS, "time": 1e9 + 60} | {
        "nan": None,
        "above": None,
        "below": None,
        "finite": 0.5,
    }
    curves = EventAccumulator(str(tmp_path / "tensorboard/steps")).Reload()
    assert math.isnan(curves.Scalars("nan")[0].value) and curves.Scalars("below")[0].value == -math.inf
    train(1, 2)  # such records can be read again
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2]


# -------------------------------------------------------------------------------------------------------------- curves

NAME = "memory/grad_norm_by_boundary"


def drawn(folder, name: str) -> dict[int, list[list[float]]]:
    """By x of the record: the bars [left, right, height > 0] that TensorBoard makes of a folder's histograms."""
    found = {}
    for path in sorted(folder.iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for item in event.summary.value:
                if item.tag == name:
                    bars = tensor_util.make_ndarray(data_compat.migrate_value(item).tensor).tolist()
                    found[event.step] = [bar for bar in bars if bar[2]]
    return found


@pytest.mark.parametrize(
    "norms",
    [[0.5], [0.125, 0.25, 3.0], [0.0, 0.25, 0.0, 3.0], [2.0, 1e-30, 0.0, 0.0], [0.0, 0.0], [1 / 3] * 70],
    ids=["one", "three", "zeros far back", "zeros near", "zeros alone", "many"],
)
def test_a_curve_is_a_list_and_a_histogram(norms, train, tmp_path):
    """Bar x, from x - 1/2 to x + 1/2, is as high as the norm x segments before the window's end."""
    running = train(0, 0, close=False)
    running.log(at(1), {"loss/train": 0.5}, {NAME: norms})
    running.close()
    (record,) = metrics(tmp_path)
    assert record[NAME] == norms and record["loss/train"] == 0.5
    by_distance = dict(enumerate(reversed(norms), start=1))
    expected = [[x - 0.5, x + 0.5, float(numpy.float32(norm))] for x, norm in by_distance.items() if norm]
    for folder, name, x in (("steps", NAME, 1), ("tokens", f"tokens/{NAME}", STEP_TOKENS)):
        folder = tmp_path / "tensorboard" / folder
        (event,) = EventAccumulator(str(folder)).Reload().Histograms(name)
        stored = event.histogram_value
        assert event.step == x and stored.bucket == list(by_distance.values())  # in float64, as it was
        assert stored.bucket_limit == [distance + 0.5 for distance in by_distance]
        assert stored.num == sum(reversed(norms))
        assert stored.sum == sum(distance * norm for distance, norm in by_distance.items())
        assert drawn(folder, name) == {x: expected}


def test_curves_of_a_resumed_run(train, tmp_path):
    """As scalars: every one once; their length may change with the window."""
    for first, last in ((0, 4), (2, 5)):
        running = train(first, first, close=False)
        for step in range(first + 1, last + 1):
            running.log(at(step), {}, {NAME: [float(step)] * step})
        running.close()
    for folder, name, x in (("steps", NAME, 1), ("tokens", f"tokens/{NAME}", STEP_TOKENS)):
        every = {"histograms": 0}
        events = EventAccumulator(str(tmp_path / "tensorboard" / folder), every).Reload().Histograms(name)
        assert [(event.step, len(event.histogram_value.bucket)) for event in events] == [
            (x * n, n) for n in range(1, 6)
        ]
    assert [record[NAME] for record in metrics(tmp_path)] == [[float(step)] * step for step in range(1, 6)]


@pytest.mark.parametrize("saved_after", [True, False])
def test_an_evaluation_is_recorded_once(train, tmp_path, saved_after):
    """It may come before the checkpoint of its step or, if a resumed run finds it overdue, after it."""
    for first in 0, 2:
        running = train(first, 2, close=False)
        running.log(at(2), {"eval/loss": 1.0})
        running.close()
    evaluated = 2 * STEP_TOKENS if saved_after else 0
    position = at(2).model_copy(update={"evaluated": evaluated})
    Monitor(tmp_path, position, is_main=True).close()
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 2][: 2 + saved_after]


def test_a_curve_that_is_not_finite(train, tmp_path):
    running = train(0, 0, close=False)
    running.log(at(1), {}, {NAME: [math.inf, 1.0, math.nan]})
    running.close()
    assert metrics(tmp_path)[0][NAME] == [None, 1.0, None]
    assert not EventAccumulator(str(tmp_path / "tensorboard/steps")).Reload().Tags()["histograms"]


def test_closed_twice_nothing_more_is_written(train, tmp_path):
    running = train(0, 2)
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(left) == 3
    running.close()
    assert left == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_other_ranks_write_nothing(tmp_path):
    silent = Monitor(tmp_path, at(0), is_main=False)
    silent.log(at(1), {"loss/train": 1.0})
    silent.close()
    assert not list(tmp_path.iterdir())


# ---- a disk that is full ---------------------------------------------------------------------------------------------


@contextmanager
def full_disk():
    """No file can grow beyond 600 bytes: what a full disk and a quota do, with EFBIG for ENOSPC and EDQUOT."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_costs_no_record_and_no_run(tmp_path, monkeypatch, caplog):
    """The run ended with an OSError, and half a record kept it from resuming. TensorBoard lacks what did not fit."""
    monkeypatch.setattr(monitor, "RETRY_S", 0.0)
    running = Monitor(tmp_path, at(0), is_main=True)
    with full_disk():
        for step in range(1, 21):
            running.log(at(step), {"loss/train": value(step)})
            running.by_step._try(lambda writer: writer.flush())  # TensorBoard writes in a thread, some time later
    assert 0 < len(metrics(tmp_path)) < 10, "whole records alone"
    for step in range(21, 24):
        running.log(at(step), {"loss/train": value(step)})
    running.close()
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, 24))
    said = [record.getMessage() for record in caplog.records]
    records = tmp_path / "metrics.jsonl"
    assert (
        said.count(
            f"{records} cannot be written (File too large); training goes on, and its records wait in memory, 10,000 at most"
        )
        == said.count(f"{records} can be written again")
        == 1
    )
    steps = tmp_path / "tensorboard" / "steps"
    assert any(line.startswith(f"{steps} cannot be written (File too large); training goes on") for line in said)
    drawn = [step for step, _ in curve(steps, "loss/train")]
    assert drawn[-3:] == [21, 22, 23] and len(drawn) < 23


def test_half_a_record_is_dropped_on_resume(train, tmp_path):
    train(0, 3)
    with (tmp_path / "metrics.jsonl").open("r+") as file:
        lines = file.readlines()
        lines[1] = lines[1][:20] + "\n"
        file.seek(0)
        file.truncate()
        file.writelines(lines)
    train(3, 4)
    assert [record["step"] for record in metrics(tmp_path)] == [1, 3, 4]
