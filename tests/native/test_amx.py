"""Products of bf16 tiles: the body of AMX, on AMX where there is one and emulated everywhere, against float64 on the dequantised weights.

What rounding costs. An activation is rounded to 8 bits of mantissa, a weight likewise; before, scale * code and the offset are rounded to a half's 11, and
each of them may be far larger than their sum. So for a product of K terms x w, whose errors are independent,

    error^2 <= c^2 sum over k of x^2 ((2^-8 w)^2 + (2^-11 m)^2),     m: the magnitude of scale * code and of the offset at most

(an even error below 2^-9 of each factor has the deviation 2^-9 / sqrt(3); 2^-8 for both and c = 4 leave room for the largest of many thousand results).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from server import _native
from tests.native.blocks import Weights, block_values, decoded, random_weights
from tests.native.isas import BF16_ISAS, ISAS, open_pool
from tests.native.test_experts import Experts, draw, run
from tests.native.test_linear import matrix
from tests.native.test_tiles import TILED, packed, product

FROM = 8  # tokens from which a product is one of tiles
IN_ROWS = [Type.F16, Type.BF16, Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S]  # opened from row order
OPENED = [*TILED, *IN_ROWS]
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=BF16_ISAS, scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[_native.Pool]:
    with open_pool(request.param) as opened:
        yield opened


def bound(weights: Weights, x: np.ndarray) -> np.ndarray:
    """[n, rows], as above; m is taken from each group of 32 columns, twice its largest weight and its offsets."""
    groups = np.abs(weights.values).reshape(len(weights.values), -1, 32).max(axis=2)
    m = 2 * np.repeat(groups, 32, axis=1) + 2 * np.abs(weights.offsets)
    return 4 * np.sqrt(np.square(x.astype(np.float64)) @ (np.square(2.0**-8 * weights.values) + np.square(2.0**-11 * m)).T) + 1e-30


def activations(n: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((n, cols)).astype(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, as float64."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)


def check(pool: _native.Pool, weights: Weights, x: np.ndarray) -> None:
    error = np.abs(product(pool, packed(pool, weights), x) - x.astype(np.float64) @ weights.values.T)
    assert (error <= bound(weights, x)).all(), (error / bound(weights, x)).max()


@pytest.mark.parametrize("cols", [32, 96, 256, 352, 768])
@pytest.mark.parametrize("type_id", OPENED, ids=lambda t: t.name)
def test_a_product_is_that_with_the_dequantised_weights(pool: _native.Pool, type_id: Type, cols: int) -> None:
    if cols % block_values(type_id):
        pytest.skip(f"{type_id.name} has blocks of {block_values(type_id)}")
    rng = np.random.default_rng(cols)
    for rows, n in ((1, 8), (15, 9), (16, 15), (17, 16), (31, 17), (32, 31), (33, 32), (49, 33), (65, 50)):
        check(pool, random_weights(type_id, rows, cols, rng), activations(n, cols, rng))


@pytest.mark.parametrize("type_id", [Type.Q4_K, Type.Q5_0, Type.Q6_K, Type.IQ4_NL, Type.BF16, Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS], ids=lambda t: t.name)
def test_more_columns_and_tokens_than_are_taken_at_once(pool: _native.Pool, type_id: Type) -> None:
    """Up to 96 tokens meet one strip at a time, 16 tiles of which are open; more meet 512 columns of two strips, and the sums of 512 tokens are kept."""
    rng = np.random.default_rng(1)
    check(pool, random_weights(type_id, 33, 2304, rng), activations(40, 2304, rng))
    check(pool, random_weights(type_id, 17, 1280, rng), activations(20, 1280, rng))
    check(pool, random_weights(type_id, 49, 768, rng), activations(96, 768, rng))
    # 20 strips: two threads take 5 at once, so that strips follow each other, and of pairs one is left alone
    for n in (12, 40, 97):
        check(pool, random_weights(type_id, 315, 768, rng), activations(n, 768, rng))
    check(pool, random_weights(type_id, 315, 1280, rng), activations(150, 1280, rng))
    check(pool, random_weights(type_id, 18, 256, rng), activations(530, 256, rng))


@pytest.mark.parametrize("type_id", OPENED, ids=lambda t: t.name)
def test_a_token_has_the_same_bits_in_any_company(pool: _native.Pool, type_id: Type) -> None:
    rng = np.random.default_rng(2)
    weights, x = packed(pool, random_weights(type_id, 40, 1280, rng)), activations(120, 1280, rng)
    together = product(pool, weights, x)
    for first, last in ((0, FROM), (3, 30), (20, 70), (10, 106)):
        np.testing.assert_array_equal(product(pool, weights, x[first:last]), together[first:last])


@pytest.mark.parametrize("type_id", IN_ROWS, ids=lambda t: t.name)
def test_rows_are_rounded_to_bf16_and_no_further(pool: _native.Pool, type_id: Type) -> None:
    """Against the product of operands that are rounded so; a weight between two of bf16's may go either way, since it is rounded to float32 before."""
    rng = np.random.default_rng(9)
    weights, x = random_weights(type_id, 40, 512, rng), activations(20, 512, rng)
    exact = to_bf16(x) @ to_bf16(weights.values).T
    assert np.linalg.norm(product(pool, packed(pool, weights), x) - exact) <= 1e-4 * np.linalg.norm(exact)


@pytest.mark.parametrize("type_id", [Type.F32, Type.F16], ids=lambda t: t.name)
def test_floats_that_tiles_do_not_take_stay_float32(pool: _native.Pool, type_id: Type) -> None:
    """F32 never meets bf16, and rows of other lengths than whole tiles' do not either."""
    rng = np.random.default_rng(10)
    weights, x = random_weights(type_id, 40, 500, rng), activations(20, 500, rng)
    exact = x.astype(np.float64) @ weights.values.T
    assert np.linalg.norm(product(pool, matrix(weights), x) - exact) <= 1e-6 * np.linalg.norm(exact)


def test_few_tokens_are_computed_as_without_tiles(pool: _native.Pool) -> None:
    rng = np.random.default_rng(3)
    weights, x = random_weights(Type.Q4_K, 40, 512, rng), activations(FROM - 1, 512, rng)
    with open_pool("scalar" if pool.isa == "amx_emulated" else "avx512_vnni") as other:
        np.testing.assert_array_equal(product(pool, packed(pool, weights), x), product(other, packed(other, weights), x))


@pytest.mark.parametrize("power", [-30, -14, 14, 40])
@pytest.mark.parametrize("type_id", [Type.Q4_K, Type.Q4_1, Type.Q6_K, Type.Q8_0, Type.MXFP4], ids=lambda t: t.name)
def test_neither_large_nor_small_activations_lose_digits(pool: _native.Pool, type_id: Type, power: int) -> None:
    rng = np.random.default_rng(4)
    check(pool, random_weights(type_id, 20, 256, rng), (activations(20, 256, rng) * 2.0**power).astype(np.float32))


@pytest.mark.parametrize("magnitude", [1e-6, 1e-4, 1.0, 500.0])
def test_neither_large_nor_small_weights_lose_digits(pool: _native.Pool, magnitude: float) -> None:
    """Q8_0 and Q4_K, whose halves d are what is small or large: below 6e-5 a half itself has fewer digits, which are the file's."""
    rng = np.random.default_rng(5)
    for type_id in (Type.Q8_0, Type.Q4_K):
        weights = _with_scale(random_weights(type_id, 17, 512, rng), magnitude)
        check(pool, weights, activations(16, 512, rng))


def test_a_block_a_hundred_times_larger_leaves_the_others_their_digits(pool: _native.Pool) -> None:
    rng = np.random.default_rng(6)
    for type_id in (Type.Q8_0, Type.Q4_0, Type.Q4_K):
        weights = random_weights(type_id, 20, 1024, rng)
        blocks = weights.data.reshape(20, -1, weights.data.size // 20 // (1024 // block_values(type_id)))
        blocks[:, 1, :2] = np.array([0.5], np.float16).view(np.uint8)
        large = decoded(type_id, weights.data, 20, 1024)
        x = activations(16, 1024, rng)
        x[:, block_values(type_id) : 2 * block_values(type_id)] = 0
        check(pool, large, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("type_id", [Type.Q4_K, Type.Q6_K, Type.Q5_0, Type.Q8_0], ids=lambda t: t.name)
def test_what_is_no_number_is_not_hidden(pool: _native.Pool, type_id: Type, bad: float) -> None:
    rng = np.random.default_rng(7)
    weights, x = random_weights(type_id, 20, 512, rng), activations(16, 512, rng)
    good = product(pool, packed(pool, weights), x)
    at_d = {Type.Q6_K: slice(208, 210)}.get(type_id, slice(0, 2))
    weights.data.reshape(20, -1, weights.data.size // 20 // (512 // block_values(type_id)))[3, 1, at_d] = np.array([bad], np.float16).view(np.uint8)
    spoilt = product(pool, packed(pool, weights), x)
    assert not np.isfinite(spoilt[:, 3]).any()
    np.testing.assert_array_equal(np.delete(spoilt, 3, axis=1), np.delete(good, 3, axis=1))

    x[5, 100] = bad
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(np.delete(product(pool, packed(pool, weights), x)[5], 3)).any()


# --- whole layers ------------------------------------------------------------


def packed_experts(pool: _native.Pool, experts: Experts) -> Experts:
    """The same, whose matrices() are in tile order."""

    class Packed(Experts):
        def matrices(self) -> list[_native.Matrix]:
            made = super().matrices()
            for m in made:
                while left := m.strips_left:
                    m.pack(pool, left)
            return made

    return Packed(experts.count, experts.gate, experts.up, experts.down)


@pytest.mark.parametrize("n", [1, 40, 200])
@pytest.mark.parametrize(
    "types",
    [
        (Type.Q4_K, Type.Q4_K, Type.Q6_K),
        (Type.Q4_K, Type.Q4_K, Type.Q8_0),
        (Type.Q4_K, Type.IQ3_S, Type.Q5_0),
        (Type.IQ1_S, Type.IQ1_S, Type.IQ2_XXS),
        (Type.BF16, Type.BF16, Type.F16),
    ],
    ids=str,
)
def test_a_layer_of_experts_errs_by_half_a_percent(pool: _native.Pool, types: tuple[Type, Type, Type], n: int) -> None:
    """Experts with eight and more tokens meet tiles, others int8 (whose error the layers with one token show); IQ3_S is opened from row order."""
    plain = Experts.random(types, 6, 512, 768, seed=n)
    experts = packed_experts(pool, plain)
    x, _, weights = draw(n, 512, 6, 2, seed=n)
    ids = np.array([[0, (1, 2, 3)[t % 3] if t % 7 else 5] for t in range(n)], np.int32)  # 4 has none, 5 a few
    result, exact = run(pool, experts, x, ids, weights), plain.all(x, ids, weights, rounded=False)
    assert np.linalg.norm(result - exact) <= (0.005 if n > 100 else 0.02) * np.linalg.norm(exact)


def test_threads_do_not_change_a_bit(pool: _native.Pool) -> None:
    experts = packed_experts(pool, Experts.random((Type.Q4_K, Type.Q4_K, Type.Q6_K), 5, 256, 512, seed=1))
    x, ids, weights = draw(60, 256, 5, 3, seed=2)
    whole = run(pool, experts, x, ids, weights)
    with open_pool(pool.isa, threads=5) as many:
        np.testing.assert_array_equal(run(many, experts, x, ids, weights), whole)


def test_dense_layers_and_heads_take_tiles_too(pool: _native.Pool) -> None:
    """linear of matrices of different types at once: one meets tiles, one tiles that are opened from rows, one int8, one floats."""
    rng = np.random.default_rng(8)
    weights = [random_weights(t, 40, 256, rng) for t in (Type.Q4_K, Type.F16, Type.Q8_0, Type.F32)]
    matrices = [packed(pool, weights[0]), *map(matrix, weights[1:])]
    x = activations(30, 256, rng)
    outs = [np.zeros((30, 40), np.float32) for _ in matrices]
    pool.linear(matrices, x.ctypes.data, 30, [o.ctypes.data for o in outs], False)
    for out, one in zip(outs, matrices, strict=True):
        np.testing.assert_array_equal(out, product(pool, one, x))


# --- which of them runs ------------------------------------------------------


def test_emulated_tiles_are_never_chosen() -> None:
    assert "amx_emulated" not in _native.available_isas()


def test_tiles_are_first_where_there_are_any() -> None:
    assert ("amx" in _native.available_isas()) == (_native.available_isas()[0] == "amx")
    assert len(ISAS) + len(BF16_ISAS) - 1 == len(_native.compiled_isas()) or "amx" not in _native.compiled_isas()


# --- sanitised ---------------------------------------------------------------


def test_the_body_touches_nothing_outside_and_overflows_nothing(tmp_path: Path) -> None:
    """Emulated, with every buffer as large as it must be and no larger, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    program = tmp_path / "amx_sanitised"
    sources = [f"{ROOT}/native/quant/grids.cpp", f"{ROOT}/tests/native/amx_sanitised.cpp"]
    flags = ["-std=c++20", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-unused-function"]
    done = subprocess.run([compiler, *flags, "-I", f"{ROOT}/native", *sources, "-o", str(program)], capture_output=True, text=True, check=False)
    if done.returncode and ("sanitize" in done.stderr or "asan" in done.stderr):
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stderr


def _with_scale(weights: Weights, magnitude: float) -> Weights:
    """Its halves d (and dmin) replaced by random ones of that magnitude."""
    halves = 2 if weights.type_id is Type.Q4_K else 1
    rows, cols = weights.values.shape
    blocks = weights.data.reshape(rows * cols // block_values(weights.type_id), -1)
    d = np.random.default_rng(1).uniform(0.5, 1, (len(blocks), halves)) * magnitude / (60 if halves == 2 else 1)
    blocks[:, : 2 * halves] = d.astype(np.float16).view(np.uint8)
    return decoded(weights.type_id, weights.data, rows, cols)
