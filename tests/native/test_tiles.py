"""Tile order against float64 and against row order, for every type that has one, on every instruction set, with all remainders.

The bound of a product is test_linear's: the sums are the same, in another order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from server import _native
from tests.native.blocks import QUANTISED_TYPES, Weights, block_values, random_weights
from tests.native.isas import ISAS, address, open_pool
from tests.native.test_linear import activations, expected, matrix

PADDING = 5  # floats behind an output, which must stay as they are
STRIP = 16


@pytest.fixture(params=ISAS, scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[_native.Pool]:
    with open_pool(request.param) as opened:
        yield opened


def packed(pool: _native.Pool, weights: Weights, step: int = 10**6) -> _native.Matrix:
    """In tile order, `step` strips at a time."""
    tiles = matrix(weights)
    while left := tiles.strips_left:
        tiles.pack(pool, min(step, left))
    return tiles


def product(pool: _native.Pool, weights: _native.Matrix, x: np.ndarray) -> np.ndarray:
    out = np.full(len(x) * weights.rows + PADDING, 77, np.float32)
    pool.linear([weights], address(x), len(x), [address(out)], False)
    assert (out[-PADDING:] == 77).all()
    return out[:-PADDING].reshape(len(x), -1)


TILED = [t for t in QUANTISED_TYPES if _native.Matrix(int(t), 1, 256, random_weights(t, 1, 256, np.random.default_rng(0)).data).strips_left]


def test_all_types_but_those_with_grids_have_a_tile_order() -> None:
    grids = {Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S}
    assert set(TILED) == set(QUANTISED_TYPES) - grids


@pytest.mark.parametrize("cols", [32, 96, 256, 352, 768])
@pytest.mark.parametrize("type_id", TILED, ids=lambda t: t.name)
def test_a_product_is_that_with_the_dequantised_weights(pool: _native.Pool, type_id: Type, cols: int) -> None:
    if cols % block_values(type_id):
        pytest.skip(f"{type_id.name} has blocks of {block_values(type_id)}")
    rng = np.random.default_rng(cols)
    for rows in (1, 7, 8, 15, 16, 17, 65):
        weights = random_weights(type_id, rows, cols, rng)
        tiles = packed(pool, weights)
        for n in (1, 2, 3, 5, 7, 8, 9, 15, 33):
            x = activations(n, cols, rng)
            exact, bound = expected(weights, x)
            assert (np.abs(product(pool, tiles, x) - exact) <= bound).all(), (rows, n)


@pytest.mark.parametrize("cols", [1408, 2304])
@pytest.mark.parametrize("type_id", TILED, ids=lambda t: t.name)
def test_many_tokens_one_by_one_and_row_order_agree(pool: _native.Pool, type_id: Type, cols: int) -> None:
    if cols % block_values(type_id):
        pytest.skip(f"{type_id.name} has blocks of {block_values(type_id)}")
    rng = np.random.default_rng(6)
    weights, x = random_weights(type_id, 70, cols, rng), activations(150, cols, rng)
    tiles, (_, bound) = packed(pool, weights), expected(weights, x)
    together = product(pool, tiles, x)
    apart = np.concatenate([product(pool, tiles, x[i : i + 1]) for i in range(len(x))])
    assert (np.abs(together - apart) <= 2 * bound).all()
    assert (np.abs(together - product(pool, matrix(weights), x)) <= 2 * bound).all()


@pytest.mark.parametrize("type_id", TILED, ids=lambda t: t.name)
def test_the_crossover_is_measured_and_changes_no_bit(pool: _native.Pool, type_id: Type) -> None:
    """What the stopwatch says may differ from one start to the next; answers may not."""
    rng = np.random.default_rng(7)
    tiles, x = packed(pool, random_weights(type_id, 40, 512, rng)), activations(40, 512, rng)
    assert 2 <= pool.crossovers[int(type_id)] <= 33
    together = product(pool, tiles, x)
    for n in (1, 3, 7, 8, 9, 20, 33):
        np.testing.assert_array_equal(product(pool, tiles, x[:n]), together[:n])


@pytest.mark.parametrize("type_id", TILED, ids=lambda t: t.name)
def test_the_largest_codes_do_not_saturate(pool: _native.Pool, type_id: Type) -> None:
    rng = np.random.default_rng(5)
    weights = random_weights(type_id, 18, 512, rng, extreme=True)
    x = np.where(rng.random((9, 512)) < 0.9, 1, -1).astype(np.float32)
    tiles, (exact, bound) = packed(pool, weights), expected(weights, x)
    assert (np.abs(product(pool, tiles, x) - exact) <= bound).all()
    assert (np.abs(product(pool, tiles, x[:1]) - exact[:1]) <= bound[:1]).all()


@pytest.mark.parametrize("type_id", TILED, ids=lambda t: t.name)
def test_tile_order_has_the_files_own_bytes(pool: _native.Pool, type_id: Type) -> None:
    weights = random_weights(type_id, 64, 1024, np.random.default_rng(1))
    assert packed(pool, weights).nbytes == weights.data.nbytes


def test_packing_goes_on_where_it_stopped_and_a_matrix_works_meanwhile(pool: _native.Pool) -> None:
    rng = np.random.default_rng(2)
    weights, x = random_weights(Type.Q4_K, 3 * 40, 512, rng), activations(3, 512, rng)
    whole = packed(pool, weights)
    expected_product = product(pool, matrix(weights), x)
    part = matrix(weights)
    places = []
    while left := part.strips_left:
        np.testing.assert_array_equal(product(pool, part, x), expected_product)
        places.append(part.next_byte)
        part.pack(pool, min(3, left))
    assert places == [3 * STRIP * 288 * i for i in range(3)]
    assert part.in_tiles
    np.testing.assert_array_equal(product(pool, part, x), product(pool, whole, x))


def test_what_cannot_be_is_refused(pool: _native.Pool) -> None:
    tiles = matrix(random_weights(Type.Q8_0, 20, 64, np.random.default_rng(3)))
    with pytest.raises(ValueError, match="3 strips to pack, but 2 are left"):
        tiles.pack(pool, 3)
    tiles.pack(pool, 2)
    with pytest.raises(ValueError, match="1 strips to pack, but 0 are left"):
        tiles.pack(pool, 1)
    out, row = np.zeros(64, np.float32), np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="a matrix in tile order has no rows to hand out"):
        pool.dequantize_rows(tiles, address(row), 1, address(out))
    assert matrix(random_weights(Type.F16, 20, 64, np.random.default_rng(3))).strips_left == 0
