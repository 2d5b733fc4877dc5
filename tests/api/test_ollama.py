"""Ollama's API, with the official client and to the last key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from server.config import SchedulerConfig
from tests.api.calling import ARGUMENTS, SCHEMA, call_of, calling
from tests.api.live import ECHO, MODEL, USER, Live, live
from tests.fakes import FakeEngine

THINKS = "<think>\nhm\n</think>\n\nyes"


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[ollama.Client]:
    with client_of(server) as client:
        yield client


def client_of(server: Live, **headers: str) -> ollama.Client:
    return ollama.Client(f"http://127.0.0.1:{server.port}", timeout=20, headers=headers)


def says(text: str) -> FakeEngine:
    return FakeEngine(script=list(text.encode()))


def lines_of(server: Live, path: str, **body: Any) -> list[dict[str, Any]]:
    """The stream's lines. It streams without being asked."""
    with server._http.stream("POST", path, json=body) as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in response.iter_lines()]


COUNTS = {"done_reason", "total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"}


def test_a_whole_chat_has_ollamas_shape(server: Live) -> None:
    reply = server.post("/api/chat", {"model": "any", "messages": USER, "stream": False}).json()
    assert set(reply) == {"model", "created_at", "message", "done"} | COUNTS
    assert (reply["model"], reply["message"], reply["done"], reply["done_reason"]) == (MODEL, {"role": "assistant", "content": ECHO}, True, "stop")
    assert (reply["prompt_eval_count"], reply["eval_count"], reply["load_duration"]) == (10, 11, 0)
    assert reply["total_duration"] >= reply["prompt_eval_duration"] + reply["eval_duration"] > 0
    assert reply["created_at"].endswith("Z")


def test_a_chat_streams_lines_by_default(server: Live) -> None:
    lines = lines_of(server, "/api/chat", model="any", messages=USER)
    assert "".join(line["message"]["content"] for line in lines) == ECHO
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert set(lines[0]) == {"model", "created_at", "message", "done"}
    assert set(lines[-1]) > COUNTS


def test_a_prompt_has_ollamas_shape_too(server: Live) -> None:
    lines = lines_of(server, "/api/generate", model="any", prompt="hello", system="be brief")
    assert "".join(line["response"] for line in lines) == "s:be brief\nu:hello\na:"
    whole = server.post("/api/generate", {"prompt": "hello", "raw": True, "stream": False}).json()
    assert (whole["response"], whole["done"], whole["prompt_eval_count"]) == ("hello", True, 5)
    assert bytes(server.engine.samplers[-1].prompt_ids) == b"hello"


def test_the_client_chats_and_generates(client: ollama.Client) -> None:
    assert client.chat(MODEL, USER).message.content == ECHO
    assert "".join(part.message.content or "" for part in client.chat(MODEL, USER, stream=True)) == ECHO
    assert client.generate(MODEL, "hello").response == ECHO
    assert "".join(part.response or "" for part in client.generate(MODEL, "hello", stream=True)) == ECHO


@pytest.mark.parametrize(("think", "seen"), [(None, "hm"), (True, "hm"), (False, None), ("high", "hm")])
def test_thinking_has_a_field_of_its_own_unless_it_is_switched_off(think: Any, seen: str | None) -> None:
    with live(says(THINKS), template="{{ messages[0].content }}{{ enable_thinking }}") as server, client_of(server) as client:
        whole = client.chat(MODEL, USER, think=think)
        parts = list(client.chat(MODEL, USER, think=think, stream=True))
        generated = client.generate(MODEL, "hello", think=think)
        assert bytes(server.engine.samplers[-1].prompt_ids).endswith(b"False" if think is False else b"True" if think else b"hello")
    assert (whole.message.thinking, whole.message.content) == (seen, "yes")
    assert "".join(part.message.thinking or "" for part in parts) == (seen or "")
    assert "".join(part.message.content or "" for part in parts) == "yes"
    assert (generated.thinking, generated.response) == (seen, "yes")


def test_options_reach_the_sampler(server: Live, client: ollama.Client) -> None:
    same = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "seed": 3, "presence_penalty": 0.25, "frequency_penalty": -0.25}
    reply = client.chat(
        MODEL, USER, options={**same, "repeat_penalty": 1.2, "num_predict": 3, "num_ctx": 1024, "num_gpu": 99, "num_thread": 2}, keep_alive="5m"
    )
    params = server.engine.samplers[-1].params
    assert {name: getattr(params, name) for name in same} == same
    assert params.repetition_penalty == 1.2
    assert (reply.message.content, reply.done_reason) == (ECHO[:3], "length")
    assert client.chat(MODEL, USER, options={"stop": ["llo"]}).message.content == "u:he"


@pytest.mark.parametrize("raw", [False, True])
def test_many_stop_strings(client: ollama.Client, raw: bool) -> None:
    stops = [*(f"never {i}" for i in range(255)), "llo"]
    assert client.generate(MODEL, "hello", raw=raw, options={"stop": stops}).response.endswith("he")
    with pytest.raises(ollama.ResponseError, match=r"'options\.stop' holds 257 strings; at most 256 are possible\."):
        client.generate(MODEL, "hello", raw=raw, options={"stop": [*stops, "x"]})


def test_durations_are_nanoseconds() -> None:
    with live(FakeEngine(step_s=0.01)) as server, client_of(server) as client:
        reply = client.chat(MODEL, USER)
        assert reply.eval_duration is not None
        assert 1e8 <= reply.eval_duration < 1e9


def test_no_limit_is_the_cache() -> None:
    with live(FakeEngine(script=[ord("x")] * 1000), cache_lens=64, scheduler=SchedulerConfig(max_new_tokens=5)) as server, client_of(server) as client:
        assert client.chat(MODEL, USER).eval_count == 5
        assert client.chat(MODEL, USER, options={"num_predict": -1}).eval_count == 54


def test_log_probabilities(client: ollama.Client) -> None:
    reply = client.chat(MODEL, USER, logprobs=True, top_logprobs=2)
    assert reply.logprobs is not None
    assert [entry.token for entry in reply.logprobs] == list(ECHO)
    assert [len(entry.top_logprobs or []) for entry in reply.logprobs[:3]] == [2, 2, 2]
    streamed = [entry.token for part in client.chat(MODEL, USER, logprobs=True, stream=True) for entry in part.logprobs or []]
    assert streamed == list(ECHO)


def test_nothing_to_say_asks_whether_the_model_is_loaded(server: Live) -> None:
    for path, said in (("/api/chat", {"message": {"role": "assistant", "content": ""}}), ("/api/generate", {"response": ""})):
        reply = server.post(path, {"model": MODEL}).json()
        reply.pop("created_at")
        assert reply == {"model": MODEL, **said, "done": True, "done_reason": "load"}


def test_the_model_is_listed_and_shown(server: Live, client: ollama.Client) -> None:
    (listed,) = client.list().models
    assert (listed.model, len(listed.digest or "")) == (MODEL, 64)
    (running,) = client.ps().models
    assert (running.name, running.context_length) == (MODEL, 1024)
    assert "completion" in (client.show(f"{MODEL}:latest").capabilities or [])
    with pytest.raises(ollama.ResponseError, match="no model 'nope'") as caught:
        client.show("nope")
    assert caught.value.status_code == 404
    assert server.get("/api/version").json()["version"].count(".") == 2
    assert server.request("HEAD", "/").status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"options": {"num_ctx": 32768}}, "'options.num_ctx' is 32768, but the KV cache holds 1024 tokens."),
        ({"options": {"mirostat": 2}}, "'mirostat' is not supported by this server."),
        ({"options": {"temperature": "hot"}}, "'options.temperature' must be a number, not a string."),
        (
            {"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}},
            "'options' has repeat_last_n 64; here repeat_penalty is of the prompt and all of the reply.",
        ),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "'messages[0]' has images; this server's models read text only."),
        ({"think": "much"}, "'think' must be true, false or one of low, medium, high, not 'much'."),
        ({"format": "yaml"}, "'format' must be 'json' or a JSON schema, not a string."),
        ({"think": True}, "so a 'think' of 'medium' is not possible. Leave it out."),
        ({"messages": "hello"}, "'messages' must be an array, not a string."),
    ],
)
def test_what_is_wrong_is_said_in_ollamas_shape(server: Live, body: dict[str, Any], said: str) -> None:
    reply = server.post("/api/chat", {"model": MODEL, "messages": USER, **body})
    assert reply.status_code == 400
    assert list(reply.json()) == ["error"]
    assert said in reply.json()["error"]


@pytest.mark.parametrize("field", ["suffix", "template", "context", "images"])
def test_what_a_prompt_cannot_have_is_refused(server: Live, field: str) -> None:
    reply = server.post("/api/generate", {"prompt": "x", field: [1] if field in ("context", "images") else "x"})
    assert (reply.status_code, reply.json()) == (400, {"error": f"'{field}' is not supported by this server. Leave it out."})


def test_a_raw_prompt_has_no_template(server: Live, client: ollama.Client) -> None:
    reply = client.generate(MODEL, "hello", raw=True, options={"num_predict": 2}, logprobs=True, top_logprobs=1)
    assert reply.logprobs is not None
    assert (reply.response, [entry.token for entry in reply.logprobs], bytes(server.engine.samplers[-1].prompt_ids)) == ("he", ["h", "e"], b"hello")
    for field in ({"system": "x"}, {"think": False}):
        assert "needs the model's template, and 'raw' leaves that out." in server.post("/api/generate", {"prompt": "x", "raw": True, **field}).json()["error"]


def test_managing_models_and_embeddings_are_not_implemented(client: ollama.Client) -> None:
    for call in (lambda: client.pull("x"), lambda: client.embed("x", "y"), lambda: client.delete("x"), lambda: client.embeddings("x", "y")):
        with pytest.raises(ollama.ResponseError, match="is not served: this server") as caught:
            call()
        assert caught.value.status_code == 501


def test_errors_are_the_clients() -> None:
    with live(FakeEngine(fail_at=20), api_key=("sk-right",)) as server:
        with client_of(server, Authorization="Bearer sk-right") as client:
            with pytest.raises(ollama.ResponseError, match="The prompt has 5005 tokens"):
                client.chat(MODEL, [{"role": "user", "content": "x" * 5000}])
            with pytest.raises(ollama.ResponseError, match="The engine failed"):
                list(client.chat(MODEL, [{"role": "user", "content": "x" * 50}], stream=True))
        with client_of(server) as client, pytest.raises(ollama.ResponseError, match="missing") as caught:
            client.chat(MODEL, USER)
        assert caught.value.status_code == 401


def test_leaving_a_stream_cancels() -> None:
    with live(FakeEngine(step_s=0.005)) as server, client_of(server) as client:
        stream = client.chat(MODEL, [{"role": "user", "content": "x" * 500}], stream=True)
        next(stream)
        stream.close()
        server.wait_idle()
        assert len(server.engine.steps) < 100


def test_a_stream_that_waits_is_kept_alive_with_lines_that_add_nothing() -> None:
    with live(FakeEngine(step_s=0.02, prefill_chunk=8), keep_alive_s=0.03) as server:
        lines = lines_of(server, "/api/chat", messages=[{"role": "user", "content": "x" * 60}], options={"num_predict": 2})
        assert [line["message"]["content"] for line in lines[:2]] == ["", ""]
        assert "".join(line["message"]["content"] for line in lines) == "u:"
        assert lines[-1]["done_reason"] == "length"


TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "x", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "time"}},
]


def test_calls_are_sent_as_a_whole() -> None:
    with calling() as server, client_of(server) as client:
        whole = client.chat(MODEL, USER, tools=TOOLS)
        lines = list(client.chat(MODEL, USER, tools=TOOLS, stream=True))
    streamed = [call for line in lines for call in line.message.tool_calls or []]
    for calls in (whole.message.tool_calls or [], streamed):
        assert [(call.function.name, dict(call.function.arguments)) for call in calls] == [("weather", ARGUMENTS), ("time", {})]
    assert (whole.message.content or "").strip() == "Let me see."
    assert (whole.done_reason, lines[-1].done_reason) == ("stop", "stop")


def test_results_go_to_the_calls_that_they_are_of() -> None:
    call: Any = [{"function": {"name": "weather", "arguments": ARGUMENTS}}, {"function": {"name": "time", "arguments": {}}}]
    turns: Any = [*USER, {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": call}]
    results: Any = [{"role": "tool", "tool_name": "time", "content": "noon"}, {"role": "tool", "content": "rain"}, {"role": "tool", "content": "?"}]
    with calling() as server, client_of(server) as client:
        client.chat(MODEL, [*turns, *results], tools=TOOLS)
        prompt = bytes(server.engine.samplers[-1].prompt_ids).decode()
    assert prompt == f"t:weather,time\nu:hello\na:(hm){call_of('weather', **ARGUMENTS)}{call_of('time')}\ncall_1_1:noon\ncall_1_0:rain\nt:?\na:"
