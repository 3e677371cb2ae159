"""Waiting for another process: for what it does, never for a time it is thought to take."""

import time
from collections.abc import Callable

PATIENCE_S = 120.0  # only a test that fails waits as long


def wait_until(condition: Callable[[], object], *, alive: Callable[[], bool] = lambda: True, what: str = "") -> None:
    """Return once `condition()` is true. Fails after PATIENCE_S, or when `alive()` is false and it is not true."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        living = alive()  # asked first: what ends may have fulfilled the condition just before
        if condition():
            return
        assert living, f"ended before its time: {what}"
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what or condition}"
        time.sleep(0.002)
