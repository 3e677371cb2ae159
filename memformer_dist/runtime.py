"""The process a program runs in: its rank, its device, its random seeds, its wish to stop, and its end.

Works under `deepspeed`, `torchrun` and as a single process: the first two set RANK, LOCAL_RANK and WORLD_SIZE, without them
the process is alone. Collectives are NCCL on GPUs and gloo on CPUs (DS_ACCELERATOR=cpu forces the latter).

A run is asked to stop by SIGTERM, SIGINT or SIGUSR1 to any rank, or by a file named `stop` in its directory. The wish is
only noted here; the training loop shares it among the ranks once a step, so that all of them stop at the same one.
"""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from memformer_dist.errors import UserError


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

    def largest(self, value: float) -> float:
        over = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(over, dist.ReduceOp.MAX)
        return over.item()


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


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
            local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
        dist.init_process_group("gloo")
    return Process(dist.get_rank(), dist.get_world_size(), device)


def reseed(device: torch.device, *coordinates: int) -> None:
    """Set the device's random state from integers that say where in the run we are, so that no state need be stored.

    Not by torch.manual_seed: without a GPU that queues a call for CUDA's late start, with a stack trace, every time.
    """
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0]))


class StopRequest:
    """Whether somebody asked this run to stop: by a signal to this process, or by the file `stop` in the run's directory."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, run_dir: Path):
        self.file = run_dir / "stop"
        self.received: str | None = None
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name

    def reason(self) -> str | None:
        if self.received is None and self.file.exists():
            return f"file {self.file}"
        return self.received


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
        # Before the group exists every rank finds the same mistake; after that it may be one rank's alone.
        if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
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
