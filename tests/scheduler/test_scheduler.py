"""The policy alone: no thread, no engine; the test plays both."""

import pytest

from server.scheduler.kv_pages import PageTable
from server.scheduler.scheduler import Scheduler
from server.types import FinishReason, GenerateRequest
from tests.fakes import FakeSampler


def request(prompt: int, max_tokens: int = 4, request_id: str = "r", stop_ids: frozenset[int] = frozenset()) -> GenerateRequest:
    return GenerateRequest(request_id, tuple(range(100, 100 + prompt)), max_tokens, stop_ids=stop_ids)


def scheduler(cache_lens: int = 64, chunk: int = 8) -> Scheduler:
    return Scheduler(PageTable(cache_lens // 16, 16), chunk, cache_lens)


@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 15, 16, 17, 24])
def test_a_prompt_is_prefilled_in_chunks_and_only_the_last_one_draws(prompt: int) -> None:
    policy = scheduler()
    policy.add(request(prompt))
    sequence = policy.admit()
    assert sequence is not None
    sequence.sampler = FakeSampler(sequence.request.sampling, sequence.request.prompt_ids)
    seen: list[int] = []
    while sequence.prefilling:
        step = policy.next_step(sequence)
        assert step.start == len(seen)
        assert 1 <= len(step.token_ids) <= 8
        assert len(step.pages) == -(-(step.start + len(step.token_ids)) // 16)
        seen += step.token_ids
        assert (step.sampler is not None) == (len(seen) == prompt)
        policy.advance(sequence, step, 1 if step.sampler else None)
    assert tuple(seen) == sequence.request.prompt_ids


def test_decode_feeds_the_token_that_was_drawn_last() -> None:
    policy = scheduler()
    policy.add(request(3))
    sequence = policy.admit()
    assert sequence is not None
    policy.advance(sequence, policy.next_step(sequence), 77)
    step = policy.next_step(sequence)
    assert (step.token_ids, step.start) == ((77,), 3)
    policy.advance(sequence, step, 78)
    assert (policy.next_step(sequence).token_ids, policy.next_step(sequence).start) == ((78,), 4)


def run(policy: Scheduler, token: int) -> tuple[FinishReason, int]:
    """Admit the next sequence and draw the same token until it is over: why, and after how many tokens."""
    sequence = policy.admit()
    assert sequence is not None
    while True:
        step = policy.next_step(sequence)
        last = step.start + len(step.token_ids) >= len(sequence.request.prompt_ids)
        reason = policy.advance(sequence, step, token if last else None)
        if reason is not None:
            policy.remove(sequence)
            return reason, sequence.generated


def test_a_stop_id_ends_with_stop() -> None:
    policy = scheduler()
    policy.add(request(5, stop_ids=frozenset({9})))
    assert run(policy, 9) == (FinishReason.STOP, 1)


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_ends_with_length(max_tokens: int) -> None:
    policy = scheduler()
    policy.add(request(5, max_tokens))
    assert run(policy, 1) == (FinishReason.LENGTH, max_tokens)


@pytest.mark.parametrize("prompt", [1, 16, 47, 62, 63])
def test_the_end_of_the_cache_ends_with_length(prompt: int) -> None:
    policy = scheduler(cache_lens=64)
    policy.add(request(prompt, max_tokens=1000))
    assert run(policy, 1) == (FinishReason.LENGTH, 64 - prompt)


@pytest.mark.parametrize(("prompt", "max_tokens", "pages"), [(10, 6, 1), (10, 7, 1), (10, 8, 2), (16, 1, 1), (16, 2, 2), (33, 1000, 4)])
def test_a_sequence_gets_the_pages_that_it_can_need_and_no_more(prompt: int, max_tokens: int, pages: int) -> None:
    """The last token drawn never enters the cache."""
    policy = scheduler(cache_lens=64)
    policy.add(request(prompt, max_tokens))
    sequence = policy.admit()
    assert sequence is not None
    assert len(sequence.pages) == policy.pages.used == pages


def test_one_runs_and_the_rest_wait_in_order() -> None:
    policy = scheduler()
    for name in "abc":
        policy.add(request(2, request_id=name))
    order = []
    while not policy.idle:
        sequence = policy.admit()
        assert sequence is not None
        assert policy.admit() is None
        order.append(sequence.request.request_id)
        policy.remove(sequence)
    assert order == ["a", "b", "c"]


def test_removing_frees_pages_wherever_the_sequence_is() -> None:
    policy = scheduler()
    running, waiting = policy.add(request(20, request_id="running")), policy.add(request(20, request_id="waiting"))
    policy.admit()
    assert policy.find("waiting") is waiting
    policy.remove(waiting)
    assert policy.find("waiting") is None
    assert policy.pages.used > 0
    policy.remove(running)
    assert policy.idle
    assert policy.pages.free == policy.pages.num_pages
