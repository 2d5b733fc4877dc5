"""What the log says of a request: its id in every line, one line at its end, and never its text unless asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from server.api.access import request_id
from server.cli.logs import JsonFormatter, TextFormatter, set_up_logging
from server.types import REQUEST_ID
from tests.api.live import USER, Live, live, wait_for
from tests.fakes import FakeEngine

CHAT = "/v1/chat/completions"
SECRET = "xyzzy plugh"


class Lines(logging.Handler):
    """Every line of the log, as a formatter writes it."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def logged() -> Iterator[Callable[..., list[str]]]:
    """Begin to log everything, of every library."""
    root, handlers = logging.getLogger(), []

    def begin(formatter: logging.Formatter) -> list[str]:
        handlers.append(Lines(formatter))
        root.addHandler(handlers[-1])
        return handlers[-1].lines

    level = root.level
    root.setLevel(logging.DEBUG)
    yield begin
    root.setLevel(level)
    for handler in handlers:
        root.removeHandler(handler)


def access_line(lines: list[str]) -> dict[str, Any]:
    """The one that ends a request, once it is there."""
    wait_for(lambda: any('"server.api.access"' in line for line in lines))
    (found,) = [json.loads(line) for line in lines if '"server.api.access"' in line]
    return dict(found)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_with_a_line_that_says_it_all(logged: Callable[..., list[str]], stream: bool) -> None:
    with live(FakeEngine(step_s=0.002)) as server:
        lines = logged(JsonFormatter())
        reply = server.post(CHAT, {"messages": USER, "stream": stream, "max_tokens": 4}, headers={"x-request-id": "trace-42"})
        line = access_line(lines)
    assert reply.headers["x-request-id"] == "trace-42"
    said = {key: line[key] for key in ("request_id", "client", "method", "route", "status", "prompt_tokens", "completion_tokens", "finish_reason")}
    assert said == {
        "request_id": "trace-42", "client": "127.0.0.1", "method": "POST", "route": CHAT, "status": 200,
        "prompt_tokens": 10, "completion_tokens": 4, "finish_reason": "length",
    }  # fmt: skip
    assert 0 <= line["queue_s"] < line["ttft_s"] <= line["seconds"] < 10
    assert 100 < line["tok_s"] < 500
    assert line["level"] == "info"


def test_every_line_of_a_request_has_its_id(logged: Callable[..., list[str]]) -> None:
    """The engine's thread works for one request at a time, and its lines go to the right one."""
    with live(FakeEngine(step_s=0.001)) as server, ThreadPoolExecutor() as pool:
        lines = logged(JsonFormatter())
        long = [{"role": "user", "content": "x" * 100}]
        ids = [f"client-{number}" for number in range(4)]
        list(pool.map(lambda name: server.post(CHAT, {"messages": long}, headers={"x-request-id": name}), ids))
        wait_for(lambda: sum('"server.api.access"' in line for line in lines) == 4)
    ours = [json.loads(line) for line in lines if '"logger": "server.' in line]
    by_logger = {name: [line["request_id"] for line in ours if line["logger"] == name] for name in ("server.scheduler.worker", "server.api.access")}
    assert sorted(by_logger["server.api.access"]) == ids
    assert sorted(by_logger["server.scheduler.worker"]) == sorted(ids * 4)  # three chunks of the prompt, and the end
    replies: dict[str, set[str]] = {}
    for line in ours:
        if line["logger"] == "server.scheduler.worker":
            replies.setdefault(line["message"].partition(":")[0], set()).add(line["request_id"])
    assert [len(names) for names in replies.values()] == [1, 1, 1, 1]


def test_a_failure_is_logged_under_its_request(logged: Callable[..., list[str]]) -> None:
    with live(FakeEngine(fail_at=2)) as server:
        lines = logged(JsonFormatter())
        assert server.post(CHAT, {"messages": USER}, headers={"x-request-id": "it"}).status_code == 500
        assert access_line(lines)["status"] == 500
    failure = next(json.loads(line) for line in lines if "traceback" in line)
    assert (failure["request_id"], failure["level"]) == ("it", "error")
    assert "told to fail" in failure["traceback"]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "-x", "a\tb", "é", '{"a":1}'])
def test_an_id_that_is_none_is_replaced(given: str) -> None:
    assert request_id(given).startswith("req_")
    assert request_id("7f.a_b:c-9") == "7f.a_b:c-9"


def test_every_answer_has_an_id(server: Live) -> None:
    replies = [server.get("/health"), server.get("/nowhere"), server.post(CHAT, []), server.get("/v1/models", headers={"host": "evil.example"})]
    assert [reply.status_code for reply in replies] == [200, 404, 400, 403]
    assert len({reply.headers["x-request-id"] for reply in replies}) == 4


def test_lines_name_the_route_and_not_what_a_client_wrote(server: Live, logged: Callable[..., list[str]]) -> None:
    lines = logged(TextFormatter())
    server.get("/v1/models/some%20made-up%20name")
    server.get("/no%0Awhere/" + "y" * 1000)
    wait_for(lambda: sum("server.api.access" in line for line in lines) == 2)
    first, second = [line for line in lines if "server.api.access" in line]
    assert "127.0.0.1 GET /v1/models/{model_id:path} 404 in 0.0" in first
    assert r"GET /no\nwhere/yyy" in second
    assert len(second) < 300


def test_a_client_that_leaves_has_its_line(logged: Callable[..., list[str]]) -> None:
    with live(FakeEngine(step_s=0.01)) as server:
        lines = logged(JsonFormatter())
        with pytest.raises(Exception, match="timed out"):
            server.post(CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}, timeout=0.2)
        assert access_line(lines)["status"] == 499


def ask_everything(server: Live) -> None:
    """Requests of all kinds around one text, right ones and wrong ones."""
    messages = [{"role": "user", "content": SECRET}]
    for path, body in [(CHAT, {"messages": messages}), ("/v1/completions", {"prompt": SECRET}), ("/tokenize", {"prompt": SECRET})]:
        for more in ({}, {"stream": True}, {"logprobs": True}, {"temperature": SECRET}, {"stop": SECRET}, {SECRET: SECRET}, {"max_tokens": 10**9}):
            server.post(path, {**body, **more})
    server.post(CHAT, {"messages": [{"role": SECRET, "content": SECRET}]})
    server.request("POST", CHAT, content=f'{{"messages": "{SECRET}')
    server.post(CHAT, {"messages": [{"role": "user", "content": SECRET * 500}]})


@pytest.mark.parametrize("fail_at", [None, 3])
def test_no_prompt_is_in_the_log(logged: Callable[..., list[str]], fail_at: int | None) -> None:
    with live(FakeEngine(fail_at=fail_at)) as server:
        lines = logged(JsonFormatter())
        ask_everything(server)
    ours = [line for line in lines if '"logger": "httpcore' not in line and '"logger": "sse_starlette' not in line]  # the client's own; DEBUG of a library
    assert len(ours) > 20
    assert [line for line in ours if "xyzzy" in line] == []


def test_with_log_prompts_they_are(logged: Callable[..., list[str]]) -> None:
    with live(log_prompts=True) as server:
        lines = logged(TextFormatter())
        server.chat(messages=[{"role": "user", "content": SECRET}])
    assert any(f"u:{SECRET}\na:" in line for line in lines)


def test_lines_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    token = REQUEST_ID.set("r-1")
    try:
        set_up_logging(verbose=False)
        logging.getLogger("server.x").info("Zählt %d", 3, extra={"fields": {"n": 3}})
        set_up_logging(verbose=False, log_format="json")
        logging.getLogger("server.x").info("Zählt %d", 3, extra={"fields": {"n": 3}})
        logging.getLogger("server.x").debug("not this")
        logging.getLogger("library").info("nor this")
    finally:
        REQUEST_ID.reset(token)
    text, line = capsys.readouterr().err.splitlines()
    assert text[8:] == " INFO    server.x: [r-1] Zählt 3"
    parsed = json.loads(line)
    assert parsed.pop("time").endswith("+00:00")
    assert parsed == {"level": "info", "logger": "server.x", "request_id": "r-1", "message": "Zählt 3", "n": 3}
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)  # the streams that it had are closed after the test
