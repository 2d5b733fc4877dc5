"""linear, ffn and dequantize_rows against float64, for every type on every instruction set, with all remainders of rows, tokens and columns.

The tolerance of a product. With int8 activations q and their scale sx, a row's result is the sum over groups g of 32 (or 16) values of
    s_g sx (c . q)  +  o_g (sx sum(q))
in float32. The integer dot products are exact (below 2^24). Each of the 2 groups terms carries at most 4 roundings (d * scale, times sx,
sx * sum, and the product where there is no fma), and passes through at most groups + 6 additions (one after the other in a lane, the lanes'
tree, the offsets, the accumulated output). So |error| <= (groups + 10) u * (sum of the terms' magnitudes), u = 2^-24, whatever the order;
and the magnitudes are at most |q sx| (|s c| + |o|). A float type has cols terms of one rounding each, and at most cols + 6 additions.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from server import _native
from tests.native.blocks import FLOAT_TYPES, GROUPS_OF_16, QUANTISED_TYPES, TYPES, Weights, block_values, int8_activations, random_weights
from tests.native.isas import ISAS, UNIT, address, open_pool

TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 31, 33)
ROWS = (1, 3, 7, 8, 17, 65)
COLS = (32, 96, 224, 256, 352, 768)  # 1, 3, 7, 8, 11, 24 sub-blocks: less than a span of 8, whole spans, and a last one that overlaps
PADDING = 5  # floats after each output, which must stay as they are


@pytest.fixture(params=ISAS, scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[_native.Pool]:
    with open_pool(request.param) as opened:
        yield opened


def matrix(weights: Weights) -> _native.Matrix:
    return _native.Matrix(int(weights.type_id), *weights.values.shape, weights.data)


def linear(pool: _native.Pool, weights: Sequence[Weights], x: np.ndarray, start: float | None = None) -> list[np.ndarray]:
    """The products, one for each matrix; accumulated onto `start` where it is given. What lies behind an output is checked."""
    n = len(x)
    outs = [np.full(n * len(w.values) + PADDING, np.nan if start is None else start, np.float32) for w in weights]
    for out in outs:
        out[-PADDING:] = 77
    pool.linear([matrix(w) for w in weights], address(x), n, [address(out) for out in outs], start is not None)
    assert all((out[-PADDING:] == 77).all() for out in outs)
    return [out[:-PADDING].reshape(n, -1) for out in outs]


def expected(weights: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64 and the bound of the module's docstring, both [n, rows]."""
    cols = x.shape[1]
    floating = weights.type_id in FLOAT_TYPES
    used = x.astype(np.float64) if floating else int8_activations(x)
    steps = cols + 7 if floating else cols // (16 if weights.type_id in GROUPS_OF_16 else 32) + 10
    magnitudes = np.abs(used) @ (np.abs(weights.values - weights.offsets) + np.abs(weights.offsets)).T
    return used @ weights.values.T, steps * UNIT * magnitudes


def activations(n: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((n, cols)).astype(np.float32)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("type_id", TYPES, ids=lambda t: t.name)
def test_linear_is_the_product_with_the_dequantised_weights(pool: _native.Pool, type_id: Type, cols: int) -> None:
    if cols % block_values(type_id):
        pytest.skip(f"{type_id.name} has blocks of {block_values(type_id)}")
    rng = np.random.default_rng(cols)
    for rows in ROWS:
        weights = random_weights(type_id, rows, cols, rng)
        for n in TOKENS:
            x = activations(n, cols, rng)
            result, (product, bound) = linear(pool, [weights], x)[0], expected(weights, x)
            assert (np.abs(result - product) <= bound).all(), (rows, n)


@pytest.mark.parametrize("cols", [1, 3, 7, 9, 17, 31, 33])
@pytest.mark.parametrize("type_id", FLOAT_TYPES, ids=lambda t: t.name)
def test_float_types_take_any_number_of_columns(pool: _native.Pool, type_id: Type, cols: int) -> None:
    rng = np.random.default_rng(cols)
    weights = random_weights(type_id, 19, cols, rng)
    for n in (1, 3, 20):
        x = activations(n, cols, rng)
        product, bound = expected(weights, x)
        assert (np.abs(linear(pool, [weights], x)[0] - product) <= bound).all(), n


@pytest.mark.parametrize("type_id", QUANTISED_TYPES, ids=lambda t: t.name)
def test_the_largest_codes_do_not_saturate(pool: _native.Pool, type_id: Type) -> None:
    rng = np.random.default_rng(5)
    weights = random_weights(type_id, 18, 512, rng, extreme=True)
    x = np.where(rng.random((9, 512)) < 0.9, 1, -1).astype(np.float32)  # every activation code is 127 or -127
    product, bound = expected(weights, x)
    assert (np.abs(linear(pool, [weights], x)[0] - product) <= bound).all()
    assert (np.abs(linear(pool, [weights], x[:1])[0] - product[:1]) <= bound[:1]).all()


@pytest.mark.parametrize("cols", [1408, 2144, 2304])
@pytest.mark.parametrize("type_id", TYPES, ids=lambda t: t.name)
def test_many_tokens_at_once_agree_with_one_by_one(pool: _native.Pool, type_id: Type, cols: int) -> None:
    """Panels (GEMM) against blocks in place (GEMV), over rows longer than a stretch (2048), and more tokens than a token block."""
    if cols % block_values(type_id):
        pytest.skip(f"{type_id.name} has blocks of {block_values(type_id)}")
    rng = np.random.default_rng(6)
    weights, x = random_weights(type_id, 70, cols, rng), activations(150, cols, rng)
    together, (product, bound) = linear(pool, [weights], x)[0], expected(weights, x)
    apart = np.concatenate([linear(pool, [weights], x[i : i + 1])[0] for i in range(len(x))])
    assert (np.abs(together - apart) <= 2 * bound).all()
    assert (np.abs(apart - product) <= bound).all()


@pytest.mark.parametrize("type_id", QUANTISED_TYPES, ids=lambda t: t.name)
def test_int8_activations_cost_at_most_one_percent(pool: _native.Pool, type_id: Type) -> None:
    rng = np.random.default_rng(7)
    weights, x = random_weights(type_id, 300, 1536, rng), activations(6, 1536, rng)
    exact = x.astype(np.float64) @ weights.values.T
    assert np.linalg.norm(linear(pool, [weights], x)[0] - exact) <= 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("n", [1, 6])
def test_matrices_of_different_types_and_heights_share_x(pool: _native.Pool, n: int) -> None:
    rng = np.random.default_rng(8)
    weights = [random_weights(t, rows, 512, rng) for t, rows in [(Type.Q4_K, 65), (Type.F32, 3), (Type.Q8_0, 17), (Type.Q6_K, 1)]]
    x = activations(n, 512, rng)
    for w, result in zip(weights, linear(pool, weights, x), strict=True):
        product, bound = expected(w, x)
        assert (np.abs(result - product) <= bound).all(), w.type_id


@pytest.mark.parametrize("type_id", [Type.F16, Type.Q4_1], ids=lambda t: t.name)
@pytest.mark.parametrize("n", [1, 9])
def test_accumulate_adds_to_what_is_there(pool: _native.Pool, type_id: Type, n: int) -> None:
    rng = np.random.default_rng(9)
    weights, x = random_weights(type_id, 21, 96, rng), activations(n, 96, rng)
    product, bound = expected(weights, x)
    assert (np.abs(linear(pool, [weights], x, start=3.0)[0] - (product + 3)) <= bound + UNIT * (np.abs(product) + 6)).all()


@pytest.mark.parametrize("threads", [2, 3, 15])
def test_each_row_is_computed_once_however_the_rows_are_cut(threads: int) -> None:
    """Rows of 4 KB, of which a piece has 2 at least: long pieces first, and shorter ones behind them. Accumulated, so that a row computed twice shows."""
    rng = np.random.default_rng(11)
    x = activations(1, 1024, rng)
    with open_pool(_native.available_isas()[0], threads) as pool:
        for rows in [*range(1, 40), 60, 61, 119, 121, 240, 481, 1000]:
            weights = random_weights(Type.F32, rows, 1024, rng)
            product, bound = expected(weights, x)
            assert (np.abs(linear(pool, [weights], x, start=3.0)[0] - (product + 3)) <= bound + UNIT * (np.abs(product) + 6)).all(), rows


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("n", [1, 5])
def test_a_nan_or_inf_is_not_hidden(pool: _native.Pool, n: int, bad: float) -> None:
    rng = np.random.default_rng(10)
    x = activations(n, 256, rng)
    x[-1, 100] = bad
    result = linear(pool, [random_weights(Type.Q4_K, 5, 256, rng)], x)[0]
    assert not np.isfinite(result[-1]).any()
    assert np.isfinite(result[:-1]).all()


def test_zeros_give_zeros(pool: _native.Pool) -> None:
    weights = random_weights(Type.Q4_1, 9, 64, np.random.default_rng(11))
    for n in (1, 8):
        assert (linear(pool, [weights], np.zeros((n, 64), np.float32))[0] == 0).all()


def test_instruction_sets_agree() -> None:
    isas = _native.available_isas()
    if len(isas) == 1:
        pytest.skip("this CPU has only the scalar kernels")
    rng = np.random.default_rng(12)
    for type_id in TYPES:
        weights, x = random_weights(type_id, 33, 768, rng), activations(9, 768, rng)
        results = []
        for isa in isas:
            with open_pool(isa) as pool:
                results.append(linear(pool, [weights], x)[0])
        bound = 2 * expected(weights, x)[1]
        assert all((np.abs(result - results[0]) <= bound).all() for result in results[1:]), type_id


# --- dequantize_rows ---------------------------------------------------------


@pytest.mark.parametrize("cols", [32, 96, 256, 352, 768])
@pytest.mark.parametrize("type_id", TYPES, ids=lambda t: t.name)
def test_dequantize_rows_gives_the_rows_asked_for(pool: _native.Pool, type_id: Type, cols: int) -> None:
    if cols % block_values(type_id):
        pytest.skip(f"{type_id.name} has blocks of {block_values(type_id)}")
    weights = random_weights(type_id, 11, cols, np.random.default_rng(cols))
    ids = np.array([10, 0, 3, 3, 7], np.int64)
    out = np.full((5, cols), np.nan, np.float32)
    pool.dequantize_rows(matrix(weights), address(ids), len(ids), address(out))
    # scale * code and the sum with the offset: three roundings at most, the offset's own among them.
    bound = 3 * UNIT * (np.abs(weights.values - weights.offsets) + np.abs(weights.offsets))
    assert (np.abs(out - weights.values[ids]) <= bound[ids]).all()
    if type_id is not Type.Q6_K:  # d * scale * code: 11 + 8 + 6 bits there, and at most the 24 of a float in the others
        np.testing.assert_array_equal(out, weights.values[ids])


def test_dequantize_rows_refuses_a_row_that_is_not_there(pool: _native.Pool) -> None:
    weights = random_weights(Type.F32, 4, 8, np.random.default_rng(0))
    out = np.zeros((1, 8), np.float32)
    for row in (-1, 4):
        with pytest.raises(ValueError, match=f"row {row} of a matrix of 4 rows"):
            pool.dequantize_rows(matrix(weights), address(np.array([row], np.int64)), 1, address(out))


# --- ffn ---------------------------------------------------------------------


def ffn(pool: _native.Pool, weights: Sequence[Weights], x: np.ndarray, start: float | None = None) -> np.ndarray:
    out = np.full((len(x), len(weights[2].values)), np.nan if start is None else start, np.float32)
    pool.ffn(*(matrix(w) for w in weights), address(x), len(x), address(out), start is not None)
    return out


def ffn_in_float64(weights: Sequence[Weights], x: np.ndarray) -> np.ndarray:
    gate, up, down = (w.values for w in weights)
    g = x.astype(np.float64) @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def random_ffn(types: Sequence[Type], hidden: int, width: int, rng: np.random.Generator) -> list[Weights]:
    gate, up, down = types
    return [random_weights(gate, width, hidden, rng), random_weights(up, width, hidden, rng), random_weights(down, hidden, width, rng)]


@pytest.mark.parametrize("n", [1, 2, 5, 33])
@pytest.mark.parametrize("types", [[Type.F32] * 3, [Type.F16, Type.F32, Type.BF16]], ids=["F32", "mixed"])
@pytest.mark.parametrize(("hidden", "width"), [(8, 3), (40, 65), (64, 96)])
def test_ffn_of_floats_is_that_of_float64(pool: _native.Pool, types: list[Type], hidden: int, width: int, n: int) -> None:
    rng = np.random.default_rng(hidden + n)
    weights, x = random_ffn(types, hidden, width, rng), activations(n, hidden, rng) / np.float32(np.sqrt(hidden))
    exact = ffn_in_float64(weights, x)
    # Two products in a row: each at most (cols + 7) u of its magnitudes, which are about sqrt(cols) times the result; exp adds 1e-7.
    assert np.linalg.norm(ffn(pool, weights, x) - exact) <= 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("n", [1, 2, 5, 33])
@pytest.mark.parametrize(
    "types",
    [[t] * 3 for t in QUANTISED_TYPES] + [[Type.Q4_K, Type.Q4_K, Type.Q6_K], [Type.Q4_K, Type.Q8_0, Type.F16], [Type.F32, Type.F32, Type.Q4_0]],
    ids=lambda types: "-".join(t.name for t in types),
)
def test_ffn_of_quantised_weights_is_near_that_of_float64(pool: _native.Pool, types: list[Type], n: int) -> None:
    rng = np.random.default_rng(n)
    width = 512 if block_values(types[2]) == 256 else 352  # an expert's need not be whole spans
    weights, x = random_ffn(types, 512, width, rng), activations(n, 512, rng) / np.float32(20)
    exact = ffn_in_float64(weights, x)
    # Rounding to int8 twice, x and the gated values: below 1 % each for Gaussian weights, and they are independent.
    assert np.linalg.norm(ffn(pool, weights, x) - exact) <= 0.02 * np.linalg.norm(exact)


def test_ffn_accumulates(pool: _native.Pool) -> None:
    rng = np.random.default_rng(3)
    weights, x = random_ffn([Type.F32] * 3, 24, 40, rng), activations(3, 24, rng)
    np.testing.assert_allclose(ffn(pool, weights, x, start=5.0), ffn(pool, weights, x) + 5, rtol=1e-5, atol=1e-5)


# --- what is refused ---------------------------------------------------------


def test_a_matrix_of_the_wrong_size_is_refused() -> None:
    data = np.zeros(18 * 3, np.uint8)
    with pytest.raises(ValueError, match="cols is 33, but type 2 has blocks of 32"):
        _native.Matrix(2, 3, 33, data)
    with pytest.raises(ValueError, match=r"a \[4, 32\] matrix of type 2 has 72 bytes, not 54"):
        _native.Matrix(2, 4, 32, data)
    with pytest.raises(ValueError, match="rows is 0"):
        _native.Matrix(2, 0, 32, data)
    with pytest.raises(ValueError, match="type id 999 is not supported"):
        _native.Matrix(999, 3, 32, data)


def test_a_matrix_that_would_overflow_is_refused() -> None:
    with pytest.raises(ValueError, match="too large"):
        _native.Matrix(0, 2**62, 4, np.zeros(0, np.uint8))


def test_a_matrix_keeps_its_buffer_and_takes_a_read_only_one() -> None:
    data = bytearray(4 * 8)
    borrowed = _native.Matrix(0, 1, 8, memoryview(data).toreadonly())
    with pytest.raises(BufferError):
        data.extend(b"x")
    assert (borrowed.type_id, borrowed.rows, borrowed.cols) == (0, 1, 8)
    del borrowed
    data.extend(b"x")


def test_calls_that_do_not_fit_are_refused(pool: _native.Pool) -> None:
    rng = np.random.default_rng(0)
    wide, narrow = (matrix(random_weights(Type.F32, 2, cols, rng)) for cols in (8, 4))
    x = address(np.zeros(64, np.float32))
    with pytest.raises(ValueError, match="8 and 4 columns"):
        pool.linear([wide, narrow], x, 1, [x, x], False)
    with pytest.raises(ValueError, match="2 matrices, but 1 outputs"):
        pool.linear([wide, wide], x, 1, [x], False)
    with pytest.raises(ValueError, match="not 0"):
        pool.linear([], x, 1, [], False)
    with pytest.raises(ValueError, match="n is 0"):
        pool.linear([wide], x, 0, [x], False)
    with pytest.raises(ValueError, match="x is a null address"):
        pool.linear([wide], 0, 1, [x], False)
    with pytest.raises(ValueError, match="2 matrices, but 1 biases"):
        pool.linear([wide, wide], x, 1, [x, x], False, biases=[x])
    with pytest.raises(ValueError, match="what is accumulated has no bias"):
        pool.linear([wide], x, 1, [x], True, biases=[x])
    with pytest.raises(ValueError, match="gate has 2 rows, but down has 8 columns"):
        pool.ffn(wide, wide, wide, x, 1, x, False)


_AT_THE_END_OF_MEMORY = """
import ctypes, mmap, sys
import numpy as np
from server import _native
from tests.native.blocks import TYPES, block_values, random_weights

libc, page = ctypes.CDLL(None), mmap.PAGESIZE
rng = np.random.default_rng(0)

def at_the_end(data):
    '''The bytes right before a page that may not be touched.'''
    pages = -(-data.nbytes // page)
    memory = np.frombuffer(mmap.mmap(-1, (pages + 1) * page), np.uint8)
    assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + pages * page), page, 0) == 0
    place = memory[pages * page - data.nbytes : pages * page]
    place[:] = data.view(np.uint8).ravel()
    return place

pool = _native.Pool([sorted(__import__('os').sched_getaffinity(0))[0]], sys.argv[1])
for type_id in TYPES:
    for cols in {block_values(type_id), 3 * block_values(type_id), 11 * block_values(type_id), 768, 2304}:
        for rows in (1, 2, 5):
            w = random_weights(type_id, rows, cols, rng)
            m = _native.Matrix(int(type_id), rows, cols, at_the_end(w.data))
            for n in (1, 2, 9):
                x, out = (at_the_end(np.ones((n, width), np.float32)) for width in (cols, rows))
                pool.linear([m], x.ctypes.data, n, [out.ctypes.data], False)
            ids, out = np.array([rows - 1]), at_the_end(np.ones(cols, np.float32))
            pool.dequantize_rows(m, ids.ctypes.data, 1, out.ctypes.data)
print('unharmed')
"""


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_read_behind_the_end(isa: str) -> None:
    """Weights, activations and outputs end where a page begins that may not be touched, as a mapped file can."""
    done = subprocess.run([sys.executable, "-c", _AT_THE_END_OF_MEMORY, isa], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "unharmed\n"
