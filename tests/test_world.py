"""What a launcher's variables may say, and a single process that needs none of them."""

import json
import socket

import pytest

from memformer_dist.launcher import launch_problems
from tests.helpers.scripts import run_script

RANKS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAUNCHER = "expected what a launcher sets (torchrun, deepspeed, mpirun, srun), or none of them for a single process"


def start(**environment: str) -> tuple[int, str]:
    """The exit code and message of a program that joins the process group and then finds no run."""
    done = run_script("launch/evaluate.py", "--run-dir", "gone", timeout=30, **environment)
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    return done.returncode, done.stderr.partition("error: ")[2].rstrip("\n")


def problems(**changes: str | None) -> list[str]:
    """With the variables of rank 0 of two, changed; None: not set."""
    return list(launch_problems({name: value for name, value in (RANKS | changes).items() if value is not None}))


@pytest.mark.parametrize("ranks", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
@pytest.mark.parametrize("address", ["127.0.0.1", "no.such.host.invalid"])
def test_a_single_process_needs_no_port(address, ranks):
    """Of a job before: the port is taken. Seen: EADDRINUSE, or a wait for a host that is not there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, message = start(MASTER_ADDR=address, MASTER_PORT=str(taken.getsockname()[1]), **ranks)
    assert code == 2 and message.startswith("gone: no checkpoint found")


@pytest.mark.parametrize(
    "left_over",
    [{"MASTER_PORT": "29500"}, {"MASTER_ADDR": "x"}, {"MASTER_PORT": "many"}, {"GLOO_SOCKET_IFNAME": "ib7"}],
)
def test_a_single_process_passes_over_what_is_left_in_the_environment(left_over):
    """Seen: a ValueError where MASTER_PORT was set and MASTER_ADDR was not."""
    code, message = start(**left_over)
    assert code == 2 and message.startswith("gone: no checkpoint found")


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "1"}, f"RANK: found '1' in the environment without WORLD_SIZE; {LAUNCHER}"),
        (
            {"RANK": "zero", "WORLD_SIZE": "2"},
            "RANK: found 'zero' in the environment, expected a whole number of at least 0",
        ),
        (
            {"WORLD_SIZE": "0", "LOCAL_RANK": "-1"},
            (
                "WORLD_SIZE: found '0' in the environment, expected a whole number of at least 1\n"
                "LOCAL_RANK: found '-1' in the environment, expected a whole number of at least 0"
            ),
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1234"},
            f"WORLD_SIZE: found 2 in the environment without MASTER_ADDR; {LAUNCHER}",
        ),
        (
            {"WORLD_SIZE": "3"},
            f"WORLD_SIZE: found 3 in the environment without RANK, MASTER_ADDR, MASTER_PORT; {LAUNCHER}",
        ),
    ],
)
def test_variables_that_do_not_fit_together(environment, message):
    """One message, also from a process that is not rank 0. Seen: tracebacks, or silence and exit code 2."""
    assert start(**environment) == (2, message)


def test_training_says_the_same(config, tmp_path):
    """From any rank. A process that is alone reports its mistakes whatever RANK is."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    words = ("launch/train.py", "--config", path, "--run-dir", tmp_path / "run")
    for environment in ({"RANK": "1"}, {"WORLD_SIZE": "two"}, {"RANK": "1", "WORLD_SIZE": "2"}):
        done = run_script(*words, **environment)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {list(environment)[-1]}: found "), done.stderr
    done = run_script("launch/train.py", "--config", "gone", "--run-dir", tmp_path / "run", RANK="1")
    assert done.returncode == 2 and done.stderr.startswith("error: --config: found no file gone")


def test_a_port_that_another_program_has():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, message = start(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert code == 2 and message.startswith("MASTER_PORT: rank 0 on ")
    assert f"at 127.0.0.1:{port}: the port is in use" in message


def test_ranks_and_ports_out_of_range():
    assert problems() == problems(LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", LOCAL_SIZE="2") == []
    assert problems(RANK="2") == ["RANK: found 2 in the environment with WORLD_SIZE 2, expected at most 1"]
    for port in ("0", "65536", "x", "-1"):
        assert problems(MASTER_PORT=port) == [
            f"MASTER_PORT: found {port!r} in the environment, expected a port, 1 to 65535"
        ]
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        assert problems(**{name: ""}) == [f"{name}: found '' in the environment, expected a whole number of at least 1"]
