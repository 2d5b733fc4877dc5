"""The instruction sets that the kernel tests run on, and how a pool is made that surely runs the one asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from server import _native

UNIT = 2.0**-24  # float32's unit roundoff


def _param(isa: str) -> object:
    return pytest.param(isa, marks=pytest.mark.skipif(isa not in _native.available_isas(), reason=f"this CPU has no {isa}"))


# These have AVX-512 VNNI's kernels and, for many tokens, products of bf16 beside them: those are test_amx's.
_WITH_BF16 = ("avx512_bf16", "amx")
ISAS = [_param(isa) for isa in reversed(_native.compiled_isas()) if isa not in _WITH_BF16]
BF16_ISAS = ["amx_emulated", *(_param(isa) for isa in _WITH_BF16)]


@contextmanager
def open_pool(isa: str, threads: int = 2) -> Iterator[_native.Pool]:
    """A pool of that many threads (several on one CPU where there are fewer CPUs), whose kernels are the ISA's."""
    cpus = sorted(os.sched_getaffinity(0))
    pool = _native.Pool([cpus[i % len(cpus)] for i in range(threads)], isa)
    assert pool.isa == isa
    assert pool.threads == threads
    try:
        yield pool
    finally:
        pool.close()


def rounding(terms: float) -> float:
    """A bound for the relative error of a float32 sum of that many products, whose rounding errors are independent.

    With probability 1 - 2 exp(-8) it is below 4 sqrt(terms) u (Higham and Mary, 2019, "A new approach to probabilistic rounding error analysis").
    """
    return 4.0 * float(np.sqrt(terms)) * UNIT


def address(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
