"""How busy a GPU is, from the driver's own samples (NVML): a counter that costs a step nothing.

The driver notes some times a second whether anything runs on the GPU. Its samples are added up whenever somebody asks, so that all who ask see one count,
however often they come.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import torch

from server.types import GpuUse

if TYPE_CHECKING:
    from types import ModuleType

_log = logging.getLogger(__name__)


class GpuMeter:
    """Adds up the samples of one GPU. Any thread may read it."""

    def __init__(self, nvml: ModuleType, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._lock = threading.Lock()
        self._seen_us = 0  # the driver's clock
        self._busy_s = 0.0
        self.read()

    def read(self) -> GpuUse | None:
        """None where the driver does not answer."""
        with self._lock:
            try:
                self._add_up()
                memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            except self._nvml.NVMLError:
                return None
            return GpuUse(self._busy_s, int(memory.used), int(memory.total))

    def _add_up(self) -> None:
        """Of a time that the driver kept no samples of, the mean of those that came later is taken."""
        try:
            _, samples = self._nvml.nvmlDeviceGetSamples(self._handle, self._nvml.NVML_GPU_UTILIZATION_SAMPLES, self._seen_us)
        except self._nvml.NVMLError_NotFound:  # none since the last time
            return
        fresh = [sample for sample in samples if sample.timeStamp > self._seen_us]
        if not fresh:
            return
        latest = max(sample.timeStamp for sample in fresh)
        if self._seen_us:
            share = sum(sample.sampleValue.uiVal for sample in fresh) / (100 * len(fresh))
            self._busy_s += share * (latest - self._seen_us) * 1e-6
        self._seen_us = latest


def open_meter(device: torch.device) -> GpuMeter | None:
    """The meter of a GPU that torch uses; None, and a word in the log, where NVML cannot be asked for it."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        return GpuMeter(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
    except ImportError:
        _log.info("nvidia-ml-py is not installed, so the metrics do not say how busy the GPU is. Install it with: pip install nvidia-ml-py")
    except pynvml.NVMLError as error:
        _log.info("The metrics do not say how busy the GPU is, since the driver cannot be asked (%s).", error)
    return None
