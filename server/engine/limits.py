"""What this process may use of the machine, CPUs and memory, as its affinity and its cgroups allow. Nothing heavy is imported for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
ARC = Path("/proc/spl/kstat/zfs/arcstats")


def cpus_allowed() -> list[int]:
    """The CPUs that this process may use: its affinity, cut to the CPU quota of its cgroups.

    A quota is rounded down, to one at least: a pool that runs over it is stopped as a whole until the next period.
    """
    cpus = sorted(os.sched_getaffinity(0))
    quotas = [quota for directory in _cgroup_directories("cpu") if (quota := cgroup_quota(directory)) is not None]
    return cpus[: max(1, int(min(quotas, default=len(cpus))))]


def cgroup_quota(directory: Path) -> float | None:
    """CPUs' worth of time that one cgroup directory grants: cpu.max (v2) or cpu.cfs_quota_us (v1); None without a limit."""
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text().split()
        else:
            quota, period = ((directory / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):  # no such controller here
        return None


def available_memory() -> int:
    """Bytes that this process can still get without swapping: what the kernel estimates, with what ZFS would give back, cut to what its cgroups leave."""
    left = [left for directory in _cgroup_directories("memory") if (left := cgroup_memory(directory)) is not None]
    return min([_meminfo("MemAvailable") + _zfs_cache(), *left])


def free_swap() -> int:
    """Bytes of swap that nobody uses."""
    return _meminfo("SwapFree")


def _meminfo(name: str) -> int:
    line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def _zfs_cache() -> int:
    """Bytes of files that ZFS keeps in a cache of its own, by default up to half of the memory, and lets go of when others want it."""
    try:
        rows = [line.split() for line in ARC.read_text().splitlines()]
        values = {row[0]: int(row[2]) for row in rows if len(row) == 3 and row[2].isdecimal()}
        return max(0, values["size"] - values["c_min"])
    except (OSError, KeyError):  # no ZFS here
        return 0


def cgroup_memory(directory: Path) -> int | None:
    """Bytes that one cgroup directory leaves: its limit, less what is used and is no file's; None without a limit. v2's names, or v1's."""
    newer = (directory / "memory.max").exists()
    limit, used, prefix = ("memory.max", "memory.current", "") if newer else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    try:
        most, taken = ((directory / name).read_text().strip() for name in (limit, used))
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        files = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))  # the kernel lets go of these first
        return max(0, int(most) - int(taken) + files) if most != "max" else None
    except (OSError, ValueError, KeyError):  # no such controller here
        return None


def _cgroup_directories(controller: str, root: Path = Path("/sys/fs/cgroup")) -> Iterator[Path]:
    """The directories of this process's cgroups and of those above them, any of which may set a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers  # v2 has no controllers in its line
        inner = top / path.lstrip("/")
        yield from (directory for directory in (inner, *inner.parents) if directory.is_relative_to(top))
