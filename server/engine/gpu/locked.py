"""Page-locked host memory: the GPU copies from it by itself, at the bus's speed and beside whatever the CPU does.

Experts lie in ordinary memory that the native pool packed. `PageLocks` registers it with the driver, matrix by matrix and in bounded time; what is not
locked, because a limit forbids it or time ran out, goes through `Bounce`: small locked buffers that threads fill.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from server.engine.gpu.threads import CPUS, executor

_log = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every context
_PAGE = os.sysconf("SC_PAGESIZE")


class Driver(Protocol):
    """What locks pages."""

    def register(self, address: int, nbytes: int) -> str:
        """Lock whole pages; "" or why not, in the driver's words."""
        ...

    def unregister(self, address: int) -> None: ...


class CudaDriver:
    """cudaHostRegister, through cuda-bindings: an error of theirs is not left behind for torch to meet."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._runtime = runtime

    def register(self, address: int, nbytes: int) -> str:
        (error,) = self._runtime.cudaHostRegister(address, nbytes, _PORTABLE)
        return "" if int(error) == 0 else str(error.name)

    def unregister(self, address: int) -> None:
        self._runtime.cudaHostUnregister(address)


class PageLocks:
    """The ranges that are locked, until `close`. Made once, when all experts are in memory."""

    def __init__(self, driver: Driver, clock: Callable[[], float] = time.monotonic) -> None:
        self._driver, self._clock = driver, clock
        self._sizes: dict[int, int] = {}  # of the ranges that were asked for, by address
        self._registered: list[int] = []  # page addresses

    def lock(self, layers: Iterable[Iterable[tuple[int, int]]], budget_s: float) -> str:
        """Lock the (address, bytes) of each layer, in order, as long as time lasts; a layer is locked whole or not at all. Returns why it stopped, or "".

        Once budget_s seconds have gone, or the next layer would not fit into what is left of them, the rest stays unlocked. The log is told.
        """
        start, nbytes, reason = self._clock(), 0, ""
        todo = [list(layer) for layer in layers]
        for i, layer in enumerate(todo):
            size, spent = sum(size for _, size in layer), self._clock() - start
            late = spent + (spent / nbytes * size if nbytes else 0) > budget_s
            if reason := f"it would take longer than {budget_s:.0f} s" if late else self._lock_layer(layer):
                self._tell_unlocked(sum(size for rest in todo[i:] for _, size in rest), reason)
                break
            nbytes += size
        spent = self._clock() - start
        if nbytes:
            _log.info("Page-locked %.3g GB of experts in %.1f s (%.3g GB/s).", nbytes / 1e9, spent, nbytes / 1e9 / max(spent, 1e-9))
        return reason

    def _lock_layer(self, layer: list[tuple[int, int]]) -> str:
        done: list[int] = []
        for address, nbytes in layer:
            if self.holds(address, nbytes):  # for another layer, which shares it
                continue
            page = address // _PAGE * _PAGE
            if reason := self._driver.register(page, -(-(address + nbytes - page) // _PAGE) * _PAGE):
                for registered in done:
                    self._driver.unregister(registered)
                return reason
            done.append(page)
        self._registered += done
        self._sizes.update(layer)
        return ""

    def _tell_unlocked(self, nbytes: int, reason: str) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = "" if soft == resource.RLIM_INFINITY else f" The limit on locked memory is {soft / 1e9:.3g} GB: raise it with `ulimit -l unlimited`."
        _log.warning("%.3g GB of experts are not page-locked (%s), so they are streamed through buffers, which is slower.%s", nbytes / 1e9, reason, limit)

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether that whole range, which `lock` was given, is locked."""
        return nbytes <= self._sizes.get(address, -1)

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())

    def close(self) -> None:
        """Unlock all. Copies must have ended; the memory must still be there."""
        for page in self._registered:
            self._driver.unregister(page)
        self._registered.clear()
        self._sizes.clear()


class Bounce:
    """Copies to the GPU from memory that is not locked, through a ring of locked buffers. One thread at a time; on the CPU the copies are plain."""

    def __init__(self, device: torch.device, nbytes: int = 64 << 20, count: int = 3, threads: int | None = None) -> None:
        """`threads` fill the buffers."""
        cuda = device.type == "cuda"
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda) for _ in range(count)]
        self._events = [torch.cuda.Event(blocking=True) if cuda else None for _ in range(count)]
        self._threads = threads or min(12, len(CPUS))
        self._pool = executor(self._threads, "fill")
        self._next = 0

    def copy(self, to: Tensor, source: Tensor) -> None:
        """to = source, both uint8 [bytes], in the current stream's order. Returns once `source` has been read."""
        size = self._buffers[0].numel()
        for at in range(0, source.numel(), size):
            piece = source[at : at + size]
            buffer, event = self._buffers[self._next][: piece.numel()], self._events[self._next]
            if event is not None:
                event.synchronize()  # its last copy has left the buffer
            self._fill(buffer, piece)
            to[at : at + size].copy_(buffer, non_blocking=True)
            if event is not None:
                event.record()
            self._next = (self._next + 1) % len(self._buffers)

    def _fill(self, buffer: Tensor, piece: Tensor) -> None:
        share = -(-piece.numel() // self._threads)
        parts = range(0, piece.numel(), share)
        jobs = [self._pool.submit(ctypes.memmove, buffer.data_ptr() + at, piece.data_ptr() + at, min(share, piece.numel() - at)) for at in parts]
        for job in jobs:
            job.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
