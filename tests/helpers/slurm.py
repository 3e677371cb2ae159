"""A SLURM cluster on this machine, for tests: one slurmctld, two slurmd, munged; all on loopback, all below one folder.

    with Cluster.start(tmp_path) as cluster:
        job = cluster.submit("--nodes=2", "--ntasks-per-node=1", script)
        cluster.wait(job)

Needs root and Debian's slurm-wlm and munge. Jobs are requeued within seconds; a preempted one has 20 s.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")


def missing() -> str | None:
    """Why there can be no cluster here."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"needs Debian's slurm-wlm and munge: found no {', '.join(lacking)}" if lacking else None


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """Nodes node1 and node2, each with two CPUs; partitions `main` and `urgent`, whose jobs preempt those of `main`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._daemons: list[subprocess.Popen] = []

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator["Cluster"]:
        cluster = cls(folder)
        try:
            cluster._boot()
            yield cluster
        finally:
            cluster._end()

    def _boot(self) -> None:
        for name in ("state", "spool1", "spool2", "log", "munge"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o755)
        self._write_configuration()
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key} | {f"{name}-file": munge / name for name in ("pid", "seed", "log")}
        self._daemon("munged", "--foreground", "--force", "--socket", munge / "socket", *_options(files))
        self._until(lambda: (munge / "socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in ("node1", "node2"):
            self.boot_node(node)
        self._until(lambda: self.states() == {"node1": "IDLE", "node2": "IDLE"}, "the nodes")

    def _write_configuration(self) -> None:
        host = socket.gethostname()
        controller, first, second = _free_ports(3)
        memory = 3000
        (self.folder / "slurm.conf").write_text(
            f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={self.folder}/log/jobs
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=5
SchedulerType=sched/builtin
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SlurmdTimeout=60
JobRequeue=1
MinJobAge=3600
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/%n.pid
SlurmctldLogFile={self.folder}/log/slurmctld
SlurmdLogFile={self.folder}/log/%n
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory={memory}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory={memory}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
""".replace("spool%n", "spool-%n")
        )
        for number in (1, 2):
            (self.folder / f"spool{number}").rename(self.folder / f"spool-node{number}")

    def boot_node(self, name: str) -> None:
        self._daemon("slurmd", "-D", "-N", name)

    def _daemon(self, *command: object) -> None:
        out = (self.folder / "log" / f"{command[0]}.out").open("ab")
        self._daemons.append(
            subprocess.Popen(
                [str(word) for word in command], env=self.environment, stdout=out, stderr=out, start_new_session=True
            )
        )

    def _end(self) -> None:
        for job in self.run("squeue", "-h", "-o", "%i", check=False).split():
            self.run("scancel", "--full", "--signal=KILL", job, check=False)
            self.run("scancel", job, check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # slurmstepd and what it runs outlive slurmd
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (entry / "environ").read_bytes()
                if f"SLURM_CONF={self.folder}".encode() in environment and int(entry.name) != os.getpid():
                    os.kill(int(entry.name), signal.SIGKILL)

    # ---- what a user does ------------------------------------------------------------------------------------------------

    def run(self, *command: object, check: bool = True, **options) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=options.pop("timeout", 120),
            **options,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def states(self) -> dict[str, str]:
        shown = self.run("scontrol", "-o", "show", "nodes", check=False)
        return dict(re.findall(r"NodeName=(\S+).*? State=(\w+)", shown))

    def submit(self, *options: object, cwd: Path | None = None) -> str:
        """sbatch -> the job's number."""
        return self.run("sbatch", "--parsable", *options, cwd=cwd).split(";")[0].strip()

    def state(self, job: str) -> str:
        found = re.search(r"JobState=(\w+)", self.run("scontrol", "-o", "show", "job", job, check=False))
        return found[1] if found else "GONE"

    def exit_code(self, job: str) -> int:
        found = re.search(r"ExitCode=(\d+):(\d+)", self.run("scontrol", "-o", "show", "job", job))
        assert found
        return int(found[1])

    def wait(self, job: str, timeout: float = 300, states: tuple[str, ...] = ENDED) -> str:
        self._until(lambda: self.state(job) in states, f"job {job}", timeout)
        return self.state(job)

    def _until(self, condition, what: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what}: waited {timeout} s; {self._logs()}"
            time.sleep(0.2)

    def _logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted((self.folder / "log").iterdir())
        )


def _options(files: dict[str, Path]) -> list[str]:
    return [f"--{name}={path}" for name, path in files.items()]
