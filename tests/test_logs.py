"""Log lines on standard error and in the file, and how far a task has come: on a terminal, and where there is none."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from memformer_dist import logs
from memformer_dist.logs import ProgressReport, tracked
from tests.helpers.scripts import program_environment, run_script

CLOCK, DATE = r"\d\d:\d\d:\d\d", r"\d{4}-\d\d-\d\d"


@pytest.fixture
def start():
    """logs.start, undone after the test."""
    yield logs.start
    logs.stop()


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


# ---- log lines ----------------------------------------------------------------------------------------------------


def report_all(name: str) -> None:
    for level in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger(name), level)(f"{name} {level}")


def test_rank_0_reports_everything_with_time_and_rank(start, tmp_path, capsys):
    start(0, tmp_path / "run" / "log.txt")
    report_all("memformer_dist.train")
    report_all("asyncio")  # of other packages, warnings and errors
    shown, written = capsys.readouterr(), (tmp_path / "run" / "log.txt").read_text()
    expected = [f"memformer_dist.train {level}" for level in ("info", "warning", "error")]
    expected += [f"asyncio {level}" for level in ("warning", "error")]
    assert shown.out == "" and re.fullmatch("".join(rf"{CLOCK} rank 0  {text}\n" for text in expected), shown.err)
    assert re.fullmatch("".join(rf"{DATE} {CLOCK} rank 0  {text}\n" for text in expected), written)


def test_other_ranks_report_warnings_and_errors(start, tmp_path, capsys):
    start(0, tmp_path / "log.txt")
    logging.getLogger("memformer_dist").info("hello")
    start(3, tmp_path / "log.txt")
    report_all("memformer_dist.train")
    expected = ["rank 0  hello", *(f"rank 3  memformer_dist.train {level}" for level in ("warning", "error"))]
    for lines in (capsys.readouterr().err.splitlines(), (tmp_path / "log.txt").read_text().splitlines()):
        assert [line.partition("rank")[1] + line.partition("rank")[2] for line in lines] == expected


def test_started_twice_nothing_is_reported_twice(start, tmp_path, capsys):
    for name in ("first", "second"):
        start(0, tmp_path / f"{name}.txt")
    logging.getLogger("memformer_dist").info("hello")
    assert capsys.readouterr().err.count("hello") == 1
    assert not (tmp_path / "first.txt").exists() and "hello" in (tmp_path / "second.txt").read_text()


def test_stopped_nothing_is_left(capsys):
    before = list(logging.getLogger().handlers)
    logs.start(0)
    logs.stop()
    logging.getLogger("memformer_dist").info("hello")
    assert logging.getLogger().handlers == before and capsys.readouterr().err == ""


DEEPSPEED = """
import os
os.environ["DS_ACCELERATOR"] = "cpu"
import logging
from memformer_dist import logs
logs.start(0)
import deepspeed
from deepspeed.utils import logger
logger.info("chatter")
logger.warning("of interest")
logging.getLogger("torch.distributed").info("chatter")
"""


def test_deepspeed_reports_warnings_alone():
    done = run_script("-c", DEEPSPEED)
    assert done.returncode == 0, done.stderr
    assert "of interest" in done.stdout + done.stderr and "chatter" not in done.stdout + done.stderr


# ---- progress without a terminal -------------------------------------------------------------------------------------


def lines_of(capsys) -> list[str]:
    return [line.partition("rank 0  ")[2] for line in capsys.readouterr().err.splitlines()]


def test_progress_is_a_line_now_and_then(start, capsys):
    """At the first update, then every 30 seconds, and at the end; with the time left at the pace until then."""
    start(0)
    clock = Clock()
    progress = ProgressReport("train", total=2000, unit="tokens", done=1000, terminal=False, clock=clock)
    for step in range(1, 8):
        clock.now += 10
        progress.update(1000 + 100 * step, f"step {step}, loss {7 - step}.5, 10 tokens/s")
    progress.close()
    progress.close()
    assert lines_of(capsys) == [
        "train: 1,100 of 2,000 tokens (55%), step 1, loss 6.5, 10 tokens/s, 0:01:30 left",
        "train: 1,400 of 2,000 tokens (70%), step 4, loss 3.5, 10 tokens/s, 0:01:00 left",
        "train: 1,700 of 2,000 tokens (85%), step 7, loss 0.5, 10 tokens/s, 0:00:30 left",
    ]


def test_a_task_that_is_not_meant_to_end(start, capsys):
    """training.tokens of 10**18: the time left is no date, and was an OverflowError that ended the run."""
    start(0)
    clock = Clock()
    progress = ProgressReport("train", total=10**18, unit="tokens", terminal=False, clock=clock)
    for step in (1, 2):
        clock.now += 40
        progress.update(1000 * step)
    assert lines_of(capsys)[-1] == "train: 2,000 of 1,000,000,000,000,000,000 tokens (0%)"


def test_the_end_is_reported_and_a_task_without_work_is_not(start, capsys):
    start(0)
    clock = Clock()
    progress = ProgressReport("train", total=2000, unit="tokens", terminal=False, clock=clock)
    progress.update(1000)
    progress.update(2100)  # the last step may go beyond the total
    progress.close()
    ProgressReport("train", total=2000, unit="tokens", done=2100, terminal=False).close()
    assert [line.partition(", ")[0] for line in lines_of(capsys)] == [
        "train: 1,000 of 2,000 tokens (50%)",
        "train: 2,100 of 2,000 tokens (100%)",
    ]


def test_other_ranks_report_no_progress(start, capsys):
    start(0)  # so that only `enabled` keeps it silent
    for terminal in (False, True):
        progress = ProgressReport("train", total=10, unit="tokens", enabled=False, terminal=terminal, every_s=0)
        progress.update(5)
        progress.close()
    assert capsys.readouterr() == ("", "")


def test_tracked_yields_everything_and_ends_the_report_where_it_is_left(start, capsys):
    start(0)
    assert list(tracked(range(3), "evaluate", "segments")) == [0, 1, 2]
    assert lines_of(capsys)[-1] == "evaluate: 3 of 3 segments (100%)"
    for item in tracked(range(3), "evaluate", "segments"):
        if item == 1:
            break
    assert lines_of(capsys)[-1].startswith("evaluate: 1 of 3 segments (33%)")


def test_a_part_of_another_task_is_reported_once_it_takes_long(start, capsys):
    start(0)
    assert list(tracked(range(3), "evaluation", "segments", delay_s=30)) == [0, 1, 2]
    assert lines_of(capsys) == []


# ---- output that cannot be written -----------------------------------------------------------------------------------


def test_a_log_that_cannot_be_written_is_said_once(start, tmp_path, capsys):
    """Its folder was there when the program started; an OSError of its disk ended a training."""
    log = logging.getLogger("memformer_dist")
    start(0, tmp_path / "run" / "log.txt")
    (tmp_path / "run").symlink_to("/proc/nowhere")
    for number in range(3):
        log.info("message %d", number)
    assert [line.partition(" (")[0] for line in lines_of(capsys)] == [
        "message 0",
        f"{tmp_path / 'run' / 'log.txt'} cannot be written",
        "message 1",
        "message 2",
    ]
    (tmp_path / "run").unlink()
    log.info("message 3")
    assert (tmp_path / "run" / "log.txt").read_text().endswith("message 3\n")
    logs.stop()
    start(0, tmp_path / "full")
    (tmp_path / "full").symlink_to("/dev/full")
    log.info("message 4")
    assert "No space left on device" in lines_of(capsys)[-1]


LOST = """
import os, sys
from memformer_dist import logs
logs.start(0, "log.txt")
logs.survive_lost_output()
import logging
reader, writer = os.pipe()
os.close(reader)
for number in 1, 2:
    os.dup2(writer, number)
for number in range(3):
    print("printed", flush=True)
    print("printed", file=sys.stderr)
    logging.getLogger("memformer_dist").info("message %d", number)
"""


def test_a_program_survives_its_readers(tmp_path):
    environment = program_environment()
    done = subprocess.run([sys.executable, "-c", LOST], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    texts = [line.partition("rank 0  ")[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert texts == [  # the first notice meets the second loss on its way to the log
        "standard error cannot be written any more (Broken pipe); training goes on",
        "standard output cannot be written any more (Broken pipe); training goes on",
        *(f"message {number}" for number in range(3)),
    ]


# ---- on a terminal, and a whole run ------------------------------------------------------------------------------


PROGRAM = """
import logging
from memformer_dist import logs
logs.start(0)
progress = logs.ProgressReport("train", total=100, unit="tokens", every_s=0)
progress.update(40, "step 2, loss 1.5")
logging.getLogger("memformer_dist").info("step 2: held-out loss")
progress.update(100, "step 5, loss 0.5")
progress.close()
"""


def on_a_terminal(*command: str) -> str:
    """All that the command shows, its standard output and error being a terminal."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # without a size there is no bar
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=program_environment())
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 1 << 16):
            shown += part
    except OSError:  # Linux reports the end of a terminal as an error
        pass
    os.close(leader)
    assert process.wait() == 0, shown
    return shown.decode()


def test_a_terminal_shows_a_bar_and_lines_above_it():
    shown = on_a_terminal(sys.executable, "-c", PROGRAM)
    assert "\rtrain: 100%|" in shown and "step 5, loss 0.5" in shown
    assert "of 100 tokens" not in shown  # the line of those who have no terminal
    (line,) = re.findall(rf"\r({CLOCK} rank 0  step 2: held-out loss)\r\n", shown)
    before, _, after = shown.partition(line)
    assert before.endswith(" \r")  # the bar has been wiped away
    assert after.startswith("\r\n\rtrain: ")  # and comes back below


def test_without_a_terminal_there_are_lines_and_no_bar():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=program_environment(), check=True
    )
    assert done.stdout == "" and "\r" not in done.stderr
    texts = [line.partition("rank 0  ")[2].partition(", 0:")[0] for line in done.stderr.splitlines()]
    assert texts == [
        "train: 40 of 100 tokens (40%), step 2, loss 1.5",
        "step 2: held-out loss",
        "train: 100 of 100 tokens (100%), step 5, loss 0.5",
    ]


def test_the_log_of_a_run(trained_run):
    """Nothing but dated lines of rank 0: what was started, how far it has come, how well it did."""
    lines = (trained_run / "log.txt").read_text().splitlines()
    assert all(re.match(rf"{DATE} {CLOCK} rank 0  \S", line) for line in lines)
    texts = [line.partition("rank 0  ")[2] for line in lines]
    assert re.match(r"[\d,]+ parameters, vocabulary 400; an epoch is 30 documents, ", texts[0])
    progress = [text for text in texts if text.startswith("train: ")]
    assert re.match(r"train: \d+ of 600 tokens \(\d+%\), step 1, loss \d\.\d{4}, [\d,]+ tokens/s, ", progress[0])
    assert re.match(r"train: \d+ of 600 tokens \(100%\), step \d, loss ", progress[-1])
    assert re.match(r"step \d: held-out loss \d\.\d{4}, memory reset \d\.\d{4}, everything reset \d", texts[-1])
