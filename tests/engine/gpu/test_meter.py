"""The GPU's meter, over a driver that is made up: samples are added up once, whoever asks and however often."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from server.engine.gpu.meter import GpuMeter, open_meter


class NVMLError(Exception):
    """The driver's."""


class NVMLErrorNotFound(NVMLError):
    """No new samples."""


@dataclass
class Driver:
    """Samples by their time in microseconds; it keeps the last hundred."""

    samples: dict[int, int] = field(default_factory=dict)
    gone: bool = False
    NVML_GPU_UTILIZATION_SAMPLES: int = 1
    NVMLError: type = NVMLError
    NVMLError_NotFound: type = NVMLErrorNotFound

    def nvmlDeviceGetSamples(self, handle: object, kind: int, seen_us: int) -> tuple[int, list[Any]]:
        assert (handle, kind) == ("gpu", 1)
        fresh = [SimpleNamespace(timeStamp=at, sampleValue=SimpleNamespace(uiVal=share)) for at, share in self.samples.items() if at > seen_us][-100:]
        if not fresh:
            raise NVMLErrorNotFound
        return 1, fresh

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> Any:
        if self.gone:
            raise NVMLError
        return SimpleNamespace(used=3, total=8)


def busy_s(meter: GpuMeter) -> float:
    use = meter.read()
    assert use is not None
    assert (use.memory_used, use.memory_total) == (3, 8)
    return use.busy_s


def test_shares_become_seconds_from_the_start_on() -> None:
    driver = Driver({1_000_000: 100, 2_000_000: 100})  # before the meter
    meter = GpuMeter(cast(Any, driver), "gpu")
    assert busy_s(meter) == 0
    driver.samples |= {2_500_000: 100, 3_000_000: 50}
    assert busy_s(meter) == pytest.approx(0.75)
    assert busy_s(meter) == pytest.approx(0.75)  # nothing new
    driver.samples[4_000_000] = 0
    assert busy_s(meter) == pytest.approx(0.75)


def test_what_the_driver_has_forgotten_counts_as_the_mean_of_the_rest() -> None:
    driver = Driver({0: 0, 1_000_000: 0})
    meter = GpuMeter(cast(Any, driver), "gpu")
    driver.samples |= {1_000_000 * second: 40 for second in range(2, 402)}
    assert busy_s(meter) == pytest.approx(0.4 * 400)


def test_a_driver_that_does_not_answer_gives_none() -> None:
    driver = Driver()
    meter = GpuMeter(cast(Any, driver), "gpu")
    driver.gone = True
    assert meter.read() is None


def test_there_is_no_meter_without_a_gpu() -> None:
    assert open_meter(torch.device("cpu")) is None
