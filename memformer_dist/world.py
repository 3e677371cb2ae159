"""The ranks that work together: which one this is, on which device, and what all of them must agree on.

Under `deepspeed` and `torchrun`, which set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and as a single
process, which needs none of them. Collectives are NCCL on GPUs and gloo on CPUs (DS_ACCELERATOR=cpu forces the latter).
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from memformer_dist.errors import LaunchError, UserError

Result = TypeVar("Result")

LEAST = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "LOCAL_SIZE": 1}  # of these variables
HOSTS_SHOWN = 4  # in one message
ANY_NAME = "surrogatepass"  # messages name files, whose names need not be UTF-8


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls) -> "World":
        """Join the process group and choose the device.

        Raises LaunchError if the launcher's variables do not fit together, or the ranks cannot meet where they say.
        """
        if problems := list(launch_problems(os.environ)):
            raise LaunchError("\n".join(problems))
        for name in "RANK", "LOCAL_RANK":
            os.environ.setdefault(name, "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        alone = world_size() == 1
        if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            _join("nccl", alone, device_id=device)
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported, which guesses otherwise
            device = torch.device("cpu")
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_of_this_host()))
            # Ranks of one machine need not listen on its network, nor need its name resolve.
            if "lo" in dict(socket.if_nameindex()).values():
                if alone:
                    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                elif os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            _join("gloo", alone)
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


def _join(backend: str, alone: bool, **options: Any) -> None:
    """Join the process group. A process that is alone listens nowhere: a port may be taken."""
    if alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
        return
    try:
        dist.init_process_group(backend, **options)
    except dist.DistNetworkError as error:
        raise LaunchError(
            f"MASTER_ADDR, MASTER_PORT: rank {os.environ['RANK']} on {socket.gethostname()} found no way to meet the"
            f" other ranks at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}"
        ) from None


def launch_problems(environment: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the variables that a launcher sets, one sentence each."""
    several = "expected what a launcher sets (deepspeed, torchrun), or none of them for a single process"
    numbers = {name: environment[name] for name in LEAST if name in environment}
    wrong = {name: value for name, value in numbers.items() if not _is_number(value, LEAST[name])}
    for name, value in wrong.items():
        yield f"{name}: found {value!r} in the environment, expected a whole number of at least {LEAST[name]}"
    if "RANK" in environment and "WORLD_SIZE" not in environment:
        yield f"RANK: found {environment['RANK']!r} in the environment without WORLD_SIZE; {several}"
    if wrong or "WORLD_SIZE" not in environment:
        return
    size, rank = int(environment["WORLD_SIZE"]), int(environment.get("RANK", 0))
    if rank >= size:
        yield f"RANK: found {rank} in the environment with WORLD_SIZE {size}, expected at most {size - 1}"
    if size == 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        yield f"WORLD_SIZE: found {size} in the environment without {', '.join(missing)}; {several}"
    port = environment.get("MASTER_PORT")
    if port and not (_is_number(port, 1) and int(port) < 2**16):
        yield f"MASTER_PORT: found {port!r} in the environment, expected a port, 1 to 65535"


def _is_number(text: str, least: int) -> bool:
    return text.isascii() and text.isdigit() and int(text) >= least


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


def several_ranks_can_meet() -> bool:
    """Whether this is one of several ranks, and the launcher's variables fit together."""
    return world_size() > 1 and not list(launch_problems(os.environ))


def world_size() -> int:
    """Raises LaunchError where WORLD_SIZE is no such number."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not _is_number(size, LEAST["WORLD_SIZE"]):
        raise LaunchError("\n".join(launch_problems(os.environ)))
    return int(size)


def ranks_of_this_host() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
