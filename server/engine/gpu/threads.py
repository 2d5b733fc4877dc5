"""Threads beside the pool's. One inherits the CPUs of the thread that makes it, which is one of the pool's, pinned: these get back what the process had."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

CPUS = frozenset(os.sched_getaffinity(0))  # when the engine was imported, and nothing was pinned yet


def executor(threads: int, name: str) -> ThreadPoolExecutor:
    """Some threads that may run on any of the process's CPUs."""
    return ThreadPoolExecutor(threads, name, lambda: os.sched_setaffinity(0, CPUS))
