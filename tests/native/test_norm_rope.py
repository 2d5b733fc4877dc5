"""RMSNorm and rope against float64, on every instruction set: sizes around each vector width, a thread and many, bounds kept."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from server import _native
from tests.native.isas import ISAS, UNIT, address, open_pool, rounding

GUARD = 64  # floats after each array that must stay as they are
MANY = 300  # enough tokens for the work to be shared


@pytest.fixture(params=ISAS, scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[_native.Pool]:
    with open_pool(request.param) as opened:
        yield opened


def guarded(values: np.ndarray) -> np.ndarray:
    """The values as one flat float32 array with a guard of NaN behind them."""
    return np.concatenate([values.astype(np.float32).ravel(), np.full(GUARD, np.nan, np.float32)])


def unguarded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    assert np.isnan(array[-GUARD:]).all()
    return array[:-GUARD].reshape(shape)


def rms_norm_in_float64(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("n", [1, 3, MANY])
@pytest.mark.parametrize("dim", [1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 576, 1000])
def test_rms_norm_is_that_of_float64(pool: _native.Pool, n: int, dim: int, in_place: bool) -> None:
    rng = np.random.default_rng(dim)
    x, weight = rng.normal(size=(n, dim)).astype(np.float32), rng.normal(size=dim).astype(np.float32)
    given = guarded(x)
    out = given if in_place else guarded(np.zeros_like(x))
    factors = guarded(weight)

    pool.rms_norm(address(given), address(factors), address(out), n, dim, 1e-5)

    expected = rms_norm_in_float64(x, weight, float(np.float32(1e-5)))
    # Half the mean's relative error, and a rounding each for the mean, eps, root, quotient and the two products.
    bound = (rounding(dim) / 2 + 6 * UNIT) * np.abs(expected)
    assert (np.abs(unguarded(out, x.shape) - expected) <= bound).all()


def test_rms_norm_heeds_eps(pool: _native.Pool) -> None:
    x, weight, out = np.zeros((1, 40), np.float32), np.ones(40, np.float32), np.full((1, 40), np.nan, np.float32)
    x[0, 39] = 1e-3
    pool.rms_norm(address(x), address(weight), address(out), 1, 40, 1e-2)
    np.testing.assert_allclose(out[0, 39], 1e-3 / np.sqrt(1e-6 / 40 + 1e-2), rtol=1e-6)
    assert (out[0, :39] == 0).all()


def rope_in_float64(x: np.ndarray, angles: np.ndarray, rot_dim: int, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    """The rotated x [n, heads, head_dim], and |x cos| + |y sin| for each value: what its rounding error is relative to."""
    first = np.arange(rot_dim).reshape(-1, 2)[:, 0] if interleaved else np.arange(rot_dim // 2)
    second = first + (1 if interleaved else rot_dim // 2)
    wide = x.astype(np.float64)
    a, b = wide[:, :, first], wide[:, :, second]
    cos, sin = angles[:, None, :, 0].astype(np.float64), angles[:, None, :, 1].astype(np.float64)
    rotated, size = wide.copy(), np.zeros_like(wide)
    rotated[:, :, first], rotated[:, :, second] = a * cos - b * sin, b * cos + a * sin
    size[:, :, first], size[:, :, second] = np.abs(a * cos) + np.abs(b * sin), np.abs(b * cos) + np.abs(a * sin)
    return rotated, size


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("n", [1, 3, MANY])
@pytest.mark.parametrize(
    ("heads", "head_dim", "rot_dim"),
    [(1, 8, 8), (3, 20, 20), (3, 20, 12), (9, 64, 64), (2, 64, 32), (5, 36, 34), (2, 80, 80), (1, 192, 64), (2, 2, 2)],
)
def test_rope_is_that_of_float64(pool: _native.Pool, n: int, heads: int, head_dim: int, rot_dim: int, interleaved: bool) -> None:
    rng = np.random.default_rng(head_dim + rot_dim)
    x = rng.normal(size=(n, heads, head_dim)).astype(np.float32)
    turns = rng.uniform(-np.pi, np.pi, size=(n, rot_dim // 2))
    angles = np.stack([np.cos(turns), np.sin(turns)], axis=-1).astype(np.float32)
    given, table = guarded(x), guarded(angles)

    pool.rope(address(given), n, heads, head_dim, rot_dim, address(table), interleaved)

    expected, size = rope_in_float64(x, angles, rot_dim, interleaved)
    rotated = unguarded(given, x.shape)
    assert (np.abs(rotated - expected) <= 2 * UNIT * size).all()  # two roundings of products and one of the sum, of half an ulp each
    np.testing.assert_array_equal(rotated[:, :, rot_dim:], x[:, :, rot_dim:])


@pytest.mark.parametrize("rot_dim", [3, 10, 0, -2])
def test_rope_refuses_a_rot_dim_that_does_not_fit(pool: _native.Pool, rot_dim: int) -> None:
    x = np.zeros((1, 1, 8), np.float32)
    with pytest.raises(ValueError, match="rot_dim"):
        pool.rope(address(x), 1, 1, 8, rot_dim, address(x), True)


@pytest.mark.parametrize(("n", "dim"), [(0, 8), (1, 0), (-1, 8)])
def test_rms_norm_refuses_empty_shapes(pool: _native.Pool, n: int, dim: int) -> None:
    x = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match="at least 1"):
        pool.rms_norm(address(x), address(x), address(x), n, dim, 1e-5)
