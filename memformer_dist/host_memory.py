"""How much memory a rank can still allocate, on its GPU or on the host that it shares with other ranks."""

from pathlib import Path

import torch

from memformer_dist.launcher import detected


def free_bytes(device: torch.device) -> int:
    """Bytes of `device` that this rank can still allocate.

    On a GPU: what the driver reports free, and what torch's allocator has reserved without using it. On a host: what the
    system can give without swapping, or what the limits of a batch job or container (cgroups) leave, whichever is less,
    divided equally among the host's ranks.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return host_free_bytes(Path("/")) // detected().local_size


# By controller in /proc/self/cgroup (version 2 names none): where the hierarchy is mounted, its files for limit and usage,
# and the entry of memory.stat for page cache that is reclaimed first, which counts as used although it is free.
CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def host_free_bytes(root: Path) -> int:
    """Bytes that all ranks of the host together can still allocate. `root`: where /proc and /sys are."""
    room = int(_table(root / "proc/meminfo")["MemAvailable:"]) * 1024
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controller, path = line.split(":", 2)
        if controller not in CGROUPS:
            continue
        mount, limit, used, cache = CGROUPS[controller]
        # Parent groups have limits too. In a container the path may be the host's and not exist here, up to the mount.
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
