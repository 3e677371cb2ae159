"""Whole runs: stopped and resumed, on other numbers of ranks, interrupted by signals, diverging."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memformer_dist.config import OptimizerConfig, RunConfig
from memformer_dist.data.corpus import CorpusError, open_corpora
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import UserError
from memformer_dist.train import crosses, learning_rate
from tests.conftest import ROOT
from tests.ranks import free_port, run_ranks

STEP_TOKENS = 8 * 3 * 16  # lanes x segments x tokens, padding included


def settings(corpus: Path, *, stage=0, dropout=0.0, tokens=20 * STEP_TOKENS, **sections) -> dict:
    raw = {
        "model": {
            "width": 16,
            "heads": 2,
            "feed_forward": 32,
            "slots": 4,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "dropout": dropout,
        },
        "data": {"corpus": str(corpus), "lanes": 8, "segment_length": 16},
        "mrbp": {"window": 3},
        "optimizer": {"learning_rate": 3e-3, "warmup_tokens": 2 * STEP_TOKENS},
        "training": {"tokens": tokens},
        "monitor": {"log_every_steps": 1},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    for name, fields in sections.items():
        raw[name] |= fields
    return raw


def run_rank(process, raw: dict, run_dir: Path, stop_after: int | None = None) -> None:
    """A run on this rank without its final evaluation, asked to stop after a given step."""
    from memformer_dist.train import Trainer

    config = RunConfig.check(raw, process.world_size)
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, run_dir, open_corpora(Path(config.data.corpus)), process)
    agreed = trainer._agreed_stop
    trainer._agreed_stop = lambda: "the test" if trainer.position.step == stop_after else agreed()
    reason = trainer.fit()
    assert (reason is not None) == (stop_after is not None)
    trainer.monitor.close()
    if trainer.lock is not None:
        trainer.lock.close()


def interrupted_rank(process, cases) -> None:
    """Each case is (raw, folder): a run of its own, and the same run stopped half-way and resumed."""
    for raw, folder in cases:
        run_rank(process, raw, folder / "whole")
        run_rank(process, raw, folder / "parts", stop_after=9)
        assert not list((folder / "parts" / "checkpoints").glob("step-00000020"))
        run_rank(process, raw, folder / "parts")


def records(run_dir: Path, *names: str, having: str = "loss/train") -> list[tuple]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(name) for name in ("step", "tokens", *names)) for line in lines if having in line]


def last_checkpoint(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"))


def tensors(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(checkpoint.glob(f"{prefix}-*.safetensors")):
        found |= {f"{path.name if prefix == 'lanes' else ''}{name}": x for name, x in load_file(path).items()}
    return found


DETERMINISTIC = ("loss/train", "optim/lr", "optim/grad_norm", "memory/write_norm", "data/documents_started")


def test_resumed_run_equals_uninterrupted_run_bit_by_bit(corpus_dir, tmp_path):
    """With dropout, on two ranks, for every ZeRO stage, in fp32 and bf16: weights, moments, lane states and logged figures."""
    cases = []
    for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")):
        raw = settings(
            corpus_dir,
            stage=stage,
            dropout=0.2,
            training={"precision": precision, "tokens": 20 * STEP_TOKENS * 9 // 10},
        )
        raw["mrbp"] |= {"lanes_per_group": 2, "readout_group": 2}
        raw["monitor"] = {"log_every_steps": 1 if stage < 2 else 4}  # the stop, at step 9, falls into an interval
        if stage == 3:
            raw["training"] |= {"evaluate_every_tokens": 3 * STEP_TOKENS, "evaluate_ticks": 3}
        cases.append((raw, tmp_path / f"stage{stage}"))
    run_ranks(2, interrupted_rank, cases)
    for raw, folder in cases:
        whole, parts = last_checkpoint(folder / "whole"), last_checkpoint(folder / "parts")
        assert whole.name == parts.name and int(whole.name.removeprefix("step-")) > 15
        for prefix in ("weights", "moments", "lanes"):
            expected, found = tensors(whole, prefix), tensors(parts, prefix)
            assert expected.keys() == found.keys() and expected
            assert all(torch.equal(expected[name], found[name]) for name in expected), (folder.name, prefix)
        assert records(folder / "whole", *DETERMINISTIC) == records(folder / "parts", *DETERMINISTIC)
        losses = [loss for _, _, loss in records(folder / "whole", "loss/train")]
        assert len(losses) > 15 / raw["monitor"]["log_every_steps"] and losses[-1] < losses[0]
        if raw["training"].get("evaluate_every_tokens"):
            evaluated = [
                records(folder / part, "eval/loss", "eval/gap", having="eval/loss") for part in ("whole", "parts")
            ]
            assert evaluated[0] == evaluated[1] and len(evaluated[0]) >= 5


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


def several_runs(process, cases) -> None:
    for raw, run_dir, stop_after in cases:
        run_rank(process, raw, run_dir, stop_after)


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
        assert max(abs(x[3] - y[3]) for x, y in zip(found, expected)) <= 1e-5


def test_a_run_moves_to_other_ranks_and_another_stage(corpus_dir, tmp_path):
    """Stopped on 2 ranks at ZeRO 2, resumed on 1 at ZeRO 0 and on 2 at ZeRO 3: the losses of the run that was left alone."""
    raw = settings(corpus_dir, stage=2)
    run_ranks(2, several_runs, [(raw, tmp_path / "whole", None), (raw, tmp_path / "a", 8), (raw, tmp_path / "b", 8)])
    run_ranks(1, several_runs, [(settings(corpus_dir, stage=0), tmp_path / "a", None)])
    run_ranks(2, several_runs, [(settings(corpus_dir, stage=3), tmp_path / "b", None)])
    expected = records(tmp_path / "whole", "loss/train")
    for name in ("a", "b"):
        found = records(tmp_path / name, "loss/train")
        assert [row[:2] for row in found] == [row[:2] for row in expected]
        assert max(abs(x[2] - y[2]) for x, y in zip(found, expected)) <= 2e-5, name


def test_the_window_may_change_on_resume(corpus_dir, tmp_path):
    """Position is the tick: windows of 3, then of 2 segments read on without a gap. The same tokens, whatever the windows."""
    raw = settings(corpus_dir, tokens=18 * STEP_TOKENS)
    run_ranks(1, several_runs, [(raw, tmp_path / "run", 4), (raw | {"mrbp": {"window": 2}}, tmp_path / "run", None)])
    lengths = [row[1] for row in records(tmp_path / "run")]
    checkpoint = json.loads((last_checkpoint(tmp_path / "run") / "checkpoint.json").read_text())
    position = checkpoint["position"]
    assert position["tick"] == 4 * 3 + (position["step"] - 4) * 2
    train, _ = open_corpora(corpus_dir)
    schedule = LaneSchedule(train.lengths, seed=0, lanes=8, segment_length=16)
    reader = WindowReader(train, schedule, lanes=range(8))
    assert lengths[-1] == reader.valid_tokens(0, position["tick"])


def damaged_rank(process, raw, run_dir, expected) -> None:
    with pytest.raises(CorpusError, match=expected):
        run_rank(process, raw, run_dir)


def test_a_damaged_document_of_one_rank_ends_all_of_them(corpus_dir, tmp_path):
    """The document is met in a later window, by one rank; both end with the same message, what was trained is saved."""
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_dir, corpus)
    train, _ = open_corpora(corpus)
    schedule = LaneSchedule(train.lengths, seed=0, lanes=8, segment_length=16)
    tick, lane = next((t, lane) for t in range(6, 60) for lane in range(4, 8) if schedule.at(t).reset[lane])
    document = int(schedule.at(tick).document[lane])
    assert all(document not in schedule.at(t).document for t in range(tick))
    index = load_file(corpus / "train" / "index.safetensors")
    shard = corpus / "train" / train.manifest.shards[int(index["shard"][document])].name
    raw_bytes = bytearray(shard.read_bytes())
    raw_bytes[int(index["offset"][document])] ^= 1
    shard.write_bytes(raw_bytes)
    raw = settings(corpus, stage=2, tokens=60 * STEP_TOKENS, mrbp={"lanes_per_group": 2})
    run_ranks(2, damaged_rank, raw, tmp_path / "run", f"document {document} at byte")
    assert last_checkpoint(tmp_path / "run").name == f"step-{tick // 3:08d}"


def locked_rank(process, raw, run_dir) -> None:
    with pytest.raises(UserError, match="another process"):
        run_rank(process, raw, run_dir)


def test_two_processes_do_not_share_a_run_directory(corpus_dir, tmp_path):
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run_ranks(2, locked_rank, settings(corpus_dir), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def diverging_rank(process, raw, run_dir) -> None:
    with pytest.raises(UserError, match="optimizer.learning_rate"):
        run_rank(process, raw, run_dir)


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


def interrupt_and_resume(command, how, run_dir: Path, *, expected_codes) -> None:
    """Start, interrupt once there is a step, see that it was saved; start again to the end."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    log = (run_dir.parent / f"{run_dir.name}.log").open("w+")
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, (
            run_dir.parent / f"{run_dir.name}.log"
        ).read_text()
        time.sleep(0.05)
    how(process, run_dir)
    assert process.wait(timeout=60) in expected_codes, (run_dir.parent / f"{run_dir.name}.log").read_text()
    with (run_dir / "lock").open() as file:  # the launcher may be gone before the ranks have saved
        wait_for(lambda: free_lock(file))
    stopped_at = records(run_dir)[-1][0]
    assert last_checkpoint(run_dir).name == f"step-{stopped_at:08d}"
    assert not (run_dir / "summary.json").exists()
    assert not (run_dir / "stop").exists()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120, stdout=log, stderr=subprocess.STDOUT)
    assert (run_dir / "summary.json").exists()
    steps = [row[0] for row in records(run_dir)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > stopped_at


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def free_lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def send(number):
    """To the command and all that it has started, as a terminal and a batch system do."""
    return lambda process, run_dir: os.killpg(process.pid, number)


def touch_stop(process, run_dir):
    (run_dir / "stop").touch()


def write_config(corpus: Path, folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(settings(corpus, dropout=0.1, stage=1, tokens=60 * STEP_TOKENS)))
    return path


def test_single_process_stops_on_a_signal_and_resumes(corpus_dir, tmp_path):
    command = [
        sys.executable,
        "launch/train.py",
        "--config",
        write_config(corpus_dir, tmp_path),
        "--run-dir",
        tmp_path / "run",
    ]
    interrupt_and_resume(command, send(signal.SIGUSR1), tmp_path / "run", expected_codes=(0,))


@pytest.mark.full
def test_deepspeed_launcher_terminated_saves_and_resumes(corpus_dir, tmp_path):
    """The outer command dies of SIGTERM at once, the launcher below hands it to one rank after the other; the run saves."""
    command = [
        Path(sys.executable).parent / "deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        "29631",
        "launch/train.py",
    ]
    command += ["--config", write_config(corpus_dir, tmp_path), "--run-dir", tmp_path / "run"]
    interrupt_and_resume(command, send(signal.SIGTERM), tmp_path / "run", expected_codes=(0, 1, -signal.SIGTERM))


@pytest.mark.full
def test_torchrun_stops_on_a_stop_file_and_resumes(corpus_dir, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command += ["launch/train.py", "--config", write_config(corpus_dir, tmp_path), "--run-dir", tmp_path / "run"]
    interrupt_and_resume(command, touch_stop, tmp_path / "run", expected_codes=(0,))


def test_learning_rate_follows_tokens():
    config = OptimizerConfig(learning_rate=1.0, warmup_tokens=100, final_learning_rate_ratio=0.1)
    assert learning_rate(config, 50, 1100) == 0.5
    assert learning_rate(config, 100, 1100) == 1.0
    assert learning_rate(config, 600, 1100) == pytest.approx(0.55)
    assert learning_rate(config, 1100, 1100) == learning_rate(config, 2000, 1100) == pytest.approx(0.1)


def test_crosses():
    assert crosses(0, 100, 100) and crosses(99, 301, 100) and not crosses(100, 199, 100) and not crosses(0, 500, None)
