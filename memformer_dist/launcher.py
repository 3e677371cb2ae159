"""Which rank of how many this process is, worked out from whatever started it.

    launch = detect(os.environ)
    launch.by, launch.rank, launch.size, launch.local_rank        # "srun", 1, 4, 1

In this order, because a launcher inside of another one leaves the outer one's variables in place:

1.  RANK and WORLD_SIZE: torchrun, deepspeed, a script of the user's
2.  MPI: mpirun of Open MPI; of MPICH and Intel MPI, also under `deepspeed --launcher mpich`
3.  a job step of SLURM: srun, `deepspeed --launcher slurm`. SLURM_NTASKS alone says nothing: a batch shell has it too, and
    is one process; and under mpirun the step is mpirun's own, one task per node
4.  nothing: a single process

Where WORLD_SIZE is set without RANK, as batch scripts do, MPI or SLURM know the rank.

The ranks meet at MASTER_ADDR and MASTER_PORT, where these are set. Otherwise SLURM says which node has rank 0, and
under MPI rank 0 tells the others, if they are on other machines.
"""

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from memformer_dist.errors import LaunchError

Environment = Mapping[str, str]

# rank, ranks, rank on this host, ranks on this host
STANDARD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
MPI_LAUNCHERS = {"mpirun (Open MPI)": OPEN_MPI, "mpirun (MPICH)": MPICH}
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's name, deepspeed's
LEAST = dict(zip(STANDARD, (0, 1, 0, 1))) | {"LOCAL_SIZE": 1}
PORTS = range(15000, 30000)  # of jobs that name none: below those that systems give to outgoing connections
EXPECTED = "expected what a launcher sets (torchrun, deepspeed, mpirun, srun), or none of them for a single process"


NOTHING, ENVIRONMENT, DEEPSPEED, SRUN = "nothing", "the environment", "deepspeed", "srun"


class Launch(NamedTuple):
    by: str  # the launcher, in words
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None  # where the ranks meet; None: rank 0 has to say so, by MPI
    port: int | None = None
    job: str | None = None  # of SLURM: number, or number_task of an array

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def has_launcher(self) -> bool:
        """Whether signals to this process may come through another one."""
        return self.by not in (NOTHING, ENVIRONMENT)


ALONE = Launch(NOTHING)


def detect(environment: Environment) -> Launch:
    """Raises LaunchError with all that does not fit together."""
    problems = list(launch_problems(environment))
    if problems:
        raise LaunchError("\n".join(problems))
    found = _mpi(environment) or _slurm_step(environment)
    if "RANK" in environment or ("WORLD_SIZE" in environment and found is None):
        found = _standard(environment)
    if found is None:
        return ALONE._replace(job=_job(environment))
    if found.is_alone:
        return found._replace(address=None, port=None)
    return found._replace(
        address=environment.get("MASTER_ADDR") or found.address,
        port=int(environment["MASTER_PORT"]) if environment.get("MASTER_PORT") else found.port,
    )


def detected() -> Launch:
    """That of this process. Where the launcher's variables do not fit together, what can be read of them, under NOTHING."""
    try:
        return detect(os.environ)
    except LaunchError:
        rank, size = (
            int(value) if is_number(value := os.environ.get(name, ""), LEAST[name]) else LEAST[name]
            for name in STANDARD[:2]
        )
        return ALONE._replace(rank=rank, size=size)


def several_ranks_can_meet() -> bool:
    """Whether this is one of several ranks, and the launcher's variables fit together."""
    launch = detected()
    return launch.by != NOTHING and not launch.is_alone


def launch_problems(environment: Environment) -> Iterator[str]:
    """What is wrong with the variables of whichever launcher it was, one sentence each."""
    names = (*LEAST, *OPEN_MPI, *MPICH, *(name for name in STEP if environment.get("SLURM_STEP_ID")))
    wrong = [name for name in names if name in environment and not is_number(environment[name], LEAST.get(name, 0))]
    for name in wrong:
        least = LEAST.get(name, 0)
        yield f"{name}: found {environment[name]!r} in the environment, expected a whole number of at least {least}"
    port = environment.get("MASTER_PORT")
    if wrong:
        return
    other = _mpi(environment) or _slurm_step(environment)
    if "RANK" not in environment and other is not None:
        stated = int(environment.get("WORLD_SIZE", other.size))
        if stated != other.size:
            yield f"WORLD_SIZE: found {stated} in the environment, but {other.by} has started {other.size} processes"
        several = other.size > 1
    else:
        yield from _standard_problems(environment)
        several = int(environment.get("WORLD_SIZE", 1)) > 1
    if several and port and not (is_number(port, 1) and int(port) < 2**16):
        yield f"MASTER_PORT: found {port!r} in the environment, expected a port, 1 to 65535"


def _standard_problems(environment: Environment) -> Iterator[str]:
    if "RANK" in environment and "WORLD_SIZE" not in environment:
        yield f"RANK: found {environment['RANK']!r} in the environment without WORLD_SIZE; {EXPECTED}"
    if "WORLD_SIZE" not in environment:
        return
    size, rank = int(environment["WORLD_SIZE"]), int(environment.get("RANK", 0))
    if rank >= size:
        yield f"RANK: found {rank} in the environment with WORLD_SIZE {size}, expected at most {size - 1}"
    if size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            yield f"WORLD_SIZE: found {size} in the environment without {', '.join(missing)}; {EXPECTED}"


def is_number(text: str, least: int) -> bool:
    return text.isascii() and text.isdigit() and int(text) >= least


# ---- the launchers -----------------------------------------------------------------------------------------------------


def _standard(environment: Environment) -> Launch:
    rank, size, local_rank = (int(environment.get(name, least)) for name, least in zip(STANDARD, (0, 1, 0)))
    local_size = next((int(environment[name]) for name in LOCAL_SIZES if name in environment), 1)
    signs = {"TORCHELASTIC_RUN_ID": "torchrun", "LOCAL_SIZE": DEEPSPEED}
    by = next((launcher for name, launcher in signs.items() if name in environment), ENVIRONMENT)
    return Launch(by, rank, size, local_rank, local_size, job=_job(environment))


def _mpi(environment: Environment) -> Launch | None:
    for by, names in MPI_LAUNCHERS.items():
        # srun --mpi=pmi2 sets the first two of MPICH's: that is a job step.
        if all(name in environment for name in names):
            rank, size, local_rank, local_size = (int(environment[name]) for name in names)
            # On one machine nobody has to say where to meet: all ranks have the same parent.
            address, port = ("127.0.0.1", PORTS[os.getppid() % len(PORTS)]) if size == local_size else (None, None)
            return Launch(by, rank, size, local_rank, local_size, address, port, _job(environment))
    return None


STEP = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


def _slurm_step(environment: Environment) -> Launch | None:
    if not all(environment.get(name) for name in ("SLURM_STEP_ID", *STEP)):
        return None
    rank, size, local_rank = (int(environment[name]) for name in STEP)
    nodes = node_names(environment.get("SLURM_STEP_NODELIST", ""))
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = int(environment.get("SLURM_NODEID", 0))
    local_size = per_node[node] if node < len(per_node) else 1
    step = int(re.sub(r"\D", "", environment["SLURM_STEP_ID"]) or 0)
    port = PORTS[(int(environment.get("SLURM_JOB_ID", 0)) * 64 + step) % len(PORTS)]
    return Launch(SRUN, rank, size, local_rank, local_size, nodes[0] if nodes else None, port, _job(environment))


def _job(environment: Environment) -> str | None:
    array, task = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")


def node_names(text: str) -> list[str]:
    """SLURM's short form of a list of nodes, in full: "gpu[01-03,7],login" -> gpu01, gpu02, gpu03, gpu7, login."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        prefixes = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            choices = [plain] if plain else [number for piece in ranges.split(",") for number in _numbers(piece)]
            prefixes = [prefix + choice for prefix in prefixes for choice in choices]
        names += prefixes
    return names


def _numbers(piece: str) -> list[str]:
    first, _, last = piece.partition("-")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of the tasks of each node: "2(x3),1" -> 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


# ---- where the ranks meet ----------------------------------------------------------------------------------------------


def meeting_point(launch: Launch) -> tuple[str, int]:
    """Address and port at which rank 0 waits for the others. Under MPI, where they are not set, a collective call.

    Raises LaunchError if there is no such address.
    """
    address, port = launch.address, launch.port
    if address is None or port is None:
        told_address, told_port = _told_by_rank_0(launch)
        address, port = address or told_address, port or told_port
    if not _resolves(address):
        address = _address_of_node(address) if launch.by == SRUN else None
    if address is None:
        raise LaunchError(
            f"MASTER_ADDR: rank {launch.rank} on {socket.gethostname()} cannot resolve"
            f" {launch.address or 'the host of rank 0'}, where the ranks are to meet"
        )
    return address, port


def end_of_job() -> float | None:
    """When SLURM will end the job that this process belongs to, in seconds since the epoch; None: no job, or no limit known.

    Asked for, because a limit may be changed while a job runs.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    with suppress(OSError, subprocess.SubprocessError, ValueError, OverflowError):
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, timeout=10, check=True
        )
        if found := re.search(r" EndTime=(\S+)", shown.stdout):
            return time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S"))
    return None


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _address_of_node(node: str) -> str | None:
    """The address that SLURM has for a node whose name does not resolve."""
    with suppress(OSError, subprocess.SubprocessError):
        shown = subprocess.run(
            ["scontrol", "show", "node", node], capture_output=True, text=True, timeout=10, check=True
        )
        if (found := re.search(r"NodeAddr=(\S+)", shown.stdout)) and _resolves(found[1]):
            return found[1]
    return None


def _told_by_rank_0(launch: Launch) -> tuple[str, int]:
    """Address and a free port of the host of rank 0, by MPI, which is left again at once.

    `os._exit` with MPI under way would count as a failure.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    MPI.Init()
    try:
        world = MPI.COMM_WORLD
        if world.Get_size() != launch.size:
            raise LaunchError(
                f"{launch.by} has started {launch.size} processes, but the MPI library that mpi4py has found"
                f" ({MPI.Get_library_version().splitlines()[0].strip(chr(0))}) sees {world.Get_size()}: it is another one's."
                " Use the mpirun that belongs to it, or set MASTER_ADDR and MASTER_PORT"
            )
        message = bytearray(256)
        if world.Get_rank() == 0:
            text = f"{own_address()} {_free_port()}".encode()
            message[: len(text)] = text
        world.Bcast(message, root=0)
    finally:
        MPI.Finalize()
    address, port = message.rstrip(b"\0").decode().split()
    return address, int(port)


def own_address() -> str:
    """An address of this host that others can reach: of its name, or else of the interface towards other networks."""
    with suppress(OSError):
        address = str(socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)[0][4][0])
        if not address.startswith("127."):
            return address
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent; RFC 5737: nobody's address
        return str(probe.getsockname()[0])
    return socket.gethostname()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
