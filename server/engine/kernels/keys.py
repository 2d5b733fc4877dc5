"""A float32 and its index as one integer, so that a maximum finds the place too: its upper half orders as the float does, its lower half falls with
the index. All keys differ, equal floats go to the lower index, and a NaN stands above everything, as it does when torch sorts.
"""

from __future__ import annotations

import triton
import triton.language as tl

GONE = tl.constexpr(-(2**63))  # below every key: taken already, or padding
INFINITE = tl.constexpr(0x7F800000)  # ordered(inf); NaN is above it
LOWEST = tl.constexpr(-0x7F800001)  # ordered(-inf)


@triton.jit
def ordered(values):
    """int32 that order as the float32 values do, NaN on top. Two's complement orders negative floats the wrong way round, hence the flip of their
    lower bits; -0 counts as 0."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values != values, 0x7FFFFFFF, bits)


@triton.jit
def key(values, index):
    """int64 keys of float32 values at int32 indices."""
    return (ordered(values).to(tl.int64) << 32) + (0x7FFFFFFF - index)


@triton.jit
def index_of(key):
    """The index in a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def value_of(key):
    """The float32 in a key."""
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(key):
    """Whether the key's float is finite."""
    order = key >> 32
    return (order < INFINITE) & (order > LOWEST)
