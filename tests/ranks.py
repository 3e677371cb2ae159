"""Run a function on several ranks of a gloo group, each a process of its own, as the launchers would start them.

The ranks are forks of one server that has imported what takes seconds and done nothing else.
"""

import functools
import os
import socket
import traceback
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd

import torch
import torch.multiprocessing as multiprocessing

from memformer_dist.world import World


def run_ranks(world_size: int, function, *arguments) -> None:
    """function(process, *arguments) on every rank; an assertion that fails on one of them fails the test."""
    _start_server()
    multiprocessing.start_processes(
        _rank,
        args=(world_size, free_port(), Output(), function, arguments),
        nprocs=world_size,
        start_method="forkserver",
    )


@functools.cache
def _start_server() -> None:
    """Once. One that another test has started, for workers of its own, would import everything for each rank."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # deepspeed looks for it when it is imported
    forkserver._forkserver._stop()
    # The first optimiser imports torch._dynamo, the first engine by its Muon torch._inductor: three seconds for each rank.
    multiprocessing.set_forkserver_preload(
        ["memformer_dist.train", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"]
    )
    forkserver.ensure_running()


class Output:
    """Standard output and error of the process that starts the ranks: the server's own are those of an earlier test."""

    def __getstate__(self) -> dict:
        return {"descriptors": [DupFd(1), DupFd(2)]}

    def take_over(self) -> None:
        for number, descriptor in enumerate(self.descriptors, start=1):
            os.dup2(descriptor.detach(), number)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _rank(rank: int, world_size: int, port: str, output: Output, function, arguments) -> None:
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
    try:
        world = World.start()
        function(world, *arguments)
    except BaseException:
        traceback.print_exc()
        raise
    os._exit(0)  # gloo's threads abort at random while the interpreter shuts down
