"""Processes forked from a server that has imported torch and deepspeed, for which a new interpreter needs seconds.

    process = start_fork(function, *arguments)   # a multiprocessing process: join, exitcode, kill

The function must be one of a module, and its arguments must be picklable. The server has imported what
helpers/preload.py lists and done nothing else; the fork starts with this process's environment.
"""

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess

from tests.helpers import ROOT

PRELOAD = "tests.helpers.preload"


def start_fork(function: Callable[..., object], *arguments: object) -> BaseProcess:
    start_server()
    process = multiprocessing.get_context("forkserver").Process(
        target=_run, args=(dict(os.environ), function, arguments)
    )
    process.start()
    return process


@functools.cache
def start_server() -> None:
    """Once; from then on it serves whatever uses the start method "forkserver", the workers of preparation included."""
    forkserver._forkserver._stop()  # preparation may have started one for its workers, without these imports
    before = dict(os.environ)
    # The server's -c has the working directory on its path, and that need not be the repository.
    path = os.pathsep.join(filter(None, [str(ROOT), before.get("PYTHONPATH")]))
    os.environ.update(PYTHONPATH=path, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    try:
        multiprocessing.set_forkserver_preload([PRELOAD])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def is_warm() -> bool:
    """Whether this process is a fork of the server. A preload that cannot be imported is skipped without a word."""
    return PRELOAD in sys.modules


def _run(environment: dict[str, str], function: Callable[..., object], arguments: tuple) -> None:
    assert is_warm(), f"the server could not import {PRELOAD}"
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)
