"""Signals that end programs: a thread hears them, also while the main thread waits inside a library. Standard library alone.

    signals.note_stop_requests()     # training: from here on a request to stop is noted, and the run ends by itself
    signals.received()               # "SIGTERM" once one has come

    signals.end_at_once()            # programs, and imports, that have nothing to save: Ctrl-C is a line, exit code 130
    with signals.noting_the_end() as wish:   # a program that saves what it has made
        ...                                  # until wish.number is set

Python runs the handler of a signal in the main thread, once the call that it is in returns. A rank that waits for
another one that hangs never gets there. A byte for every signal, however, is written at once (signal.set_wakeup_fd); a
thread reads it here and acts. Signals that were ignored when the program started stay ignored (nohup, a background job
of a script).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from memformer_dist.launcher import detected

# End a job: kill, scancel, docker stop; Ctrl-C; a terminal that is closed. SIGQUIT (Ctrl-\) is not among them: it stays
# the way to end a program without waiting for anything.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Announce the end, some time ahead: Slurm's --signal, Grid Engine's -notify, LSF's -wa; a limit of CPU time, whose signal
# the kernel repeats every second.
ANNOUNCING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
STOPPING = ENDING + ANNOUNCING

# One request may arrive twice: `timeout` signals the process and then its group; Ctrl-C reaches a rank directly, and
# again through its launcher.
SAME_REQUEST_S = 0.3
SAME_REQUEST_UNDER_A_LAUNCHER_S = 3.0
OTHER_RANKS_SAY_SO_AFTER_S = 10.0  # rank 0 says at once that it has been asked to stop

_listeners: list["Listener"] = []  # the last one hears
_stop_requests: "StopRequests | None" = None


class Listener:
    """Calls `action(number)` in a thread of its own for each of `numbers` that arrives and was not ignored before.

    To be made and closed in the main thread. A process forked from this one has the handlers that were there before.
    """

    def __init__(self, numbers: Iterable[int], action: Callable[[int], object]):
        self._before = {number: signal.getsignal(number) for number in numbers}
        self._heard = [number for number, handler in self._before.items() if handler is not signal.SIG_IGN]
        self._action = action
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        threading.Thread(target=self._listen, args=(read_end,), name="signals", daemon=True).start()
        self._woken_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in self._heard:
            signal.signal(number, _leave_it_to_the_thread)
        _listeners.append(self)

    def _listen(self, read_end: int) -> None:
        while byte := os.read(read_end, 1):
            if byte[0] in self._heard:
                self._action(byte[0])
        os.close(read_end)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        _listeners.remove(self)
        for number in self._heard:
            signal.signal(number, self._before[number] or signal.SIG_DFL)
        signal.set_wakeup_fd(self._woken_before)

    def close(self) -> None:
        """`restore`, and end the thread."""
        self.restore()
        os.close(self._write_end)


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    pass


def _after_fork_in_child() -> None:
    global _stop_requests
    for listener in _listeners[::-1]:
        listener.restore()
    _stop_requests = None


os.register_at_fork(after_in_child=_after_fork_in_child)


# ---- requests to stop a run ------------------------------------------------------------------------------------------


class StopRequests:
    """The first request is noted. A second one ends the process at once: what the first waits for may hang."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.since = 0.0
        self.began = time.time()
        self.leaving_with: int | None = None  # the exit code once everything is saved
        launch = detected()
        self.rank = launch.rank
        self.same_request_s = SAME_REQUEST_UNDER_A_LAUNCHER_S if launch.has_launcher else SAME_REQUEST_S

    def note(self, number: int) -> None:
        """Called in the thread that listens."""
        if self.leaving_with is not None:
            os._exit(self.leaving_with)
        now, first = time.monotonic(), self.received
        if first is None or (first in ANNOUNCING and number in ENDING):  # its announced end has come
            self.received, self.since = number, now
            threading.Thread(target=self._say_so, args=(number,), daemon=True).start()
        elif now - self.since > self.same_request_s and self._is_second(first, number):
            _within(1.0, lambda: _warn(f"{_name(number)}: ended at once, without saving"))
            os._exit(128 + number)

    @staticmethod
    def _is_second(first: int, number: int) -> bool:
        if number in ENDING:
            return True
        return number == first != signal.SIGXCPU

    def _say_so(self, number: int) -> None:
        if self.rank > 0:
            time.sleep(OTHER_RANKS_SAY_SO_AFTER_S)
        if self.leaving_with is None:
            _warn(f"{_name(number)}: stopping after this step; a second signal ends the run at once, without saving")


def note_stop_requests() -> None:
    """From here on signals that ask to stop are noted. Does nothing the second time, and outside the main thread."""
    global _stop_requests
    if _stop_requests is None and threading.current_thread() is threading.main_thread():
        _stop_requests = StopRequests()
        Listener(STOPPING, _stop_requests.note)


def received() -> str | None:
    """The signal that has asked this process to stop."""
    if _stop_requests is None or _stop_requests.received is None:
        return None
    return _name(_stop_requests.received)


def listening_since() -> float:
    """When this process began to note requests, in seconds since the epoch; now, if it does not."""
    return time.time() if _stop_requests is None else _stop_requests.began


def everything_is_saved(exit_code: int) -> None:
    """From here on a signal ends the process at once, with this exit code."""
    if _stop_requests is not None:
        _stop_requests.leaving_with = exit_code


# ---- programs that have nothing to save ------------------------------------------------------------------------------


def end_at_once() -> Listener:
    """From here on Ctrl-C prints a line and ends the process with exit code 130, whatever the main thread is doing."""
    return Listener((signal.SIGINT,), _end_at_once)


def _end_at_once(number: int) -> None:
    _within(0.5, sys.stdout.flush)
    if detected().rank == 0:
        _within(0.5, lambda: print("stopped", file=sys.stderr, flush=True))
    os._exit(128 + number)


class Wish:
    """Set once somebody wants a program to end: `number` is the signal."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.since = 0.0

    def note(self, number: int) -> None:
        """Called in the thread that listens."""
        if self.number is None:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > SAME_REQUEST_S:
            _end_at_once(number)


@contextmanager
def noting_the_end() -> Iterator[Wish]:
    """Signals that end a program are noted, for a program that saves what it has made; the second one ends it at once."""
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    listener = Listener(ENDING, wish.note)
    try:
        yield wish
    finally:
        listener.close()


def _within(seconds: float, function: Callable[[], object]) -> None:
    """Run it, but do not wait longer: whoever reads the output may have stopped, and the main thread may hold a lock."""

    def quietly() -> None:
        with suppress(OSError, ValueError):
            function()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)


def _warn(message: str) -> None:
    import logging  # takes longer than all that is imported above, before any signal is heard

    logging.getLogger(__name__).warning(message)


def _name(number: int) -> str:
    return signal.Signals(number).name
