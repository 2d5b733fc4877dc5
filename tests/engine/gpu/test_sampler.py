"""The GPU's sampler against the CPU's, request by request; on a machine without a GPU it runs on the CPU, with the kernels' twin."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from server.engine.gpu.sampler import GpuSampler
from server.engine.kernels import plain_small
from server.engine.protocol import Drawn
from server.engine.sampler import SamplerState, TokenSampler
from server.errors import EngineFailure
from server.types import SamplingParams
from tests.fakes import FakeMask

VOCAB = 3000
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=1, temperature=0.4, top_p=0.9),
    SamplingParams(seed=1, top_k=1),
    SamplingParams(seed=1, top_k=30, min_p=0.05),
    SamplingParams(seed=1, top_k=700, top_p=0.97, temperature=1.7),
    SamplingParams(seed=1, top_k=10**6, top_p=1e-6),
    SamplingParams(seed=1, min_p=1.0),
    SamplingParams(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.5),
    SamplingParams(seed=1, top_p=0.8, repetition_penalty=1.3, frequency_penalty=-0.5, logit_bias={3: 5.0, 7: -100.0}),
    SamplingParams(seed=1, repetition_penalty=1e-40),
]


def gpu_sampler(vocab: int = VOCAB) -> GpuSampler:
    """On a GPU with Triton's kernels where there is one."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        sample = pytest.importorskip("server.engine.kernels.sample")
        return GpuSampler(vocab, torch.device("cuda"), sample.draw)
    return GpuSampler(vocab, torch.device("cpu"), plain_small.draw)


def draw(sampler: GpuSampler, logits: torch.Tensor, state: SamplerState) -> Drawn:
    sampler.enqueue(logits.to(sampler.logits.device), state)
    if sampler.logits.is_cuda:
        torch.cuda.current_stream().synchronize()
    return sampler.result()


def logits_of(step: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(step)) * 3


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_the_same_seed_and_logits_give_the_cpus_tokens(params: SamplingParams) -> None:
    prompt = tuple(range(0, VOCAB, 3))
    sampler, cpu = gpu_sampler(), TokenSampler(params, prompt)
    state = sampler.begin(params, prompt)
    for step in range(25):
        logits = logits_of(step % 5)  # so that tokens come again
        assert draw(sampler, logits, state).token_id == cpu.draw(logits).token_id, step


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_a_constrained_request_draws_the_cpus_tokens(params: SamplingParams) -> None:
    allowed = [set(range(i, VOCAB, 7)) for i in range(3)] + [{5}, None, {VOCAB - 1, 1024, 31}]
    masks = [FakeMask(*allowed, words=-(-VOCAB // 32)) for _ in range(2)]
    sampler, cpu = gpu_sampler(), TokenSampler(params, (1, 2), masks[0])
    state = sampler.begin(params, (1, 2), masks[1])
    for step in range(18):
        drawn = draw(sampler, logits_of(step % 5), state).token_id
        assert drawn == cpu.draw(logits_of(step % 5)).token_id, step
        assert (now := allowed[step % 6]) is None or drawn in now
    assert masks[0].accepted == masks[1].accepted


def test_a_mask_ends_with_the_tokenizers_vocabulary_and_with_its_request() -> None:
    """The head may be padded beyond the tokenizer; and the next request finds no constraint, be it adjusted in other ways or not."""
    sampler, logits = gpu_sampler(), torch.arange(float(VOCAB))
    greedy = SamplingParams(temperature=0.0)
    for words, best in ((1, 9), (-(-VOCAB // 32) + 3, 9)):
        assert draw(sampler, logits, sampler.begin(greedy, (), FakeMask({3, 9}, words=words))).token_id == best
        assert draw(sampler, logits, sampler.begin(greedy, ())).token_id == VOCAB - 1
        assert draw(sampler, logits, sampler.begin(SamplingParams(temperature=0.0, presence_penalty=1.0), ())).token_id == VOCAB - 1


def test_two_requests_take_turns() -> None:
    sampler, prompts = gpu_sampler(), ((1, 2), (5,))
    params = [SamplingParams(seed=2, repetition_penalty=1.5, top_p=0.7), SamplingParams(temperature=0.0, presence_penalty=2.0, logit_bias={9: 3.0})]
    pairs = [(sampler.begin(p, prompt), TokenSampler(p, prompt)) for p, prompt in zip(params, prompts, strict=True)]
    for step in range(12):
        state, cpu = pairs[step // 2 % 2]
        assert draw(sampler, logits_of(0), state) == cpu.draw(logits_of(0))


@pytest.mark.parametrize("count", [0, 3, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_the_cpus(count: int, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=4, top_logprobs=count, logit_bias={100: 12.0})
    sampler = gpu_sampler()
    mine, theirs = draw(sampler, logits_of(1), sampler.begin(params, ())).logprob, TokenSampler(params, ()).draw(logits_of(1)).logprob
    assert mine is not None
    assert theirs is not None
    assert mine.token_id == theirs.token_id
    assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
    assert [p for _, p in mine.top] == pytest.approx([p for _, p in theirs.top], abs=1e-5)


def test_a_small_vocabulary_has_no_more_leaders_than_tokens() -> None:
    sampler = gpu_sampler(5)
    logprob = draw(sampler, logits_of(1, 5), sampler.begin(SamplingParams(temperature=0.0, top_logprobs=20), ())).logprob
    assert logprob is not None
    assert len(logprob.top) == 5


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(seed=11), 8),
        (SamplingParams(seed=11, temperature=2.0), 8),
        (SamplingParams(seed=11, top_k=4), 4),
        (SamplingParams(seed=11, top_p=0.78), 4),  # what four have, but for rounding
        (SamplingParams(seed=11, min_p=0.35), 5),
        (SamplingParams(seed=11, top_k=4, top_p=0.8), 3),  # 0.65 / 0.78 of what top_k left
    ],
    ids=str,
)
def test_the_frequencies_are_the_distributions(params: SamplingParams, kept: int) -> None:
    """Pearson's chi-square, at six standard deviations of its normal approximation."""
    p = torch.tensor([0.25, 0.22, 0.18, 0.13, 0.09, 0.07, 0.04, 0.02])
    order = torch.tensor([5, 0, 7, 2, 4, 1, 6, 3])  # so that the vocabulary's order is not the order of likelihood
    logits = torch.empty(8).index_copy_(0, order, p.log())
    expected = torch.zeros(8).index_copy_(0, order[:kept], (p[:kept].log() / params.temperature).softmax(0))
    sampler, count = gpu_sampler(8), 3000
    state = sampler.begin(params, ())
    seen = Counter(draw(sampler, logits, state).token_id for _ in range(count))
    assert set(seen) == set(order[:kept].tolist())
    chi_square = sum((seen[i] - count * q) ** 2 / (count * q) for i, q in enumerate(expected.tolist()) if q > 0)
    freedom = kept - 1
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [PARAMS[0], PARAMS[5], PARAMS[9]], ids=str)
def test_damaged_logits_are_an_error_not_a_token(bad: float, params: SamplingParams) -> None:
    sampler, logits = gpu_sampler(), logits_of(1)
    logits[77] = bad
    state = sampler.begin(params, ())
    with pytest.raises(EngineFailure, match="not finite"):
        draw(sampler, logits, state)
    other = sampler.begin(params, ())
    assert draw(sampler, logits_of(1), other).token_id == TokenSampler(params, ()).draw(logits_of(1)).token_id


@pytest.mark.parametrize("params", [PARAMS[0], PARAMS[5], PARAMS[9]], ids=str)
def test_where_no_token_is_left_none_is_drawn(params: SamplingParams) -> None:
    sampler, logits = gpu_sampler(), logits_of(1)
    beyond = FakeMask({len(logits)}, words=len(logits) // 32 + 1)
    with pytest.raises(EngineFailure, match="not finite"):
        draw(sampler, logits, sampler.begin(params, (), beyond))


@pytest.mark.gpu
def test_every_way_is_recorded_and_leaves_no_trace() -> None:
    sampler = gpu_sampler()
    sampler.warm_up()
    for params in PARAMS:
        state, cpu = sampler.begin(params, (1, 2)), TokenSampler(params, (1, 2))
        assert [draw(sampler, logits_of(i), state) for i in range(3)] == [cpu.draw(logits_of(i)) for i in range(3)]
