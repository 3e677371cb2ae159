"""Programs that start others: what a signal to them alone does. Real processes, as a container's first one where possible."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from memformer_dist import programs, signals
from memformer_dist.errors import Stopped
from tests.helpers import ROOT
from tests.helpers.corpora import documents
from tests.helpers.runs import last_checkpoint, metrics
from tests.helpers.scripts import program_environment
from tests.helpers.waiting import PATIENCE_S, wait_until

# In a process namespace of its own, as a container has it: what the first process there does not handle, it never gets.
AS_FIRST = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def can_be_first() -> bool:
    try:
        return subprocess.run([*AS_FIRST, "true"], capture_output=True, timeout=10).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


HOW = [
    pytest.param([], id="plain"),
    pytest.param(
        AS_FIRST,
        id="first",
        marks=pytest.mark.skipif(not can_be_first(), reason="no process namespaces here: unshare --pid"),
    ),
]


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Started:
    """A command and what it starts."""

    def __init__(self, how: list[str], command: list, folder: Path):
        self.how, self.folder = how, folder
        self.out = (folder / "out").open("w+")
        self.process = subprocess.Popen(
            [*how, *map(str, command)], cwd=ROOT, env=program_environment(), stdout=self.out, stderr=self.out,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def pid(self) -> int:
        """Of the command itself, seen from here: below `unshare` if there is one."""
        if not self.how:
            return self.process.pid
        return psutil.Process(self.process.pid).children()[0].pid

    def wait_for(self, name: str) -> None:
        alive = lambda: self.process.poll() is None  # noqa: E731
        wait_until((self.folder / name).exists, alive=alive, what=f"{name}: {self.said()}")

    def signal(self, number: int) -> None:
        os.kill(self.pid(), number)

    def said(self) -> str:
        return (self.folder / "out").read_text()

    def code(self) -> int:
        return self.process.wait(PATIENCE_S)

    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def start(tmp_path):
    started: list[Started] = []

    def start(how: list[str], *command: object) -> Started:
        started.append(Started(how, list(command), tmp_path))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            for process in each.below():
                process.kill()
            each.process.kill()
            each.process.wait()
        each.out.close()


def ours(program: str, options: str = "") -> str:
    """A program of ours that starts `python -c program`."""
    return f"""
import sys
from memformer_dist import programs, signals
from memformer_dist.errors import run_program
def main():
    with programs.handing_on(signals.STOPPING):
        done = programs.run([sys.executable, "-c", {program!r}]{options})
        print("went on", done.returncode)
run_program(main)
"""


def saves(folder: Path, code: int = 75) -> str:
    """A program that takes its time to save when it is asked to stop."""
    return f"""
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    pathlib.Path({str(folder / "saved")!r}).write_text(signal.Signals(number).name)
    sys.exit({code})
for number in {[int(number) for number in signals.STOPPING]}:
    signal.signal(number, save)
pathlib.Path({str(folder / "ready")!r}).touch()
time.sleep(60)
"""


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("number", signals.STOPPING, ids=lambda number: number.name)
def test_a_signal_is_handed_on(start, tmp_path, how, number):
    """Ours did not even end, as a container's first process; else it left the other program behind."""
    started = start(how, sys.executable, "-c", ours(saves(tmp_path)))
    started.wait_for("ready")
    below = started.below()
    started.signal(number)
    assert started.code() == 75, started.said()
    assert (tmp_path / "saved").read_text() == number.name and started.said() == "stopped\n"
    wait_until(lambda: not any(map(lives, below)), what="it is left behind")


@pytest.mark.parametrize("how", HOW)
def test_a_program_that_does_not_handle_the_signal(start, tmp_path, how):
    """Its code is that of shells."""
    program = f"import pathlib, time; pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    started = start(how, sys.executable, "-c", ours(program))
    started.wait_for("ready")
    started.signal(signal.SIGTERM)
    assert started.code() == 128 + signal.SIGTERM and started.said() == "stopped\n"


LAUNCHER = """
import os, subprocess, sys, time
time.sleep(0.5)
ranks = [
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)\\n" + program], env=os.environ | {"LOCAL_RANK": "0"})
    for program in sys.argv[1:]
]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("early", [False, True])
def test_the_ranks_of_a_launcher_have_the_signal(start, tmp_path, how, early):
    """The launcher handles no signal and would end at once. Ranks that are not there yet, or do not handle it yet, have it
    as soon as they do."""
    program = ours("@", ", ranks=True").replace("'@'", f"{LAUNCHER!r}, {saves(tmp_path)!r}")
    started = start(how, sys.executable, "-c", program)
    if early:
        wait_until(lambda: len(started.below()) > len(how) // len(AS_FIRST), what="the launcher")
    else:
        started.wait_for("ready")
    started.signal(signal.SIGTERM)
    assert started.code() == 75, started.said()
    assert (tmp_path / "saved").read_text() == "SIGTERM" and "went on" not in started.said()


def test_what_the_program_has_started_ends_before_ours(start, tmp_path):
    """A program that ends at once, over one of its own that takes its time to save."""
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {saves(tmp_path)!r}]).wait()"
    started = start([], sys.executable, "-c", ours(program))
    started.wait_for("ready")
    (middle,) = psutil.Process(started.pid()).children()
    (last,) = middle.children()
    started.signal(signal.SIGTERM)
    wait_until(lambda: not lives(middle), what="the program")
    assert started.process.poll() is None
    last.send_signal(signal.SIGTERM)
    assert started.code() == 128 + signal.SIGTERM and (tmp_path / "saved").exists()


def test_a_signal_between_two_programs_ends_ours(start, tmp_path):
    """Also while it computes; what it has open is closed."""
    program = f"""
import pathlib, time
from memformer_dist import programs
from memformer_dist.errors import run_program
def main():
    with programs.handing_on(message="stopped here"):
        try:
            pathlib.Path({str(tmp_path / "ready")!r}).touch()
            time.sleep(60)
        finally:
            pathlib.Path({str(tmp_path / "closed")!r}).touch()
run_program(main)
"""
    started = start([], sys.executable, "-c", program)
    started.wait_for("ready")
    started.signal(signal.SIGTERM)
    assert started.code() == 128 + signal.SIGTERM and started.said() == "stopped here\n"
    assert (tmp_path / "closed").exists()


def test_what_is_ignored_stays_ignored(start, tmp_path):
    """nohup: neither ours nor the program has the signal. Another one it has: the control."""
    program = ours(
        saves(tmp_path).replace(str([int(number) for number in signals.STOPPING]), str([int(signal.SIGTERM)]))
    )
    started = start(["nohup"], sys.executable, "-c", program)
    started.wait_for("ready")
    os.kill(started.process.pid, signal.SIGHUP)
    time.sleep(0.3)
    assert started.process.poll() is None
    os.kill(started.process.pid, signal.SIGTERM)
    assert started.code() == 75 and (tmp_path / "saved").read_text() == "SIGTERM"


def test_without_a_signal_it_is_as_subprocess_run():
    done = programs.run(["sh", "-c", "echo $WORD; exit 3"], stdout=subprocess.PIPE, env={"WORD": "said"})
    assert (done.returncode, done.stdout, done.stderr) == (3, b"said\n", None)
    with pytest.raises(subprocess.CalledProcessError):
        programs.run([sys.executable, "-c", "import sys; sys.exit(3)"], check=True)
    with pytest.raises(FileNotFoundError):
        programs.run(["/no/such/program"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught, programs.handing_on():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert caught.value.exit_code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    assert programs.run(["true"]).returncode == 0, "asked to stop before, and not now"


# ---- the scripts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_the_installation_ends_with_its_script(start, tmp_path, how, number):
    """pip went on behind a script that had ended."""
    (tmp_path / "launch").mkdir()
    for name in ("launch/install.sh", "launch/quickstart.sh", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"  # makes an environment whose python works for a minute, with a process of its own
    python.write_text(
        f"""#!/bin/sh
[ "$2" != venv ] || {{
    mkdir -p "$3/bin"
    printf '#!/bin/sh\\nsleep 60 &\\ntouch "{tmp_path}/ready"\\nwait\\n' > "$3/bin/python"
    chmod +x "$3/bin/python"
}}
"""
    )
    python.chmod(0o755)
    started = start(how, "env", f"PYTHON={python}", "bash", tmp_path / "launch" / "quickstart.sh")
    started.wait_for("ready")
    wait_until(
        lambda: any(process.name() == "sleep" for process in started.below()), what="sleep"
    )  # forked, not run yet
    below = started.below()
    started.signal(number)
    assert started.code() == 128 + number, started.said()
    wait_until(lambda: not any(map(lives, below)), what="it is left behind")
    assert not list((tmp_path / ".venv").glob("installed-*"))


@pytest.mark.full
def test_the_quickstart_stops_its_training(start, tmp_path):
    """As a container's first process, where there are namespaces: asked before DeepSpeed has started the ranks, and in the
    middle of the training; both times nothing is left."""
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(documents(60)):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    path = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"
    words = ["env", path, sys.executable, "launch/quickstart.py", tmp_path / "texts", "--runs", tmp_path / "runs"]
    started = start(AS_FIRST if can_be_first() else [], *words)
    wait_until(lambda: "$ deepspeed" in started.said(), what="no training")
    started.signal(signal.SIGTERM)
    assert started.code() == 75, started.said()
    (run,) = (tmp_path / "runs").iterdir()
    assert "stopped by SIGTERM at step 0" in started.said() and not (run / "checkpoints").exists()

    started = start(AS_FIRST if can_be_first() else [], *words)
    wait_until(lambda: (run / "metrics.jsonl").exists() and metrics(run), what="no steps")
    below = started.below()
    started.signal(signal.SIGINT)
    assert started.code() == 75, started.said()
    assert started.said().endswith("stopped before its end; the same command resumes\n")
    assert last_checkpoint(run) and not any(map(lives, below))


def test_every_script_hands_over_to_its_last_program():
    """A shell that waits for a program does not hand signals on; `exec` takes its place."""
    scripts = [ROOT / ".ci" / "run", *(path for folder in ("launch", "tests") for path in (ROOT / folder).glob("*.sh"))]
    assert len(scripts) == 4
    for script in scripts:
        if script.name != "install.sh":
            assert script.read_text().splitlines()[-1].startswith("exec "), script


def test_programs_of_ours_start_others_through_this_module():
    """Of the package, launch/ and benchmarks/, but for git, tar and scontrol, which end at once by themselves."""
    starters = {
        str(path.relative_to(ROOT))
        for folder in ("memformer_dist", "launch", "tokenizer", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if "import subprocess" in path.read_text()
    }
    assert starters == {
        *("memformer_dist/programs.py", "memformer_dist/start.py", "memformer_dist/launcher.py"),
        "benchmarks/same_numbers.py",
    }
