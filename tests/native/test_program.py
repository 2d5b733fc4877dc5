"""Recorded calls of the pool: nothing runs while they are recorded, all of them run for each place, and the first that it does not suit says so."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from server import _native
from tests.native.isas import ISAS, address, open_pool

PAGE, HEAD = 16, 8


@pytest.fixture(params=ISAS, scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[_native.Pool]:
    with open_pool(request.param) as opened:
        yield opened


class Decode:
    """Norm x into k, then store k and v: one token of one head, wherever it is told to."""

    def __init__(self, pool: _native.Pool) -> None:
        self.pool = pool
        self.x, self.k, self.weight = (np.full(HEAD, value, np.float32) for value in (3, np.nan, 2))
        self.keys, self.values = np.zeros((3, HEAD, PAGE), np.float32), np.zeros((3, PAGE, HEAD), np.float32)
        self.program = _native.Program()
        pool.record(self.program)
        pool.rms_norm(address(self.x), address(self.weight), address(self.k), 1, HEAD, 0.0)
        pool.store_kv(address(self.k), address(self.x), 1, 1, HEAD, address(self.keys), address(self.values), False, PAGE, [], 0)
        pool.record(None)

    def run(self, x: float, start: int, pages: list[int]) -> None:
        self.x[:] = x
        self.program.set_pages(pages)
        self.program.run(self.pool, start)


def test_recording_computes_nothing(pool: _native.Pool) -> None:
    decode = Decode(pool)
    assert len(decode.program) == 2
    assert np.isnan(decode.k).all()
    assert not decode.keys.any()


def test_each_run_has_its_own_input_and_place(pool: _native.Pool) -> None:
    decode = Decode(pool)
    decode.run(5, 0, [2])
    decode.run(7, PAGE + 3, [1, 0])
    expected = np.zeros_like(decode.values)
    expected[2, 0], expected[0, 3] = 5, 7
    np.testing.assert_array_equal(decode.values, expected)
    np.testing.assert_allclose(decode.keys, np.where(expected.swapaxes(1, 2) > 0, 2, 0), rtol=1e-6)


def test_what_does_not_suit_the_place_is_told_and_changes_nothing(pool: _native.Pool) -> None:
    decode = Decode(pool)
    with pytest.raises(ValueError, match="1 pages of 16 tokens cannot hold 17 tokens"):
        decode.run(5, PAGE, [0])
    for start, pages in ((-1, [0]), (0, [-1])):
        with pytest.raises(ValueError, match="must not be negative"):
            decode.run(5, start, pages)
    assert not decode.values.any()
    decode.run(5, 0, [0])
    assert decode.values.any()


def test_arguments_are_checked_as_they_are_recorded(pool: _native.Pool) -> None:
    program = _native.Program()
    pool.record(program)
    try:
        with pytest.raises(ValueError, match="n is 0"):
            pool.rms_norm(64, 64, 64, 0, HEAD, 0.0)
        assert len(program) == 0
    finally:
        pool.record(None)


def test_a_closed_pool_runs_nothing() -> None:
    with open_pool("scalar") as opened:
        decode = Decode(opened)
        opened.close()
        with pytest.raises(ValueError, match="the pool is closed"):
            decode.run(5, 0, [0])
