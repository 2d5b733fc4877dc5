"""The loops that measure the machine: every instruction set has them, and what they say is possible."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.isas import ISAS, open_pool


@pytest.mark.parametrize("isa", ISAS)
def test_a_sweep_takes_time_and_more_memory_takes_more(isa: str) -> None:
    memory = np.ones(64 << 20, np.uint8)
    address = memory.ctypes.data
    with open_pool(isa, 1) as pool:
        short = min(pool.read_sweep(address, 1 << 20) for _ in range(9))
        long = min(pool.read_sweep(address, 64 << 20) for _ in range(9))
    assert 0 < 10 * short < long
    assert memory.nbytes / long < 400e9  # of one thread: no load was left out


@pytest.mark.parametrize("isa", ISAS)
def test_peaks_are_of_the_isa_that_runs(isa: str) -> None:
    with open_pool(isa, 1) as pool:
        assert pool.isa == isa
        peaks = pool.peak_ops()
    assert list(peaks) == (["f32"] if isa == "scalar" else ["f32", "int8"])
    assert all(1e8 < rate < 8e12 for rate in peaks.values())
    if isa != "scalar":
        assert peaks["int8"] > peaks["f32"]


def test_a_sweep_is_whole_megabytes() -> None:
    memory = np.ones(1 << 20, np.float32)
    with open_pool("scalar", 1) as pool:
        for wrong in (0, 1 << 19, (1 << 20) + 64):
            with pytest.raises(ValueError, match="bytes is"):
                pool.read_sweep(memory.ctypes.data, wrong)
        with pytest.raises(ValueError, match="null address"):
            pool.read_sweep(0, 1 << 20)
