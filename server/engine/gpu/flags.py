"""Flags in pinned memory by which a captured step and the pool of CPU threads take turns (native/layers/handoff.h).

Two ways to raise and await one in stream order: the driver's own operations, which a graph takes as nodes, and kernels where a driver does not have them.
Measured on an H100, a round trip is 2 us with the first and 3 with the second; host functions in a graph take 87.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from server.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

STRIDE = 16  # int32 words from flag to flag: a cache line each, as native/layers/handoff.h has it


class Flags(Protocol):
    """Both work on the current stream; flag is int32 [1] in pinned memory."""

    def raise_flag(self, flag: Tensor) -> None:
        """Write 1, after all that the stream did before."""
        ...

    def await_flag(self, flag: Tensor) -> None:
        """Hold the stream until the flag is 1 or more."""
        ...


class StreamFlags:
    """cuStreamWriteValue32 and cuStreamWaitValue32."""

    def __init__(self) -> None:
        """Raises ImportError without cuda-bindings, DeviceError where the driver or the device does not support them."""
        from cuda.bindings import driver

        self._driver = driver
        device = torch.cuda.current_device()
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR  # the newest of the family: has all that is needed
        _, supported = driver.cuDeviceGetAttribute(attribute, device)
        if not supported:
            raise DeviceError("The GPU's driver has no operations on values in stream order.")

    def raise_flag(self, flag: Tensor) -> None:
        self._call(self._driver.cuStreamWriteValue32, flag, 0)

    def await_flag(self, flag: Tensor) -> None:
        self._call(self._driver.cuStreamWaitValue32, flag, int(self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ))

    def _call(self, operation: Callable[..., tuple[Any]], flag: Tensor, how: int) -> None:
        (error,) = operation(torch.cuda.current_stream().cuda_stream, flag.data_ptr(), 1, how)
        if int(error) != 0:
            raise DeviceError(f"The GPU's driver refused a flag in stream order ({error}).")


class KernelFlags:
    """Kernels of one thread."""

    def __init__(self) -> None:
        """Both are launched once, since a capture is no place to compile them."""
        from server.engine.kernels import handoff

        self._kernels = handoff
        flag = torch.zeros(STRIDE, dtype=torch.int32, pin_memory=True)[:1]
        self.raise_flag(flag)
        self.await_flag(flag)
        torch.cuda.current_stream().synchronize()  # they have read and written it: it may go

    def raise_flag(self, flag: Tensor) -> None:
        self._kernels.raise_flag(flag, 1)

    def await_flag(self, flag: Tensor) -> None:
        self._kernels.await_flag(flag, 1)


def open_flags() -> Flags:
    """The faster of the two that works here."""
    try:
        return StreamFlags()
    except (ImportError, DeviceError) as error:
        _log.info("GPU and CPU take turns by flags of kernels (%s).", error)
        return KernelFlags()
