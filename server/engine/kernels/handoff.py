"""The GPU's side of a hand-over to the CPU: kernels that write and read pinned host memory directly, and flags in it.

Copy nodes in a graph cost more than such kernels, for what is copied is small. Who reads after the other side's flag must not meet a stale line, so
what comes from the host is loaded as volatile (Triton's cache_modifier=".cv" is dropped on the way to PTX). The flag kernels stand in for
cuStreamWriteValue32 and cuStreamWaitValue32 where a driver has not got them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512


def send(y: Tensor, ids: Tensor, weights: Tensor, to_y: Tensor, to_ids: Tensor, to_weights: Tensor) -> None:
    """Copy y [n, hidden] float32, ids [n, top_k] int32 and weights [n, top_k] float32, all contiguous, to pinned tensors of the same shapes; one launch."""
    blocks = triton.cdiv(max(y.numel(), ids.numel()), _BLOCK)
    _send[(blocks,)](y, ids, weights, to_y, to_ids, to_weights, y.numel(), ids.numel(), BLOCK=_BLOCK, num_warps=4)


def receive(out: Tensor, pinned: Tensor) -> None:
    """out += pinned: float32 and contiguous, of one shape; out on the device, the other in pinned memory."""
    _receive[(triton.cdiv(out.numel(), _BLOCK),)](out, pinned, out.numel(), BLOCK=_BLOCK, num_warps=4)


def fetch(out: Tensor, pinned: Tensor) -> None:
    """out = pinned: contiguous, of one shape and type; out on the device, the other in pinned memory."""
    _fetch[(triton.cdiv(out.numel(), _BLOCK),)](out, pinned, out.numel(), BLOCK=_BLOCK, num_warps=4)


def raise_flag(flag: Tensor, value: int) -> None:
    """Write `value` to flag [1] int32 in pinned memory; whoever sees it sees all that the stream wrote before."""
    _raise_flag[(1,)](flag, value, num_warps=1)


def await_flag(flag: Tensor, value: int = 1) -> None:
    """Hold the stream until flag [1] int32 in pinned memory is at least `value`. There is no time-out: whoever waits on the CPU's behalf must raise it."""
    _await_flag[(1,)](flag, value, num_warps=1)


@triton.jit
def _send(y, ids, weights, to_y, to_ids, to_weights, y_size, ids_size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_y + at, tl.load(y + at, mask=at < y_size), mask=at < y_size)
    tl.store(to_ids + at, tl.load(ids + at, mask=at < ids_size), mask=at < ids_size)
    tl.store(to_weights + at, tl.load(weights + at, mask=at < ids_size), mask=at < ids_size)


@triton.jit
def _receive(out, pinned, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    arrived = tl.load(pinned + at, mask=at < size, other=0.0, volatile=True)
    tl.store(out + at, tl.load(out + at, mask=at < size) + arrived, mask=at < size)


@triton.jit
def _fetch(out, pinned, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(pinned + at, mask=at < size, volatile=True), mask=at < size)


@triton.jit(do_not_specialize=["value"])
def _raise_flag(flag, value):
    tl.atomic_xchg(flag, value, sem="release", scope="sys")


@triton.jit(do_not_specialize=["value"])
def _await_flag(flag, value):
    # A load and no atomic: where the bus has no atomics, adding zero would be a read and a write, and could undo what the CPU wrote in between.
    while tl.load(flag, volatile=True) < value:
        pass
