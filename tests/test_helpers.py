"""The tests' own instruments: a warm program is a program, ranks fail as they should, a wait ends."""

import json
import signal
import subprocess
import sys
import warnings

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.scripts import run_script
from tests.helpers.waiting import wait_until

PROGRAM = """
import json, os, sys
facts = [__name__, sys.argv[1:], sys.path[0], os.getcwd(), *map(os.environ.get, ("GREETING", "RANK"))]
print(json.dumps(facts))
print("to the other stream", file=sys.stderr)
exec(sys.argv[1])
"""
ENDINGS = {
    "pass": 0,
    "sys.exit(3)": 3,
    "sys.exit('a reason')": 1,
    "os._exit(4)": 4,
    "1 / 0": 1,
    "os.kill(os.getpid(), 15)": -signal.SIGTERM,
    "import threading; threading.Timer(0.01, print, ['from a thread']).start()": 0,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_warm_program_is_what_a_cold_one_is(tmp_path, monkeypatch, ending):
    """Name, arguments, path, folder, environment, both streams, code."""
    monkeypatch.setenv("RANK", "3")  # a launcher's, of the tests themselves
    script = tmp_path / "scripts" / "program.py"
    script.parent.mkdir()
    script.write_text(PROGRAM)
    found = []
    for cold in (False, True):
        done = run_script(script, ending, "--flag", cwd=tmp_path, cold=cold, GREETING="hello")
        last = done.stderr.strip().splitlines()[-1]
        found.append((done.returncode, done.stdout, last))
    assert found[0] == found[1]
    assert found[0][0] == ENDINGS[ending]
    if ending != "os._exit(4)":  # which leaves buffers as they are
        facts = json.loads(found[0][1].splitlines()[0])
        assert facts == ["__main__", [ending, "--flag"], str(script.parent), str(tmp_path), "hello", None]


def test_modules_run_warm_as_well(tmp_path):
    for cold in (False, True):
        done = run_script("-m", "json.tool", "--help", cwd=tmp_path, cold=cold)
        assert done.returncode == 0
        assert "usage: " in done.stdout


def test_a_program_that_hangs_is_ended(tmp_path):
    (tmp_path / "hang.py").write_text("print('begun', flush=True)\nimport threading\nthreading.Event().wait()")
    for cold in (False, True):
        with pytest.raises(subprocess.TimeoutExpired):
            run_script(tmp_path / "hang.py", cold=cold, timeout=0.5)


def warning_rank(world) -> None:
    with pytest.raises(UserWarning, match="on a rank"):
        warnings.warn("on a rank", stacklevel=1)


def failing_rank(world) -> None:
    assert world.rank == 0, "the second rank fails"


def test_what_fails_on_one_rank_fails_the_test(capfd):
    run_ranks(2, warning_rank)
    with pytest.raises(Exception, match="the second rank fails"):
        run_ranks(2, failing_rank)
    assert "the second rank fails" in capfd.readouterr().err


def test_a_wait_ends(monkeypatch):
    left = iter([False, False, True])
    wait_until(lambda: next(left))
    with pytest.raises(AssertionError, match="ended before its time: the log"):
        wait_until(lambda: False, alive=lambda: False, what="the log")
    wait_until(lambda: True, alive=lambda: False)
    monkeypatch.setattr(sys.modules[wait_until.__module__], "PATIENCE_S", 0.01)
    with pytest.raises(AssertionError, match="not within"):
        wait_until(lambda: False)
