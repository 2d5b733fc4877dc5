"""The service, its worker and the fake engine together: what a request hears, and when."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from server.config import SchedulerConfig
from server.errors import ContextOverflow, EngineFailure, QueueFull, ShuttingDown
from server.metrics import Metrics
from server.scheduler.service import Service
from server.types import FinishReason, GenerateRequest, SamplingParams, TokenEvent
from tests.fakes import STOP_ID, FakeEngine


class Listener:
    """A sink that a test can wait on."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()

    def __call__(self, event: TokenEvent) -> None:
        self.events.put(event)

    def to_end(self) -> list[TokenEvent]:
        """All events up to the last one, which must be the only end."""
        seen = [self.events.get(timeout=10)]
        while seen[-1].finish_reason is None and seen[-1].error is None:
            seen.append(self.events.get(timeout=10))
        time.sleep(0.005)
        assert self.events.empty(), "something came after the end"
        return seen


def ids(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def request(text: bytes = b"hello", max_tokens: int = 400, name: str = "r", **sampling: object) -> GenerateRequest:
    return GenerateRequest(name, tuple(text), max_tokens, SamplingParams(**sampling), frozenset({STOP_ID}))  # type: ignore[arg-type]


@contextmanager
def serving(engine: FakeEngine, max_queue: int = 64, cache_lens: int = 512) -> Iterator[Service]:
    service = Service(engine, SchedulerConfig(max_queue=max_queue), cache_lens, Metrics())
    try:
        yield service
    finally:
        service.close()
        assert engine.closed
        service._pages.check_idle()


def test_a_request_hears_its_progress_its_tokens_and_one_end() -> None:
    with serving(FakeEngine(prefill_chunk=4)) as service:
        listener = Listener()
        service.submit(request(b"0123456789"), listener)
        events = listener.to_end()
    assert [event.prefilled for event in events if event.prefilled is not None] == [0, 4, 8]
    assert bytes(ids(events)) == b"0123456789"
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].token_id is None
    timings = events[-1].timings
    assert timings is not None
    assert (timings.prompt_tokens, timings.generated_tokens, timings.cached_tokens) == (10, 11, 0)
    assert timings.queue_s >= 0
    assert timings.prefill_s > 0
    assert timings.decode_s > 0


def test_the_last_token_and_the_end_are_one_event() -> None:
    with serving(FakeEngine()) as service:
        listener = Listener()
        service.submit(request(max_tokens=3), listener)
        events = listener.to_end()
    assert bytes(ids(events)) == b"hel"
    assert (events[-1].token_id, events[-1].finish_reason) == (ord("l"), FinishReason.LENGTH)


def test_a_prompt_that_leaves_no_room_is_refused_with_both_counts() -> None:
    with serving(FakeEngine(), cache_lens=64) as service:
        for size in (64, 65, 1000):
            with pytest.raises(ContextOverflow, match=rf"{size} tokens.* 64 tokens"):
                service.submit(request(b"x" * size), Listener())
        listener = Listener()
        service.submit(request(b"x" * 63), listener)
        assert ids(listener.to_end()) == [ord("x")]


def test_an_engine_failure_ends_its_request_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeEngine(fail_at=3)) as service:
        failing, other = Listener(), Listener()
        service.submit(request(name="failing"), failing)
        service.submit(request(name="other"), other)
        error = failing.to_end()[-1].error
        assert isinstance(error, EngineFailure)
        assert "RuntimeError" in str(error)
        assert bytes(ids(other.to_end())) == b"hello"
    assert "the fake engine was told to fail" in caplog.text


def test_books_that_are_wrong_cost_the_requests_that_were_there_and_no_later_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A fault of our own: each of the clients hears of it, and the engine's thread lives."""
    with serving(FakeEngine(step_s=0.001)) as service:
        with monkeypatch.context() as patch:
            patch.setattr(service._pages, "check_idle", lambda: 1 / 0)
            listeners = [Listener() for _ in range(3)]
            for index, listener in enumerate(listeners):
                service.submit(request(name=str(index)), listener)
            assert [type(listener.to_end()[-1].error) for listener in listeners] == [EngineFailure] * 3
        assert service.open == 0
        service.submit(request(name="later"), listener := Listener())
        assert bytes(ids(listener.to_end())) == b"hello"
    assert "ZeroDivisionError" in caplog.text


def test_a_sink_that_raises_cancels_its_request_and_no_other() -> None:
    def broken(event: TokenEvent) -> None:
        raise OSError("nobody there")

    with serving(FakeEngine(step_s=0.001)) as service:
        service.submit(request(b"x" * 200, name="broken"), broken)
        listener = Listener()
        service.submit(request(name="other"), listener)
        assert bytes(ids(listener.to_end())) == b"hello"
        assert len(service._worker._engine.steps) < 30  # type: ignore[attr-defined]


def test_cancelling_ends_a_running_request_within_a_token() -> None:
    engine = FakeEngine(step_s=0.005)
    with serving(engine) as service:
        listener = Listener()
        service.submit(request(b"x" * 20), listener)
        while listener.events.get(timeout=10).token_id is None:
            pass
        steps = len(engine.steps)
        service.cancel("r")
        assert listener.to_end()[-1].finish_reason is FinishReason.CANCELLED
        assert len(engine.steps) - steps <= 2
        service.cancel("r")  # over already: nothing happens


def test_cancelling_ends_a_waiting_request_at_once() -> None:
    with serving(FakeEngine(step_s=0.002)) as service:
        running, waiting = Listener(), Listener()
        service.submit(request(b"x" * 100, name="running"), running)
        service.submit(request(name="waiting"), waiting)
        service.cancel("waiting")
        events = waiting.to_end()
        assert [event.finish_reason for event in events] == [FinishReason.CANCELLED]
        assert service.open == 1
        assert running.to_end()[-1].finish_reason is FinishReason.STOP


def test_the_queue_is_bounded_and_its_places_come_back() -> None:
    with serving(FakeEngine(step_s=0.001), max_queue=2) as service:
        listeners = [Listener() for _ in range(3)]
        for index, listener in enumerate(listeners):
            service.submit(request(b"x" * 20, name=str(index)), listener)
        with pytest.raises(QueueFull, match="2 requests are waiting") as caught:
            service.submit(request(name="one too many"), Listener())
        assert caught.value.retry_after_s >= 1
        service.submit(request(name="accepted before"), Listener(), continues=True)
        listeners[0].to_end()
        listeners[1].to_end()
        service.submit(request(name="there is room again"), listener := Listener())
        assert bytes(ids(listener.to_end())) == b"hello"


def test_who_hears_the_end_may_come_back_at_once() -> None:
    with serving(FakeEngine(), max_queue=0) as service:
        second = Listener()

        def again(event: TokenEvent) -> None:
            if event.finish_reason is not None:
                service.submit(request(name="second"), second)

        service.submit(request(name="first"), again)
        assert bytes(ids(second.to_end())) == b"hello"


def test_without_a_queue_one_request_runs() -> None:
    with serving(FakeEngine(step_s=0.001), max_queue=0) as service:
        service.submit(request(name="a"), listener := Listener())
        with pytest.raises(QueueFull):
            service.submit(request(name="b"), Listener())
        listener.to_end()
        service.submit(request(name="c"), listener := Listener())
        assert bytes(ids(listener.to_end())) == b"hello"


def test_draining_lets_the_running_request_finish_and_refuses_the_others() -> None:
    with serving(FakeEngine(step_s=0.002)) as service:
        running, waiting = Listener(), Listener()
        service.submit(request(b"x" * 30, name="running"), running)
        service.submit(request(name="waiting"), waiting)
        running.events.get(timeout=10)
        assert service.drain(grace_s=10)
        assert running.to_end()[-1].finish_reason is FinishReason.STOP
        assert isinstance(waiting.to_end()[-1].error, ShuttingDown)
        with pytest.raises(ShuttingDown):
            service.submit(request(name="late"), Listener())


def test_what_outlives_the_grace_time_is_told_so() -> None:
    with serving(FakeEngine(step_s=0.01)) as service:
        service.submit(request(b"x" * 200), listener := Listener())
        listener.events.get(timeout=10)
        assert not service.drain(grace_s=0.05)
        service.close()
        assert isinstance(listener.to_end()[-1].error, ShuttingDown)


def test_on_start_runs_in_the_engines_thread_and_its_failure_is_raised() -> None:
    threads: list[str] = []
    service = Service(FakeEngine(), SchedulerConfig(), 64, Metrics(), on_start=lambda: threads.append(threading.current_thread().name))
    service.close()
    assert threads == ["engine"]

    def fail() -> None:
        raise OSError("no such CPU")

    engine = FakeEngine()
    with pytest.raises(OSError, match="no such CPU"):
        Service(engine, SchedulerConfig(), 64, Metrics(), on_start=fail)
    assert engine.closed


def test_an_idle_worker_uses_no_cpu() -> None:
    with serving(FakeEngine()) as service:
        service.submit(request(), listener := Listener())
        listener.to_end()
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.05


def test_metrics_add_up() -> None:
    metrics = Metrics()
    service = Service(FakeEngine(), SchedulerConfig(), 512, metrics)
    for name in "ab":
        service.submit(request(name=name), listener := Listener())
        listener.to_end()
    value = metrics.registry.get_sample_value
    assert value("moespan_prompt_tokens_total") == 10
    assert value("moespan_generation_tokens_total") == 12
    assert value("moespan_request_success_total", {"finished_reason": "stop"}) == 2
    assert value("moespan_inter_token_latency_seconds_count") == 10
    assert value("moespan_time_to_first_token_seconds_count") == 2
    assert value("moespan_num_requests_running") == 0
    assert value("moespan_kv_cache_usage_perc") == 0
    service.drain(1)
    with pytest.raises(ShuttingDown):
        service.submit(request(), Listener())
    assert value("moespan_request_failure_total", {"error": "ShuttingDown"}) == 1
    service.close()


def test_many_requests_from_many_threads_are_each_answered_in_order() -> None:
    engine = FakeEngine()
    with serving(engine, max_queue=400) as service:
        results: dict[str, bytes] = {}

        def client(number: int) -> None:
            for index in range(25):
                name = f"{number}-{index}"
                service.submit(request(name.encode(), name=name), listener := Listener())
                results[name] = bytes(ids(listener.to_end()))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 200
    assert all(text == name.encode() for name, text in results.items())


def test_draining_lets_the_rest_of_accepted_work_run() -> None:
    """Even where another request came between its parts."""
    with serving(FakeEngine(step_s=0.005)) as service:
        first, between, second = Listener(), Listener(), Listener()
        service.submit(request(b"x" * 5, name="w-0"), first)
        service.expect_more("w")
        service.submit(request(b"x" * 30, name="between"), between)
        service.submit(request(name="w-1"), second, continues=True)
        service.expect_no_more("w")
        first.to_end()
        between.events.get(timeout=10)
        assert service.drain(10)
        assert bytes(ids(second.to_end())) == b"hello"
