"""How much memory a rank may still take, on a GPU or on a host that it shares."""

from pathlib import Path

import torch

from memformer_dist.world import ranks_of_this_host


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
