"""A rank whose launcher has died is asked to stop, as by SIGTERM: it would train on, unseen, and keep others from the run.

    stop_with_launcher()

The kernel's own way, PR_SET_PDEATHSIG, tells of the end of the thread that started a process: launchers with threads would
stop healthy ranks. So a thread looks once per second whether the parent is still the same. deepspeed starts the ranks
through a second process, whose parent is watched as well.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from memformer_dist.launcher import DEEPSPEED, detected

EVERY_S = 1.0


def stop_with_launcher() -> None:
    """Does nothing in a process that no launcher has started, or that has outlived it on purpose (nohup)."""
    launch = detected()
    if not launch.has_launcher or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return
    generations = 2 if launch.by == DEEPSPEED else 1
    threading.Thread(target=_watch, args=(_ancestors(generations),), name="launcher", daemon=True).start()


def _watch(ancestors: list[int]) -> None:
    while _ancestors(len(ancestors)) == ancestors:
        time.sleep(EVERY_S)
    import logging

    logging.getLogger(__name__).warning("the launcher has died")
    os.kill(os.getpid(), signal.SIGTERM)


def _ancestors(generations: int) -> list[int]:
    """Parent, its parent ...: as many as there are."""
    found = [os.getppid()]
    with suppress(OSError, ValueError):
        while len(found) < generations:
            after_the_name = Path(f"/proc/{found[-1]}/stat").read_text().rpartition(")")[2]
            found.append(int(after_the_name.split()[1]))
    return found
