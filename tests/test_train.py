"""Whole runs: stopped and resumed, on other numbers of ranks, interrupted by signals, diverging."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memformer_dist.checkpoint import build_cell
from memformer_dist.config import RunConfig
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.open_data import open_corpora
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import CorpusError, UserError
from memformer_dist.mrbp.executor import reseed
from memformer_dist.prepare.build import shard
from memformer_dist.train import crosses
from tests.helpers import ROOT
from tests.helpers.corpora import write_split
from tests.helpers.ranks import free_port, run_ranks
from tests.helpers.runs import STEP_TOKENS, interrupted_rank, last_checkpoint, records, run_rank, settings, tensors
from tests.helpers.waiting import wait_until

DETERMINISTIC = ("loss/train", "optim/lr", "optim/grad_norm", "memory/write_norm", "data/documents_started")


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run_bit_by_bit(corpus_dir, tmp_path):
    """With dropout, on two ranks, for every ZeRO stage and precision: weights, moments, lane states, logged figures."""
    cases = []
    for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "bf16_parameters"), (3, "bf16")):
        raw = settings(
            corpus_dir,
            stage=stage,
            dropout=0.2,
            training={"precision": precision, "tokens": 6 * STEP_TOKENS},
        )
        raw["mrbp"] |= {"lanes_per_group": 2, "readout_group": 2}
        raw["monitor"] = {"log_every_steps": 1 if stage < 2 else 3}  # the stop, at step 4, falls into an interval
        if stage == 2:
            raw["mrbp"] |= {"reduce": "segment", "state_store": "host"}
        if stage == 3:
            raw["training"] |= {"evaluate_every_tokens": 2 * STEP_TOKENS, "evaluate_segments": 3}
        cases.append((raw, tmp_path / f"stage{stage}"))
    run_ranks(2, interrupted_rank, cases)
    for raw, folder in cases:
        whole, parts = last_checkpoint(folder / "whole"), last_checkpoint(folder / "parts")
        assert whole.name == parts.name and int(whole.name.removeprefix("step-")) > 6
        for prefix in ("weights", "moments", "lanes"):
            expected, found = tensors(whole, prefix), tensors(parts, prefix)
            assert expected.keys() == found.keys() and expected
            assert all(torch.equal(expected[name], found[name]) for name in expected), (folder.name, prefix)
        assert records(folder / "whole", *DETERMINISTIC) == records(folder / "parts", *DETERMINISTIC)
        losses = [loss for _, _, loss in records(folder / "whole", "loss/train")]
        assert len(losses) > 6 / raw["monitor"]["log_every_steps"] and losses[-1] < losses[0]
        if raw["training"].get("evaluate_every_tokens"):
            evaluated = [
                records(folder / part, "eval/loss", "eval/gap", having="eval/loss") for part in ("whole", "parts")
            ]
            assert evaluated[0] == evaluated[1] and len(evaluated[0]) >= 2


@pytest.mark.slow
def test_mixtures_and_streams_resume_where_they_stopped(corpus_dir, tmp_path, capfd):
    """Losses of a run that was stopped, bit by bit; several corpora have one tokenizer."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.txt").write_text("ba be bi bo bu " * (20 * number + 1))
    shard(tmp_path / "other", corpus_dir / "tokenizer.model", [str(texts)], valid_fraction=0.2)
    mixed = {"corpus": {str(corpus_dir): 0.5, str(tmp_path / "other"): 2}, "min_tokens": 5, "shuffle_shards": 1}
    cases = [
        (settings(corpus_dir, dropout=0.2, tokens=8 * STEP_TOKENS, data=data), tmp_path / name)
        for name, data in {"mixed": mixed, "stream": {"mode": "stream"}, "plain": {}}.items()
    ]
    run_ranks(1, interrupted_rank, cases)
    losses = {}
    for _, folder in cases:
        losses[folder.name] = records(folder / "whole", "loss/train", "data/documents_started")
        assert len(losses[folder.name]) > 7
        assert losses[folder.name] == records(folder / "parts", "loss/train", "data/documents_started")
    assert len({losses[name][0][2] for name in losses}) == 3, "each reads something else"
    said = capfd.readouterr().err
    train, _ = open_corpora(corpus_dir)
    positions = int((-(-train.lengths // 16) * 16).sum())
    padding = 1 - train.total_tokens / positions
    assert f"{len(train.lengths)} documents, {train.total_tokens:,} tokens, {padding:.1%} of the positions" in said
    assert "an epoch is 8 documents, " in said, "a stream of 8 parts"


def test_dropout_masks_depend_on_the_seed(corpus_dir, tmp_path):
    """The control of the test above. All runs start from the same weights (training.init_from), with fresh moments."""
    raw = settings(corpus_dir, dropout=0.2, tokens=3 * STEP_TOKENS)
    start = tmp_path / "start"
    raw_from = settings(corpus_dir, dropout=0.2, training={"tokens": 3 * STEP_TOKENS, "init_from": str(start)})
    other = settings(corpus_dir, dropout=0.2, training={"tokens": 3 * STEP_TOKENS, "init_from": str(start), "seed": 1})
    plain = settings(corpus_dir, training={"tokens": 3 * STEP_TOKENS, "init_from": str(start)})
    names = dict(a=raw_from, b=raw_from, c=other, d=plain, e=plain | {"training": plain["training"] | {"seed": 1}})
    run_ranks(1, several_runs, [(raw, start, None), *((case, tmp_path / name, None) for name, case in names.items())])
    weights = {name: tensors(last_checkpoint(tmp_path / name), "weights") for name in names}

    def same(x: str, y: str) -> bool:
        return all(torch.equal(weights[x][name], weights[y][name]) for name in weights[x])

    assert same("a", "b") and not same("a", "c")
    assert same("d", "e"), "without dropout the seed has no part in a run that starts from given weights"


def several_runs(world, cases) -> None:
    for raw, run_dir, stop_after in cases:
        run_rank(world, raw, run_dir, stop_after)


@pytest.mark.slow
def test_one_and_two_ranks_train_alike(corpus_dir, tmp_path):
    """fp32, dropout 0: the same batches and losses within 1e-5 over 20 steps; the ranks also work in lane groups."""
    raw = settings(corpus_dir, tokens=19 * STEP_TOKENS)
    grouped = settings(corpus_dir, tokens=19 * STEP_TOKENS, stage=2, mrbp={"lanes_per_group": 2})
    run_ranks(1, several_runs, [(raw, tmp_path / "one", None)])
    run_ranks(2, several_runs, [(raw, tmp_path / "two", None), (grouped, tmp_path / "grouped", None)])
    expected = records(tmp_path / "one", "data/documents_started", "loss/train")
    assert len(expected) >= 20
    for name in ("two", "grouped"):
        found = records(tmp_path / name, "data/documents_started", "loss/train")
        assert [row[:3] for row in found] == [row[:3] for row in expected]
        assert max(abs(x[3] - y[3]) for x, y in zip(found, expected, strict=True)) <= 1e-5


@pytest.mark.slow
def test_masked_labels_count_alike_on_one_and_two_ranks(corpus_dir, tmp_path):
    """Half of each document is not learnt; ranks count the labels of their own lanes, and lanes differ."""
    generator, lines = random.Random(0), []
    for _ in range(40):
        halves = [" ".join(generator.choices(("ba", "be", "bidu", "bo"), k=generator.randint(1, 60))) for _ in range(2)]
        lines.append(json.dumps({"parts": [{"text": halves[0], "loss": False}, {"text": halves[1]}]}))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    shard(tmp_path / "masked", corpus_dir / "tokenizer.model", [str(tmp_path / "texts.jsonl")], valid_fraction=0.1)
    raw = settings(tmp_path / "masked", tokens=4 * STEP_TOKENS)
    run_ranks(1, several_runs, [(raw, tmp_path / "one", None)])
    run_ranks(2, several_runs, [(raw, tmp_path / "two", None)])
    one, two = (records(tmp_path / name, "loss/train") for name in ("one", "two"))
    assert [row[:2] for row in one] == [row[:2] for row in two] and len(one) > 5
    assert max(abs(x[2] - y[2]) for x, y in zip(one, two, strict=True)) <= 1e-5
    corpus = open_corpora(tmp_path / "masked")[0]
    reader = WindowReader(corpus, LaneSchedule(corpus.lengths, lanes=8, segment_length=16), lanes=range(8))
    counts = [sum(int((reader.segment(tick).labels >= 0).sum()) for tick in range(3 * n, 3 * n + 3)) for n in range(6)]
    assert [int(row[1]) for row in one[:6]] == np.cumsum(counts).tolist() and len(set(counts)) > 3


@pytest.mark.slow
def test_a_run_moves_to_other_ranks_and_another_stage(corpus_dir, tmp_path):
    """Stopped on 2 ranks at ZeRO 2, resumed on 1 at ZeRO 0 and on 2 at ZeRO 3: the losses of the run that was left alone."""
    tokens = 12 * STEP_TOKENS
    raw = settings(corpus_dir, stage=2, tokens=tokens)
    run_ranks(2, several_runs, [(raw, tmp_path / "whole", None), (raw, tmp_path / "a", 6), (raw, tmp_path / "b", 6)])
    run_ranks(1, several_runs, [(settings(corpus_dir, stage=0, tokens=tokens), tmp_path / "a", None)])
    run_ranks(2, several_runs, [(settings(corpus_dir, stage=3, tokens=tokens), tmp_path / "b", None)])
    expected = records(tmp_path / "whole", "loss/train")
    for name in ("a", "b"):
        found = records(tmp_path / name, "loss/train")
        assert [row[:2] for row in found] == [row[:2] for row in expected]
        assert max(abs(x[2] - y[2]) for x, y in zip(found, expected, strict=True)) <= 2e-5, name


def test_the_window_may_change_on_resume(corpus_dir, tmp_path, capfd):
    """To a schedule by step, to growth from the window at hand, to other bounds, to a number; no gap in the data."""
    raw = settings(corpus_dir, tokens=18 * STEP_TOKENS)
    growing = {"first": 1, "last": 6, "metric": "loss/train", "threshold": 99.0, "every_steps": 2}
    parts = [
        (3, 2, [3, 3]),
        ({"by_step": {"0": 1, "3": 2, "5": 4}}, 6, [1, 2, 2, 4]),
        (growing, 9, [4, 4, 5]),
        (growing | {"last": 3}, 11, [3, 3]),
        (2, None, None),
    ]
    cases = [(raw | {"mrbp": {"window": window}}, tmp_path / "run", stop) for window, stop, _ in parts]
    run_ranks(1, several_runs, cases)
    rows = records(tmp_path / "run", "mrbp/window")
    expected = [n for _, _, windows in parts[:-1] for n in windows]
    windows = [window for _, _, window in rows]
    assert windows == expected + [2] * (len(rows) - len(expected)) and len(rows) > len(expected)
    checkpoint = json.loads((last_checkpoint(tmp_path / "run") / "checkpoint.json").read_text())
    assert checkpoint["position"]["tick"] == sum(windows)
    assert checkpoint["curriculum"]["window"] == 2
    train, _ = open_corpora(corpus_dir)
    schedule = LaneSchedule(train.lengths, seed=0, lanes=8, segment_length=16)
    reader = WindowReader(train, schedule, lanes=range(8))
    assert [tokens for _, tokens, _ in rows] == [reader.labels(0, sum(windows[: n + 1])) for n in range(len(rows))]
    said = "".join(capfd.readouterr())
    for window in (1, 4, 3, 2):
        assert f"windows of {window} segments from here\n" in said
    for change in (
        "2 segments from here, 1 until now: by",
        "4 segments from here, 2 until",
        "5 segments from here, 4 until",
    ):
        assert f"windows of {change}" in said
    assert "changed since: mrbp.window was 3, is {'by_step': {0: 1, 3: 2, 5: 4}}" in said
    assert (
        "8 lanes x 4 segments x 16 tokens; mrbp.window: from 1 to 6, one more whenever loss/train is below 99" in said
    )


def chosen_rank(world, cases) -> None:
    """Each case is (raw, folder, stop, choice): what measuring would choose in this part, None where it may not."""
    from memformer_dist import train
    from memformer_dist.mrbp.readout_size import Choice

    for raw, run_dir, stop_after, choice in cases:
        asked = []

        def choose(engine, cell, segment, state, world, *, window, reserved):
            assert reserved == engine.first_step_bytes(state, window) > 0
            asked.append(window)
            assert len(segment.tokens) == len(state.memory)
            return Choice(choice, 3 << 20, 64 << 20)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "choose_readout_group", choose)
            run_rank(world, raw, run_dir, stop_after)
        assert asked == ([] if choice is None else [3])


@pytest.mark.slow
def test_a_chosen_readout_group_is_kept(corpus_dir, tmp_path, capfd):
    """Dropout masks depend on it, so a run that is resumed where more memory is free has to go on with what it had.

    It is chosen anew where lane groups have another size, and where none is in the checkpoint: the control.
    """
    raw = settings(corpus_dir, dropout=0.2, tokens=5 * STEP_TOKENS, mrbp={"readout_group": "auto"})
    halves = settings(
        corpus_dir, dropout=0.2, tokens=5 * STEP_TOKENS, mrbp={"readout_group": "auto", "lanes_per_group": 4}
    )
    fixed = settings(corpus_dir, dropout=0.2, tokens=5 * STEP_TOKENS, mrbp={"readout_group": 2})
    cases = [(raw, tmp_path / "whole", None, 2), (raw, tmp_path / "parts", 2, 2), (raw, tmp_path / "parts", None, None)]
    cases += [
        (raw, tmp_path / "moved", 2, 2),
        (halves, tmp_path / "moved", 3, 1),
        (halves, tmp_path / "moved", None, None),
    ]
    cases += [
        (fixed, tmp_path / "fixed", 2, None),
        (raw, tmp_path / "fixed", 3, 3),
        (fixed, tmp_path / "fixed", 4, None),
    ]
    run_ranks(1, chosen_rank, cases)
    weights = {name: tensors(last_checkpoint(tmp_path / name), "weights") for name in ("whole", "parts")}
    assert all(torch.equal(weights["parts"][name], weight) for name, weight in weights["whole"].items())
    assert records(tmp_path / "whole", *DETERMINISTIC) == records(tmp_path / "parts", *DETERMINISTIC)
    losses = [records(tmp_path / name, "loss/train")[:3] for name in ("whole", "fixed")]
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]

    def kept(name: str):
        return json.loads((last_checkpoint(tmp_path / name) / "checkpoint.json").read_text())["readout_group"]

    assert kept("whole") == kept("parts") == {"segments": 2, "lanes": 8}
    assert kept("moved") == {"segments": 1, "lanes": 4} and kept("fixed") is None
    lines = capfd.readouterr().err.splitlines()
    said = [line.partition("rank 0  ")[2] for line in lines if "rank 0  mrbp.readout_group: " in line]
    assert len(said) == 5
    assert said[0] == (
        "mrbp.readout_group: 2 segments, because a segment of 8 lanes takes 3.0 MiB, 64 MiB are free, and a window has 3"
        " segments at most; kept for the rest of the run"
    )


@pytest.mark.slow
def test_gradient_norms_at_the_boundaries_equal_full_bptt(corpus_dir, tmp_path):
    """||dL/d(state)|| at every boundary of the first window, over 2 ranks and 2 lane groups each, against float64."""
    raw = settings(
        corpus_dir, stage=1, tokens=STEP_TOKENS, mrbp={"window": 5, "lanes_per_group": 2, "readout_group": 2}
    )
    run_ranks(2, several_runs, [(raw, tmp_path / "run", None)])
    ((_, tokens, found),) = records(tmp_path / "run", "memory/grad_norm_by_boundary")

    train, _ = open_corpora(corpus_dir)
    schedule = LaneSchedule(train.lengths, seed=0, lanes=8, segment_length=16)
    reader = WindowReader(train, schedule, lanes=range(8))
    config = RunConfig.check(raw)
    reseed(torch.device("cpu"), config.training.seed)
    cell = build_cell(config, train.vocabulary).double()

    def norms(segments: int, mean: float) -> list[float]:
        """By one graph over the first `segments` segments, the loss divided by `mean`."""
        state, memories, loss = cell.empty_state(8), [], 0.0
        state = state._replace(memory=state.memory.double())
        for tick in range(segments):
            segment = reader.segment(tick)
            memories.append(state.memory.requires_grad_())
            features, state = cell("advance", segment, state)
            loss = loss + cell("readout", segment, features).sum() / mean
        return [float(x.norm()) for x in torch.autograd.grad(loss, memories[1:])]

    expected = norms(5, tokens)
    assert len(found) == 4 and found == pytest.approx(expected, rel=1e-5)
    for wrong in (expected[::-1], norms(5, tokens / 2), norms(6, tokens)[:4], norms(6, tokens)[1:]):
        assert found != pytest.approx(wrong, rel=1e-3), "the control"


def damaged_rank(world, raw, run_dir, expected) -> None:
    with pytest.raises(CorpusError, match=expected):
        run_rank(world, raw, run_dir)


@pytest.mark.slow
def test_a_damaged_document_of_one_rank_ends_all_of_them(corpus_dir, tmp_path):
    """The document is met in a later window, by one rank; both end with the same message, what was trained is saved."""
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_dir, corpus)
    train, _ = open_corpora(corpus)
    schedule = LaneSchedule(train.lengths, seed=0, lanes=8, segment_length=16)
    tick, lane = next((t, lane) for t in range(6, 60) for lane in range(4, 8) if schedule.at(t).reset[lane])
    document = int(schedule.at(tick).document[lane])
    assert all(document not in schedule.at(t).document for t in range(tick))
    shard, first_byte = train.place(document)
    raw_bytes = bytearray(Path(shard).read_bytes())
    raw_bytes[first_byte] ^= 1
    Path(shard).write_bytes(raw_bytes)
    raw = settings(corpus, stage=2, tokens=60 * STEP_TOKENS, mrbp={"lanes_per_group": 2})
    run_ranks(2, damaged_rank, raw, tmp_path / "run", f"document {document} at byte")
    assert last_checkpoint(tmp_path / "run").name == f"step-{tick // 3:08d}"


def locked_rank(world, raw, run_dir) -> None:
    with pytest.raises(UserError, match="another process"):
        run_rank(world, raw, run_dir)


def test_two_processes_do_not_share_a_run_directory(corpus_dir, tmp_path):
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run_ranks(2, locked_rank, settings(corpus_dir), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def diverging_rank(world, raw, run_dir) -> None:
    with pytest.raises(UserError, match="optimizer.learning_rate"):
        run_rank(world, raw, run_dir)


def test_a_run_that_diverged_ends_with_a_message(corpus_dir, tmp_path):
    """No step with a gradient that is not finite is applied, and after some in a row the run ends, on every rank."""
    raw = settings(
        corpus_dir,
        optimizer={"learning_rate": 1e30, "gradient_clipping": 0.0},
        training={"tokens": 40 * STEP_TOKENS, "skipped_steps_limit": 3},
    )
    run_ranks(2, diverging_rank, raw, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    skipped = [row[2] for row in records(tmp_path, "optim/skipped")]
    assert skipped[-3:] == [1, 1, 1]


@pytest.mark.slow
def test_a_window_without_labels_moves_no_weight(corpus_dir, tmp_path):
    """Such windows once counted as updates and moved weights by Adam's moments; now they advance the states alone.

    They are no skipped steps either, and a run that is stopped after one resumes bit by bit.
    """
    tokenizer = (corpus_dir / "tokenizer.model").read_bytes()
    for split in ("train", "valid"):
        generator = np.random.default_rng(0)
        vocabulary = open_corpora(corpus_dir)[0].vocabulary
        # Of 40 documents of a window each, one lane's in three windows of five has labels.
        texts = [generator.integers(4, vocabulary.size, 48) for _ in range(40)]
        masks = [np.full(48, int(number in (3, 17, 31))) for number in range(40)]
        write_split(tmp_path / "corpus" / split, texts, masks, vocabulary=vocabulary)
    (tmp_path / "corpus" / "tokenizer.model").write_bytes(tokenizer)
    raw = settings(tmp_path / "corpus", tokens=47 * 3 * 5, dropout=0.1, training={"skipped_steps_limit": 1})
    run_ranks(2, several_runs, [(raw, tmp_path / "whole", None)])
    tokens = [row[1] for row in records(tmp_path / "whole", "optim/skipped", having="optim/skipped")]
    empty = [step for step, (x, y) in enumerate(zip([0, *tokens], tokens, strict=False), start=1) if x == y]
    assert len(empty) >= 4 and any(step > 2 for step in empty), empty
    assert all(row[2] == 0 for row in records(tmp_path / "whole", "optim/skipped", having="optim/skipped"))

    step = next(step for step in empty if tokens[step - 1] > 0)  # the first behind an update
    cases = [(raw, tmp_path / "before", step - 1), (raw, tmp_path / "resumed", step)]
    run_ranks(2, several_runs, cases)
    before, after = (last_checkpoint(tmp_path / name) for name in ("before", "resumed"))
    for prefix in ("weights", "moments", "lanes"):
        then, now = tensors(before, prefix), tensors(after, prefix)
        assert all(torch.equal(then[name], now[name]) for name in then) == (prefix != "lanes"), prefix
    run_ranks(2, several_runs, [(raw, tmp_path / "resumed", None)])
    for prefix in ("weights", "moments", "lanes"):
        whole, resumed = (tensors(last_checkpoint(tmp_path / name), prefix) for name in ("whole", "resumed"))
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    run_ranks(1, several_runs, [(raw, tmp_path / "one", None)])
    assert [row[1] for row in records(tmp_path / "one", having="optim/skipped")] == tokens


def interrupt_and_resume(command, how, run_dir: Path, *, expected_codes, by_its_folder=True) -> None:
    """Start a run without end, interrupt it once there are steps, see that it was saved; start again, to an end."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    log_file, metrics_file = run_dir.parent / f"{run_dir.name}.log", run_dir / "metrics.jsonl"
    with log_file.open("w+") as log:
        options = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
        endless = [*command, "--set", f"training.tokens={10**9}"]
        world = subprocess.Popen(endless, start_new_session=True, **options)
        wait_until(
            lambda: metrics_file.exists() and metrics_file.read_text().count("\n") >= 3,
            alive=lambda: world.poll() is None,
            what=str(log_file),
        )
        how(world, run_dir)
        assert world.wait(timeout=60) in expected_codes, log_file.read_text()
        with (run_dir / "lock").open() as file:  # the launcher may be gone before the ranks have saved
            wait_until(lambda: free_lock(file), what="the lock is not given back")
        stopped_at, tokens = records(run_dir)[-1]
        assert last_checkpoint(run_dir).name == f"step-{stopped_at:08d}"
        assert not (run_dir / "summary.json").exists()
        assert not (run_dir / "stop").exists()
        again = [*command[: command.index("--config")], "--resume", run_dir] if by_its_folder else command
        ending = [*again, "--set", f"training.tokens={tokens + 5 * STEP_TOKENS}"]
        subprocess.run(ending, check=True, timeout=120, **options)
    assert (run_dir / "summary.json").exists()
    steps = [row[0] for row in records(run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > stopped_at


def free_lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def send(number):
    """To the command and all that it has started, as a terminal and a batch system do."""
    return lambda world, run_dir: os.killpg(world.pid, number)


def touch_stop(world, run_dir):
    (run_dir / "stop").touch()


def write_config(corpus: Path, folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(settings(corpus, dropout=0.1, stage=1)))
    return path


@pytest.mark.slow
def test_single_process_stops_on_a_signal_and_resumes(corpus_dir, tmp_path):
    command = [
        sys.executable,
        "launch/train.py",
        "--config",
        write_config(corpus_dir, tmp_path),
        "--run-dir",
        tmp_path / "run",
    ]
    run_dir = tmp_path / "run"
    interrupt_and_resume(command, send(signal.SIGUSR1), run_dir, expected_codes=(75,), by_its_folder=False)


@pytest.mark.full
def test_deepspeed_launcher_terminated_saves_and_resumes(corpus_dir, tmp_path):
    """The outer command dies of SIGTERM at once, the launcher below hands it to one rank after the other; the run saves."""
    command = [
        Path(sys.executable).parent / "deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        free_port(),
        "launch/train.py",
    ]
    command += ["--config", write_config(corpus_dir, tmp_path), "--run-dir", tmp_path / "run"]
    interrupt_and_resume(command, send(signal.SIGTERM), tmp_path / "run", expected_codes=(75, 1, -signal.SIGTERM))


@pytest.mark.full
def test_torchrun_stops_on_a_stop_file_and_resumes(corpus_dir, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command += ["launch/train.py", "--config", write_config(corpus_dir, tmp_path), "--run-dir", tmp_path / "run"]
    interrupt_and_resume(command, touch_stop, tmp_path / "run", expected_codes=(1,))  # torchrun's for any but 0


def test_crosses():
    assert crosses(0, 100, 100) and crosses(99, 301, 100) and not crosses(100, 199, 100) and not crosses(0, 500, None)
