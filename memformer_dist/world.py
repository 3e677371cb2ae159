"""The ranks that work together: which one this is, on which device, and what all of them must agree on.

Under any launcher that launcher.py knows, and as a single process. Collectives are NCCL on GPUs and gloo on CPUs
(DS_ACCELERATOR=cpu forces the latter).
"""

import os
import socket
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from memformer_dist.errors import LaunchError, UserError
from memformer_dist.launcher import ALONE, STANDARD, Launch, detect
from memformer_dist.rendezvous import meet

Result = TypeVar("Result")

HOSTS_SHOWN = 4  # in one message
ANY_NAME = "surrogatepass"  # messages name files, whose names need not be UTF-8


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device
    launch: Launch = ALONE
    hosts: tuple[str, ...] = ()  # of every rank

    @classmethod
    def start(cls) -> "World":
        """Join the process group and choose the device.

        Raises LaunchError if the launcher's variables do not fit together, or the ranks cannot meet where they say.
        """
        launch = detect(os.environ)
        for name, value in zip(STANDARD, (launch.rank, launch.size, launch.local_rank, launch.local_size)):
            os.environ[name] = str(value)  # for DeepSpeed
        if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
            device = torch.device("cuda", launch.local_rank)
            torch.cuda.set_device(device)
            hosts = _join("nccl", launch, device_id=device)
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported, which guesses otherwise
            device = torch.device("cpu")
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))
            hosts = _join("gloo", launch)
        return cls(launch.rank, launch.size, device, launch, tuple(hosts))

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
        raw = (message or "").encode(errors=ANY_NAME)
        sizes = self._sizes(raw)
        speaker = next((rank for rank, size in enumerate(sizes) if size), None)
        if speaker is None:
            return None
        text = torch.zeros(sizes[speaker], dtype=torch.uint8, device=self.device)
        if self.rank == speaker:
            text.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        dist.broadcast(text, speaker)
        return bytes(text.tolist()).decode(errors=ANY_NAME)

    def first_problem(self, problem: str | None) -> str | None:
        """As `broadcast_first`, with the rank and its host in front where there are several ranks."""
        if problem is not None and self.size > 1:
            problem = f"rank {self.rank} on {socket.gethostname()}: {problem}"
        return self.broadcast_first(problem)

    def gather(self, text: str) -> list[str]:
        """The text of every rank, by rank, on every rank. Not pickled; of any lengths, which are exchanged first."""
        raw = text.encode(errors=ANY_NAME)
        sizes = self._sizes(raw)
        if not any(sizes):
            return [""] * self.size
        mine = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        if raw:
            mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        all_texts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_texts, mine)
        pairs = zip(all_texts, sizes, strict=True)
        return [bytes(found[:size].tolist()).decode(errors=ANY_NAME) for found, size in pairs]

    def on_all_or_raise(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on this rank. If it raises UserError on one rank, all of them do: none is left waiting.

        The message is the same on all ranks. It names rank and host unless all ranks have found the same.
        """
        try:
            result, problem = [function()], ""
        except UserError as error:
            result, problem = [], f"{socket.gethostname()}\n{error}"
        found = self.gather(problem)
        if not any(found):
            return result[0]
        hosts, problems = zip(*(text.split("\n", 1) if text else ("", "") for text in found), strict=True)
        if len(set(problems)) == 1:
            raise UserError(problems[0])
        raise UserError(
            "\n".join(
                f"{ranks_on_hosts([rank for rank in range(self.size) if problems[rank] == message], hosts)}: {message}"
                for message in filter(None, dict.fromkeys(problems))
            )
        )

    def _sizes(self, raw: bytes) -> list[int]:
        """The number of bytes that each rank has."""
        sizes = self.all_reduce_sum([float(len(raw)) if rank == self.rank else 0.0 for rank in range(self.size)])
        return [int(size) for size in sizes]


def _join(backend: str, launch: Launch, **options: Any) -> list[str]:
    """Join the process group -> the host of every rank. A process that is alone listens nowhere: a port may be taken."""
    store, hosts = (dist.HashStore(), [socket.gethostname()]) if launch.is_alone else meet(launch)
    if launch.is_alone and "lo" in dict(socket.if_nameindex()).values():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # nor need its name resolve
    try:
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, **options)
    except dist.DistError as error:
        raise LaunchError(
            f"rank {launch.rank} on {socket.gethostname()} cannot talk to the other ranks: {str(error).splitlines()[0]}"
        ) from None
    return hosts


def ranks_on_hosts(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks in words: "rank 0 on node1", "ranks 0-3 on node1, ranks 4, 6 on node2".

    Args:
        ranks: in ascending order.
        hosts: the host's name of every rank, or at least of these.
    """
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    parts = []
    for host, members in list(by_host.items())[:HOSTS_SHOWN]:
        # Consecutive ranks have the same difference to their place in the list.
        runs = [[r for _, r in run] for _, run in groupby(enumerate(members), lambda pair: pair[1] - pair[0])]
        words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        parts.append(f"rank{'' if len(members) == 1 else 's'} {words} on {host}")
    left = len(by_host) - len(parts)
    return ", ".join(parts) + (f" and ranks on {left} other hosts" if left else "")
