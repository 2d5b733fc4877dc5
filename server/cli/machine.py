"""What this machine is and may use, found without importing anything heavy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def version() -> str:
    """The installed version of moespan; "from source" where only the tree is there."""
    try:
        return importlib.metadata.version("moespan")
    except importlib.metadata.PackageNotFoundError:
        return "from source"


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def gpu_nodes() -> int:
    """NVIDIA GPUs that the kernel shows us. A device file costs nothing to look at, and a CPU build of torch would not see the GPU."""
    return sum(name.removeprefix("nvidia").isdecimal() for name in os.listdir("/dev"))
