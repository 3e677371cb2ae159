"""The benchmarks' own instruments against what is known beforehand, and small runs of their pieces."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import data, mrbp, mrbp_worker, recomputation
from benchmarks.collectives import Collectives
from memformer_dist.data import lanes
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.sampler import EpochSampler
from memformer_dist.data.windows import WindowReader
from tests.helpers.engines import make_engine
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import ToyCell, labels_in, random_window

WORLD = 2

# ---- collectives -------------------------------------------------------------------------------------------------


def known_collectives_rank(process):
    world = dist.group.WORLD
    dist.all_reduce(torch.ones(6))  # before the counter is on: not counted
    with Collectives() as seen:
        dist.all_reduce(torch.ones(6))
        dist.all_reduce(torch.ones(3, dtype=torch.float64), async_op=True).wait()
        world.allreduce_coalesced([torch.ones(2), torch.ones(5)]).wait()
        dist.reduce(torch.ones(4), 0)
        dist.broadcast(torch.ones(7, dtype=torch.bfloat16), 0)
        dist.all_gather([torch.empty(3), torch.empty(3)], torch.ones(3))
        dist.all_gather_single(torch.empty(10), torch.ones(5))
        world.all_gather_single_coalesced([torch.empty(4), torch.empty(8)], [torch.ones(2), torch.ones(4)]).wait()
        dist.reduce_scatter(torch.empty(3), [torch.ones(3), torch.ones(3)])
        dist.reduce_scatter_single(torch.empty(9), torch.ones(18))
        world.reduce_scatter_single_coalesced([torch.empty(1), torch.empty(2)], [torch.ones(2), torch.ones(4)]).wait()
        dist.all_to_all_single(torch.empty(4), torch.ones(4))
        dist.barrier()
        if process.rank == 0:
            dist.send(torch.ones(3), 1)
        else:
            dist.recv(torch.ones(3), 0)
    expected = {  # kind and dtype: (calls, numbers in the payload)
        ("all_reduce", torch.float32): (2, 6 + 7),
        ("all_reduce", torch.float64): (1, 3),
        ("reduce", torch.float32): (1, 4),
        ("broadcast", torch.bfloat16): (1, 7),
        ("all_gather", torch.float32): (3, 6 + 10 + 12),
        ("reduce_scatter", torch.float32): (3, 6 + 18 + 6),
        ("all_to_all", torch.float32): (1, 4),
        ("barrier", None): (1, 0),
        ("send" if process.rank == 0 else "recv", torch.float32): (1, 3),
    }
    for (kind, dtype), (calls, numbers) in expected.items():
        size = dtype.itemsize if dtype else 0
        assert (seen.calls(kind, dtype), seen.bytes(kind, dtype)) == (calls, numbers * size), f"{kind} {dtype}"
    assert seen.calls() == sum(calls for calls, _ in expected.values()) == len(seen.record)
    assert seen.bytes() == sum(n * (dtype.itemsize if dtype else 0) for (_, dtype), (_, n) in expected.items())
    assert seen.calls("all_reduce") == 3 and seen.calls("all_reduce", torch.bfloat16) == 0
    seen.clear()
    assert seen.calls() == 0


def hooks_rank(process):
    """Collectives issued while the autograd engine runs."""
    parameter = torch.nn.Parameter(torch.ones(5))
    parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
    with Collectives() as seen:
        (parameter * 2).sum().backward()
    assert (seen.calls(), seen.bytes("all_reduce", torch.float32)) == (1, 20)


def deepspeed_rank(process):
    """What DeepSpeed issues for a window and a step, at every stage, against the events that gloo itself records."""
    for stage in range(4):
        torch.manual_seed(5)
        cell = ToyCell(width=8)
        numbers = sum(parameter.numel() for parameter in cell.parameters())
        padded = sum(-(-parameter.numel() // WORLD) * WORLD for parameter in cell.parameters())
        settings = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        engine = make_engine(cell, torch.optim.SGD(cell.parameters(), lr=0.1), process, settings=settings)
        window = Window(random_window(2, 2, 4, seed=1))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            with Collectives() as window_seen:
                engine.accumulate([window], [cell.empty_state(2)], valid_tokens=labels_in(window))
            with Collectives() as step_seen:
                engine.step(0.1)
        events = [event.name for event in profile.events() if event.name.startswith("gloo:")]
        assert len(events) == window_seen.calls() + step_seen.calls()
        found = {kind: (window_seen.calls(kind), window_seen.bytes(kind)) for kind in ("all_reduce", "reduce_scatter")}
        if stage < 3:
            assert found == {"all_reduce": (1, 4 * numbers), "reduce_scatter": (0, 0)}, f"ZeRO {stage}"
        else:
            assert found == {"all_reduce": (0, 0), "reduce_scatter": (1, 4 * padded)}, f"ZeRO {stage}"
        gathered = step_seen if stage in (1, 2) else window_seen
        assert (gathered.bytes("all_gather", torch.float32) >= 4 * numbers) == (stage > 0)


class Window(list):
    start = 0


def traffic_rank(process):
    from benchmarks.mrbp_traffic import READOUT_GROUP, SEGMENTS, traffic

    rows = traffic(process, quick=True)
    assert [row["zero_stage"] for row in rows] == [2, 3]
    assert all(row["gradient_bytes_ratio"] == 1 for row in rows)
    assert rows[1]["readout_gathers_a_window"] <= SEGMENTS / READOUT_GROUP


def counter_rank(process):
    known_collectives_rank(process)
    hooks_rank(process)
    deepspeed_rank(process)
    traffic_rank(process)


@pytest.mark.slow
def test_collectives_are_counted():
    run_ranks(WORLD, counter_rank)


# ---- memory replay against its peers ---------------------------------------------------------------------------------

SMALL = replace(mrbp.CHECKED, lanes=1, segments=4, model=mrbp.CHECKED.model | {"dropout": 0.1})


def test_all_methods_have_one_gradient(monkeypatch):
    errors = mrbp_worker.gradient_errors(mrbp.CHECKED)
    assert errors.keys() == set(mrbp_worker.METHODS) - {"bptt"}
    assert max(errors.values()) <= mrbp.GRADIENT_TOLERANCE

    def wrong(*arguments, loss_scale, replay=mrbp_worker.memory_replay, **keywords):
        return replay(*arguments, loss_scale=1.001 * loss_scale, **keywords)

    monkeypatch.setattr(mrbp_worker, "memory_replay", wrong)
    errors = mrbp_worker.gradient_errors(mrbp.CHECKED)
    assert errors["checkpoint"] <= mrbp.GRADIENT_TOLERANCE < 1e-5 < min(errors["plain"], errors["grouped"])


@pytest.mark.parametrize("method", mrbp_worker.METHODS)
def test_matrix_products_of_a_window(method):
    """Added up from one segment's, against those of the method itself; the window's ends, which need less, aside."""
    layout = replace(SMALL, segments=8)
    expected = mrbp_worker.count_flops(layout).of_window(method, layout.segments)
    device = torch.device("cpu")
    cell = mrbp_worker.new_cell(layout, device)
    run = mrbp_worker.method_of(mrbp_worker.Measurement(layout, method, "cpu", steps=1, memory=False))
    with FlopCounterMode(display=False) as counter:
        run(cell, mrbp_worker.RandomWindow(layout, layout.segments, device), cell.empty_state(layout.lanes), 1.0)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.015)


PEAK = """
import torch
from benchmarks.mrbp_worker import peak

def step():
    kept = [torch.ones(1 << 18) for _ in range(40)]
    del kept[::2]
    kept += [torch.ones(1 << 16) for _ in range(40)]
    kept.clear()

torch.ones(1 << 24)
step()
print(peak(step, torch.device("cpu"))[0])
"""


@pytest.mark.slow
def test_peak_memory_is_what_was_alive():
    """40 MiB, of which every other one goes before 10 MiB in other pieces come."""
    command = [sys.executable, "-c", PEAK]
    environment = os.environ | mrbp_worker.RETURN_FREED_MEMORY
    done = subprocess.run(command, cwd=mrbp.ROOT, env=environment, capture_output=True, text=True)
    assert int(done.stdout) == pytest.approx(40 * mrbp.MIB, rel=0.05)
    refused = subprocess.run(command, cwd=mrbp.ROOT, capture_output=True, text=True)
    assert refused.returncode and "RETURN_FREED_MEMORY" in refused.stderr


def test_benchmark_of_recomputation(monkeypatch, tmp_path, capsys):
    """On tiny models and in this process: what is switched on is what runs."""
    measured = []

    def in_this_process(measurement):
        measured.append(measurement)
        times = mrbp_worker.measure(replace(measurement, memory=False, steps=1))
        return times | {"peak_bytes": 2**20, "state_bytes": 1}

    tiny = replace(SMALL, model=SMALL.model | {"dropout": 0.1})
    monkeypatch.setattr(recomputation, "run_worker", in_this_process)
    cases = [(tiny, [{}, {"checkpoint_layers": True, "loss_chunk": 5}, {"state_stride": 2}])]
    monkeypatch.setattr(recomputation, "layouts", lambda quick: cases)
    monkeypatch.setattr(sys, "argv", ["recomputation.py", "--quick", "--json", str(tmp_path / "result.json")])
    recomputation.main()
    on = [(m.layout.model.get("loss_chunk"), m.state_stride) for m in measured]
    assert on == [(None, 1)] * 2 + [(5, 1)] * 2 + [(None, 2)] * 2
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["on"] for row in rows] == cases[0][1] and all(row["seconds"] > 0 for row in rows)
    assert f"| {tiny.name}: state_stride 2 | 1.0 |" in capsys.readouterr().out


SENT = [
    {"zero_stage": 2, "gradient_bytes_ratio": 1.0, "calls": {"all_reduce": 1}},
    {"zero_stage": 3, "gradient_bytes_ratio": 1.0, "calls": {}, "readout_gathers_a_window": 2.0},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--quick"], ["--repeats", "2", "--long"]])
def test_whole_benchmark(monkeypatch, tmp_path, capsys, options):
    """On tiny models, its measurements in this process: rows, table and JSON of what was measured."""
    measured = []

    def in_this_process(measurement):
        measured.append(measurement)
        return mrbp_worker.measure(mrbp_worker.Measurement.from_json(measurement.to_json()))

    names = [*mrbp.METHODS_OF, "windows"]
    monkeypatch.setattr(mrbp, "layouts", lambda device, quick: {name: replace(SMALL, name=name) for name in names})
    monkeypatch.setattr(mrbp, "LONG", replace(SMALL, name="long"))
    monkeypatch.setattr(mrbp, "MILLION", 6)
    monkeypatch.setattr(mrbp, "WINDOWS", (2, 3, 4))
    monkeypatch.setattr(mrbp, "gradient_errors", lambda layout: {"plain": 0.0})
    monkeypatch.setattr(mrbp, "run_worker", in_this_process)
    monkeypatch.setattr(mrbp, "on_two_ranks", lambda *program: SENT)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "refused without")
    monkeypatch.setattr(sys, "argv", ["mrbp.py", *options, "--json", str(tmp_path / "figures.json")])
    mrbp.main()
    result = json.loads((tmp_path / "figures.json").read_text())
    keys = {
        "speed_vs_bptt_4_16",
        "speed_vs_flop_bound_4_16",
        "speed_vs_checkpoint_4_16",
        "grouped_speed_vs_bptt_few",
        "memory_vs_bptt_4_16",
        "memory_flat_64_over_2",
        "gradient_bytes_ratio",
        "gathers_per_window_zero3",
    }
    long = {"memory_million_over_64", "million_tokens_s"}
    assert keys <= result.keys() and (long <= result.keys()) == ("--long" in options)
    of = {(row["layout"], row["method"]): row for row in result["rows"] if "speed_vs_bptt" in row}
    every = {(name, method) for name, methods in mrbp.METHODS_OF.items() for method in methods}
    not_quick = {(name, "checkpoint") for name in mrbp.METHODS_OF if name != "4+16"}
    assert of.keys() == (every - not_quick if "--quick" in options else every)
    seconds = {method: of["4+16", method]["processor_s"] for method in ("bptt", "parts", "checkpoint")}
    assert result["speed_vs_bptt_4_16"] == seconds["bptt"] / seconds["parts"]
    assert result["speed_vs_checkpoint_4_16"] == pytest.approx(seconds["checkpoint"] / seconds["parts"])
    repeats = 1 if "--quick" in options else 2
    assert all(len(row["repeats"]) == repeats for row in of.values())
    timed = [(m.layout.name, m.method) for m in measured if m.steps]
    if repeats == 2:  # the methods of a layout take turns
        methods = [("few", method) for method in mrbp.METHODS_OF["few"]]
        assert [item for item in timed if item[0] == "few"] == methods * 2
    printed = capsys.readouterr().out
    assert all(key in printed for key in keys)
    assert (">= 0.92" in printed) == ("--quick" not in options)


# ---- the data path -----------------------------------------------------------------------------------------------


def test_readers_of_the_data_benchmark_read_the_same_tokens(tmp_path, monkeypatch):
    """The limit copies what the windows read, webdataset the same rows of every document; nobody counts what it skips."""
    for name, value in dict(LANES=4, LENGTH=64, DOCUMENT_TOKENS=500).items():
        monkeypatch.setattr(data, name, value)
    split = data.write_documents(tmp_path, np.arange(5000) % 4000, 500, 30)
    corpus, batches = Corpus.open(split), []
    reader = WindowReader(corpus, data.lane_schedule(corpus, seed=0, lanes=4, segment_length=64), lanes=range(4))
    expected = [reader.segment(tick) for tick in range(32)]
    assert data.windows_reader(corpus, 32)() == 32 * 4 * 64
    zeros = np.zeros
    monkeypatch.setattr(data.np, "zeros", lambda *a, **k: batches.append(zeros(*a, **k)) or batches[-1])
    assert data.memmap_reader(corpus, 32, tmp_path, labels=True)() == 32 * 4 * 64
    tokens, labels = batches[-2:]  # of the last tick
    for row in range(4):
        length = int(expected[-1].length[row])
        assert tokens[row, :length].tolist() == expected[-1].tokens[row, :length].tolist()
        assert labels[row, : length - 1].tolist() == expected[-1].labels[row, : length - 1].tolist()
    whole_rows = 30 * (499 // 64)
    assert data.webdataset_reader(split)() == whole_rows // 4 * 4 * 64


def test_small_figures_of_the_data_benchmark(tmp_path, monkeypatch):
    """Each is the time of what it names and of nothing else: the clock moves for opening a corpus and for a shuffle."""
    now = 0.0

    def takes(owner: type, name: str, seconds: float, wrapped=lambda function: function) -> None:
        function = getattr(owner, name)

        def slow(*arguments, **options):
            nonlocal now
            now += seconds
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, wrapped(slow))

    def in_this_process(command, **_):
        printed = io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", command[2:])
            exec(command[2], {})
        return SimpleNamespace(returncode=0, stdout=printed.getvalue())

    takes(Corpus, "open", 3.0, staticmethod)
    takes(EpochSampler, "__call__", 10.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(data.programs, "run", in_this_process)
    monkeypatch.setattr(lanes, "STORED_FROM", 1000)  # so that an epoch of so few documents is kept at all
    found = data.resuming(tmp_path, np.arange(500) % 400, documents=20_000, rounds=3)
    assert found == {"resume_s": 3 + 10, "resume_kept_s": 3}
    found = data.opening(tmp_path, 2000)
    assert found["index_10m_s"] == 3
    assert found["index_bytes_a_document"] == pytest.approx(12, rel=0.1)
    assert data.scheduling(1000) == 10
