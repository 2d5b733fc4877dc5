"""linear_heads: every head's own matrix, against float64 with the bound of test_linear, for every type on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from server import _native
from tests.native.blocks import TYPES, block_values, random_weights
from tests.native.isas import ISAS, address, open_pool
from tests.native.test_linear import expected

PADDING = 3  # floats after the output, which must stay as they are


@pytest.fixture(params=ISAS, scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[_native.Pool]:
    with open_pool(request.param) as opened:
        yield opened


def check(pool: _native.Pool, type_id: Type, heads: int, rows: int, cols: int, n: int, width: int) -> None:
    """x [n, heads, width], of which the first cols of each head are read; the others are NaN."""
    rng = np.random.default_rng([heads, rows, cols, n])
    weights = random_weights(type_id, heads * rows, cols, rng)
    x = np.full((n, heads, width), np.nan, np.float32)
    x[..., :cols] = rng.standard_normal((n, heads, cols))
    out = np.full(n * heads * rows + PADDING, 77, np.float32)

    pool.linear_heads(_native.Matrix(int(type_id), rows, cols, weights.data, heads), address(x), n, width, address(out))

    assert (out[-PADDING:] == 77).all()
    result = out[:-PADDING].reshape(n, heads, rows)
    for head in range(heads):
        mine = slice(head * rows, (head + 1) * rows)
        product, bound = expected(replace(weights, values=weights.values[mine], offsets=weights.offsets[mine]), np.ascontiguousarray(x[:, head, :cols]))
        assert (np.abs(result[:, head] - product) <= bound).all(), head


@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("type_id", TYPES, ids=lambda t: t.name)
def test_each_head_has_its_own_matrix(pool: _native.Pool, type_id: Type, heads: int) -> None:
    cols = max(64, block_values(type_id))
    for rows in (7, 40):
        for n in (1, 2, 5, 20, 33):
            check(pool, type_id, heads, rows, cols, n, cols + 8)


@pytest.mark.parametrize("cols", [1, 12, 33])
@pytest.mark.parametrize("type_id", [Type.F32, Type.F16], ids=lambda t: t.name)
def test_float_types_take_any_number_of_columns(pool: _native.Pool, type_id: Type, cols: int) -> None:
    for n in (1, 3, 20):
        check(pool, type_id, 5, 24, cols, n, cols)


def test_a_width_below_the_columns_is_refused(pool: _native.Pool) -> None:
    memory = np.zeros(64, np.float32)
    matrix = _native.Matrix(int(Type.F32), 2, 8, memory[:32].view(np.uint8), 2)
    with pytest.raises(ValueError, match="width is 7"):
        pool.linear_heads(matrix, address(memory), 1, 7, address(memory))
