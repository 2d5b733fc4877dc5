"""The official client against a live server: what a person with the SDK sees."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from server.config import SchedulerConfig
from tests.api.live import ECHO, MODEL, USER, Live, live, wait_for
from tests.fakes import FakeEngine


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def ask(client: openai.OpenAI, text: str = "hello", **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **options)


def test_chat(client: openai.OpenAI) -> None:
    reply = ask(client)
    assert reply.choices[0].message.content == ECHO
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == 21
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_stream_with_usage(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ECHO
    assert chunks[-1].usage.completion_tokens == 11
    assert chunks[-1].timings["predicted_n"] == 11


def test_stop_and_logprobs(client: openai.OpenAI) -> None:
    reply = ask(client, stop=["lo\n"], logprobs=True, top_logprobs=3)
    assert reply.choices[0].message.content == "u:hel"
    assert [entry.token for entry in reply.choices[0].logprobs.content] == list("u:hel")
    assert len(reply.choices[0].logprobs.content[0].top_logprobs) == 3


def test_the_seed_arrives(server: Live, client: openai.OpenAI) -> None:
    ask(client, seed=1234, temperature=0.7)
    assert server.engine.samplers[-1].params.seed == 1234


def test_completions_and_models(client: openai.OpenAI) -> None:
    assert [choice.text for choice in client.completions.create(model=MODEL, prompt=["a", "b"]).choices] == ["a", "b"]
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "moespan"


def test_errors_by_class(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        ask(client, temperature=5)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="no model 'nope'"):
        client.models.retrieve("nope")


@pytest.mark.parametrize("key", ["wrong", "schlüssel", "x" * 1000])
def test_a_wrong_key_is_an_authentication_error(key: str) -> None:
    with live(api_key=("sk-right",)) as server:
        assert server.client(api_key="sk-right").models.list().data
        reply = server.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert (reply.status_code, reply.json()["error"]["type"], reply.headers["www-authenticate"]) == (401, "authentication_error", "Bearer")
        if key.isascii():
            with pytest.raises(openai.AuthenticationError, match="wrong"):
                ask(server.client(api_key=key))
        assert server.get("/v1/models").status_code == 401
        assert server.get("/v1/models", headers={"Authorization": "Basic sk-right"}).status_code == 401
        assert server.post("/tokenize", {"prompt": "x"}).status_code == 401


def test_a_key_beyond_ascii_works() -> None:
    with live(api_key=("schlüssel",)) as server:
        assert server.get("/v1/models", headers={"Authorization": "Bearer schlüssel".encode()}).status_code == 200


def test_an_engine_failure_is_an_internal_server_error() -> None:
    with live(FakeEngine(fail_at=0)) as server, pytest.raises(openai.InternalServerError, match="The engine failed"):
        ask(server.client())


def test_a_late_failure_is_raised_from_the_stream() -> None:
    with live(FakeEngine(fail_at=5)) as server, pytest.raises(openai.APIError, match="The engine failed"):
        list(ask(server.client(), stream=True))


def test_a_full_queue_is_a_rate_limit_error_that_retries_heal() -> None:
    with live(FakeEngine(step_s=0.01), scheduler=SchedulerConfig(max_queue=1)) as server, ThreadPoolExecutor() as pool:
        busy = [pool.submit(ask, server.client(), "x" * 20) for _ in range(2)]
        wait_for(lambda: server.service.open == 2)
        with pytest.raises(openai.RateLimitError, match="waiting") as caught:
            ask(server.client())
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "queue_full"
        assert ask(server.client(max_retries=5)).choices[0].message.content == ECHO
        assert [each.result().choices[0].finish_reason for each in busy] == ["stop", "stop"]


def test_a_timeout_cancels() -> None:
    with live(FakeEngine(step_s=0.01)) as server:
        with pytest.raises(openai.APITimeoutError):
            ask(server.client(timeout=0.2), "x" * 500)
        server.wait_idle()
        assert len(server.engine.steps) < 100


def test_leaving_a_stream_cancels() -> None:
    with live(FakeEngine(step_s=0.005)) as server:
        stream = ask(server.client(), "x" * 500, stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        server.wait_idle()
        assert len(server.engine.steps) < 100


@pytest.mark.parametrize("stream", [False, True])
def test_200_requests_from_16_threads_are_each_answered_with_their_own_text_in_order_of_arrival(stream: bool) -> None:
    with live(scheduler=SchedulerConfig(max_queue=200)) as server, server.client() as client:
        arrived = server.note_arrivals()

        def one(number: int) -> bool:
            reply = ask(client, f"number {number}", stream=stream)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in reply) if stream else reply.choices[0].message.content
            return bool(text == f"u:number {number}\na:")

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(one, range(200)))
        assert server.ran() == arrived
        assert len(arrived) == 200
        server.wait_idle()


def test_waiting_requests_run_in_order_of_arrival() -> None:
    with live(FakeEngine(step_s=0.002)) as server, server.client() as client:
        threads = []
        arrived = server.note_arrivals()
        for number in range(6):
            threads.append(threading.Thread(target=ask, args=(client, f"number {number}" + " " * 10)))
            threads[-1].start()
            wait_for(lambda: len(arrived) == len(threads))
        for thread in threads:
            thread.join()
        assert [prompt[9:10] for prompt in server.ran()] == [b"%d" % number for number in range(6)]


def test_models_answer_while_busy() -> None:
    with live(FakeEngine(step_s=0.01)) as server, ThreadPoolExecutor() as pool:
        busy = pool.submit(ask, server.client(), "x" * 50)
        wait_for(lambda: server.service.open == 1)
        start = time.monotonic()
        assert server.get("/v1/models").json()["data"][0]["id"] == MODEL
        assert time.monotonic() - start < 0.5
        assert server.serving.metrics.registry.get_sample_value("moespan_num_requests_running") == 1
        assert busy.result().choices[0].finish_reason == "stop"


def test_the_same_messages_serve_as_default(client: openai.OpenAI) -> None:
    assert ask(client).choices[0].message.content == client.chat.completions.create(model="another name", messages=USER).choices[0].message.content  # type: ignore[arg-type]
