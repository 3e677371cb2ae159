"""Programs run as a user starts them, on one process of the CPU, and what they print.

    done = run_script("launch/train.py", "--config", path)                  # a fork of the warm server
    done = run_script("launch/corpus.py", "verify", folder)
    done = run_script("launch/train.py", "--config", path, cold=True)       # an interpreter of its own

A warm program has its own argv, environment, working directory and output, and ends as a cold one does: with the same
code, by SystemExit, by os._exit or by a signal. It cannot show what happens while modules are imported: whether they can
be imported alone, in which order, and what environment variables do there (PYTHON*, MALLOC_*). So every program is also
started cold somewhere, through every launcher:

    launch/train.py       under `deepspeed`     tests/test_quickstart.py; interrupted in tests/test_train.py (full)
                          under torchrun        tests/test_train.py (full)
                          alone, interrupted    tests/test_train.py
    launch/evaluate.py    alone, and torchrun   tests/test_evaluate.py
    launch/generate.py    alone                 tests/test_quickstart.py
    launch/corpus.py      alone                 tests/test_verify.py
    tokenizer/train.py    alone                 tests/test_tokenizer.py
    tokenizer/shard.py    alone, interrupted, and under mpirun: tests/test_interruption.py

Programs that are to get a signal are started cold by their tests, in a process group of their own.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from tests.helpers import ROOT
from tests.helpers.forks import start_fork

OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def run_script(
    *command: object, cold: bool = False, cwd: Path = ROOT, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess:
    """`python COMMAND` in `cwd`; COMMAND: a script of the repository, -m MODULE, or -c CODE (always cold), and arguments."""
    first, *rest = map(str, command)
    if not first.startswith("-"):
        first = str(ROOT / first)
    words, variables = [first, *rest], program_environment() | environment
    if cold or first == "-c":
        return subprocess.run(
            [sys.executable, *words], cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout
        )
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder) / name for name in ("stdout", "stderr")]
        process = start_fork(_program, words, str(cwd), variables, output)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout, *(path.read_bytes() for path in output))
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in output))


def run_ranks_of_script(
    commands: list[tuple], environments: list[dict[str, str]], *, cold: bool = False, timeout: float = 120
) -> list[subprocess.CompletedProcess]:
    """One program per rank, side by side, each as run_script would run it: with its own command and environment."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            words, variables = [str(ROOT / command[0]), *map(str, command[1:])], program_environment() | environment
            output = [Path(folder) / f"{name}{rank}" for name in ("stdout", "stderr")]
            if cold:
                out, err = (path.open("w") for path in output)
                with out, err:
                    process = subprocess.Popen(
                        [sys.executable, *words], cwd=ROOT, env=variables, stdout=out, stderr=err
                    )
            else:
                process = start_fork(_program, words, str(ROOT), variables, output)
            running.append((process, words, output))
        ends = time.monotonic() + timeout
        done = []
        for process, words, output in running:
            left = max(0.0, ends - time.monotonic())
            if isinstance(process, subprocess.Popen):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(left)
                code = process.poll()
            else:
                process.join(left)
                code = process.exitcode
            if code is None:
                for other, _, _ in running:
                    other.kill()
                raise subprocess.TimeoutExpired(words, timeout, *(path.read_bytes() for path in output))
            done.append(subprocess.CompletedProcess(words, code, *(path.read_text() for path in output)))
        return done


def program_environment() -> dict[str, str]:
    """This process's, without what a launcher would set, on one thread of the CPU, with the repository's modules."""
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    return inherited | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


def _program(words: list[str], cwd: str, environment: dict[str, str], output: list[Path]) -> None:
    """What `python WORDS` does once its interpreter has started."""
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], cwd
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


# ---- tokenizer/shard.py, always cold: without torch it starts quickly, and it is interrupted and run under mpirun ------

SHARD = ROOT / "tokenizer" / "shard.py"


def shard_command(output: Path, model_file: Path, *arguments: object) -> list[str]:
    return [sys.executable, str(SHARD), "--tokenizer", str(model_file), "--output", str(output), *map(str, arguments)]


def run_command(*command: object) -> subprocess.CompletedProcess:
    """Any command, as it is."""
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, env=program_environment()
    )
