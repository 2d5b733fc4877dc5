"""Clients that go away, that stall, that send half a request: over raw sockets, where nothing is polite."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from server.text.tokenizer import ByteTokenizer
from tests.api.live import ECHO, Live, live, wait_for
from tests.fakes import FakeEngine


@pytest.fixture
def slow() -> Iterator[Live]:
    with live(FakeEngine(step_s=0.005)) as server:
        yield server


def send(server: Live, text: str, *, stream: bool = False, path: str = "/v1/chat/completions") -> socket.socket:
    """A request over a connection of its own, which the test may do anything to."""
    body = json.dumps({"messages": [{"role": "user", "content": text}], "prompt": [text, text], "stream": stream}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_while_its_reply_is_made(slow: Live, stream: bool, path: str) -> None:
    connection = send(slow, "x" * 400, stream=stream, path=path)
    wait_for(lambda: len(slow.engine.steps) > 20)
    steps = len(slow.engine.steps)
    connection.close()
    slow.wait_idle()
    assert len(slow.engine.steps) - steps < 20
    assert slow.serving.metrics.registry.get_sample_value("moespan_request_success_total", {"finished_reason": "cancelled"}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_hang_up_costs_one_token_at_most(stream: bool) -> None:
    """With tokens as long as a large model's: the one that is being made, or one that has just begun."""
    with live(FakeEngine(step_s=0.1)) as server:
        connection = send(server, "x" * 400, stream=stream)
        wait_for(lambda: len(server.engine.steps) > 3)
        steps = len(server.engine.steps)
        connection.close()
        server.wait_idle()
        assert len(server.engine.steps) - steps <= 1


def test_a_client_that_leaves_while_its_prompt_is_read(slow: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are answered meanwhile, and the engine never hears of it."""
    reading, read_on, encode = threading.Event(), threading.Event(), ByteTokenizer._encode

    def slowly(tokenizer: ByteTokenizer, text: str, special: bool) -> list[int]:
        if "long" in text:
            reading.set()
            assert read_on.wait(10)
        return encode(tokenizer, text, special)

    monkeypatch.setattr(ByteTokenizer, "_encode", slowly)
    arrived = slow.note_arrivals()
    connection = send(slow, "long")
    assert reading.wait(10)
    assert slow.chat().json()["choices"][0]["message"]["content"] == ECHO
    connection.close()
    assert slow.chat().status_code == 200  # by now the server has seen that, too
    read_on.set()
    assert slow.chat().status_code == 200
    wait_for(lambda: not slow.runner._server.server_state.tasks)
    assert len(arrived) == 3
    assert not [prompt for prompt in arrived if b"long" in prompt]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits(slow: Live, stream: bool) -> None:
    running = send(slow, "x" * 100)
    wait_for(lambda: slow.service.open == 1)
    waiting = send(slow, "never run", stream=stream)
    wait_for(lambda: slow.service.open == 2)
    waiting.close()
    wait_for(lambda: slow.service.open == 1)
    received = b""
    while b'"finish_reason":"stop"' not in received:
        received += running.recv(100_000)
    slow.wait_idle()
    assert len(slow.engine.samplers) == 1


def test_a_stream_that_waits_is_told_so_and_is_cancelled_too() -> None:
    with live(FakeEngine(step_s=0.005), keep_alive_s=0.02) as server:
        running = send(server, "x" * 100)
        wait_for(lambda: server.service.open == 1)
        waiting = send(server, "never run", stream=True)
        received = b""
        while b": waiting\n\n" not in received:
            received += waiting.recv(1000)
        assert b"200 OK" in received
        waiting.close()
        wait_for(lambda: server.service.open == 1)
        running.close()
        server.wait_idle()


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_error(slow: Live, caplog: pytest.LogCaptureFixture) -> None:
    connection = socket.create_connection(("127.0.0.1", slow.port))
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
    connection.close()
    assert slow.chat().json()["choices"][0]["message"]["content"] == ECHO
    assert "Traceback" not in caplog.text


def test_a_reader_that_stalls_holds_nobody_up() -> None:
    big = 20_000
    with live(FakeEngine(num_pages=4096, script=[ord("x")] * big), cache_lens=40_000) as server:
        stalled = send(server, "x", stream=True)
        assert stalled.recv(100)
        for _ in range(3):
            assert server.chat(max_tokens=5).json()["choices"][0]["message"]["content"] == "xxxxx"
        stalled.close()
        server.wait_idle()
