"""How the ranks of a run find one another. A rank that does not come is named, as are two that claim the same number.

    store, hosts = meet(launch)          # collective; then dist.init_process_group(backend, store=store, ...)

Rank 0 waits at launcher.meeting_point(), or under torchrun its agent does. Each rank says that it is there, on which
host; rank 0 tells all of them when they are complete, or, after PATIENCE_S, who is missing.
"""

import fcntl
import os
import socket
import struct
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from memformer_dist.errors import LaunchError
from memformer_dist.launcher import Launch, meeting_point

PATIENCE = "MEMFORMER_RENDEZVOUS_S"  # environment variable: how long to wait for the ranks to come, in seconds
PATIENCE_S = 300.0
SAY_SO_AFTER_S = 10.0
POLL_S = 0.05
HEARD_WITHIN_S = 10.0
NAMED = 8  # missing ranks in one message
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def meet(launch: Launch) -> tuple[dist.Store, list[str]]:
    """-> the ranks' common store, and the host of every rank.

    Raises LaunchError, on all ranks that have come, if some do not.
    """
    address, port = meeting_point(launch)
    patience = float(os.environ.get(PATIENCE, PATIENCE_S))
    store = _connect(launch, address, port, patience)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the agent's store is still that of the attempt before
    arrivals = dist.PrefixStore(f"memformer/arrivals/{attempt}", store)
    _arrive(arrivals, launch)
    hosts = _wait_for_all(arrivals, launch, f"{address}:{port}", patience)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))  # as a launcher would have
    _choose_interface(launch, address, hosts)
    return dist.PrefixStore(f"memformer/group/{attempt}", store), hosts


def _connect(launch: Launch, address: str, port: int, patience: float) -> dist.Store:
    waits_here = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not waits_here:
        _wait_until_somebody_answers(launch, address, port, patience)
    where = f"rank {launch.rank} on {socket.gethostname()}"
    try:
        return dist.TCPStore(
            address, port, launch.size, waits_here, timeout=timedelta(seconds=patience), wait_for_workers=False
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if waits_here and "in use" in str(error):
            raise LaunchError(
                f"MASTER_PORT: {where} cannot wait for the others at {address}:{port}: the port is in use. Choose another"
                " one, or end the run that has it"
            ) from None
        raise LaunchError(
            f"MASTER_ADDR, MASTER_PORT: {where} found no way to meet the other ranks at {address}:{port}:"
            f" {str(error).splitlines()[0]}"
        ) from None


def _wait_until_somebody_answers(launch: Launch, address: str, port: int, patience: float) -> None:
    began, said = time.monotonic(), False
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            waited, reason = time.monotonic() - began, error.strerror or str(error)
        here = f"rank {launch.rank} on {socket.gethostname()}"
        if waited > patience:
            raise LaunchError(
                f"MASTER_ADDR, MASTER_PORT: {here} has waited {patience:.0f} s for rank 0 at {address}:{port}: {reason}"
            )
        if waited > SAY_SO_AFTER_S and not said:
            said = True
            _say(f"{here} is waiting for rank 0 at {address}:{port}: {reason}")
        time.sleep(POLL_S)


def _arrive(arrivals: dist.Store, launch: Launch) -> None:
    host = socket.gethostname()
    if arrivals.add(f"claims/{launch.rank}", 1) > 1:
        other = arrivals.get(f"host/{launch.rank}").decode()
        raise LaunchError(
            f"RANK: two processes, on {other} and on {host}, say that they are rank {launch.rank} of {launch.size}:"
            " each has to have a number of its own"
        )
    arrivals.set(f"host/{launch.rank}", host)
    arrivals.add("arrived", 1)


def _wait_for_all(arrivals: dist.Store, launch: Launch, where: str, patience: float) -> list[str]:
    if launch.rank == 0:
        verdict = _missing_after(arrivals, launch.size, where, patience)
        arrivals.set("verdict", verdict)
        if verdict:
            _until_heard(arrivals)
    else:
        try:
            arrivals.wait(["verdict"], timedelta(seconds=patience + 60))
            verdict = arrivals.get("verdict").decode()
            arrivals.add("heard", 1)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            verdict = f"rank {launch.rank} has lost rank 0 at {where}: {str(error).splitlines()[0]}"
    if verdict:
        raise LaunchError(verdict)
    return [arrivals.get(f"host/{rank}").decode() for rank in range(launch.size)]


def _missing_after(arrivals: dist.Store, size: int, where: str, patience: float) -> str:
    """On rank 0: empty once all ranks are there, else what is to be said when the patience is at its end."""
    began, said = time.monotonic(), False
    while arrivals.add("arrived", 0) < size:
        waited = time.monotonic() - began
        if (waited > SAY_SO_AFTER_S and not said) or waited > patience:
            missing = [rank for rank in range(size) if not arrivals.check([f"host/{rank}"])]
            names = ", ".join(map(str, missing[:NAMED])) + (" ..." if len(missing) > NAMED else "")
            which = f"rank{'s' if len(missing) > 1 else ''} {names} of {size}"
            if waited > patience:
                come = "have not come" if len(missing) > 1 else "has not come"
                return f"{which} {come} to {where} within {patience:.0f} s ({PATIENCE} sets another time)"
            said = True
            _say(f"waiting for {which} at {where}")
        time.sleep(POLL_S)
    return ""


def _until_heard(arrivals: dist.Store) -> None:
    """Rank 0 takes the store with it: it stays until those who have come know why, but not for ever."""
    ends = time.monotonic() + HEARD_WITHIN_S
    while arrivals.add("heard", 0) < arrivals.add("arrived", 0) - 1 and time.monotonic() < ends:
        time.sleep(POLL_S)


def _say(message: str) -> None:
    import logging

    logging.getLogger(__name__).warning(message)


def _choose_interface(launch: Launch, address: str, hosts: list[str]) -> None:
    """Have gloo use the interface that the other ranks reach. By itself it takes that of the host's name, which many
    systems give to the loopback."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if len(set(hosts)) == 1 and _address_of("lo") is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # ranks of one host need not listen on its network
        return
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        others = next(host for host in hosts if host != hosts[launch.rank])
        probe.connect((others if hosts[0] == hosts[launch.rank] else address, 9))  # nothing is sent
        mine = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            if not mine.startswith("127.") and _address_of(name) == mine:
                os.environ["GLOO_SOCKET_IFNAME"] = name


def _address_of(interface: str) -> str | None:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(found[20:24])
    return None
