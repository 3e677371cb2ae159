"""Run a function on several ranks of a gloo group, each a process of its own, as the launchers would start them.

The ranks are forks of the warm server (helpers/forks.py). Warnings are errors there, as in the test that starts them.
"""

import os
import re
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.reduction import DupFd

import torch
import torch.multiprocessing as multiprocessing

from memformer_dist.world import World
from tests.helpers.forks import is_warm, start_server


def run_ranks(world_size: int, function: Callable[..., object], *arguments: object) -> None:
    """function(world, *arguments) on every rank; an assertion that fails on one of them fails the test."""
    start_server()
    multiprocessing.start_processes(
        _rank,
        args=(world_size, free_port(), Output(), filters_here(), function, arguments),
        nprocs=world_size,
        start_method="forkserver",
    )


class Output:
    """Standard output and error of the process that starts the ranks: the server's own are those of an earlier test."""

    def __getstate__(self) -> dict:
        return {"descriptors": [DupFd(1), DupFd(2)]}

    def take_over(self) -> None:
        for number, descriptor in enumerate(self.descriptors, start=1):
            os.dup2(descriptor.detach(), number)


def free_port() -> str:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def filters_here() -> list[tuple]:
    """The warning filters of this process (inside a test those of pyproject.toml), such as can be pickled."""

    def text(pattern: "re.Pattern | str | None") -> str:
        return pattern.pattern if isinstance(pattern, re.Pattern) else pattern or ""

    return [
        (action, text(message), category, text(module), line)
        for action, message, category, module, line in warnings.filters
    ]


def set_filters(filters: list[tuple]) -> None:
    warnings.resetwarnings()
    for entry in reversed(filters):
        warnings.filterwarnings(*entry)


def _rank(
    rank: int,
    world_size: int,
    port: str,
    output: Output,
    filters: list,
    function: Callable[..., object],
    arguments: tuple,
) -> None:
    output.take_over()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        GLOO_SOCKET_IFNAME="lo",
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    set_filters(filters)
    try:
        assert is_warm(), "the server could not import what it should"
        world = World.start()
        world.all_reduce_sum([1.0])  # one that is done at once must not leave while another still joins
        function(world, *arguments)
    except BaseException:
        traceback.print_exc()
        raise
    os._exit(0)  # gloo's threads abort at random while the interpreter shuts down
