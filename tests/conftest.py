"""Tests that need hardware say so with a marker and skip with a reason where it is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.cli.machine import gpu_nodes

if not gpu_nodes():  # read when Triton is imported, which other libraries do: its kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    flags = _cpu_flags()
    missing = {
        "amx": None if {"amx_tile", "amx_int8", "amx_bf16"} <= flags else "this CPU has no AMX",
        "slow": None if "slow" in (config.getoption("-m") or "") else "takes minutes; run with -m slow",
        "peers": None if "peers" in (config.getoption("-m") or "") else "runs beside a rival engine; run with -m peers",
    }
    for item in items:
        for name, reason in missing.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


CPUS = os.sched_getaffinity(0)


@pytest.fixture(autouse=True)
def unpinned() -> Iterator[None]:
    """A thread that starts an engine is pinned to one CPU for good: here, until the end of its test, or of the fixture for several tests."""
    os.sched_setaffinity(0, CPUS)
    yield
    os.sched_setaffinity(0, CPUS)
