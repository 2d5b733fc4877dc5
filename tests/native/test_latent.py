"""Latent attention against float64 in its expanded form, on every instruction set.

A Sequence holds one geometry's random queries, latents and weights. The latents that a call must have stored are checked against float64; the
attention over what the cache holds is then computed with every head's keys and values expanded (k = [k_b^T c ; k_rope], v = v_b c), so the test
proves the absorption too. Pages are shuffled, and the cache is NaN wherever nothing was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from server import _native
from tests.native.isas import ISAS, UNIT, address, open_pool, rounding

EPS = 1e-5
SPARE_PAGES = 3  # that belong to nobody
SPANS = [(0, 1), (0, 3), (0, 17), (0, 70), (15, 17), (16, 17), (31, 33), (60, 130), (63, 64), (64, 65), (100, 165)]


@pytest.fixture(params=ISAS, scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[_native.Pool]:
    with open_pool(request.param) as opened:
        yield opened


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv_lora: int
    rope: int
    nope: int
    v_dim: int


class Sequence:
    """Random inputs of `tokens` positions, and what latent attention makes of them in float64."""

    def __init__(self, tokens: int, sizes: Sizes, half: bool, *, interleaved: bool = True, page_size: int = 16, spread: float = 1.0) -> None:
        s, rng = sizes, np.random.default_rng([tokens, sizes.heads, sizes.kv_lora])
        self.sizes, self.half, self.interleaved, self.page_size = sizes, half, interleaved, page_size
        self.scale = float(np.float32((s.nope + s.rope) ** -0.5))
        self.q = (spread * rng.normal(size=(tokens, s.heads, s.nope + s.rope))).astype(np.float32)
        self.latent = (3 * rng.normal(size=(tokens, s.kv_lora + s.rope))).astype(np.float32)
        self.norm = (1 + 0.2 * rng.normal(size=s.kv_lora)).astype(np.float32)
        angles = rng.uniform(-3, 3, (tokens, s.rope // 2))
        self.table = np.stack((np.cos(angles), np.sin(angles)), -1).astype(np.float32)
        self.k_b = (rng.normal(size=(s.heads, s.kv_lora, s.nope)) / s.kv_lora**0.5).astype(np.float32)
        self.v_b = (rng.normal(size=(s.heads, s.v_dim, s.kv_lora)) / s.kv_lora**0.5).astype(np.float32)
        self.pages = rng.permutation(-(-tokens // page_size) + SPARE_PAGES).tolist()

    def new_cache(self) -> np.ndarray:
        return np.full((len(self.pages), self.page_size, self.sizes.kv_lora + self.sizes.rope), np.nan, np.float16 if self.half else np.float32)

    def attend(self, pool: _native.Pool, cache: np.ndarray, start: int, end: int) -> np.ndarray:
        """The output [n, heads, v_dim] of positions start .. end - 1, which are written to the cache; what lies behind it is checked."""
        s, n = self.sizes, end - start
        q, latent = self.q[start:end].copy(), self.latent[start:end].copy()
        out = np.full((n + 1, s.heads, s.v_dim), np.nan, np.float32)
        k_b, v_b = (_native.Matrix(int(Type.F32), *w.shape[1:], w.view(np.uint8), s.heads) for w in (self.k_b, self.v_b))
        pool.attend_latent(
            address(q), address(latent), n, address(self.norm), EPS, address(self.table), end, s.rope, self.interleaved,
            address(cache), self.half, self.page_size, self.pages[: -(-end // self.page_size)], start,
            k_b, v_b, self.scale, address(out),
        )  # fmt: skip
        assert np.isnan(out[n]).all()
        return out[:n]

    def stored(self, cache: np.ndarray, end: int) -> np.ndarray:
        """What the cache holds of positions 0 .. end - 1, as float64 [end, kv_lora + rope]."""
        return cache[self.pages].reshape(-1, cache.shape[2])[:end].astype(np.float64)

    def latents(self, end: int) -> tuple[np.ndarray, np.ndarray]:
        """What the cache should hold, in float64, and a bound of its error: the roundings of the norm or the rotation, and the cache's own."""
        x, lora = self.latent[:end].astype(np.float64), self.sizes.kv_lora
        normed = x[:, :lora] / np.sqrt((x[:, :lora] ** 2).mean(1, keepdims=True) + EPS) * self.norm
        turned, sizes = self._rotate(x[:, None, lora:], self.table[:end])
        exact = np.concatenate((normed, turned[:, 0]), 1)
        error = np.concatenate(((rounding(lora) + 4 * UNIT) * np.abs(normed), 4 * UNIT * sizes[:, 0]), 1)
        return exact, error + (2.0**-11 * np.abs(exact) + 2.0**-25 if self.half else 0)

    def expected(self, seen: np.ndarray, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Attention [n, heads, v_dim] of positions start .. end - 1 over the latents `seen` [end, kv_lora + rope], and a bound of its error.

        Absorbed, a score is k_b q (sums of nope products) times c, plus q_rope k_rope (sums of kv_lora + rope products in all): its error is
        relative to the same sum of magnitudes. A score's error e changes a weight by a factor of at most exp(2 e); the weighted sum of
        latents adds its own rounding, relative to the largest latent; v_b passes all that on and adds a sum of kv_lora products.
        """
        s, q = self.sizes, self.q[start:end].astype(np.float64)
        turned, turned_sizes = self._rotate(q[..., s.nope :], self.table[start:end])
        c, k_rope = seen[:, : s.kv_lora], seen[:, s.kv_lora :]
        k_b, v_b = self.k_b.astype(np.float64), self.v_b.astype(np.float64)

        def scores(nope: np.ndarray, rope: np.ndarray, k_b: np.ndarray, c: np.ndarray, k_rope: np.ndarray) -> np.ndarray:
            keys = np.einsum("hcd,jc->jhd", k_b, c)
            return self.scale * (np.einsum("ihd,jhd->hij", nope, keys) + np.einsum("ihd,jd->hij", rope, k_rope))

        causal = np.arange(end)[None] <= np.arange(start, end)[:, None]
        exact = np.where(causal, scores(q[..., : s.nope], turned, k_b, c, k_rope), -np.inf)
        weights = np.exp(exact - exact.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        sizes = np.where(causal, scores(np.abs(q[..., : s.nope]), turned_sizes, np.abs(k_b), np.abs(c), np.abs(k_rope)), 0).max(axis=2)
        error = np.expm1(np.minimum(2 * (rounding(s.nope) + rounding(s.kv_lora + s.rope + 5)) * sizes, 9.0)) + rounding(end) + 8 * UNIT
        result = np.einsum("hij,jhd->ihd", weights, np.einsum("hdc,jc->jhd", v_b, c))
        largest = np.einsum("hdc,c->hd", np.abs(v_b), np.abs(c).max(axis=0))
        return result, (error.T + rounding(s.kv_lora))[:, :, None] * largest[None]

    def check(self, pool: _native.Pool, cache: np.ndarray, start: int, end: int) -> None:
        """Attend over a cache that holds positions 0 .. start - 1, and compare what was written and what came out."""
        out, seen = self.attend(pool, cache, start, end), self.stored(cache, end)
        latents, latent_error = self.latents(end)
        assert (np.abs(seen - latents) <= latent_error).all()
        expected, bound = self.expected(seen, start, end)
        assert (np.abs(out - expected) <= bound).all()

    def _rotate(self, x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x [n, heads, rope] rotated by the table, and the sums of magnitudes behind each value."""
        half = x.shape[2] // 2
        first, second = (slice(0, None, 2), slice(1, None, 2)) if self.interleaved else (slice(0, half), slice(half, None))
        a, b, cos, sin = x[..., first], x[..., second], table[:, None, :, 0].astype(np.float64), table[:, None, :, 1].astype(np.float64)
        turned, sizes = np.empty_like(x), np.empty_like(x)
        turned[..., first], turned[..., second] = a * cos - b * sin, b * cos + a * sin
        sizes[..., first], sizes[..., second] = np.abs(a * cos) + np.abs(b * sin), np.abs(b * cos) + np.abs(a * sin)
        return turned, sizes


SIZES = [
    Sizes(heads=1, kv_lora=24, rope=8, nope=12, v_dim=20),
    Sizes(heads=3, kv_lora=33, rope=2, nope=5, v_dim=7),
    Sizes(heads=5, kv_lora=64, rope=16, nope=32, v_dim=32),
    Sizes(heads=16, kv_lora=40, rope=6, nope=9, v_dim=16),
]


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_absorbed_is_expanded(pool: _native.Pool, sizes: Sizes, half: bool) -> None:
    sequence = Sequence(165, sizes, half)
    for start, end in SPANS:
        cache = sequence.new_cache()
        if start > 0:
            sequence.attend(pool, cache, 0, start)
        sequence.check(pool, cache, start, end)


@pytest.mark.parametrize("page_size", [16, 48, 64])
def test_only_its_slots_are_written(pool: _native.Pool, page_size: int) -> None:
    sequence = Sequence(150, SIZES[1], True, page_size=page_size)
    cache = sequence.new_cache()
    sequence.attend(pool, cache, 0, 130)
    before = cache.copy()
    sequence.attend(pool, cache, 130, 150)
    written = cache[sequence.pages].reshape(-1, cache.shape[2])
    assert np.isnan(written[150:]).all()
    np.testing.assert_array_equal(written[:130], before[sequence.pages].reshape(written.shape)[:130])


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64, 150])
def test_any_chunks_give_the_same(pool: _native.Pool, chunk: int, interleaved: bool, half: bool) -> None:
    sequence = Sequence(150, SIZES[2], half, interleaved=interleaved, page_size=64)
    cache = sequence.new_cache()
    for start in range(0, 150, chunk):
        sequence.check(pool, cache, start, min(start + chunk, 150))


@pytest.mark.parametrize("heads", [47, 48, 49, 97, 128])
def test_heads_fill_more_than_a_tile(pool: _native.Pool, heads: int) -> None:
    sequence = Sequence(40, Sizes(heads, kv_lora=24, rope=8, nope=12, v_dim=20), True)
    for start, end in [(0, 40), (39, 40), (37, 40)]:
        cache = sequence.new_cache()
        if start > 0:
            sequence.attend(pool, cache, 0, start)
        sequence.check(pool, cache, start, end)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("heads", [4, 16])
def test_long_contexts_are_split_and_merged(isa: str, threads: int, heads: int) -> None:
    """Above some hundred keys, decode is shared by runs of keys; with more rows, some rows see nothing of the last runs."""
    sequence = Sequence(1100, Sizes(heads, kv_lora=24, rope=8, nope=12, v_dim=20), True, page_size=64)
    with open_pool(isa, threads) as pool:
        for start, end in [(255, 257), (511, 520), (1000, 1001), (1022, 1025), (1023, 1100), (1099, 1100)]:
            cache = sequence.new_cache()
            sequence.attend(pool, cache, 0, start)
            sequence.check(pool, cache, start, end)


@pytest.mark.parametrize("span", [(0, 65), (64, 65)])
def test_the_sizes_of_v2_lite(pool: _native.Pool, span: tuple[int, int]) -> None:
    """Keys of several depth blocks."""
    sequence = Sequence(65, Sizes(heads=16, kv_lora=512, rope=64, nope=128, v_dim=128), True, page_size=64)
    cache = sequence.new_cache()
    if span[0] > 0:
        sequence.attend(pool, cache, 0, span[0])
    sequence.check(pool, cache, *span)


def test_many_heads_go_in_blocks_of_tokens(pool: _native.Pool) -> None:
    """400 heads of 512 make 1.6 MB of absorbed queries and results a token: the 48 MiB that are kept of them at once take 30 tokens."""
    sequence = Sequence(40, Sizes(heads=400, kv_lora=512, rope=2, nope=4, v_dim=4), True)
    sequence.check(pool, sequence.new_cache(), 0, 40)


def test_huge_scores_do_not_overflow(pool: _native.Pool) -> None:
    """With scores of about 1e15 the softmax is one-hot: every output is some latent's value."""
    sequence = Sequence(130, SIZES[2], False, spread=1e15)
    cache = sequence.new_cache()
    out, seen = sequence.attend(pool, cache, 0, 130), sequence.stored(cache, 130)
    values = np.einsum("hdc,jc->jhd", sequence.v_b.astype(np.float64), seen[:, : SIZES[2].kv_lora])
    expected, _ = sequence.expected(seen, 0, 130)
    near = np.abs(expected - values[:, None]).max(axis=3).min(axis=0) < 1e-9  # [n, heads]: decided by one key
    assert near.mean() > 0.9
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[near], expected[near], rtol=0, atol=1e-5 * np.abs(values).max())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"page_size": 24}, "multiple of 16"),
        ({"start": -1}, "start"),
        ({"n": 0}, "n is 0"),
        ({"n": 17}, "pages of 16 tokens cannot hold 17"),
        ({"pages": [-1]}, "negative"),
        ({"rot_dim": 3}, "even"),
        ({"positions": 1, "start": 1}, "rotary table has 1 positions, too few for 2"),
        ({"norm": 0}, "norm is a null address"),
        ({"k_b": (4, 3, 3)}, "k_b has 3 heads, but v_b has 2"),
        ({"k_b": (6, 3, 2)}, "k_b has 6 rows, but v_b has 4"),
    ],
)
def test_what_does_not_fit_is_refused(pool: _native.Pool, changed: dict[str, Any], message: str) -> None:
    memory = np.zeros(4096, np.float32)
    at = address(memory)

    def matrices(rows: int, cols: int, count: int) -> _native.Matrix:
        return _native.Matrix(int(Type.F32), rows, cols, memory[: count * rows * cols].view(np.uint8), count)

    arguments = {
        "q": at, "latent": at, "n": 1, "norm": at, "eps": EPS, "table": at, "positions": 16, "rot_dim": 2, "interleaved": True, "cache": at, "half": False,
        "page_size": 16, "pages": [0], "start": 0, "scale": 1.0, "out": at,
        "k_b": matrices(4, 3, 2), "v_b": matrices(5, 4, 2),
    }  # fmt: skip
    if "k_b" in changed:
        changed = {"k_b": matrices(*changed["k_b"])}
    with pytest.raises(ValueError, match=message):
        pool.attend_latent(**(arguments | changed))
