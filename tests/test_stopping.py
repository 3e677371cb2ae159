"""How programs end before they are done: signals, readers that go away, full disks. Real processes, pipes and terminals."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memformer_dist import signals
from memformer_dist.commands.train import code_of_a_stopped_run
from tests.helpers import ROOT
from tests.helpers.corpora import documents
from tests.helpers.ranks import free_port
from tests.helpers.runs import STEP_TOKENS, last_checkpoint, metrics, settings
from tests.helpers.scripts import program_environment, run_script
from tests.helpers.waiting import wait_until

STOPPED = 75


class Program:
    """A command with its output in pipes, in a process group of its own."""

    def __init__(self, *command: object, shell: bool = False, **environment: str):
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT)
        arguments = command[0] if shell else [sys.executable, *map(str, command)]
        executable = "/bin/bash" if shell else None
        variables = program_environment() | environment
        self.process = subprocess.Popen(arguments, shell=shell, executable=executable, env=variables, **options)

    def wait_for_line(self, text: str) -> None:
        line = self.process.stdout.readline()
        assert text in line, (line, self.process.stderr.read())

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        out, err = self.process.communicate(timeout=90)
        return self.process.returncode, out, err


@pytest.fixture
def start():
    """Program, which does not outlive the test."""
    started = []

    def start(*command: object, **options) -> Program:
        started.append(Program(*command, **options))
        return started[-1]

    yield start
    for program in started:
        if program.process.poll() is None:
            os.killpg(program.process.pid, signal.SIGKILL)
        program.process.communicate()


# ---- signals, in programs of no more than that -----------------------------------------------------------------------


NOTES = """
import time
from memformer_dist import signals
signals.note_stop_requests()
print("ready", flush=True)
deadline = time.monotonic() + 20
while signals.received() is None and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)
print(signals.received())
"""

# The main thread is inside one call of a library for minutes, as it is while another rank hangs.
HANGS = """
import hashlib
from memformer_dist import signals
signals.note_stop_requests()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
SAID = "stopping after this step; a second signal ends the run at once, without saving\n"
KINDS = [*signals.ENDING, *signals.ANNOUNCING]


@pytest.mark.parametrize("number", KINDS, ids=lambda number: number.name)
def test_every_signal_that_ends_a_job_is_a_request(start, number):
    """SIGHUP, SIGUSR2 and SIGXCPU ended a run without a save."""
    program = start("-c", NOTES)
    program.wait_for_line("ready")
    program.send(number)
    assert program.end() == (0, f"{number.name}\n", f"{number.name}: {SAID}")


@pytest.mark.parametrize("number", KINDS, ids=lambda number: number.name)
def test_signals_that_are_ignored_at_the_start_stay_ignored(start, number):
    """nohup was undone for SIGTERM, SIGINT and SIGUSR1. Another signal is still a request: the control."""
    name = number.name.removeprefix("SIG")
    program = start(f"trap '' {name}; exec {sys.executable} -c '{NOTES}'", shell=True)
    program.wait_for_line("ready")
    program.send(number)
    time.sleep(0.3)
    other = signal.SIGTERM if number != signal.SIGTERM else signal.SIGINT
    program.send(other)
    assert program.end()[:2] == (0, f"{other.name}\n")


@pytest.mark.parametrize("first, second", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGUSR1", "SIGUSR1")])
def test_the_second_signal_ends_what_hangs(start, first, second):
    """It was noted for a main thread that never returned: only SIGKILL ended such a rank."""
    program = start("-c", HANGS)
    program.wait_for_line("ready")
    program.send(signal.Signals[first])
    time.sleep(0.1)
    program.send(signal.Signals[second])  # the same request, which has arrived twice: `timeout` does that
    time.sleep(signals.SAME_REQUEST_S + 0.3)
    assert program.process.poll() is None
    program.send(signal.Signals[second])
    code, _, said = program.end()
    assert code == 128 + signal.Signals[second]
    assert said == f"{first}: {SAID}{second}: ended at once, without saving\n"


@pytest.mark.parametrize("announced", ["SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_an_end_that_was_announced_is_no_second_request(start, announced):
    """Slurm sends SIGUSR1 a minute before SIGTERM, and the run may still be saving then."""
    program = start("-c", HANGS)
    program.wait_for_line("ready")
    for number in (signal.Signals[announced], signal.SIGTERM, signal.SIGXCPU, signal.SIGXCPU):
        program.send(number)
        time.sleep(signals.SAME_REQUEST_S + 0.2)
    assert program.process.poll() is None
    program.send(signal.SIGTERM)
    assert program.end()[0] == 128 + signal.SIGTERM


def test_what_a_launcher_hands_on_is_no_second_request(start):
    """Ctrl-C reaches a rank as SIGINT, and its launcher then sends SIGTERM."""
    program = start("-c", HANGS, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
    program.wait_for_line("ready")
    program.send(signal.SIGINT)
    time.sleep(signals.SAME_REQUEST_S + 0.5)
    program.send(signal.SIGTERM)
    time.sleep(0.5)
    assert program.process.poll() is None
    time.sleep(signals.SAME_REQUEST_UNDER_A_LAUNCHER_S)
    program.send(signal.SIGINT)
    assert program.end()[0] == 128 + signal.SIGINT


def test_a_child_has_signals_as_they_were(start):
    """Neither forked nor started children note requests for their parent, or ignore them."""
    program = start(
        "-c",
        """
import os, signal, subprocess, time
from memformer_dist import signals
signals.note_stop_requests()
children = [subprocess.Popen(["sleep", "60"]).pid, os.fork()]
if children[1] == 0:
    time.sleep(60)
time.sleep(0.2)
for child in children:
    os.kill(child, signal.SIGTERM)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], signals.received())
""",
    )
    assert program.end() == (0, f"{[-signal.SIGTERM] * 2} None\n", "")


def test_once_everything_is_saved_a_signal_ends_it_with_that_code(start):
    program = start("-c", HANGS.replace('print("', 'signals.everything_is_saved(75)\nprint("'))
    program.wait_for_line("ready")
    program.send(signal.SIGTERM)
    assert program.end() == (STOPPED, "", "")


def test_torchrun_is_not_to_restart_what_was_stopped(monkeypatch):
    """It takes every code but 0 for a failure, and starts the ranks again while restarts are left."""
    assert code_of_a_stopped_run() == STOPPED
    for done, limit, code in ((0, 0, STOPPED), (0, 3, 0), (2, 3, 0), (3, 3, STOPPED)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(done))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(limit))
        assert code_of_a_stopped_run() == code


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(corpus_dir, tmp_path) -> Callable:
    """A training of `steps` steps in tmp_path/run."""

    def command(steps: int, **sections) -> list[object]:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(settings(corpus_dir, tokens=steps * STEP_TOKENS, **sections)))
        return ["launch/train.py", "--config", path, "--run-dir", tmp_path / "run"]

    return command


def has_trained(run_dir: Path, steps: int) -> bool:
    return (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) >= steps


def log_of(run_dir: Path) -> str:
    return (run_dir / "log.txt").read_text()


@pytest.mark.slow
def test_a_signal_while_torch_is_imported_is_honoured(start, command, tmp_path):
    """SIGINT was a traceback and SIGTERM death in the first seconds."""
    program = start(*command(10**6))
    time.sleep(0.3)
    program.send(signal.SIGTERM)
    code, _, said = program.end()
    assert code == STOPPED and "Traceback" not in said
    assert f"SIGTERM: {SAID}" in said and "stopped by SIGTERM at step 0; the same command resumes" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_stopped_run_is_not_followed_by_its_evaluation(start, command, tmp_path):
    """`train && evaluate` went on with half a run. A finished run ends with 0: the control."""
    words = " ".join(map(str, command(10**6)))
    program = start(f"{sys.executable} {words} && echo evaluated", shell=True)
    wait_until(lambda: has_trained(tmp_path / "run", 2), what="no steps")
    (tmp_path / "run" / "stop").touch()
    assert program.end()[:2] == (STOPPED, "")
    step = int(last_checkpoint(tmp_path / "run").name.removeprefix("step-"))
    (tmp_path / "run" / "stop").touch()  # too late: the next run is not meant
    os.utime(tmp_path / "run" / "stop", (time.time() - 1,) * 2)
    done = run_script(*command(step + 3))
    assert done.returncode == 0 and (tmp_path / "run" / "summary.json").exists(), done.stderr
    assert "was there before this start, which it does not stop; removed" in log_of(tmp_path / "run")
    assert not (tmp_path / "run" / "stop").exists()


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["2>&1 | head -n 1", ">/dev/full 2>&1"])
def test_output_that_cannot_be_written_does_not_end_a_training(start, command, tmp_path, redirection):
    """BrokenPipeError ended it without a save."""
    words = " ".join(map(str, command(30, training={"evaluate_every_tokens": 10 * STEP_TOKENS})))
    program = start(f"{sys.executable} {words} {redirection}; echo ${{PIPESTATUS[0]}}", shell=True)
    _, out, said = program.end()
    assert out.splitlines()[-1] == "0" and said == ""
    log = log_of(tmp_path / "run")
    reason = "Broken pipe" if "head" in redirection else "No space left on device"
    assert log.count(f"standard error cannot be written any more ({reason}); training goes on\n") == 1
    assert "held-out loss" in log and (tmp_path / "run" / "summary.json").exists()
    assert "Traceback" not in log and has_trained(tmp_path / "run", 30)


@pytest.mark.slow
@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed(command, tmp_path, nohup):
    """SIGHUP stops and saves; where it is ignored the run goes on, although its terminal answers with EIO."""
    words = [str(ROOT / "launch/train.py"), *map(str, command(60 if nohup else 10**6)[1:])]
    child, leader = pty.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
            os.execve(sys.executable, [sys.executable, *words], program_environment())
        finally:
            os._exit(99)
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # without a size there is no bar
    while not has_trained(tmp_path / "run", 2):
        os.read(leader, 4096)
    os.close(leader)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = log_of(tmp_path / "run")
    assert "Traceback" not in log
    if nohup:
        assert code == 0 and (tmp_path / "run" / "summary.json").exists()
    else:
        assert code == STOPPED and "stopped by SIGHUP at step" in log
        assert last_checkpoint(tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_launcher_and_its_ranks_are_signalled(start, command, tmp_path, launcher, number):
    """As by Ctrl-C, a batch system and a terminal that is closed: the ranks hear it twice, and save."""
    port = free_port()
    words = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", port],
    }[launcher]
    program = start(*words, *command(10**6), GLOO_SOCKET_IFNAME="lo")
    wait_until(lambda: has_trained(tmp_path / "run", 2), what="no steps")
    os.killpg(program.process.pid, number)
    assert program.end()[0] != 0
    wait_until(lambda: "the same command resumes" in log_of(tmp_path / "run"), what="it has not stopped")
    log = log_of(tmp_path / "run")
    assert "Traceback" not in log and "ended at once" not in log
    step = int(last_checkpoint(tmp_path / "run").name.removeprefix("step-"))
    assert step == metrics(tmp_path / "run")[-1]["step"]


@pytest.mark.full
def test_deepspeed_hands_the_code_of_a_stopped_run_on(start, command, tmp_path):
    deepspeed = Path(sys.executable).parent / "deepspeed"
    words = [deepspeed, "--num_gpus", "2", "--master_port", free_port(), *command(10**6)]
    program = start(*words, GLOO_SOCKET_IFNAME="lo")
    wait_until(lambda: has_trained(tmp_path / "run", 2), what="no steps")
    (tmp_path / "run" / "stop").touch()
    assert program.end()[0] == STOPPED and last_checkpoint(tmp_path / "run")


# ---- the other programs ----------------------------------------------------------------------------------------------


@pytest.fixture
def generate(trained_run) -> list[object]:
    """Text without an end in sight."""
    words = ["--prompt", "Bada bidu", "--tokens", 10**9, "--temperature", 0]
    return ["launch/generate.py", "--run-dir", trained_run, *words]


@pytest.mark.slow
def test_ctrl_c_saves_the_text_so_far(start, generate, tmp_path):
    """It was a traceback, and --save lost the text."""
    program = start(*generate, "--save", tmp_path / "saved")
    assert len(program.process.stdout.read(100)) == 100
    program.send(signal.SIGINT)
    code, _, said = program.end()
    assert (code, said) == (130, f"stopped; --continue-from {tmp_path / 'saved'} continues\n")
    done = run_script(*generate[:3], "--continue-from", tmp_path / "saved", "--tokens", "5")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_a_program_quietly(start, generate, tmp_path):
    """BrokenPipeError, with a traceback."""
    program = start(*generate, "--save", tmp_path / "saved")
    program.process.stdout.read(20)
    program.process.stdout.close()
    assert program.process.wait(60) == 141 and program.process.stderr.read() == ""
    assert (tmp_path / "saved").exists()


def test_a_reader_that_goes_away_while_lines_are_printed(start, corpus_dir):
    program = start("launch/corpus.py", "show", corpus_dir, "--lanes", 2, "--segment-length", 4, "--segments", 40000)
    program.process.stdout.readline()
    program.process.stdout.close()
    assert program.process.wait(60) == 141 and program.process.stderr.read() == ""


@pytest.mark.parametrize(
    "options, code, says",
    [
        (
            "show CORPUS --segments 3 >/dev/full",
            2,
            "error: standard output cannot be written: No space left on device\n",
        ),
        ("show CORPUS --segments 3 >&-", 0, ""),
        ("--help >/dev/full", 2, "error: standard output cannot be written: No space left on device\n"),
        ("verify /nowhere 2>/dev/full", 2, ""),
        ("verify /nowhere 2>&-", 2, ""),
    ],
)
def test_output_that_cannot_be_written(start, corpus_dir, options, code, says):
    """A traceback, and Python's own words about what it could not flush, with code 120."""
    words = f"{sys.executable} launch/corpus.py {options.replace('CORPUS', str(corpus_dir))}"
    ended = start(words, shell=True).end()
    assert (ended[0], ended[2]) == (code, says)


@pytest.mark.parametrize(
    "program", ["launch/generate.py", "launch/evaluate.py", "tokenizer/train.py", "tokenizer/shard.py"]
)
def test_ctrl_c_during_imports_is_one_line(start, program):
    started = start(program, "--help")
    time.sleep(0.25)
    started.send(signal.SIGINT)
    code, _, said = started.end()
    ends = [(130, "stopped\n"), (130, "stopped; the same command resumes\n")]
    if program.startswith("tokenizer"):  # quick to import: it may have ended, or be past all Python code
        ends += [(0, ""), (-signal.SIGINT, "")]
    assert (code, said) in ends


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_an_evaluation_and_of_a_tokenizer(start, trained_run, tmp_path):
    """Tracebacks, and SentencePiece's trainer took no notice of it before it was done."""
    program = start("launch/evaluate.py", "--run-dir", trained_run, "--split", "train", "--lanes", "1")
    while "evaluate:" not in program.process.stderr.readline():
        pass
    program.send(signal.SIGINT)
    assert program.end() in [(130, "", "stopped\n")]

    (tmp_path / "text.txt").write_text("".join(documents(3000)))
    words = ["--input", tmp_path, "--output", tmp_path / "model", "--vocab-size", 3000, "--cap-vocabulary"]
    program = start("tokenizer/train.py", *words, "--sample-characters", 0, "--threads", 1)
    while "training on" not in program.process.stdout.readline():
        pass
    time.sleep(0.2)  # by then it is in SentencePiece's trainer, mostly: what is expected is the same before
    program.send(signal.SIGINT)
    code, _, said = program.end()
    assert (code, said) == (130, "stopped\n")
    assert not (tmp_path / "model.model").exists()
