"""The router: which experts win, in what order, with what weights; against a plain numpy version of the papers' rules.

The router's matrix is mostly the identity, so that the logits are the inputs to the last bit and ties are real ties. Scores then differ from
float64's by exp's rounding alone, 3 u with the division; a sum of k of them by k u more: 1e-6 is ample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from server import _native
from tests.native.blocks import random_weights
from tests.native.isas import ISAS, address, open_pool


@pytest.fixture(params=ISAS, scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[_native.Pool]:
    with open_pool(request.param) as opened:
        yield opened


@dataclass(frozen=True)
class Rule:
    top_k: int
    sigmoid: bool = False
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    group_top: int = 1
    bias: np.ndarray | None = None

    def run(self, pool: _native.Pool, router: _native.Matrix, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, weights = np.full((len(x), self.top_k), -1, np.int32), np.full((len(x), self.top_k), np.nan, np.float32)
        pool.route(
            router, self.top_k, self.sigmoid, self.normalize, self.scale, self.groups, self.groups_used, self.group_top,
            0 if self.bias is None else address(self.bias), address(x), len(x), address(ids), address(weights),
        )  # fmt: skip
        return ids, weights

    def of_logits(self, pool: _native.Pool, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        identity = np.eye(logits.shape[1], dtype=np.float32)
        return self.run(pool, _native.Matrix(0, *identity.shape, identity), logits)

    def expected(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wide = logits.astype(np.float64)
        powers = np.exp(wide - wide.max(1, keepdims=True))
        scores = 1 / (1 + np.exp(-wide)) if self.sigmoid else powers / powers.sum(1, keepdims=True)
        biased = scores if self.bias is None else scores + self.bias
        ids = np.stack([self._choose(row) for row in biased])
        weights = np.take_along_axis(scores, ids, 1)
        if self.normalize:
            weights /= weights.sum(1, keepdims=True) + 1e-20
        return ids, weights * self.scale

    def _choose(self, biased: np.ndarray) -> np.ndarray:
        groups = biased.reshape(self.groups, -1)
        worth = np.sort(groups, axis=1)[:, -self.group_top :].sum(1)
        used = np.argsort(-worth, kind="stable")[: self.groups_used]
        masked = np.full_like(groups, -np.inf)
        masked[used] = groups[used]
        return np.argsort(-masked.ravel(), kind="stable")[: self.top_k]


def draw_logits(n: int, experts: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, experts)).astype(np.float32) * 2


def biases(experts: int) -> np.ndarray:
    """Of both signs, and so large that biased scores are negative as well."""
    return np.random.default_rng(99).uniform(-2, 1, experts).astype(np.float32)


RULES = {
    "mixtral": (8, Rule(2, normalize=True)),
    "qwen2moe": (60, Rule(4)),
    "qwen3moe": (128, Rule(8, normalize=True)),
    "v2_lite": (64, Rule(6)),
    "v2": (160, Rule(6, scale=16.0, groups=8, groups_used=3)),
    "v3": (256, Rule(8, sigmoid=True, normalize=True, scale=2.5, groups=8, groups_used=4, group_top=2, bias=biases(256))),
    "kimi_k2": (384, Rule(8, sigmoid=True, normalize=True, scale=2.827, bias=biases(384))),
    "odd": (21, Rule(5, sigmoid=True, scale=0.5, groups=7, groups_used=2, group_top=3, bias=biases(21))),
    "all": (6, Rule(6, normalize=True)),
    "one": (1, Rule(1)),
}


@pytest.mark.parametrize("n", [1, 2, 5, 64])
@pytest.mark.parametrize("name", RULES)
def test_the_rule_of_each_family(pool: _native.Pool, name: str, n: int) -> None:
    experts, rule = RULES[name]
    logits = draw_logits(n, experts, seed=n)
    ids, weights = rule.of_logits(pool, logits)
    expected_ids, expected_weights = rule.expected(logits)
    assert (ids == expected_ids).all()
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_ties_go_to_the_lower_id(pool: _native.Pool, sigmoid: bool) -> None:
    logits = np.zeros((3, 24), np.float32)
    logits[1, [20, 3, 11]] = 1
    logits[2] = np.random.default_rng(1).integers(0, 3, 24)
    rule = Rule(5, sigmoid=sigmoid, groups=4, groups_used=2, group_top=2)
    ids, _ = rule.of_logits(pool, logits)
    assert (ids == rule.expected(logits)[0]).all()
    assert ids[0].tolist() == [0, 1, 2, 3, 4]
    assert ids[1].tolist() == [3, 11, 0, 1, 2]


def test_other_groups_are_out_though_all_their_rivals_are_negative(pool: _native.Pool) -> None:
    """A mask of zeros, as older code has it, would prefer an excluded group to a negative biased score."""
    bias = np.full(8, -3, np.float32)
    logits = np.array([[0, 1, 9, 9, 0, 0, 0, 0]], np.float32)
    ids, _ = Rule(2, sigmoid=True, groups=4, groups_used=1, group_top=2, bias=bias).of_logits(pool, logits)
    assert ids.tolist() == [[2, 3]]
    ids, _ = Rule(4, sigmoid=True, groups=4, groups_used=2, group_top=2, bias=bias).of_logits(pool, logits)
    assert ids.tolist() == [[2, 3, 1, 0]]


def test_the_bias_chooses_but_does_not_weigh(pool: _native.Pool) -> None:
    bias = np.array([0, 0, 10, 0], np.float32)
    ids, weights = Rule(2, sigmoid=True, bias=bias).of_logits(pool, np.array([[0, 3, -1, 1]], np.float32))
    assert ids.tolist() == [[2, 1]]
    np.testing.assert_allclose(weights, [[1 / (1 + np.e), 1 / (1 + np.exp(-3))]], rtol=1e-6)


def test_large_logits_do_not_overflow(pool: _native.Pool) -> None:
    logits = np.array([[1000, 999, -1000, 0], [-1000, -1001, -2000, -3000]], np.float32)
    ids, weights = Rule(2, normalize=True).of_logits(pool, logits)
    assert ids.tolist() == [[0, 1], [0, 1]]
    np.testing.assert_allclose(weights, [[np.e / (1 + np.e), 1 / (1 + np.e)]] * 2, rtol=1e-6)
    weights = Rule(4, sigmoid=True, normalize=True).of_logits(pool, logits)[1]
    assert np.isfinite(weights).all()  # the second token's scores are all 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", RULES)
def test_whatever_the_logits_are_ids_are_valid_and_distinct(pool: _native.Pool, name: str, bad: float) -> None:
    """A NaN in x makes all its token's logits NaN; one in the router's row, or an overflow, makes some so."""
    experts, rule = RULES[name]
    logits = draw_logits(3, experts, seed=1)
    router = np.eye(experts, dtype=np.float32)
    router[:: max(1, experts // 5)] = bad
    logits[1] = bad
    ids, weights = rule.run(pool, _native.Matrix(0, experts, experts, router), logits)
    assert ((ids >= 0) & (ids < experts)).all()
    assert all(len(set(row)) == rule.top_k for row in ids.tolist())
    assert not np.isfinite(weights[1]).all() or not np.isnan(bad)  # a token that is NaN is not hidden


def test_nan_is_chosen_last(pool: _native.Pool) -> None:
    """Of 8 experts 0, 1 and 5 are NaN; so is the worth of the group that holds two of them, when it is worth two scores."""
    router = np.eye(8, dtype=np.float32)
    router[[0, 1, 5]] = np.nan
    x = np.array([[9, 9, 4, 1, 2, 9, 7, 8]], np.float32)
    matrix = _native.Matrix(0, 8, 8, router)
    assert Rule(5, sigmoid=True).run(pool, matrix, x)[0].tolist() == [[7, 6, 2, 4, 3]]
    assert Rule(7, sigmoid=True).run(pool, matrix, x)[0].tolist() == [[7, 6, 2, 4, 3, 0, 1]]
    grouped = Rule(2, sigmoid=True, groups=4, groups_used=2, group_top=2)
    assert grouped.run(pool, matrix, x)[0].tolist() == [[7, 6]]


@pytest.mark.parametrize("type_id", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_K], ids=lambda t: t.name)
@pytest.mark.parametrize("n", [1, 7, 40])
def test_a_router_of_any_format_gives_the_logits_of_linear(pool: _native.Pool, type_id: Type, n: int) -> None:
    rng = np.random.default_rng(n)
    weights = random_weights(type_id, 24, 512, rng)
    router = _native.Matrix(int(type_id), 24, 512, weights.data)
    x = rng.standard_normal((n, 512)).astype(np.float32) / np.float32(30)
    logits = np.empty((n, 24), np.float32)
    pool.linear([router], address(x), n, [address(logits)], False)
    rule = Rule(5, sigmoid=True, normalize=True, groups=3, groups_used=2, group_top=2, bias=biases(24))
    ids, chosen = rule.run(pool, router, x)
    expected_ids, expected_weights = rule.expected(logits)
    assert (ids == expected_ids).all()
    np.testing.assert_allclose(chosen, expected_weights, rtol=1e-6)


def test_rules_that_do_not_fit_are_refused(pool: _native.Pool) -> None:
    logits = draw_logits(1, 12, seed=1)
    for rule, message in [
        (Rule(13), "top_k is 13, but the groups in use have 12 experts"),
        (Rule(7, groups=4, groups_used=2), "top_k is 7, but the groups in use have 6 experts"),
        (Rule(1, groups=5), "12 experts cannot stand in 5 equal groups"),
        (Rule(1, groups=4, groups_used=5), "5 groups to use, but there are 4"),
        (Rule(1, groups=4, groups_used=2, group_top=4), "group_top is 4, but a group has 3 experts"),
        (Rule(0), "top_k is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            rule.of_logits(pool, logits)
