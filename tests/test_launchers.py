"""The same run under every launcher that this machine has: equal losses, weights, moments and lane states, to the last bit."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.ranks import free_port
from tests.helpers.runs import assert_same_run, starts, steps_logged
from tests.helpers.scripts import program_environment
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.full
PROGRAM = ROOT / "launch" / "train.py"
HERE = Path(sys.executable).parent


def _torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options, str(PROGRAM)]


def _open_mpi() -> str | None:
    return next((found for name in ("mpirun.openmpi", "orterun") if (found := shutil.which(name))), None)


LAUNCHERS = {
    "torchrun, static": lambda: (_torchrun("--master-addr", "127.0.0.1", "--master-port", free_port()), "torchrun"),
    "torchrun, c10d": lambda: (
        _torchrun("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "a"),
        "torchrun",
    ),
    "deepspeed": lambda: (
        [str(HERE / "deepspeed"), "--num_gpus", "2", "--master_port", free_port(), str(PROGRAM)],
        "deepspeed",
    ),
    "mpirun of MPICH": lambda: (
        [str(HERE / "mpirun"), "-n", "2", "-iface", "lo", sys.executable, str(PROGRAM)],
        "mpirun (MPICH)",
    ),
    "mpirun of Open MPI": lambda: (
        [str(_open_mpi()), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, str(PROGRAM)],
        "mpirun (Open MPI)",
    ),
}


@pytest.fixture(scope="module")
def reference(_config, tmp_path_factory) -> Path:
    """Two ranks, each started by hand with the variables that torchrun would set."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "config.json").write_text(json.dumps(_config))
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, PROGRAM, "--config", folder / "config.json", "--run-dir", folder / "run"],
            env=program_environment()
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(2)
    ]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    return folder


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_same_run(name, reference, tmp_path):
    if name == "mpirun of Open MPI" and _open_mpi() is None:
        pytest.skip("needs Debian's openmpi-bin: found neither mpirun.openmpi nor orterun")
    words, by = LAUNCHERS[name]()
    command = [*words, "--config", str(reference / "config.json"), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, env=program_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [start] = starts(tmp_path / "run")
    assert (start["launcher"], start["world_size"], start["hosts"]) == (by, 2, [socket.gethostname()])
    assert_same_run(tmp_path / "run", reference / "run")


def test_ranks_whose_launcher_is_killed_save_and_end(reference, tmp_path):
    """Seen: after SIGKILL of `deepspeed` its ranks trained on, and kept the run's folder locked."""
    for name in ("torchrun, static", "deepspeed"):
        run = tmp_path / name.split(",")[0]
        words, _ = LAUNCHERS[name]()
        options = [
            "--config",
            str(reference / "config.json"),
            "--run-dir",
            str(run),
            "--set",
            "training.tokens=100000000",
        ]
        with (tmp_path / "output").open("w") as output:
            launcher = subprocess.Popen(
                [*words, *options], env=program_environment(), stdout=output, stderr=output, start_new_session=True
            )
        try:
            wait_until(lambda run=run: steps_logged(run) > 2)
            launcher.kill()
            launcher.wait()
            wait_until(lambda run=run: _ended(run))
        finally:
            for pid in _members(launcher.pid):
                os.kill(pid, 9)
        assert "stopped by SIGTERM" in (run / "log.txt").read_text()
        assert list((run / "checkpoints").glob("step-*"))


def _ended(run: Path) -> bool:
    """No process has the run's folder in its command line."""
    return not any(str(run) in _command(entry) for entry in Path("/proc").glob("[0-9]*"))


def _command(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _members(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            found.append(int(entry.name))
    return found
