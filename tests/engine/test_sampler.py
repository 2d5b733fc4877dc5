"""The sampler against the definitions, on distributions small enough to write down."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from server.engine.sampler import TokenSampler
from server.errors import EngineFailure
from server.types import SamplingParams
from tests.fakes import FakeMask

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]))
WIDE = torch.randn(50_000, generator=torch.Generator().manual_seed(3)) * 2


def draws(params: SamplingParams, count: int, logits: torch.Tensor = LOGITS, prompt: tuple[int, ...] = ()) -> list[int]:
    sampler = TokenSampler(params, prompt)
    return [sampler.draw(logits).token_id for _ in range(count)]


def support(params: SamplingParams, prompt: tuple[int, ...] = ()) -> set[int]:
    return set(draws(params, 600, prompt=prompt))


def test_greedy_is_argmax() -> None:
    assert draws(SamplingParams(temperature=0.0), 3, WIDE) == [int(WIDE.argmax())] * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    count = 8000
    seen = Counter(draws(SamplingParams(temperature=temperature, seed=5), count))
    for token, p in enumerate((LOGITS / temperature).softmax(0).tolist()):
        sigma = math.sqrt(p * (1 - p) / count)
        assert abs(seen[token] / count - p) < 5 * sigma + 1e-9, token


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(top_k=2, seed=1), {0, 1}),
        (SamplingParams(top_p=0.5, seed=1), {0}),  # 0.5 is reached by the first token alone
        (SamplingParams(top_p=0.51, seed=1), {0, 1}),
        (SamplingParams(top_p=0.9, seed=1), {0, 1, 2}),  # what three have, but for rounding
        (SamplingParams(top_p=0.90001, seed=1), {0, 1, 2, 3}),
        (SamplingParams(min_p=0.29, seed=1), {0, 1, 2}),  # 0.29 * 0.5 = 0.145
        (SamplingParams(top_k=3, top_p=0.8, seed=1), {0, 1}),  # top_p is of what top_k left: 0.75 / 0.9
        (SamplingParams(top_k=100, seed=1), {0, 1, 2, 3, 4}),
        (SamplingParams(top_p=0.9, min_p=0.4, seed=1), {0, 1}),
    ],
)
def test_truncation_keeps_exactly_these(params: SamplingParams, expected: set[int]) -> None:
    assert support(params) == expected


@pytest.mark.parametrize(("top_p", "min_p"), [(0.5, 0.0), (0.9, 0.0), (0.999, 0.0), (1.0, 0.001), (0.95, 0.01)])
def test_wide_vocabulary_needs_no_full_sort_but_equals_it(top_p: float, min_p: float) -> None:
    sampler = TokenSampler(SamplingParams(top_p=top_p, min_p=min_p, seed=1), ())
    ids, _ = sampler._candidates(WIDE, float(WIDE.max()))
    assert ids is not None
    p, order = WIDE.double().softmax(0).sort(descending=True)
    keep = int((p.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else len(p)
    if min_p:
        keep = min(keep, int((p >= min_p * p[0]).sum()))
    slack = 4  # float32 sums move the border by a few tokens of the tail, of probability 1e-7 each
    assert abs(len(ids) - keep) <= slack
    assert set(order[: keep - slack].tolist()) <= set(ids.tolist()) <= set(order[: keep + slack].tolist())


def test_same_seed_same_tokens_other_seed_others() -> None:
    one, again, other = (draws(SamplingParams(seed=seed), 40, WIDE) for seed in (7, 7, 8))
    assert one == again
    assert one != other
    assert draws(SamplingParams(), 40, WIDE) != draws(SamplingParams(), 40, WIDE)


def test_logit_bias_forces_and_forbids() -> None:
    assert support(SamplingParams(logit_bias={3: 100.0}, seed=1)) == {3}
    assert support(SamplingParams(logit_bias={0: -100.0, 1: -100.0}, seed=1)) == {2, 3, 4}


def test_penalties_change_the_logits_as_defined() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    logits = torch.tensor([3.0, 2.0, -1.0, 0.625])
    sampler = TokenSampler(params, (2,))
    assert sampler._adjusted(logits).tolist() == [3.0, 2.0, -2.0, 0.625]
    assert sampler.draw(logits).token_id == 0
    assert sampler._adjusted(logits).tolist() == [3.0 / 2 - 0.75, 2.0, -2.0, 0.625]
    assert [sampler.draw(logits).token_id for _ in range(3)] == [1, 0, 3]  # 2.0; then 0.75 against 0.25; then 0.5 against 0.625
    assert logits.tolist() == [3.0, 2.0, -1.0, 0.625]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    params = SamplingParams(temperature=0.0, top_logprobs=2, logit_bias={4: 100.0})
    drawn = TokenSampler(params, ()).draw(LOGITS)
    assert drawn.token_id == 4
    assert drawn.logprob is not None
    assert drawn.logprob.logprob == pytest.approx(math.log(0.03), abs=1e-6)
    assert [(i, round(math.exp(p), 4)) for i, p in drawn.logprob.top] == [(0, 0.5), (1, 0.25)]
    assert TokenSampler(SamplingParams(), ()).draw(LOGITS).logprob is None


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=1, top_k=4),
        SamplingParams(seed=1, top_p=0.8, min_p=0.01),
        SamplingParams(seed=1, repetition_penalty=3.0, frequency_penalty=2.0, logit_bias={0: 100.0, 4: -100.0}),
    ],
    ids=str,
)
def test_a_constraint_comes_before_all_else_and_hears_what_was_drawn(params: SamplingParams) -> None:
    mask = FakeMask({1, 4}, {4}, None, words=1)
    sampler = TokenSampler(params, (0, 1), mask)
    drawn = [sampler.draw(LOGITS).token_id for _ in range(300)]
    assert mask.accepted == drawn
    assert set(drawn[0::3]) <= {1, 4}
    assert set(drawn[1::3]) == {4}
    if params.temperature and not params.logit_bias:
        assert set(drawn[0::3]) == {1, 4} - ({4} if params.min_p else set())
        assert 0 in drawn[2::3]


def test_what_a_constraint_leaves_has_the_models_proportions() -> None:
    sampler = TokenSampler(SamplingParams(seed=5), (), FakeMask({1, 2, 4}, words=1))
    seen, count = Counter(sampler.draw(LOGITS).token_id for _ in range(8000)), 8000
    for token, p in {1: 0.25, 2: 0.15, 4: 0.03}.items():
        p /= 0.43
        assert abs(seen[token] / count - p) < 5 * math.sqrt(p * (1 - p) / count), token


@pytest.mark.parametrize("words", [1, 2, 3])
def test_a_mask_may_be_shorter_or_longer_than_the_vocabulary(words: int) -> None:
    """A model's head is often padded beyond its tokenizer's last token: what the mask does not speak of is forbidden."""
    logits = torch.arange(64.0)
    assert TokenSampler(SamplingParams(temperature=0.0), (), FakeMask({3, 7}, words=words)).draw(logits).token_id == 7


def test_logprobs_do_not_see_the_constraint() -> None:
    drawn = TokenSampler(SamplingParams(temperature=0.0, top_logprobs=1), (), FakeMask({3}, words=1)).draw(LOGITS)
    assert drawn.token_id == 3
    assert drawn.logprob is not None
    assert drawn.logprob.logprob == pytest.approx(math.log(0.07), abs=1e-6)
    assert drawn.logprob.top[0][0] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_logits_are_an_error_not_a_token(bad: float) -> None:
    with pytest.raises(EngineFailure, match="not finite"):
        draws(SamplingParams(), 1, torch.tensor([1.0, bad, 0.0]))


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=2, min_p=0.1)], ids=str)
def test_where_no_token_is_left_none_is_drawn(params: SamplingParams) -> None:
    """As under a mask that allows nothing but tokens beyond the model's."""
    with pytest.raises(EngineFailure, match="not finite"):
        TokenSampler(params, (), FakeMask({40}, words=2)).draw(LOGITS)
