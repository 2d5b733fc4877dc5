"""The paged KV cache and attention against float64, on every instruction set.

A Sequence holds the truth for one geometry: its keys and values as the cache rounds them, and attention over them in float64, computed once
for all positions. Every test then writes a stretch of it through shuffled pages of a cache that is NaN everywhere else, so that whatever is
read beyond start + n shows, and compares a stretch of the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

from server import _native
from tests.native.isas import ISAS, UNIT, address, open_pool, rounding

LENGTHS = [1, 2, 3, 5, 7, 16, 17, 64, 65]
STARTS = [0, 1, 15, 16, 63, 64, 100]
SPARE_PAGES = 3  # that belong to nobody


@pytest.fixture(params=ISAS, scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[_native.Pool]:
    with open_pool(request.param) as opened:
        yield opened


class Sequence:
    """Random queries, keys and values of `tokens` positions, and causal attention over them in float64."""

    def __init__(
        self, tokens: int, heads: int, kv_heads: int, head_dim: int, half: bool, *, page_size: int = 16, scale: float | None = None, spread: float = 1.0
    ) -> None:
        rng = np.random.default_rng([tokens, heads, kv_heads, head_dim])
        self.heads, self.kv_heads, self.head_dim, self.half, self.page_size = heads, kv_heads, head_dim, half, page_size
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q = (spread * rng.normal(size=(tokens, heads, head_dim))).astype(np.float32)
        self.k = (spread * rng.normal(size=(tokens, kv_heads, head_dim))).astype(np.float32)
        self.v = rng.normal(size=(tokens, kv_heads, head_dim)).astype(np.float32)
        self.pages = rng.permutation(-(-tokens // page_size) + SPARE_PAGES).tolist()
        self.expected, self.bound = self._in_float64()

    @property
    def dtype(self) -> type:
        return np.float16 if self.half else np.float32

    def _in_float64(self) -> tuple[np.ndarray, np.ndarray]:
        """Attention [tokens, heads, head_dim], and a bound of its float32 error for each row, [tokens, heads, 1].

        A score is a sum of head_dim products, of an error relative to sum |q k|; an error e of all scores changes a weight by a factor of at most
        exp(2 e), and the weighted sum adds its own rounding, relative to the largest value.
        """
        q = self.q.astype(np.float64) * float(np.float32(self.scale))
        k, v = (np.repeat(x.astype(self.dtype).astype(np.float64), self.heads // self.kv_heads, axis=1) for x in (self.k, self.v))
        causal = np.tril(np.ones((len(q), len(q)), bool))
        scores = np.where(causal, np.einsum("ihd,jhd->hij", q, k), -np.inf)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        sizes = np.where(causal, np.einsum("ihd,jhd->hij", np.abs(q), np.abs(k)), 0).max(axis=2)
        error = np.expm1(np.minimum(2 * rounding(self.head_dim + 1) * sizes, 9.0)) + rounding(len(q)) + 8 * UNIT
        return np.einsum("hij,jhd->ihd", weights, v), np.abs(v).max() * error.T[:, :, None]

    def new_cache(self) -> tuple[np.ndarray, np.ndarray]:
        pages = len(self.pages)
        k_cache = np.full((pages, self.kv_heads, self.head_dim, self.page_size), np.nan, self.dtype)
        return k_cache, np.full((pages, self.kv_heads, self.page_size, self.head_dim), np.nan, self.dtype)

    def store(self, pool: _native.Pool, cache: tuple[np.ndarray, np.ndarray], start: int, end: int) -> None:
        k, v = self.k[start:end], self.v[start:end]
        pages = self.pages[: -(-end // self.page_size)]
        pool.store_kv(
            address(k), address(v), end - start, self.kv_heads, self.head_dim, address(cache[0]), address(cache[1]), self.half, self.page_size, pages, start
        )

    def attend(self, pool: _native.Pool, cache: tuple[np.ndarray, np.ndarray], start: int, end: int) -> np.ndarray:
        """The output of positions start .. end - 1, with what lies behind it checked to be untouched."""
        n = end - start
        q, out = self.q[start:end], np.full((n + 1, self.heads, self.head_dim), np.nan, np.float32)
        pages = self.pages[: -(-end // self.page_size)]
        pool.attention(
            address(q), n, self.heads, self.kv_heads, self.head_dim, address(cache[0]), address(cache[1]), self.half,
            self.page_size, pages, start, self.scale, address(out),
        )  # fmt: skip
        assert np.isnan(out[n]).all()
        return out[:n]

    def check(self, out: np.ndarray, start: int) -> None:
        stretch = slice(start, start + len(out))
        assert (np.abs(out - self.expected[stretch]) <= self.bound[stretch]).all()


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("head_dim", [8, 20, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (9, 3), (4, 4), (5, 1)])
def test_attention_is_that_of_float64(pool: _native.Pool, heads: int, kv_heads: int, head_dim: int, half: bool) -> None:
    sequence = Sequence(max(STARTS) + max(LENGTHS), heads, kv_heads, head_dim, half)
    for start in STARTS:
        for n in LENGTHS:
            cache = sequence.new_cache()
            if start > 0:
                sequence.store(pool, cache, 0, start)
            sequence.store(pool, cache, start, start + n)
            sequence.check(sequence.attend(pool, cache, start, start + n), start)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 256])
def test_page_sizes(pool: _native.Pool, page_size: int, half: bool) -> None:
    sequence = Sequence(300, 6, 2, 32, half, page_size=page_size)
    for start, end in [(0, 300), (0, 49), (47, 48), (63, 66), (64, 70), (255, 257), (299, 300)]:
        cache = sequence.new_cache()
        sequence.store(pool, cache, 0, end)
        sequence.check(sequence.attend(pool, cache, start, end), start)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64, 150])
def test_any_chunks_give_the_same(pool: _native.Pool, chunk: int, half: bool) -> None:
    sequence = Sequence(150, 9, 3, 64, half)
    cache = sequence.new_cache()
    for start in range(0, 150, chunk):
        end = min(start + chunk, 150)
        sequence.store(pool, cache, start, end)
        sequence.check(sequence.attend(pool, cache, start, end), start)


@cache
def long_sequence(head_dim: int) -> Sequence:
    return Sequence(1100, 3, 1, head_dim, True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("head_dim", [24, 64])
def test_long_contexts_are_split_and_merged(isa: str, threads: int, head_dim: int) -> None:
    """Above some hundred keys, decode is shared by runs of keys; with more rows, some rows see nothing of the last runs."""
    sequence = long_sequence(head_dim)
    with open_pool(isa, threads) as pool:
        cache = sequence.new_cache()
        sequence.store(pool, cache, 0, 1100)
        for start, end in [(255, 256), (256, 257), (511, 520), (1000, 1001), (1022, 1025), (1023, 1100), (1099, 1100)]:
            sequence.check(sequence.attend(pool, cache, start, end), start)


@pytest.mark.parametrize(("heads", "kv_heads"), [(100, 1), (97, 1), (64, 2)])
def test_groups_larger_than_a_tile(pool: _native.Pool, heads: int, kv_heads: int) -> None:
    sequence = Sequence(40, heads, kv_heads, 16, True)
    cache = sequence.new_cache()
    sequence.store(pool, cache, 0, 40)
    for start, end in [(0, 40), (39, 40), (37, 40)]:
        sequence.check(sequence.attend(pool, cache, start, end), start)


@pytest.mark.parametrize(("half", "spread"), [(True, 1e4), (False, 1e15)])
@pytest.mark.parametrize("span", [(0, 130), (129, 130)])
def test_huge_scores_do_not_overflow(pool: _native.Pool, span: tuple[int, int], half: bool, spread: float) -> None:
    """With scores of 1e8 and 1e30 the softmax is one-hot: the value of the best key, exactly."""
    sequence = Sequence(130, 4, 2, 64, half, scale=1.0, spread=spread)
    cache = sequence.new_cache()
    sequence.store(pool, cache, 0, span[1])
    out = sequence.attend(pool, cache, *span)
    best = sequence.expected[span[0] : span[1]]
    decided = np.isin(best.astype(sequence.dtype), sequence.v.astype(sequence.dtype)).all(axis=2)  # no other key comes near
    assert decided.mean() > 0.9
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[decided], best[decided].astype(np.float32))


def test_equal_scores_weigh_equally(pool: _native.Pool) -> None:
    sequence = Sequence(90, 3, 1, 64, False, scale=0.0)
    cache = sequence.new_cache()
    sequence.store(pool, cache, 0, 90)
    running_mean = np.cumsum(sequence.v.astype(np.float64), axis=0) / np.arange(1, 91)[:, None, None]
    np.testing.assert_allclose(sequence.attend(pool, cache, 0, 90), np.repeat(running_mean, 3, axis=1), atol=rounding(90) * np.abs(sequence.v).max())


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("head_dim", [8, 20, 33, 64])
@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 16), (5, 6), (15, 17), (3, 100), (16, 31), (0, 200)])
def test_store_kv_fills_its_slots_and_no_others(pool: _native.Pool, start: int, end: int, head_dim: int, half: bool) -> None:
    sequence = Sequence(end, 3, 3, head_dim, half)
    k_cache, v_cache = sequence.new_cache()
    expected_k, expected_v = sequence.new_cache()
    for position in range(start, end):
        page, slot = sequence.pages[position // 16], position % 16
        expected_k[page, :, :, slot] = sequence.k[position]  # numpy rounds to the nearest half, ties to even
        expected_v[page, :, slot] = sequence.v[position]

    sequence.store(pool, (k_cache, v_cache), start, end)

    np.testing.assert_array_equal(k_cache, expected_k)
    np.testing.assert_array_equal(v_cache, expected_v)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_halves_are_rounded_as_numpy_does(pool: _native.Pool) -> None:
    """Every half, the points between halves, just beside them, and what is beyond: 65536 x 6 values through the cache's values."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        between = (halves + np.nextafter(halves.astype(np.float16), np.float16(np.inf)).astype(np.float32)) / 2
        beside = [np.nextafter(between, np.float32(side)) for side in (-np.inf, np.inf)]
        values = np.concatenate([halves, between, *beside, halves * 3e5, halves * 1e-9]).reshape(-1, 1, 64)
    n = len(values)
    k_cache, v_cache = (np.zeros((n // 16, 1, *shape), np.float16) for shape in ((64, 16), (16, 64)))

    pool.store_kv(address(values), address(values), n, 1, 64, address(k_cache), address(v_cache), True, 16, list(range(n // 16)), 0)

    np.testing.assert_array_equal(v_cache.reshape(n, 1, 64), values.astype(np.float16))
    np.testing.assert_array_equal(k_cache.swapaxes(2, 3).reshape(n, 1, 64), values.astype(np.float16))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"page_size": 24}, "multiple of 16"),
        ({"page_size": 0}, "page_size"),
        ({"start": -1}, "start"),
        ({"n": 0}, "n is 0"),
        ({"n": 17}, "pages of 16 tokens cannot hold 17"),
        ({"start": 16}, "cannot hold 17"),
        ({"pages": [-1]}, "negative"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"heads": 3}, "multiple of kv_heads"),
        ({"k_cache": 0}, "k_cache is a null address"),
    ],
)
def test_attention_refuses_what_does_not_fit(pool: _native.Pool, changed: dict[str, object], message: str) -> None:
    memory = np.zeros(4096, np.float32)
    at = address(memory)
    arguments = {
        "q": at, "n": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "k_cache": at, "v_cache": at, "half": False,
        "page_size": 16, "pages": [0], "start": 0, "scale": 1.0, "out": at,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pool.attention(**(arguments | changed))
