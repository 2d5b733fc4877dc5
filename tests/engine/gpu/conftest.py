"""The GPU stage in tests: on the GPU where there is one, with Triton's kernels; elsewhere on the CPU with their plain twins, where all but graphs can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from server.engine.gpu.devices import kernels_for
from server.engine.gpu.ops import GpuOps
from server.engine.native import NativeOps, open_ops

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def ops() -> Iterator[GpuOps]:
    torch.set_num_threads(1)  # as the loader does: more would fight the pool's threads for the cores
    native = open_ops(2)
    yield GpuOps(native, DEVICE, kernels_for(DEVICE), max_pages=64)
    native.close()


@pytest.fixture(scope="module")
def native() -> Iterator[NativeOps]:
    """A pool of one thread. Torch has one too while it lives, as where the engine runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ops = open_ops(1)
    yield ops
    ops.close()
    torch.set_num_threads(threads)
