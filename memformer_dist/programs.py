"""Programs that a program of ours starts: a signal that asks ours to stop is handed on to them, and none outlives it.

    with programs.handing_on(signals.STOPPING):                      # in the main thread
        programs.run([sys.executable, "launch/evaluate.py", ...])    # as subprocess.run; in any thread

A signal to one process alone is what `docker stop`, `kill` and many batch systems send. Programs are started in a
session of their own, so that Ctrl-C, which a terminal sends to all processes, reaches them once, handed on like any other signal.
DeepSpeed's launcher ends at once on a signal and leaves its ranks behind: `ranks=True` says that a program is such a
launcher. Then its ranks have the signal, once some of them handle it, and the launcher ends with their exit code.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from memformer_dist import signals
from memformer_dist.errors import Stopped

LOOK_FOR_RANKS_S = 0.1


class _Program:
    """One that has been started, or is about to be."""

    def __init__(self, ranks: bool):
        self.ranks = ranks
        self.process: subprocess.Popen | None = None
        self.has_ended = threading.Event()

    def hand_on(self, number: int) -> None:
        if self.process is None:
            return  # `run` does it
        if self.ranks:
            threading.Thread(target=self._hand_on_to_ranks, args=(number,), daemon=True).start()
        else:
            self.process.send_signal(number)

    def _hand_on_to_ranks(self, number: int) -> None:
        """Wait until there are ranks to have it."""
        while not self.has_ended.is_set():
            found = list(_ranks_that_heed(number))
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
            if found:
                return
            self.has_ended.wait(LOOK_FOR_RANKS_S)


def _ranks_that_heed(number: int) -> Iterator[int]:
    """The processes below this one that a launcher has started as ranks and that have a handler for the signal by now."""
    import psutil  # one of DeepSpeed's requirements

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "LOCAL_RANK" in process.environ() and _has_handler(process.pid, number):
                yield process.pid


def _has_handler(process: int, number: int) -> bool:
    """On a system that does not tell, every process counts as one that has."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return sys.platform != "linux"
    caught = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


class _Attendant:
    """What hands signals on: the programs that run, and the signal that has come."""

    def __init__(self, message: str):
        self.message = message
        self.programs: list[_Program] = []
        self.number: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals. Raises Stopped in the main thread where no program runs."""
        self.number = number
        programs = list(self.programs)
        for program in programs:
            program.hand_on(number)
        if not programs:
            raise self.stopped()

    def stopped(self, code: int = 0) -> Stopped:
        return Stopped(self.message, code or 128 + (self.number or 0))


_attendant = _Attendant("stopped")


@contextmanager
def handing_on(numbers: Iterable[int] = signals.ENDING, message: str = "stopped") -> Iterator[None]:
    """Hand these signals on to the programs that `run` starts; those that are ignored stay ignored. In the main thread.

    Args:
        message: what Stopped says.

    Raises Stopped if one comes while no program runs.
    """
    global _attendant
    before, _attendant = _attendant, _Attendant(message)
    handlers = {number: signal.getsignal(number) for number in numbers}
    heard = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, _attendant.handle)
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
        _attendant = before


def run(
    command: Sequence[str | Path], *, ranks: bool = False, check: bool = False, **options: Any
) -> subprocess.CompletedProcess:
    """As subprocess.run, with options of Popen but `stdin`, which the program cannot read.

    Args:
        ranks: the program is a launcher, and its ranks have what is handed on.

    Raises Stopped, with the program's exit code, if a signal was handed on. The program has ended then, and all that it
    has started, unless that has closed its standard input.
    """
    attendant, program = _attendant, _Program(ranks)
    attendant.programs.append(program)  # from here on a signal is noted
    try:
        if attendant.number is not None:
            raise attendant.stopped()
        # All that the program starts inherits one end of a pipe; the other one is at its end when they have ended.
        ended, held = os.pipe()
        try:
            try:
                program.process = subprocess.Popen(command, stdin=held, start_new_session=True, **options)
            finally:
                os.close(held)
            if attendant.number is not None:  # it came meanwhile
                program.hand_on(attendant.number)
            output = _wait(program.process)
            program.has_ended.set()
            if attendant.number is not None:
                os.read(ended, 1)
        finally:
            os.close(ended)
    finally:
        attendant.programs.remove(program)
    code = program.process.returncode
    if attendant.number is not None:
        raise attendant.stopped(code if code >= 0 else 128 - code)
    done = subprocess.CompletedProcess(command, code, *output)
    if check:
        done.check_returncode()
    return done


def _wait(process: subprocess.Popen) -> tuple[Any, Any]:
    """Its output, once it has ended. It is ended where that is interrupted, by KeyboardInterrupt for example."""
    try:
        return process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
