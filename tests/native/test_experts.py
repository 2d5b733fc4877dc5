"""The routed experts against float64 on the dequantised weights: formats, shapes, how tokens fall on experts, on every instruction set.

Two bounds. Float weights differ by the order of float32 sums alone: 1e-5 of a token's norm, as in test_linear's ffn. Quantised ones are
held to a float64 model of the same arithmetic, in which the input and the gated values are rounded to int8 as the kernels do: what remains is
float32's rounding and, where that moves a gated value across a rounding boundary, a code that differs by one. Such a code changes its token
by scale / ||hidden|| <= max / 127 / (sqrt(width) rms), with max / rms up to 6 among 32 gated values; two of them in a token are rare, three are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from server import _native
from tests.native.blocks import FLOAT_TYPES, QUANTISED_TYPES, TYPES, Weights, block_values, int8_activations, random_weights
from tests.native.isas import ISAS, address, open_pool

TOKENS = (1, 2, 3, 17, 70)
PADDING = 5  # floats after the output, which must stay as they are


@pytest.fixture(params=ISAS, scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[_native.Pool]:
    with open_pool(request.param) as opened:
        yield opened


@dataclass(frozen=True)
class Experts:
    """`count` experts of random weights."""

    count: int
    gate: Weights
    up: Weights
    down: Weights

    @staticmethod
    def random(types: Sequence[Type], count: int, hidden: int, width: int, seed: int) -> Experts:
        rng = np.random.default_rng(seed)
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        return Experts(count, *(random_weights(t, count * rows, cols, rng) for t, (rows, cols) in zip(types, shapes, strict=True)))

    @property
    def hidden(self) -> int:
        return self.gate.values.shape[1]

    @property
    def width(self) -> int:
        return self.down.values.shape[1]

    def matrices(self) -> list[_native.Matrix]:
        return [_native.Matrix(int(w.type_id), len(w.values) // self.count, w.values.shape[1], w.data, self.count) for w in (self.gate, self.up, self.down)]

    def one(self, expert: int, x: np.ndarray, *, rounded: bool) -> np.ndarray:
        """Expert's ffn of x [n, hidden] in float64; rounded: with the activations as int8 where quantised weights read them."""
        gate, up, down = (w.values.reshape(self.count, -1, w.values.shape[1])[expert] for w in (self.gate, self.up, self.down))
        g, u = (_read(x, w, rounded) @ values.T for w, values in ((self.gate, gate), (self.up, up)))
        return _read((g / (1 + np.exp(-g)) * u).astype(np.float32), self.down, rounded) @ down.T

    def all(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, *, rounded: bool = True) -> np.ndarray:
        total = np.zeros(x.shape)
        for expert in np.unique(ids):
            token, j = np.nonzero(ids == expert)
            np.add.at(total, token, weights[token, j, None] * self.one(expert, x[token], rounded=rounded))
        return total


def _read(x: np.ndarray, weights: Weights, rounded: bool) -> np.ndarray:
    return int8_activations(x) if rounded and weights.type_id in QUANTISED_TYPES else x.astype(np.float64)


def run(pool: _native.Pool, experts: Experts, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, start: float = 0.0) -> np.ndarray:
    out = np.full(x.size + PADDING, start, np.float32)
    out[-PADDING:] = 77
    pool.experts(*experts.matrices(), address(x), len(x), address(ids), address(weights), ids.shape[1], address(out))
    assert (out[-PADDING:] == 77).all()
    return out[:-PADDING].reshape(x.shape)


def draw(n: int, hidden: int, experts: int, top_k: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [n, hidden] that keeps gate and up at about 1, distinct ids [n, top_k], weights [n, top_k]."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, hidden)) / np.sqrt(hidden)).astype(np.float32)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(n)]).astype(np.int32)
    return x, ids, rng.uniform(0.1, 1.0, ids.shape).astype(np.float32)


def check(experts: Experts, result: np.ndarray, exact: np.ndarray) -> None:
    quantised = any(w.type_id in QUANTISED_TYPES for w in (experts.gate, experts.up, experts.down))
    bound = 2 * 6 / 127 / np.sqrt(experts.width) if quantised else 1e-5
    errors = np.linalg.norm(result - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert errors.max() <= bound, errors.max()
    # A flipped code is rare: most tokens have none, and are as near as float32 sums come.
    assert np.median(errors) <= (1e-3 if quantised and experts.width >= 256 else bound), np.median(errors)


# --- formats -----------------------------------------------------------------


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("type_id", TYPES, ids=lambda t: t.name)
def test_every_format(pool: _native.Pool, type_id: Type, n: int) -> None:
    """Widths of 352 where the type's blocks allow it: no multiple of 256."""
    experts = Experts.random([type_id] * 3, 6, 256, 352 if block_values(type_id) <= 32 else 512, seed=n)
    x, ids, weights = draw(n, 256, 6, 5, seed=n)
    check(experts, run(pool, experts, x, ids, weights), experts.all(x, ids, weights))


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize(
    "types",
    [
        (Type.Q4_K, Type.Q4_K, Type.Q8_0),
        (Type.Q4_K, Type.Q6_K, Type.Q4_0),
        (Type.F16, Type.Q8_0, Type.F32),
        (Type.Q4_K, Type.F32, Type.BF16),
        (Type.F32, Type.F32, Type.Q4_1),
    ],
    ids=lambda types: "-".join(t.name for t in types),
)
def test_mixed_formats(pool: _native.Pool, types: tuple[Type, Type, Type], n: int) -> None:
    experts = Experts.random(types, 5, 256, 288, seed=n)
    x, ids, weights = draw(n, 256, 5, 3, seed=n)
    check(experts, run(pool, experts, x, ids, weights), experts.all(x, ids, weights))


@pytest.mark.parametrize("types", [[t] * 3 for t in QUANTISED_TYPES] + [[Type.Q4_K, Type.Q4_K, Type.Q8_0]], ids=lambda types: "-".join(t.name for t in types))
@pytest.mark.parametrize("n", [1, 16])
def test_int8_activations_cost_at_most_two_percent(pool: _native.Pool, types: list[Type], n: int) -> None:
    """Against unrounded float64: 0.5 % for x in gate and in up, about 0.9 % for the gated values, which have longer tails; independent of each other."""
    experts = Experts.random(types, 3, 256, 512, seed=n)
    x, ids, weights = draw(n, 256, 3, 2, seed=n)
    exact = experts.all(x, ids, weights, rounded=False)
    assert np.linalg.norm(run(pool, experts, x, ids, weights) - exact) <= 0.02 * np.linalg.norm(exact)


# --- shapes and how tokens fall on experts -----------------------------------


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (5, 1), (5, 5), (6, 1), (6, 5), (64, 1), (64, 5), (64, 8)])
@pytest.mark.parametrize(("type_id", "hidden", "width"), [(Type.F32, 40, 24), (Type.F16, 24, 40), (Type.F32, 17, 3), (Type.Q8_0, 64, 32), (Type.Q4_0, 32, 96)])
def test_every_shape(pool: _native.Pool, type_id: Type, hidden: int, width: int, count: int, top_k: int, n: int) -> None:
    experts = Experts.random([type_id] * 3, count, hidden, width, seed=count)
    x, ids, weights = draw(n, hidden, count, top_k, seed=n)
    check(experts, run(pool, experts, x, ids, weights), experts.all(x, ids, weights))


@pytest.mark.parametrize("types", [(Type.Q4_K, Type.Q4_K, Type.Q8_0), (Type.F32,) * 3], ids=["quantised", "float"])
def test_the_width_of_v2_lite(pool: _native.Pool, types: tuple[Type, Type, Type]) -> None:
    """1408 is 5.5 x 256: one well-known engine once dropped the last 128 columns of `down`."""
    experts = Experts.random(types, 3, 256, 1408, seed=1)
    for n in (1, 9):
        x, ids, weights = draw(n, 256, 3, 2, seed=n)
        check(experts, run(pool, experts, x, ids, weights), experts.all(x, ids, weights))


@pytest.mark.parametrize("threads", [1, 2, 15])
@pytest.mark.parametrize("types", [(Type.Q4_K, Type.Q4_K, Type.Q8_0), (Type.F32,) * 3], ids=["quantised", "float"])
def test_one_expert_has_all_the_tokens(types: tuple[Type, Type, Type], threads: int) -> None:
    experts = Experts.random(types, 6, 256, 352, seed=1)
    x, _, weights = draw(500, 256, 6, 1, seed=2)
    ids = np.full((500, 1), 4, np.int32)
    with open_pool(_native.available_isas()[0], threads) as pool:
        check(experts, run(pool, experts, x, ids, weights), experts.all(x, ids, weights))


@pytest.mark.parametrize("types", [(Type.Q4_K, Type.Q4_K, Type.Q8_0), (Type.F32,) * 3], ids=["quantised", "float"])
def test_a_hot_expert_beside_cold_and_empty_ones(pool: _native.Pool, types: tuple[Type, Type, Type]) -> None:
    experts = Experts.random(types, 9, 256, 96, seed=1)
    x, _, weights = draw(60, 256, 9, 2, seed=2)
    ids = np.array([[7, (0, 2, 8)[t % 3] if t > 50 else 2] for t in range(60)], np.int32)  # 1, 3 .. 6 have none, 0 and 8 have three
    check(experts, run(pool, experts, x, ids, weights), experts.all(x, ids, weights))


def test_an_expert_twice_counts_twice(pool: _native.Pool) -> None:
    experts = Experts.random([Type.F32] * 3, 4, 24, 40, seed=1)
    for n in (1, 3):
        x, ids, weights = draw(n, 24, 4, 3, seed=n)
        ids[:, 2] = ids[:, 0]
        check(experts, run(pool, experts, x, ids, weights), experts.all(x, ids, weights))


def test_the_sum_is_added_to_what_is_there(pool: _native.Pool) -> None:
    experts = Experts.random([Type.F32] * 3, 4, 24, 40, seed=1)
    for n in (1, 5):
        x, ids, weights = draw(n, 24, 4, 2, seed=n)
        np.testing.assert_allclose(run(pool, experts, x, ids, weights, start=5.0), run(pool, experts, x, ids, weights) + 5, rtol=1e-5, atol=1e-5)


# --- the same result, however it is computed ---------------------------------


@pytest.mark.parametrize("type_id", FLOAT_TYPES, ids=lambda t: t.name)
def test_all_tokens_at_once_agree_with_one_by_one(pool: _native.Pool, type_id: Type) -> None:
    """More tokens to an expert than the change from gemv to gemm."""
    experts = Experts.random([type_id] * 3, 6, 96, 352, seed=1)
    x, ids, weights = draw(70, 96, 6, 5, seed=2)
    together = run(pool, experts, x, ids, weights)
    apart = np.concatenate([run(pool, experts, x[t : t + 1], ids[t : t + 1], weights[t : t + 1]) for t in range(len(x))])
    assert np.linalg.norm(together - apart) <= 1e-6 * np.linalg.norm(apart)


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("types", [(Type.Q4_K, Type.Q4_K, Type.Q8_0), (Type.F32,) * 3], ids=["quantised", "float"])
@pytest.mark.parametrize("isa", ISAS)
def test_the_result_is_the_same_bit_for_bit(isa: str, types: tuple[Type, Type, Type], n: int) -> None:
    """Again and again, and with any number of threads: no sum depends on which thread came first, or on how rows are cut."""
    experts = Experts.random(types, 8, 256, 352, seed=1)
    x, ids, weights = draw(n, 256, 8, 5, seed=2)
    results = []
    for threads in (1, 2, 5):
        with open_pool(isa, threads) as pool:
            results += [run(pool, experts, x, ids, weights) for _ in range(3)]
    assert all((result == results[0]).all() for result in results[1:])


def test_a_nan_stays_with_its_token(pool: _native.Pool) -> None:
    experts = Experts.random([Type.Q8_0] * 3, 4, 64, 96, seed=1)
    x, ids, weights = draw(7, 64, 4, 2, seed=2)
    x[3, 5] = np.nan
    weights[5, 1] = np.nan
    finite = np.isfinite(run(pool, experts, x, ids, weights))
    assert not finite[[3, 5]].any()
    assert finite[[0, 1, 2, 4, 6]].all()


# --- what is refused ---------------------------------------------------------


def test_calls_that_do_not_fit_are_refused(pool: _native.Pool) -> None:
    experts = Experts.random([Type.F32] * 3, 4, 8, 6, seed=1)
    gate, up, down = experts.matrices()
    x, ids, weights = draw(2, 8, 4, 2, seed=1)
    place, factors = address(x), address(weights)
    for bad in (-2, 4):
        ids[1, 1] = bad
        with pytest.raises(ValueError, match=f"expert {bad} of 4"):
            pool.experts(gate, up, down, place, 2, address(ids), factors, 2, place)
    with pytest.raises(ValueError, match="top_k is 0"):
        pool.experts(gate, up, down, place, 2, address(ids), factors, 0, place)
    with pytest.raises(ValueError, match=r"gate is \[6, 8\], but up is \[8, 6\]"):
        pool.experts(gate, down, down, place, 2, address(ids), factors, 2, place)
    fewer = Experts.random([Type.F32] * 3, 3, 8, 6, seed=1).matrices()[1]
    with pytest.raises(ValueError, match="gate, up and down hold 4, 3 and 4 experts"):
        pool.experts(gate, fewer, down, place, 2, address(ids), factors, 2, place)
    with pytest.raises(ValueError, match="gate must be a single matrix, not 4 of them"):
        pool.ffn(gate, up, down, place, 2, place, False)
    with pytest.raises(ValueError, match="must be a single matrix"):
        pool.linear([gate], place, 2, [place], False)


def test_a_matrix_counts_its_bytes() -> None:
    with pytest.raises(ValueError, match=r"3 \[4, 32\] matrices of type 2 have 216 bytes, not 72"):
        _native.Matrix(2, 4, 32, np.zeros(72, np.uint8), 3)
    with pytest.raises(ValueError, match="count is 0"):
        _native.Matrix(2, 4, 32, np.zeros(72, np.uint8), 0)
    assert _native.Matrix(2, 4, 32, np.zeros(216, np.uint8), 3).count == 3


def test_a_slot_without_an_expert_counts_for_nothing(pool: _native.Pool) -> None:
    experts = Experts.random((Type.Q4_K, Type.Q4_K, Type.Q6_K), 5, 256, 256, seed=1)
    x, ids, weights = draw(12, 256, 5, 3, seed=3)
    left = np.random.default_rng(4).random(ids.shape) < 0.5
    left[0] = True  # a token without any
    none = run(pool, experts, x, np.where(left, -1, ids).astype(np.int32), weights)
    zero = run(pool, experts, x, ids, np.where(left, 0, weights).astype(np.float32))
    np.testing.assert_allclose(none, zero, rtol=1e-4, atol=1e-4 * np.abs(zero).max())
    assert not none[0].any()
    assert (run(pool, experts, x, np.full_like(ids, -1), weights, start=2.0) == 2.0).all()


def test_the_sum_takes_the_place_of_what_is_there(pool: _native.Pool) -> None:
    experts = Experts.random((Type.Q4_K, Type.Q4_K, Type.Q6_K), 5, 256, 256, seed=1)
    for n in (1, 9):
        x, ids, weights = draw(n, 256, 5, 3, seed=n)
        out = np.full((n, 256), np.nan, np.float32)
        pool.experts(*experts.matrices(), address(x), n, address(ids), address(weights), 3, address(out), accumulate=False)
        assert (out == run(pool, experts, x, ids, weights)).all()
        pool.experts(*experts.matrices(), address(x), n, address(np.full_like(ids, -1)), address(weights), 3, address(out), accumulate=False)
        assert not out.any()
