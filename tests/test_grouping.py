"""`mrbp.readout_group: "auto"`: what a segment is reckoned to take, by hand and by measurement; the choice; no trace of it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from memformer_dist.cells.base import RecurrentCell
from memformer_dist.host_memory import host_free_bytes
from memformer_dist.mrbp import readout_size
from memformer_dist.mrbp.executor import TorchExecutor
from memformer_dist.mrbp.readout_size import (
    choose_readout_group,
    even_group,
    footprint,
    saved_storages,
)
from memformer_dist.optimizer import OptimizerConfig
from tests.helpers.engines import Rows, make_engine
from tests.helpers.memformer import memformer
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import ToyCell, labels_in, random_window

WORLD, LANES, LENGTH = 2, 4, 6
STAGES = (0, 1, 2, 3)


# ---- counting, by hand ---------------------------------------------------------------------------------------------------


class HandState(NamedTuple):
    memory: Tensor  # [lanes, width]


class HandFeatures(NamedTuple):
    mixed: Tensor  # [lanes, width]


class HandCell(RecurrentCell):
    """So simple that one can say what autograd saves. Segments of one token."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.mix, self.write = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def advance(self, segment, state):
        mixed = self.mix(state.memory)
        return HandFeatures(mixed), HandState(torch.tanh(self.write(mixed)))

    def readout(self, segment, features):
        logits = self.head(features.mixed)
        return nn.functional.cross_entropy(logits, segment.labels[:, 0], reduction="none")[:, None]


class Autocast:
    """Runs a cell as training in bf16 does."""

    carries_gradient = True

    def __init__(self, module: RecurrentCell):
        self.module = module

    def __call__(self, part, *arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.module(part, *arguments)


@pytest.mark.parametrize("lanes, width, vocabulary", [(3, 5, 700), (8, 64, 11)])
def test_footprint_equals_the_sum_by_hand(lanes, width, vocabulary):
    segment = random_window(1, lanes, 1, seed=0)[0]
    hand = HandCell(width, vocabulary)
    found = footprint(hand, hand, segment, HandState(torch.zeros(lanes, width)))
    row, logits = 4 * lanes * width, 4 * lanes * vocabulary
    advance = row + row + row  # inputs of mix and of write (the features), result of tanh (the next state)
    readout = row + logits + 8 * lanes + 4 * lanes  # features of the group, log-probabilities, labels, nll
    gradients = row + 2 * max(logits, row)  # of the features; of the largest tensor and what it was made of
    assert found.segment == advance + readout + gradients
    assert found.group <= 16  # a scalar of the loss; no parameter


def test_a_storage_counts_once_and_one_freed_is_not_taken_for_the_next():
    parameter = nn.Parameter(torch.ones(100))
    shared = torch.ones(100, requires_grad=True)
    with saved_storages([parameter]) as sizes:
        (shared * parameter).sum()  # the other factor of each: one of them a parameter
        (shared.view(10, 10) * parameter.view(10, 10)).sum()
        assert sum(sizes.values()) == 400
        for _ in range(5):  # each is freed at once, its memory taken by the next
            torch.exp(shared)
    assert sum(sizes.values()) == 400 + 5 * 400


def test_a_graph_that_was_measured_does_not_go_backward():
    leaf = torch.ones(3, requires_grad=True)
    with saved_storages([]):
        scalar = torch.exp(leaf).sum()
    with pytest.raises(AssertionError, match="measured"):
        scalar.backward()


def test_autocast_parameters_count_for_advance_by_the_segment_for_readout_by_the_group():
    """bf16 copies of weights: every advance of a group has its own, the readout one for all."""
    width, vocabulary, lanes = 64, 96, 2
    cell = HandCell(width, vocabulary)

    segment, state = random_window(1, lanes, 1, seed=0)[0], HandState(torch.zeros(lanes, width))
    found = footprint(Autocast(cell), cell, segment, state)
    of_advance, of_readout = 2 * 2 * width * width, 2 * width * vocabulary
    assert of_readout <= found.group <= of_readout + 2 * vocabulary + 64  # and the bias
    activations = 32 * lanes * (8 * width + 4 * vocabulary)  # far more than there are
    assert of_advance < found.segment < of_advance + activations


# ---- the choice ----------------------------------------------------------------------------------------------------------


@given(window=st.integers(1, 5000), room=st.integers(0, 6000))
def test_even_groups(window, room):
    """As few groups as the room allows, and of these the smallest."""
    group, fits = even_group(window, room), min(max(1, room), window)
    assert 1 <= group <= fits
    assert math.ceil(window / group) == math.ceil(window / fits)
    assert group == 1 or math.ceil(window / (group - 1)) > math.ceil(window / fits)


def test_even_groups_for_instance():
    assert even_group(64, 40) == 32
    assert even_group(64, 64) == 64 == even_group(64, 1000)
    assert even_group(64, 0) == 1
    assert even_group(10, 4) == 4  # 4, 4, 2


def fake_host(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A file system with 8 GiB available and these cgroup files."""
    files = {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8388608 kB\n", "proc/self/cgroup": cgroup} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


GIB = 2**30


@pytest.mark.parametrize(
    "cgroup, files, expected",
    [
        pytest.param("0::/\n", {}, 8 * GIB, id="no limit"),
        pytest.param(
            "4:memory:/job\n1:cpu:/\n0::/\n",
            {
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 2}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{5 * GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": "cache 0\n",
            },
            3 * GIB // 2,
            id="version 1",
        ),
        pytest.param(
            "0::/slurm/job/task\n",
            {
                "sys/fs/cgroup/slurm/job/task/memory.max": "max\n",
                "sys/fs/cgroup/slurm/job/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/slurm/job/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/slurm/job/memory.stat": "anon 5\ninactive_file 1000\n",
            },
            GIB + 1000,
            id="version 2, the limit is a group above",
        ),
        pytest.param(
            "0::/docker/0123abcd\n",
            {
                "sys/fs/cgroup/memory.max": f"{GIB}\n",
                "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory.stat": "anon 5\n",
            },
            0,
            id="version 2 in a container, over its limit",
        ),
    ],
)
def test_free_memory_of_a_host_is_bounded_by_its_cgroups(tmp_path, cgroup, files, expected):
    assert host_free_bytes(fake_host(tmp_path, cgroup, files)) == expected


def test_ranks_of_a_host_share_its_memory(monkeypatch):
    monkeypatch.setattr("memformer_dist.host_memory.host_free_bytes", lambda root: 1000)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    from memformer_dist.host_memory import free_bytes

    assert free_bytes(torch.device("cpu")) == 1000
    ranks = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == 250
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert free_bytes(torch.device("cpu")) == 125


# ---- through the engine, on two ranks ------------------------------------------------------------------------------------


def new_engine(world, stage, cell=None, **settings):
    from memformer_dist.optimizer import adamw

    if cell is None:
        torch.manual_seed(5)
        cell = memformer("encoder_decoder")  # with dropout
    optimizer = adamw(cell, OptimizerConfig(learning_rate=3e-3))
    return make_engine(cell, optimizer, world, settings={"zero_optimization": {"stage": stage}}, seed=7, **settings)


def agreement_rank(world):
    """Whoever has the least decides; what was measured is the same at all stages, gathered parameters or not."""
    segment = random_window(1, LANES, LENGTH, seed=0)[0]
    measured = {}
    for stage in STAGES:
        torch.manual_seed(5)
        engine = new_engine(world, stage, ToyCell(width=1001))
        state = engine.module.empty_state(LANES)
        measured[stage] = footprint(engine, engine.module, segment, state)
        pending = engine.first_step_bytes(state, 16) + measured[stage].group
        one = math.ceil(readout_size.SAFETY * measured[stage].segment)
        for least, expected in ((1, 1), (0.5, 1), (7, 6), (11.9, 8), (1000, 16), (-3, 1)):
            room = (least, least + 5)[(world.rank + stage) % WORLD]
            readout_size.free_bytes = lambda device: int(pending + one * room / readout_size.SHARE) + 1
            choice = choose_readout_group(
                engine, engine.module, segment, state, world, window=16, reserved=engine.first_step_bytes(state, 16)
            )
            assert choice.readout_group == expected, f"ZeRO {stage}, room for {least}: {choice}"
            assert choice.segment_bytes == one
            assert choice.free_bytes == max(0, int(one * least / readout_size.SHARE) + 1)
    assert len(set(measured.values())) == 1, measured
    parameters = sum(p.nbytes for p in ToyCell(width=1001).parameters())
    assert measured[3].segment < parameters / 4, "too few parameters to see them counted"


@pytest.mark.slow
def test_ranks_agree_on_the_tightest_of_them():
    run_ranks(WORLD, agreement_rank)


def train(world, stage, *, before=lambda engine, step, segment, state: None, **settings):
    """Losses of 3 steps on windows of 3 segments, and the weights after; `before` is called at each step's beginning."""
    engine = new_engine(world, stage, **settings)
    engine.module.train()
    share = LANES // WORLD
    state, losses = engine.module.empty_state(share), []
    for step in range(3):
        window = random_window(3, LANES, LENGTH, seed=step)
        rows = Rows(window, slice(world.rank * share, (world.rank + 1) * share), start=3 * step)
        total = []
        before(engine, step, rows[0], state)
        accumulated = engine.accumulate(
            [rows], [state], valid_tokens=labels_in(window), observe=lambda t, segment, nll: total.append(nll.sum())
        )
        assert engine.step(3e-3).applied
        state = accumulated.states[0]
        losses.append(float(sum(total)))
    return losses, [weight.clone() for _, weight, _ in engine.tensors()]


def choose(engine, step, segment, state):
    """Before the first step, as in a fresh run, and later, as in a run resumed with other lane groups."""
    if step not in (0, 2):
        return
    random_state = torch.get_rng_state()
    engine.module.train(step == 0)
    choice = choose_readout_group(
        engine, engine.module, segment, state, engine.world, window=3, reserved=engine.first_step_bytes(state, 3)
    )
    assert choice.readout_group == 3
    assert engine.module.training == (step == 0)
    engine.module.train()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in engine.module.parameters()) or step == 2


def no_trace_rank(world):
    plain = {}
    for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")):
        plain[stage], weights = train(world, stage, precision=precision)
        losses, after = train(world, stage, precision=precision, before=choose)
        assert losses == plain[stage], f"ZeRO {stage}, {precision}"
        assert all(torch.equal(x, y) for x, y in zip(after, weights, strict=True)), f"ZeRO {stage}, {precision}"

    def with_a_backward(engine, step, segment, state):
        features, _ = engine("advance", segment, state)
        engine.deepspeed.backward(engine("readout", segment, features).sum() * 1e-3)

    assert train(world, 0, before=with_a_backward)[0] != plain[0], "what a backward leaves is not seen either"


@pytest.mark.slow
def test_choosing_leaves_no_trace_in_training():
    """Losses and weights bit by bit, with dropout, at every stage; the control leaves a gradient behind."""
    run_ranks(WORLD, no_trace_rank)


def first_step_rank(world):
    """Against what parameters and optimiser hold after a step."""
    segment, width, window = random_window(1, LANES, LENGTH, seed=0)[0], 256, 5
    numbers = sum(p.numel() for p in ToyCell(width=width).parameters())
    for stage, reduce in ((0, "window"), (1, "window"), (2, "window"), (3, "window"), (2, "segment"), (3, "segment")):
        engine = new_engine(world, stage, ToyCell(width=width), reduce=reduce)
        state = engine.module.empty_state(LANES)
        expected = engine.first_step_bytes(state, window)
        # All gradients of this rank or, where they are reduced at every backward, a bucket of them.
        held = 4 * (numbers if reduce == "window" else engine.deepspeed.zero_reduce_bucket_size())
        held += 4 * numbers // WORLD if (stage, reduce) == (2, "segment") else 0  # its share of the averaged ones
        held += 4 * numbers if stage == 3 else 0  # gathered for the window
        held += window * (4 * LANES * width + 8 * LANES)  # the window's states: memory and a count
        engine.accumulate([Rows([segment], slice(0, LANES), 0)], [state], valid_tokens=100)
        engine.step(1e-3)
        moments = [
            state[key] for state in engine._moments._optimizer().state.values() for key in ("exp_avg", "exp_avg_sq")
        ]
        held += sum(moment.nbytes for moment in moments)
        assert expected == pytest.approx(held, rel=0.02), f"ZeRO {stage}, {reduce}"


@pytest.mark.slow
def test_what_the_first_step_allocates_is_known_before():
    run_ranks(WORLD, first_step_rank)


# ---- against the peak of a real process ----------------------------------------------------------------------------------

SMALL, LARGE = 2, 6  # segments a group; a window has as many as the larger
CASES = {
    # layout, vocabulary, precision, dropout
    "plain": ("encoder_decoder", 100, "fp32", 0.0),
    "dropout": ("encoder_decoder", 100, "fp32", 0.1),
    "logits": ("encoder_decoder", 4000, "fp32", 0.1),
    "decoder": ("decoder", 100, "fp32", 0.1),
    "bf16": ("encoder_decoder", 1000, "bf16", 0.1),
}


def measure_peaks() -> None:
    """Print {case: [footprint of a segment, peak resident size with groups of SMALL, with groups of LARGE]}."""
    torch.set_num_threads(1)
    for name, case in CASES.items():
        if os.fork() == 0:  # a process's peak begins with what it was born with
            print(json.dumps({name: measure_peak(*case)}), flush=True)
            os._exit(0)
        assert os.wait()[1] == 0, name


def measure_peak(layout: str, vocabulary: int, precision: str, dropout: float) -> list[int]:
    from memformer_dist.cells.memformer import Memformer, MemformerConfig
    from memformer_dist.mrbp.replay import memory_replay

    torch.manual_seed(0)
    config = MemformerConfig(
        layout=layout,
        width=128,
        heads=2,
        feed_forward=256,
        slots=32,
        encoder_layers=1 if layout == "encoder_decoder" else 0,
        decoder_layers=2,
        dropout=dropout,
    )
    lanes, length = 4, 96  # tensors large enough for the allocator's pages not to count
    cell = Memformer(config, vocab_size=vocabulary, bos_id=1, segment_length=length)
    window = random_window(LARGE, lanes, length, seed=1, vocabulary=vocabulary)
    state = cell.empty_state(lanes)
    engine = Autocast(cell) if precision == "bf16" else cell
    found = [footprint(engine, cell, window[0], state).segment]
    for group in (SMALL, LARGE):  # peaks since the start; after the first group all gradients are there
        memory_replay(cell, window, state, loss_scale=1e-3, executor=TorchExecutor(engine), readout_group=group)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        found.append(int(status["VmHWM"].split()[0]) * 1024)
    return found


@pytest.fixture(scope="module")
def peaks() -> dict[str, list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_grouping import measure_peaks; measure_peaks()"],
        cwd=Path(__file__).parents[1],
        # What is freed goes back to the system at once, so that resident is what is in use.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return {name: found for line in done.stdout.splitlines() for name, found in json.loads(line).items()}


def growth(peak: list[int]) -> float:
    """Of the peak with each segment in a group."""
    _, small, large = peak
    return (large - small) / (LARGE - SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_bounds_the_growth_of_the_real_peak(peaks, case):
    """At most SAFETY of the footprint, and not below three quarters of it."""
    assert 0.75 * peaks[case][0] < growth(peaks[case]) < readout_size.SAFETY * peaks[case][0]


@pytest.mark.slow
def test_an_estimate_without_dropout_does_not_bound_training_with_it(peaks):
    """The control: so small a difference is seen."""
    assert growth(peaks["dropout"]) > readout_size.SAFETY * peaks["plain"][0]
