"""The drawing kernels against their twin: the same token from the same scalars, whatever the vocabulary's size and the way of drawing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from server.engine.gpu import drawing
from server.engine.gpu.drawing import DrawBuffers, Way
from server.engine.kernels import plain_small, sample
from server.engine.sampler import TOP_P_SLACK, WEIGHT_OF_BEST

SOME_OF_EACH = {drawing.TOP_K: 300, drawing.TOP_P: 0.99, drawing.LEAST_WEIGHT: int(0.02 * WEIGHT_OF_BEST), drawing.TEMPERATURE: 1.5}
DEFAULTS = {drawing.TEMPERATURE: 1.0, drawing.REPETITION: 1.0, drawing.TOP_P: 1.0}


def buffers(vocab: int, device: str, scalars: dict[int, float], history: dict[int, int] | None = None) -> DrawBuffers:
    made = drawing.draw_buffers(vocab, torch.device(device))
    for at, value in (DEFAULTS | scalars).items():
        made.scalars[at] = value - TOP_P_SLACK if at == drawing.TOP_P else value
    for token, past in (history or {}).items():
        made.history[token] = past
    return made


def drawn(draw: Callable[..., None], logits: torch.Tensor, b: DrawBuffers, way: Way) -> int:
    draw(logits, b, way)
    if logits.is_cuda:
        torch.cuda.synchronize()
    return int(b.token)


def some_logits(vocab: int, device: str, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * spread).to(device)


@pytest.mark.parametrize("vocab", [1, 2, 100, 1023, 1024, 1025, 3000])
def test_greedy_is_the_first_of_the_best(device: str, vocab: int) -> None:
    logits = some_logits(vocab, device).round()  # so that there are ties, across blocks too
    b = buffers(vocab, device, {})
    assert drawn(sample.draw, logits, b, Way(True)) == int((logits == logits.max()).nonzero()[0])
    assert int(b.drawn) == int(b.token)


@pytest.mark.parametrize(
    "scalars",
    [
        {},
        {drawing.TEMPERATURE: 0.3},
        {drawing.LEAST_WEIGHT: int(0.05 * WEIGHT_OF_BEST)},
        {drawing.TOP_K: 1},
        {drawing.TOP_K: 40},
        {drawing.TOP_K: 1600, drawing.TEMPERATURE: 5.0},
        {drawing.TOP_P: 0.5},
        {drawing.TOP_P: 1e-9},
        {drawing.TOP_P: 0.9999, drawing.TEMPERATURE: 2.0},
        {drawing.TOP_K: 50, drawing.TOP_P: 0.8},
        SOME_OF_EACH,
    ],
)
def test_kernel_draws_its_twins_token(device: str, scalars: dict[int, float]) -> None:
    logits = some_logits(2500, device)
    way = Way(False, False, drawing.TOP_K in scalars, drawing.TOP_P in scalars)
    both = [buffers(2500, device, scalars | {drawing.UNIFORM: 0.73}) for _ in range(2)]
    assert drawn(sample.draw, logits, both[0], way) == drawn(plain_small.draw, logits, both[1], way)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_distribution(device: str, uniform: float) -> None:
    logits = some_logits(2500, device)
    for scalars, way in (({}, Way(False)), (SOME_OF_EACH, Way(False, top_k=True, top_p=True))):
        both = [buffers(2500, device, scalars | {drawing.UNIFORM: uniform}) for _ in range(2)]
        assert drawn(sample.draw, logits, both[0], way) == drawn(plain_small.draw, logits, both[1], way)


def test_min_p_leaves_nothing_below_it(device: str) -> None:
    logits = some_logits(1100, device)
    scalars = {drawing.LEAST_WEIGHT: int(0.2 * WEIGHT_OF_BEST)}
    likely = (logits >= logits.max() + torch.tensor(0.2).log()).nonzero().flatten().tolist()
    found = {drawn(sample.draw, logits, buffers(1100, device, scalars | {drawing.UNIFORM: u / 8}), Way(False)) for u in range(8)}
    assert len(likely) > 1
    assert found <= set(likely)


@pytest.mark.parametrize("vocab", [1, 2, 1024, 1025])
def test_remainders(device: str, vocab: int) -> None:
    logits = some_logits(vocab, device)
    scalars = {drawing.TOP_K: max(vocab // 2, 1), drawing.TOP_P: 0.95, drawing.UNIFORM: 0.8}
    for way in (Way(False), Way(False, top_k=True, top_p=True)):
        assert drawn(sample.draw, logits, buffers(vocab, device, scalars), way) == drawn(plain_small.draw, logits, buffers(vocab, device, scalars), way)


@pytest.mark.parametrize(("top_k", "expected"), [(1, {4, 9}), (3, {4, 9, 7})])
def test_what_is_equal_to_the_last_one_stays(device: str, top_k: int, expected: set[int]) -> None:
    logits = torch.full((12,), -1.0, device=device)
    logits[4], logits[9], logits[7], logits[3] = 2.0, 2.0, 1.0, -0.5
    twins = (buffers(12, device, {drawing.TOP_K: top_k, drawing.UNIFORM: u / 24}) for u in range(24))
    assert {drawn(plain_small.draw, logits, twin, Way(False, top_k=True)) for twin in twins} == expected
    b = buffers(12, device, {drawing.TOP_K: top_k, drawing.UNIFORM: 0.999})
    assert drawn(sample.draw, logits, b, Way(False, top_k=True)) == max(expected)
    assert int(b.sums.sum()) == int(b.weights[list(expected)].sum())


@pytest.mark.parametrize("greedy", [False, True])
def test_bias_and_penalties(device: str, greedy: bool) -> None:
    logits = some_logits(2000, device)
    best = logits.topk(40).indices.tolist()
    history = {token: [drawing.IN_PROMPT, 1, drawing.IN_PROMPT + 3][i % 3] for i, token in enumerate(best[:30])}
    scalars = {drawing.REPETITION: 1.7, drawing.PRESENCE: 0.6, drawing.FREQUENCY: 0.9, drawing.UNIFORM: 0.5}
    both = [buffers(2000, device, scalars, history) for _ in range(2)]
    for b in both:
        b.bias[best[0]], b.bias[best[35]] = -3.0, 2.5
    for _ in range(3):  # what is drawn is counted, and penalised from then on
        tokens = [drawn(draw, logits, b, Way(greedy, adjust=True)) for draw, b in zip((sample.draw, plain_small.draw), both, strict=True)]
        assert tokens[0] == tokens[1]
        assert torch.equal(both[0].history, both[1].history)
    assert int(both[0].history.sum()) == sum(history.values()) + 3


@pytest.mark.parametrize("vocab", [3, 31, 32, 33, 1025, 2000])
def test_only_what_a_mask_allows(device: str, vocab: int) -> None:
    logits = some_logits(vocab, device)
    allowed = {vocab - 1, vocab // 2, vocab // 3}
    bits = sum(1 << token for token in allowed).to_bytes(-(-vocab // 32) * 4, "little")
    for way in (Way(True, True), Way(False, True), Way(False, True, top_k=True, top_p=True)):
        for u in range(6):
            both = [buffers(vocab, device, {drawing.TOP_K: 2, drawing.TOP_P: 0.99, drawing.UNIFORM: u / 6, drawing.PRESENCE: 0.5}) for _ in range(2)]
            for b in both:
                b.allowed.copy_(torch.frombuffer(bytearray(bits), dtype=torch.int32))
            tokens = [drawn(draw, logits, b, way) for draw, b in zip((sample.draw, plain_small.draw), both, strict=True)]
            assert tokens[0] == tokens[1]
            assert tokens[0] in allowed


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("way", [Way(True), Way(True, True), Way(False), Way(False, True, True, True)])
def test_damaged_logits_draw_no_token(device: str, bad: float, way: Way) -> None:
    logits = some_logits(1100, device)
    logits[1060] = bad
    for draw in (sample.draw, plain_small.draw):
        b = buffers(1100, device, {drawing.TOP_K: 5, drawing.TOP_P: 0.9, drawing.PRESENCE: 1.0}, {1060: 1})
        assert drawn(draw, logits, b, way) == drawing.NOT_FINITE


def test_a_token_can_be_ruled_out(device: str) -> None:
    logits = torch.full((1026,), -torch.inf, device=device)
    logits[1025] = -4.0
    for way in (Way(True), Way(False), Way(False, top_p=True)):
        assert drawn(sample.draw, logits, buffers(1026, device, {drawing.TOP_P: 0.9, drawing.UNIFORM: 0.99}), way) == 1025


@pytest.mark.parametrize("count", [0, 1, 20])
def test_log_probabilities(device: str, count: int) -> None:
    logits = some_logits(2100, device)
    b, twin = (buffers(2100, device, {drawing.LEADERS: count, drawing.UNIFORM: 0.3}) for _ in range(2))
    token = drawn(sample.draw, logits, b, Way(False, leaders=True))
    assert token == drawn(plain_small.draw, logits, twin, Way(False, leaders=True))
    exact = logits.double().log_softmax(0).cpu()
    order = exact.argsort(descending=True, stable=True)[:count]
    assert b.leader_ids[:count].tolist() == twin.leader_ids[:count].tolist() == order.tolist()
    expected = torch.cat((exact[token][None], exact[order])).float()
    for made in (b, twin):
        torch.testing.assert_close(made.logprobs[: 1 + count], expected, rtol=0, atol=16 * 2.0**-22)  # a few roundings of values up to 16
