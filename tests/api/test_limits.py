"""What a request may cost: its size, its depth, and the time that either side may take."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import openai
import pytest

from server.api import connection as connection_limits
from server.api.limits import MOST_HELD
from server.api.replying import LONG
from server.api.runner import bind
from server.config import ApiConfig, SchedulerConfig
from server.scheduler.reply import MOST_WAITING
from server.text.tokenizer import ByteTokenizer
from tests.api.live import ECHO, USER, Live, live, wait_for
from tests.fakes import FakeEngine

CHAT = "/v1/chat/completions"
CUT = r"reset|Broken pipe"
BODY = json.dumps({"messages": USER}).encode()


@pytest.fixture(scope="module")
def tight() -> Iterator[Live]:
    with live(max_body_mb=0.1, read_timeout_s=0.3, write_timeout_s=0.3, request_timeout_s=20) as server:
        yield server
        server.wait_idle()


@contextmanager
def connected(server: Live, first: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(10)
        connection.sendall(first)
        yield connection


def head(*lines: str) -> bytes:
    return "\r\n".join([f"POST {CHAT} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def keep_sending(connection: socket.socket, pieces: Iterable[bytes], pause_s: float = 0) -> None:
    for piece in pieces:
        connection.sendall(piece)
        time.sleep(pause_s)


def status_and_error(reply: bytes) -> tuple[int, dict[str, Any]]:
    found = re.fullmatch(rb"HTTP/1.1 (\d+) .*?\r\n\r\n(.*)", reply, re.DOTALL)
    assert found is not None, reply
    return int(found[1]), json.loads(found[2])["error"]


# --- Size ---


def test_a_body_up_to_the_limit_is_read(tight: Live) -> None:
    assert tight.request("POST", CHAT, content=BODY.ljust(100_000)).status_code == 200
    assert tight.request("POST", CHAT, content=iter([BODY, b" " * (100_000 - len(BODY))])).status_code == 200  # chunked


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("chunked", [False, True])
def test_one_byte_more_is_413(tight: Live, path: str, chunked: bool) -> None:
    body = BODY.ljust(100_001)
    reply = tight.request("POST", path, content=iter([body[:50_000], body[50_000:]]) if chunked else body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert "larger than 0.1 MB. Send less, or start the server with a larger --max_body_mb" in reply.json()["error"]["message"]
    assert tight.chat().status_code == 200


def test_all_bodies_together_are_bounded() -> None:
    with live(max_body_mb=0.1, read_timeout_s=20) as server:

        def reply() -> httpx.Response:
            return server.request("POST", CHAT, content=BODY.ljust(90_000))

        with ExitStack() as stack:
            for _ in range(MOST_HELD):
                stack.enter_context(connected(server, head("Content-Length: 100000") + b" " * 99_990))
            wait_for(lambda: reply().status_code == 429)
            refused = reply()
        assert (refused.json()["error"]["code"], refused.headers["Retry-After"]) == ("busy", "5")
        wait_for(lambda: reply().status_code == 200)


def test_an_endless_body_is_answered_and_then_cut(tight: Live) -> None:
    """What comes after the answer is thrown away, and not for ever."""
    with connected(tight, head("Transfer-Encoding: chunked")) as connection:
        start = time.monotonic()
        with pytest.raises(OSError, match=CUT):
            keep_sending(connection, itertools.repeat(b"10000\r\n" + b" " * 0x10000 + b"\r\n"))
        assert 0.2 < time.monotonic() - start < 5


def test_a_client_that_asks_first_is_told_before_it_sends(tight: Live) -> None:
    with connected(tight, head("Content-Length: 100001", "Expect: 100-continue", "Connection: close")) as connection:
        assert status_and_error(received(connection))[0] == 413
    with connected(tight, head(f"Content-Length: {len(BODY)}", "Expect: 100-continue", "Connection: close")) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(BODY)
        assert b"HTTP/1.1 200 OK" in received(connection)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":['])
@pytest.mark.parametrize("depth", [100, 10_000])
def test_deep_nesting_is_a_sentence(tight: Live, opening: bytes, depth: int) -> None:
    for body in (opening * depth, b'{"messages":' + opening * depth):
        reply = tight.request("POST", CHAT, content=body)
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        (CHAT, {"messages": USER * 4097}, "'messages' must not hold more than 4096."),
        (CHAT, {"messages": USER, "stop": ["a"] * 5}, "'stop' holds 5 strings; at most 4 are possible."),
        (CHAT, {"messages": USER, "logit_bias": {str(number): 1 for number in range(1025)}}, "'logit_bias' must not hold more than 1024."),
        ("/v1/completions", {"prompt": ["x"] * 257}, "'prompt' holds 257 prompts; at most 256 are possible."),
        (CHAT, {"messages": USER, "temperature": 10**400}, "'temperature' "),
    ],
)
def test_counts_are_bounded(server: Live, path: str, body: object, sentence: str) -> None:
    reply = server.post(path, body)
    assert reply.status_code == 400
    assert sentence in reply.json()["error"]["message"]


# --- Number ---


@contextmanager
def crowded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    """A server that can hold four connections, with one place free."""
    monkeypatch.setattr(connection_limits, "OTHERS", 2)
    with live(scheduler=SchedulerConfig(max_queue=1, grace_s=5)) as server, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connected(server))
        wait_for(lambda: len(server.runner._server.server_state.connections) == 3)
        yield server


def test_a_connection_too_many_gets_503_for_whatever_it_asks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with crowded(monkeypatch) as server:
        with connected(server):
            wait_for(lambda: len(server.runner._server.server_state.connections) == 4)
            for _ in range(3):
                with connected(server, head("Content-Length: 5")) as connection:
                    reply = received(connection)
            status, error = status_and_error(reply)
            assert (status, error["type"]) == (503, "service_unavailable_error")
            assert error["message"] == "The server has as many connections as it can hold. Close some, or try again in 5 s."
            assert b"\r\nretry-after: 5\r\n" in reply.lower()
        assert server.chat().json()["choices"][0]["message"]["content"] == ECHO  # on the place that is free again
        assert caplog.messages.count("All of the 4 connections that there may be are taken: more of them get 503.") == 1


def test_a_connection_too_many_that_says_nothing_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_limits, "EXCESS_S", 0.2)
    with crowded(monkeypatch) as server, connected(server), connected(server) as connection:
        start = time.monotonic()
        assert received(connection) == b""
        assert time.monotonic() - start < 3  # the read timeout is 30 s


def test_connections_leave_some_files_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A model, a grammar or an import must be able to open one, however many clients come."""
    with bind(ApiConfig(port=0)) as listener, monkeypatch.context() as patch:
        patch.setattr(connection_limits.resource, "getrlimit", lambda kind: (0, 0))
        with socket.create_connection(listener.getsockname(), timeout=10) as connection:
            with pytest.raises(ConnectionAbortedError):
                listener.accept()
            assert connection.recv(1) == b""
        assert "files that this process may open are taken" in caplog.text
        patch.undo()
        with socket.create_connection(listener.getsockname(), timeout=10), listener.accept()[0]:
            pass


def test_files_are_raised_to_what_the_connections_need(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    limits, raised = {"soft": 1024, "hard": 4096}, []
    monkeypatch.setattr(connection_limits.resource, "getrlimit", lambda kind: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(connection_limits.resource, "setrlimit", lambda kind, pair: raised.append(pair))
    assert connection_limits.most_connections(64) == 1065
    assert raised.pop() == (1065 + 256, 4096)
    limits["soft"] = 2000
    assert connection_limits.most_connections(64) == 1065
    assert raised == caplog.records == []
    assert connection_limits.most_connections(10_000) == 4096 - 256
    assert raised.pop() == (4096, 4096)
    assert "may open 4096 files, so at most 3840 clients can be connected at once: raise the limit (ulimit -n 11257)." in caplog.messages[0]


def test_long_bodies_are_read_one_at_a_time_and_short_ones_pass(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes some 200 times its memory while it is made into tokens."""
    begun, go_on, encode = threading.Semaphore(0), threading.Semaphore(0), ByteTokenizer._encode

    def slowly(tokenizer: ByteTokenizer, text: str, special: bool) -> list[int]:
        if len(text) > LONG:
            begun.release()
            assert go_on.acquire(timeout=10)
        return encode(tokenizer, text, special)

    monkeypatch.setattr(ByteTokenizer, "_encode", slowly)
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(server.chat, messages=[{"role": "user", "content": "x" * LONG}]) for _ in range(3)]
        for _ in replies:
            assert begun.acquire(timeout=10)
            assert server.chat().json()["choices"][0]["message"]["content"] == ECHO
            assert not begun.acquire(timeout=0.1)
            go_on.release()
        assert {reply.result().json()["error"]["code"] for reply in replies} == {"context_length_exceeded"}


# --- Time ---


def test_half_a_head_is_given_up(tight: Live) -> None:
    with connected(tight, b"POST /v1/chat/completions HTTP/1.1\r\nHost: local") as connection:
        status, error = status_and_error(received(connection))
    assert (status, error["message"]) == (408, "The request's head did not arrive within 0.3 s (--read_timeout_s).")


def test_dripping_does_not_help(tight: Live) -> None:
    """The whole head has the time, not each byte of it; on a connection that was used before, too."""
    with connected(tight, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert b"200 OK" in connection.recv(1000)
        time.sleep(0.5)  # between two requests there is more time
        start = time.monotonic()
        with pytest.raises(OSError, match=CUT):
            keep_sending(connection, (bytes([letter]) for letter in b"GET /health HTTP/1.1\r\nx-header: " + b"y" * 1000), pause_s=0.02)
        assert time.monotonic() - start < 3


def test_a_connection_that_says_nothing_is_closed(tight: Live) -> None:
    with connected(tight) as connection:
        start = time.monotonic()
        assert received(connection) == b""
        assert 0.2 < time.monotonic() - start < 3


@pytest.mark.parametrize("lines", [("Content-Length: 1000",), ("Transfer-Encoding: chunked",)])
def test_half_a_body_is_given_up(tight: Live, lines: tuple[str, ...]) -> None:
    start = time.monotonic()
    with connected(tight, head(*lines) + b"5\r\n") as connection:
        status, error = status_and_error(received(connection))
    assert (status, error["code"]) == (408, "body_timeout")
    assert time.monotonic() - start < 3


def test_what_is_no_http_is_told_so_in_the_usual_shape(tight: Live) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"):
        with connected(tight, garbage) as connection:
            assert status_and_error(received(connection))[0] == 400
    with connected(tight, b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000) as connection:  # a head without an end
        assert b" 400 " in connection.recv(100)


def test_a_reader_that_never_reads_is_cut(tight: Live) -> None:
    """Its events are bounded, its request is ended, its connection does not stay; the others never notice."""
    forever = [ord("x")] * 3_000_000
    with live(FakeEngine(num_pages=200_000, page_size=16, script=forever), cache_lens=3_100_000, write_timeout_s=1.0) as server:
        body = json.dumps({"messages": USER, "max_tokens": 3_000_000, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
        with connected(server) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head(f"Content-Length: {len(body)}") + body)
            wait_for(lambda: len(server.engine.steps) > 10)
            wait_for(lambda: server.service.open == 0, 20)
            assert len(server.engine.steps) < 30_000 + MOST_WAITING  # what sockets buffer, and what may wait
            assert server.chat(max_tokens=5).json()["choices"][0]["message"]["content"] == "xxxxx"
            wait_for(lambda: not server.runner._server.server_state.connections - idle(server), 10)
        server.wait_idle()


def idle(server: Live) -> set[Any]:
    return {connection for connection in server.runner._server.server_state.connections if connection.cycle is None or connection.cycle.response_complete}


def test_a_whole_reply_that_is_never_read_is_cut_too(tight: Live) -> None:
    many = 7000  # tokens, 2 KB each
    with live(FakeEngine(num_pages=1000, script=[ord("x")] * many), cache_lens=many + 1000, write_timeout_s=0.3) as server:
        body = json.dumps({"messages": USER, "max_tokens": many, "logprobs": True, "top_logprobs": 20}).encode()
        with connected(server) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head(f"Content-Length: {len(body)}") + body)
            wait_for(lambda: len(server.engine.steps) >= many)
            wait_for(lambda: not server.runner._server.server_state.connections, 10)


def test_a_slow_reader_gets_its_whole_reply() -> None:
    """Slower than the timeout all in all, but it does read."""
    many = 6000
    with live(FakeEngine(num_pages=1000, script=[ord("x")] * many), cache_lens=2 * many, write_timeout_s=0.5) as server:
        body = json.dumps({"messages": USER, "max_tokens": many, "stream": True, "logprobs": True, "top_logprobs": 5}).encode()
        with connected(server) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            connection.sendall(head(f"Content-Length: {len(body)}", "Connection: close") + body)
            reply = b""
            while part := connection.recv(65536):
                reply += part
                time.sleep(0.02)
        assert reply.count(b'"content":"x"') == many
        assert b"data: [DONE]" in reply


def test_a_request_that_takes_too_long_is_ended() -> None:
    with live(FakeEngine(step_s=0.01), request_timeout_s=0.3) as server, ThreadPoolExecutor() as pool:
        long = [{"role": "user", "content": "x" * 500}]
        running = pool.submit(server.chat, messages=long)
        wait_for(lambda: server.service.open == 1)
        waiting = pool.submit(server.chat)
        for reply in (running.result(), waiting.result()):
            assert (reply.status_code, reply.json()["error"]["code"], reply.headers["x-should-retry"]) == (504, "request_timeout", "false")
        assert server.serving.metrics.registry.get_sample_value("moespan_request_failure_total", {"error": "RequestTimeout"}) == 2
        server.wait_idle()
        steps = len(server.engine.steps)
        lines = server.lines(CHAT, {"messages": long})
        assert '"code":"request_timeout"' in lines[-1]
        assert len(lines) > 3  # what was there by then
        server.wait_idle()
        assert len(server.engine.steps) - steps < 60
        with pytest.raises(openai.InternalServerError, match=r"took longer than the 0\.3 s"):  # and the SDK does not try again
            server.client(max_retries=5).chat.completions.create(model="m", messages=long)


def test_within_its_time_a_request_is_as_ever(tight: Live) -> None:
    assert tight.chat().json()["choices"][0]["message"]["content"] == ECHO
    assert tight.lines(CHAT, {"messages": USER})[-1] == "[DONE]"
