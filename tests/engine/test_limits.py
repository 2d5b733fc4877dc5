"""CPUs and memory that a process may use, from files as kernels write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.engine import limits

MIB = 1 << 20


def test_the_affinity_mask_is_heeded() -> None:
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(everything)})
        assert limits.cpus_allowed() == [max(everything)]
    finally:
        os.sched_setaffinity(0, everything)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.cfs_quota_us": "300000\n", "cpu.cfs_period_us": "100000\n"}, 3.0),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_cgroup_quota_of_both_versions(tmp_path: Path, files: dict[str, str], cpus: float | None) -> None:
    write(tmp_path, files)
    assert limits.cgroup_quota(tmp_path) == cpus


def test_the_smallest_quota_counts_and_one_cpu_remains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path, {"cpu.max": "50000 100000"})
    write(tmp_path / "inner", {"cpu.max": "800000 100000"})
    monkeypatch.setattr(limits, "_cgroup_directories", lambda _: iter([tmp_path / "inner", tmp_path]))
    assert len(limits.cpus_allowed()) == 1


def write(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


def test_free_memory_is_some_of_the_machine() -> None:
    assert MIB < limits.available_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert limits.free_swap() >= 0


STAT = f"anon {70 * MIB}\nfile {25 * MIB}\nactive_file {20 * MIB}\ninactive_file {4 * MIB}\n"
STAT_V1 = f"cache {25 * MIB}\nactive_file 1\ninactive_file 1\ntotal_active_file {20 * MIB}\ntotal_inactive_file {4 * MIB}\n"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": f"{128 * MIB}\n", "memory.current": f"{100 * MIB}\n", "memory.stat": STAT}, 52 * MIB),  # 100 used, 24 of them by files
        ({"memory.max": f"{64 * MIB}\n", "memory.current": f"{100 * MIB}\n", "memory.stat": STAT}, 0),
        ({"memory.max": "max\n", "memory.current": f"{100 * MIB}\n", "memory.stat": STAT}, None),
        ({"memory.limit_in_bytes": f"{128 * MIB}\n", "memory.usage_in_bytes": f"{100 * MIB}\n", "memory.stat": STAT_V1}, 52 * MIB),
        ({"memory.max": "nonsense", "memory.current": "1", "memory.stat": STAT}, None),
        ({"memory.max": f"{128 * MIB}\n", "memory.current": f"{100 * MIB}\n", "memory.stat": "anon 1\n"}, None),
        ({}, None),
    ],
)
def test_what_a_cgroup_leaves_of_memory(tmp_path: Path, files: dict[str, str], left: int | None) -> None:
    write(tmp_path, files)
    assert limits.cgroup_memory(tmp_path) == left


def test_the_least_that_anyone_leaves_is_what_can_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used = {"memory.current": f"{100 * MIB}\n", "memory.stat": STAT}
    write(tmp_path, {"memory.max": f"{128 * MIB}\n", **used, "meminfo": "MemTotal: 900000 kB\nMemAvailable: 40960 kB\nSwapFree: 1024 kB\n"})
    write(tmp_path / "inner", {"memory.max": f"{110 * MIB}\n", **used})
    monkeypatch.setattr(limits, "MEMINFO", tmp_path / "meminfo")
    for directories, left in (([], 40), ([tmp_path], 40), ([tmp_path / "inner", tmp_path], 34)):
        monkeypatch.setattr(limits, "_cgroup_directories", lambda _, found=directories: iter(found))
        assert limits.available_memory() == left * MIB
    assert limits.free_swap() == MIB


def test_what_zfs_keeps_of_files_can_be_had_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path, {"meminfo": "MemAvailable: 1024 kB\n", "arcstats": f"9 1 0x01 1 2 3 4\nname type data\nsize 4 {30 * MIB}\nc_min 4 {10 * MIB}\n"})
    monkeypatch.setattr(limits, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(limits, "_cgroup_directories", lambda _: iter(()))
    assert limits.available_memory() == MIB
    monkeypatch.setattr(limits, "ARC", tmp_path / "arcstats")
    assert limits.available_memory() == 21 * MIB
