"""What a run records, read back: TensorBoard's curves and metrics.jsonl."""

import errno
import json
import math
import re
import resource
import time
from contextlib import contextmanager

import numpy
import pytest
from tensorboard import data_compat
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.util import tensor_util
from torch.utils.tensorboard import SummaryWriter

from memformer_dist import monitor
from memformer_dist.metrics import BOUNDARY_NORMS, EVALUATION, TRAINING, description
from memformer_dist.monitor import Monitor
from memformer_dist.progress import Position
from tests.helpers.runs import metrics

STEP_TOKENS = 1000
AXES = (("", 1), ("tokens/", STEP_TOKENS))  # how names begin, and x of a step


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
    steps, folder = range(1, 7), tmp_path / "tensorboard"
    for prefix, x in AXES:
        assert curve(folder, f"{prefix}loss/train") == [(x * step, value(step)) for step in steps]
        assert curve(folder, f"{prefix}perf/step_s") == [(x * step, step) for step in steps]
    assert len(EventAccumulator(str(folder)).Reload().Tags()["scalars"]) == 4
    assert [(r["step"], r["tokens"], r["loss/train"]) for r in metrics(tmp_path)] == [
        (step, STEP_TOKENS * step, value(step)) for step in steps
    ]


def test_what_is_recorded_again_must_be_taken_out(train, tmp_path, monkeypatch):
    """The controls: left in, points are doubled; TensorBoard's own way takes the curves by tokens with it."""
    monkeypatch.setattr(monitor, "drop_later", lambda folder, position: None)
    train(0, 5), train(3, 6)
    assert [x for x, _ in curve(tmp_path / "tensorboard", "loss/train")] == [1, 2, 3, 4, 5, 4, 5, 6]
    writers = []
    for first, last in (0, 5), (3, 6):
        train(0, 0)  # the clock
        writers.append(SummaryWriter(str(tmp_path / "together"), purge_step=first + 1))
        for step in range(first + 1, last + 1):
            writers[-1].add_scalar("loss/train", value(step), step)
            writers[-1].add_scalar("tokens/loss/train", value(step), STEP_TOKENS * step)
        writers[-1].close()
    assert [x for x, _ in curve(tmp_path / "together", "loss/train")] == [1, 2, 3, 4, 5, 6]
    assert [x for x, _ in curve(tmp_path / "together", "tokens/loss/train")] == [4000, 5000, 6000]


@pytest.mark.parametrize("left", [1, 20, 200])
def test_an_event_that_is_torn_ends_its_file(left, train, tmp_path):
    """TensorBoard reads nothing behind it: a later start goes on in a file of its own, and what is torn goes."""
    train(0, 4)
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-left])
    train(4, 6)
    steps = [step for step, _ in curve(tmp_path / "tensorboard", "tokens/loss/train")]
    assert steps[-2:] == [5000, 6000] and steps == sorted(steps) and 1000 in steps
    before = path.read_bytes()
    train(6, 7)
    assert path.read_bytes() == before, "whole now"


def test_files_are_read_in_the_order_of_their_starts(tmp_path, monkeypatch):
    """TensorBoard goes by the names; the clock of the next machine may be behind."""
    for first, clock in (0, 2e9), (3, 1e9), (5, 1.5e9):
        monkeypatch.setattr(time, "time", lambda: clock)
        running = Monitor(tmp_path, at(first), is_main=True)
        running.log(at(first + 1), {"loss/train": value(first + 1)})
        running.close()
    assert [step for step, _ in curve(tmp_path / "tensorboard", "loss/train")] == [1, 4, 6]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


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
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
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
    folder = tmp_path / "tensorboard"
    for prefix, x in AXES:
        name = prefix + NAME
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
    for prefix, x in AXES:
        every = {"histograms": 0}
        events = EventAccumulator(str(tmp_path / "tensorboard"), every).Reload().Histograms(prefix + NAME)
        assert [(event.step, len(event.histogram_value.bucket)) for event in events] == [
            (x * n, n) for n in range(1, 6)
        ]
    assert [record[NAME] for record in metrics(tmp_path)] == [[float(step)] * step for step in range(1, 6)]


@pytest.mark.parametrize("saved_after", [True, False])
def test_an_evaluation_is_recorded_once(train, tmp_path, saved_after):
    """It may come before the checkpoint of its step or, if a resumed run finds it overdue, after it."""
    train(0, 2)
    evaluated = at(2).model_copy(update={"evaluated": 2 * STEP_TOKENS if saved_after else 0})
    for position in at(2), evaluated:
        running = Monitor(tmp_path, position, is_main=True)
        if position is not evaluated:
            running.log(at(2), {"eval/loss": 1.0})
        running.close()
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 2][: 2 + saved_after]
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    for prefix, x in AXES:
        assert [step for step, _ in curve(tmp_path / "tensorboard", f"{prefix}loss/train")] == [x, 2 * x]
        if saved_after:
            assert curve(tmp_path / "tensorboard", f"{prefix}eval/loss") == [(2 * x, 1.0)]
        else:
            assert f"{prefix}eval/loss" not in tags


def test_a_curve_that_is_not_finite(train, tmp_path):
    running = train(0, 0, close=False)
    running.log(at(1), {}, {NAME: [math.inf, 1.0, math.nan]})
    running.close()
    assert metrics(tmp_path)[0][NAME] == [None, 1.0, None]
    assert not EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["histograms"]


def test_closed_twice_nothing_more_is_written(train, tmp_path):
    running = train(0, 2)
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(left) == 2
    running.close()
    assert left == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_other_ranks_write_nothing(tmp_path):
    silent = Monitor(tmp_path, at(0), is_main=False)
    silent.log(at(1), {"loss/train": 1.0})
    silent.close()
    assert not list(tmp_path.iterdir())


# ---- a disk that is full ---------------------------------------------------------------------------------------------


@contextmanager
def full_disk(room: int):
    """No file can grow beyond so many bytes: what a full disk and a quota do, with EFBIG for ENOSPC and EDQUOT."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_costs_no_record_and_no_run(tmp_path, caplog):
    """The run ended with an OSError, and half a record kept it from resuming; TensorBoard lacked what did not fit."""
    running = Monitor(tmp_path, at(0), is_main=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    with full_disk(room=600 + events.stat().st_size):
        for step in range(1, 41):
            running.log(at(step), {"loss/train": value(step)})
    assert 0 < len(metrics(tmp_path)) < 40, "whole records alone"
    for step in range(41, 44):
        running.log(at(step), {"loss/train": value(step)})
    running.close()
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, 44))
    for prefix, x in AXES:
        expected = [(x * step, value(step)) for step in range(1, 44)]
        assert curve(tmp_path / "tensorboard", f"{prefix}loss/train") == expected
    said = [record.getMessage() for record in caplog.records]
    for path in events, tmp_path / "metrics.jsonl":
        lost = "training goes on, and its records wait in memory, 10,000 at most"
        assert said.count(f"{path} cannot be written (File too large); {lost}") == 1
        assert said.count(f"{path} can be written again") == 1


class FailingDisk:
    """A path to a file of which half a record is written and cannot be taken back, while `fails` is set."""

    def __init__(self, path):
        self.path, self.parent, self.fails = path, path.parent, False

    @contextmanager
    def open(self, mode, buffering):
        with self.path.open(mode, buffering=buffering) as file:
            yield FailingFile(file) if self.fails else file


class FailingFile:
    def __init__(self, file):
        self.file, self.tell, self.seek = file, file.tell, file.seek

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        raise OSError(errno.EIO, "Input/output error")

    def truncate(self, size):
        raise OSError(errno.EIO, "Input/output error")


def test_half_a_record_that_could_not_be_taken_back_is_later(tmp_path):
    """Else it would stand in front of the next one: a torn line, and an event behind which TensorBoard reads nothing."""
    disk = FailingDisk(tmp_path / "records")
    records = monitor.RecordFile(disk, head=b"head ")
    records.append(b"one ")
    for record, fails in ((b"two ", True), (b"three ", True), (b"four ", False)):
        disk.fails = fails
        records.append(record)
        assert disk.path.read_bytes().startswith(b"head one ")
    assert disk.path.read_bytes() == b"head one two three four "


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


# ---- what TensorBoard shows ------------------------------------------------------------------------------------------

CONFIGURATION = '{\n  "training": {"tokens": 600}\n}\n'


def everything() -> dict[str, float]:
    """A value of every figure there is."""
    names = [metric.name.replace("*", "0") for metric in TRAINING]
    names += [f"{family}/{metric.name}" for family in ("eval", "final") for metric in EVALUATION]
    return dict.fromkeys(names, 0.5)


def shown(folder) -> MultiplexerDataProvider:
    """What `tensorboard --logdir` of a folder serves."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    return MultiplexerDataProvider(multiplexer, str(folder))


def layout_of(provider: MultiplexerDataProvider, run: str) -> Layout:
    """Of the page "Custom Scalars"."""
    found = provider.read_tensors(
        RequestContext(), experiment_id="", plugin_name=layout_metadata.PLUGIN_NAME, downsample=1, run_tag_filter=None
    )
    return Layout.FromString(found[run][layout_metadata.CONFIG_SUMMARY_TAG][0].numpy.item())


def test_one_run_is_one_entry_with_a_description_per_name(tmp_path):
    """Of every name of figures and curves, on both axes; the configuration as text."""
    for name in "small", "big":
        for first in 0, 1:
            running = Monitor(tmp_path / name, at(first), is_main=True, configuration=CONFIGURATION)
            running.log(at(first + 1), everything(), {BOUNDARY_NORMS: [1.0, 2.0]})
            running.close()
    provider, context = shown(tmp_path), RequestContext()
    runs = provider.list_runs(context, experiment_id="")
    assert {run.run_name for run in runs} == {"small/tensorboard", "big/tensorboard"}
    scalars = provider.list_scalars(context, experiment_id="", plugin_name=scalar_metadata.PLUGIN_NAME)
    assert set(scalars["small/tensorboard"]) == {prefix + name for prefix, _ in AXES for name in everything()}
    curves = provider.list_tensors(context, experiment_id="", plugin_name=histogram_metadata.PLUGIN_NAME)
    for prefix, _ in AXES:
        axis = "by tokens trained on: " if prefix else ""
        for name in everything():
            assert description(name) and scalars["big/tensorboard"][prefix + name].description == axis + description(
                name
            )
        assert curves["big/tensorboard"][prefix + BOUNDARY_NORMS].description == axis + description(BOUNDARY_NORMS)
    assert (
        "held-out loss with the memory carried [nats per token]"
        == description("eval/loss")
        == description("final/loss")
    )
    assert len({description(name) for name in everything()}) == len(TRAINING) + len(EVALUATION), "each its own"
    texts = provider.read_tensors(
        context, experiment_id="", plugin_name=text_metadata.PLUGIN_NAME, downsample=10, run_tag_filter=None
    )
    starts = texts["small/tensorboard"]["configuration"]
    assert [start.step for start in starts] == [0, 1] and CONFIGURATION in starts[0].numpy[0].decode()


def test_losses_and_gaps_of_an_evaluation_are_a_chart_each(tmp_path):
    for name in "small", "big":
        running = Monitor(tmp_path / name, at(0), is_main=True)
        running.log(at(1), everything())
        running.close()
    names = [metric.name for metric in EVALUATION]
    layout = layout_of(shown(tmp_path), "big/tensorboard")
    for category, (prefix, _) in zip(layout.category, AXES, strict=True):
        drawn = [
            [name for name in everything() if any(re.match(tag, prefix + name) for tag in chart.multiline.tag)]
            for chart in category.chart
        ]
        assert drawn == [[f"eval/{name}" for name in names if name.startswith(start)] for start in ("loss", "gap")]
        assert list(map(len, drawn)) == [4, 2]


# ---- folders that version 0.1 wrote ----------------------------------------------------------------------------------


def version_0_1(run_dir, first: int, last: int) -> None:
    """What version 0.1 wrote into a run's folder, from the checkpoint of step `first` to the end of step `last`."""
    folders = {axis: run_dir / "tensorboard" / axis for axis in ("steps", "tokens")}
    writers = {
        axis: SummaryWriter(str(folder), purge_step=(first if axis == "steps" else STEP_TOKENS * first) + 1)
        for axis, folder in folders.items()
    }
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in range(first + 1, last + 1):
            values = {"loss/train": value(step), "optim/grad_norm": None if step == 2 else 2.0}
            record = {"step": step, "tokens": STEP_TOKENS * step, "time": 1e9 + step} | values | {NAME: [0.5] * step}
            file.write(json.dumps(record) + "\n")
            writers["steps"].add_scalar("loss/train", value(step), step)
            writers["tokens"].add_scalar("tokens/loss/train", value(step), STEP_TOKENS * step)
    for writer in writers.values():
        writer.close()


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_of_version_0_1_goes_on_as_one_entry(killed, train, tmp_path):
    """Its two folders are replaced by one, made of metrics.jsonl; a start that was killed on the way does not matter."""
    version_0_1(tmp_path, 0, 5)
    if killed:
        (tmp_path / "tensorboard" / "events.out.tfevents.1000000000.host.1").write_bytes(b"half a file")
    train(3, 6)
    folder = tmp_path / "tensorboard"
    assert not [path for path in folder.iterdir() if path.is_dir()]
    provider = shown(tmp_path)
    assert [run.run_name for run in provider.list_runs(RequestContext(), experiment_id="")] == ["tensorboard"]
    events = EventAccumulator(str(folder), {"histograms": 0}).Reload()
    for prefix, x in AXES:
        assert curve(folder, f"{prefix}loss/train") == [(x * step, value(step)) for step in range(1, 7)]
        norms = [event.value for event in events.Scalars(f"{prefix}optim/grad_norm")]
        assert math.isnan(norms[1]) and norms[::2] == [2.0, 2.0]
        norms = [len(event.histogram_value.bucket) for event in events.Histograms(prefix + NAME)]
        assert norms == [1, 2, 3]
    assert events.Scalars("loss/train")[0].wall_time == 1e9 + 1, "when it was recorded"


def test_without_records_nothing_of_version_0_1_is_removed(train, tmp_path):
    version_0_1(tmp_path, 0, 2)
    (tmp_path / "metrics.jsonl").unlink()
    train(2, 3)
    assert curve(tmp_path / "tensorboard" / "steps", "loss/train") == [(step, value(step)) for step in (1, 2)]
    assert curve(tmp_path / "tensorboard", "loss/train") == [(3, value(3))]


def test_what_was_removed_is_made_again(train, tmp_path):
    """The folder before a start, or the file while a run is at work: then from there on."""
    train(0, 3)
    for path in (tmp_path / "tensorboard").iterdir():
        path.unlink()
    (tmp_path / "tensorboard").rmdir()
    running = train(3, 5, close=False)
    assert [step for step, _ in curve(tmp_path / "tensorboard", "loss/train")] == [1, 2, 3, 4, 5]
    for path in (tmp_path / "tensorboard").iterdir():
        path.unlink()
    (tmp_path / "tensorboard").rmdir()
    running.log(at(6), {"loss/train": value(6)})
    running.close()
    assert curve(tmp_path / "tensorboard", "tokens/loss/train") == [(6 * STEP_TOKENS, value(6))]
