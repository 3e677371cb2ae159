"""The ranks that work together: which one this is, on which device, and what all of them must agree on.

Under `deepspeed` and `torchrun`, which set RANK, LOCAL_RANK and WORLD_SIZE, and as a single process. Collectives are NCCL on
GPUs and gloo on CPUs (DS_ACCELERATOR=cpu forces the latter).
"""

import os
import socket
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from memformer_dist.errors import UserError

Result = TypeVar("Result")


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls) -> "World":
        """Join the process group and choose the device."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if world_size() == 1 and "MASTER_PORT" not in os.environ:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported, which guesses otherwise
            device = torch.device("cpu")
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_of_this_host()))
            # Ranks of one machine need not listen on its network, nor need its name resolve.
            if (
                os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost")
                and "lo" in dict(socket.if_nameindex()).values()
            ):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def lanes_of_rank(self, lanes: int) -> range:
        """The global lanes of this rank out of `lanes`, which the world size divides."""
        share = lanes // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Element by element over all ranks, in float64: the same bits on every rank."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def broadcast_first(self, message: str | None) -> str | None:
        """The message of the first rank that has one, on every rank; None where nobody has. Not pickled, unlike objects."""
        raw = (message or "").encode()
        sizes = self.all_reduce_sum([len(raw) if rank == self.rank else 0 for rank in range(self.size)])
        speaker = next((rank for rank, size in enumerate(sizes) if size), None)
        if speaker is None:
            return None
        text = torch.zeros(int(sizes[speaker]), dtype=torch.uint8, device=self.device)
        if self.rank == speaker:
            text.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        dist.broadcast(text, speaker)
        return bytes(text.tolist()).decode()

    def on_all_or_raise(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on this rank. If it raises UserError on one rank, all of them do: none is left waiting."""
        try:
            result = function()
        except UserError as error:
            raise UserError(self.broadcast_first(str(error))) from None
        if message := self.broadcast_first(None):
            raise UserError(message)
        return result


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def ranks_of_this_host() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
