"""The process a program runs in: its rank, its device, its random seeds, its wish to stop, and its end.

Works under `deepspeed`, `torchrun` and as a single process: the first two set RANK, LOCAL_RANK and WORLD_SIZE, without them
the process is alone. Collectives are NCCL on GPUs and gloo on CPUs (DS_ACCELERATOR=cpu forces the latter).

A run is asked to stop by SIGTERM, SIGINT or SIGUSR1 to any rank, or by a file named `stop` in its directory. The wish is
only noted here; the training loop shares it among the ranks once a step, so that all of them stop at the same one.
"""

import fcntl
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import IO, Callable, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from memformer_dist.errors import UserError

Result = TypeVar("Result")


class Process(NamedTuple):
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def block(self, lanes: int) -> range:
        """The global lanes of this rank out of `lanes`, which the world size divides."""
        share = lanes // self.world_size
        return range(self.rank * share, (self.rank + 1) * share)

    def sum(self, values: list[float]) -> list[float]:
        """Element by element over all ranks, in float64: the same bits on every rank."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def spread(self, message: str | None) -> str | None:
        """The message of the first rank that has one, on every rank; None where nobody has. Not pickled, unlike objects."""
        raw = (message or "").encode()
        sizes = self.sum([len(raw) if rank == self.rank else 0 for rank in range(self.world_size)])
        speaker = next((rank for rank, size in enumerate(sizes) if size), None)
        if speaker is None:
            return None
        text = torch.zeros(int(sizes[speaker]), dtype=torch.uint8, device=self.device)
        if self.rank == speaker:
            text.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        dist.broadcast(text, speaker)
        return bytes(text.tolist()).decode()

    def together(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on this rank. Raises UserError on all ranks where it does on one: none waits for it."""
        result = message = None
        try:
            result = function()
        except UserError as error:
            message = str(error)
        if message := self.spread(message):
            raise UserError(message)
        return result


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def ranks_of_this_host() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))


def start() -> Process:
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
        if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and "lo" in dict(socket.if_nameindex()).values():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo")
    return Process(dist.get_rank(), dist.get_world_size(), device)


def reseed(device: torch.device, *coordinates: int) -> None:
    """Set the device's random state from integers that say where in the run we are, so that no state need be stored.

    Not by torch.manual_seed: without a GPU that queues a call for CUDA's late start, with a stack trace, every time.
    """
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0]))


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that this rank may still take.

    Of a GPU, what the driver has free and what torch's allocator holds without using it. Of a host, what the system can give
    without swapping or what the limits of a batch job or container (cgroups) leave, whichever is less, in equal shares for the
    ranks of the host.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return host_free_bytes(Path("/")) // ranks_of_this_host()


# Where a hierarchy of cgroups is mounted, by its controller in /proc/self/cgroup (version 2 names none); its files of limit
# and usage; and the entry of its memory.stat for page cache that is given back first: counted as used, yet free.
CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def host_free_bytes(root: Path) -> int:
    """As free_bytes, for all ranks of the host together; `root` is where /proc and /sys are."""
    room = int(_table(root / "proc/meminfo")["MemAvailable:"]) * 1024
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controller, path = line.split(":", 2)
        if controller not in CGROUPS:
            continue
        mount, limit, used, cache = CGROUPS[controller]
        # The groups above have limits too. In a container the path may be the host's and lead nowhere: its end is the mount.
        own = root / mount / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(root / mount):
                break
            if (group / limit).exists() and (most := (group / limit).read_text().strip()) != "max":
                cached = int(_table(group / "memory.stat").get(cache, 0))
                room = min(room, int(most) - int((group / used).read_text()) + cached)
    return max(0, room)


def _table(file: Path) -> dict[str, str]:
    """The first two words of every line."""
    return dict(line.split()[:2] for line in file.read_text().splitlines())


class StopRequest:
    """Whether somebody asked this run to stop: by a signal to this process, or by the file `stop` in the run's directory.

    Rank 0 alone looks for the file. `clear` removes it, so that the same command can go on.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, run_dir: Path, process: Process):
        self.file = run_dir / "stop" if process.is_main else None
        self.received: str | None = None
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name

    def reason(self) -> str | None:
        if self.received is None and self.file is not None and self.file.exists():
            return f"the file {self.file}"
        return self.received

    def clear(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def claim(run_dir: Path, process: Process) -> IO | None:
    """Lock a run's directory until the returned file is closed, by the end of the process at the latest. A collective call.

    Raises UserError where another process has it: two runs in one directory would destroy each other's checkpoints.
    """
    file, taken = None, None
    if process.is_main:
        file = (run_dir / "lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = f"--run-dir: another process is training in {run_dir}; wait for it, or stop it"
        except OSError:  # a file system without locks
            pass
    if message := process.spread(taken):
        raise UserError(message)
    return file


def run_program(program: Callable[[], None], error_log: Path | None = None) -> None:
    """Run a program's main function and end the process: 0, 2 for the user's mistakes (message only), 1 for ours.

    A message also goes to `error_log`, because torchrun turns every exit code into 1 and drowns what was printed.
    Ends by os._exit once the process group exists: gloo's threads abort at random while the interpreter shuts down.
    """
    code = 0
    try:
        program()
    except UserError as error:
        code = 2
        if (
            os.environ.get("RANK", "0") == "0"
        ):  # every rank finds the same mistake, or has been told of it (Process.spread)
            print(f"error: {error}", file=sys.stderr, flush=True)
            if error_log is not None:
                error_log.parent.mkdir(parents=True, exist_ok=True)
                with error_log.open("a") as log:
                    log.write(f"error: {error}\n")
    except Exception:
        code = 1
        traceback.print_exc()
    if not dist.is_initialized():
        sys.exit(code)
    if code == 0:
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
