"""Page locks with a made-up driver, and copies through buffers."""

from __future__ import annotations

import ctypes
import logging
import resource

import pytest
import torch

from server.engine.gpu.locked import Bounce, PageLocks

PAGE = resource.getpagesize()
GB = 10**9


class FakeDriver:
    """Locks up to `most` bytes, at `rate` bytes a second of the clock that it keeps."""

    def __init__(self, most: int = 1 << 60, rate: float = GB) -> None:
        self.most, self.rate, self.now = most, rate, 0.0
        self.held: dict[int, int] = {}

    def register(self, address: int, nbytes: int) -> str:
        assert address % PAGE == 0
        assert nbytes % PAGE == 0
        self.now += nbytes / self.rate
        if sum(self.held.values()) + nbytes > self.most:
            return "cudaErrorMemoryAllocation"
        self.held[address] = nbytes
        return ""

    def unregister(self, address: int) -> None:
        del self.held[address]

    def clock(self) -> float:
        return self.now


def layers_of(count: int, nbytes: int = GB) -> list[list[tuple[int, int]]]:
    """Three matrices each, apart from one another."""
    return [[((3 * i + j + 1) * 4 * GB // PAGE * PAGE, nbytes) for j in range(3)] for i in range(count)]


def test_all_is_locked_and_let_go(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeDriver()
    locks = PageLocks(driver, driver.clock)
    layers = layers_of(4)
    with caplog.at_level(logging.INFO):
        assert locks.lock(layers, 60) == ""
    assert "12 GB" in caplog.text
    assert locks.nbytes == 12 * GB
    assert all(locks.holds(*matrix) for layer in layers for matrix in layer)
    assert not locks.holds(layers[0][0][0], 2 * GB)
    assert not locks.holds(1, 1)
    locks.close()
    assert not driver.held
    assert not locks.holds(*layers[0][0])


def test_whole_pages_are_locked() -> None:
    driver = FakeDriver()
    locks = PageLocks(driver, driver.clock)
    address = 100 * PAGE + 64
    assert locks.lock([[(address, PAGE)]], 60) == ""
    assert driver.held == {100 * PAGE: 2 * PAGE}
    assert locks.holds(address, PAGE)


def test_what_two_layers_share_is_locked_once() -> None:
    driver = FakeDriver(most=4 * GB)
    locks = PageLocks(driver, driver.clock)
    layer = layers_of(1)[0]
    assert locks.lock([layer, [layer[0], layer[2]]], 60) == ""
    assert len(driver.held) == 3
    locks.close()
    assert not driver.held


def test_time_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """A layer takes 3 s: after three, 9 s have gone, and a fourth would end behind the 10th."""
    driver = FakeDriver()
    locks = PageLocks(driver, driver.clock)
    layers = layers_of(9)
    reason = locks.lock(layers, 10)
    assert "longer than 10 s" in reason
    assert driver.now == pytest.approx(9, rel=1e-3)
    assert [locks.holds(*layer[0]) for layer in layers] == [True] * 3 + [False] * 6
    assert "18 GB of experts are not page-locked" in caplog.text


def test_a_refusal_leaves_whole_layers_and_names_the_limit(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4 * GB, 4 * GB))
    driver = FakeDriver(most=5 * GB)  # the second layer's first matrix fits
    locks = PageLocks(driver, driver.clock)
    layers = layers_of(2)
    assert locks.lock(layers, 60) == "cudaErrorMemoryAllocation"
    assert len(driver.held) == 3  # of the second layer nothing is left
    assert not any(locks.holds(*matrix) for matrix in layers[1])
    assert "3 GB of experts are not page-locked (cudaErrorMemoryAllocation)" in caplog.text
    assert "The limit on locked memory is 4 GB: raise it with `ulimit -l unlimited`." in caplog.text


def test_without_a_limit_none_is_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    driver = FakeDriver(most=0)
    PageLocks(driver, driver.clock).lock(layers_of(1), 60)
    assert "not page-locked" in caplog.text
    assert "ulimit" not in caplog.text


@pytest.mark.parametrize("nbytes", [1, 7, 4096, 4097, 12288, 100_001])
@pytest.mark.parametrize("threads", [1, 3])
def test_bounced_copies(nbytes: int, threads: int) -> None:
    bounce = Bounce(torch.device("cpu"), nbytes=4096, count=3, threads=threads)
    source = torch.randint(256, (nbytes,), dtype=torch.uint8)
    for _ in range(2):
        to = torch.zeros(nbytes, dtype=torch.uint8)
        bounce.copy(to, source)
        assert torch.equal(to, source)
    bounce.close()


@pytest.mark.gpu
def test_locked_memory_is_copied_beside_the_cpu() -> None:
    from server.engine.gpu.locked import CudaDriver

    memory = torch.randint(256, (1 << 24,), dtype=torch.uint8)
    source = torch.frombuffer((ctypes.c_uint8 * memory.numel()).from_address(memory.data_ptr()), dtype=torch.uint8)
    locks = PageLocks(CudaDriver())
    assert locks.lock([[(memory.data_ptr(), memory.numel())]], 60) == ""
    assert source.is_pinned()
    to = torch.empty_like(source, device="cuda")
    to.copy_(source, non_blocking=True)
    assert torch.equal(to.cpu(), memory)
    locks.close()
    assert not source.is_pinned()
    bounce = Bounce(torch.device("cuda"), nbytes=1 << 20)
    to.zero_()
    bounce.copy(to, source)
    assert torch.equal(to.cpu(), memory)
    bounce.close()
