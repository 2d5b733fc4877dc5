"""The wire of /v1/chat/completions, to the last key."""

from __future__ import annotations

import json
import time

import pytest

from tests.api.live import ECHO, MODEL, USER, Live, live
from tests.fakes import FakeEngine

CHAT = "/v1/chat/completions"


def test_a_whole_reply_has_openais_shape(server: Live) -> None:
    reply = server.chat(model="whatever the client calls it").json()
    timings = reply.pop("timings")
    assert reply.pop("id").startswith("chatcmpl-")
    assert abs(reply.pop("created") - time.time()) < 10
    assert reply == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": ECHO}, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 11, "total_tokens": 21, "prompt_tokens_details": {"cached_tokens": 0}},
    }
    assert set(timings) == {"cache_n", "prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_ms", "predicted_per_second"}
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (0, 10, 11)
    assert timings["prompt_per_second"] > 0


def test_a_stream_has_openais_shape(server: Live) -> None:
    chunks = server.chunks(CHAT, {"messages": USER})
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {("chat.completion.chunk", MODEL)}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0] == {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    assert choices[1] == {"index": 0, "delta": {"content": "u"}, "logprobs": None, "finish_reason": None}
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == ECHO
    assert [("timings" in chunk, "usage" in chunk) for chunk in chunks] == [(False, False)] * (len(chunks) - 1) + [(True, False)]


def test_usage_comes_in_a_chunk_of_its_own_with_the_timings(server: Live) -> None:
    chunks = server.chunks(CHAT, {"messages": USER, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 10, "completion_tokens": 11, "total_tokens": 21, "prompt_tokens_details": {"cached_tokens": 0}}
    assert chunks[-1]["timings"]["predicted_n"] == 11
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in chunk or "timings" in chunk for chunk in chunks[:-1])


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_limit_ends_with_length(server: Live, field: str) -> None:
    reply = server.chat(**{field: 3}).json()
    assert reply["choices"][0]["message"]["content"] == ECHO[:3]
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 3


def test_the_newer_limit_is_the_stronger_one(server: Live) -> None:
    assert server.chat(max_tokens=5, max_completion_tokens=2).json()["usage"]["completion_tokens"] == 2


def test_the_end_of_the_cache_ends_with_length() -> None:
    with live(FakeEngine(script=[ord("x")] * 1000), cache_lens=32) as server:
        reply = server.chat(max_tokens=500).json()
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["total_tokens"] == 32


@pytest.mark.parametrize("stop", ["hello", ["never", "hello"], ["o\na"]])
def test_stop_strings_end_a_reply_across_tokens_and_do_not_leak(server: Live, stop: object) -> None:
    expected = ECHO[: ECHO.index("hello")] if "hello" in stop else ECHO[: ECHO.index("o\na")]  # type: ignore[operator]
    choice = server.chat(stop=stop).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    chunks = server.chunks(CHAT, {"messages": USER, "stop": stop})
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_content_may_be_an_array_of_texts(server: Live) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert server.chat(messages=messages).json()["choices"][0]["message"]["content"] == "u:hel\nlo\na:"


def test_every_role_reaches_the_template_and_developer_is_system(server: Live) -> None:
    messages = [
        {"role": "developer", "content": "1"},
        {"role": "system", "content": "2"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
        {"role": "tool", "content": "5", "tool_call_id": "x"},
    ]
    assert server.chat(messages=messages).json()["choices"][0]["message"]["content"] == "s:1\ns:2\nu:3\na:4\nu:<tool_response>\n5\n</tool_response>\na:"


def test_logprobs_have_the_chat_shape(server: Live) -> None:
    expected = {
        "token": "u",
        "logprob": -0.5,
        "bytes": [117],
        "top_logprobs": [{"token": "u", "logprob": -0.5, "bytes": [117]}, {"token": "v", "logprob": -1.5, "bytes": [118]}],
    }
    entries = server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert entries[0] == expected
    assert "".join(entry["token"] for entry in entries) == ECHO
    chunks = server.chunks(CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 2})
    assert chunks[1]["choices"][0]["logprobs"] == {"content": [expected]}
    assert server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_sampling_reaches_the_engine(server: Live) -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 11,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.1,
    }
    assert server.chat(**given, logit_bias={"5": -100, "6": 1.5}, logprobs=True, top_logprobs=1).status_code == 200
    params = server.engine.samplers[-1].params
    assert {name: getattr(params, name) for name in given} == given
    assert params.logit_bias == {5: -100, 6: 1.5}
    assert params.top_logprobs == 1


def test_absent_and_null_fields_have_openais_defaults(server: Live) -> None:
    nulls = dict.fromkeys(["temperature", "top_p", "top_k", "seed", "stop", "logit_bias", "max_tokens", "logprobs", "n", "tools", "stream_options", "user"])
    assert server.chat(**nulls).status_code == 200
    params = server.engine.samplers[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.logit_bias, params.top_logprobs) == (1.0, 1.0, 0, None, {}, None)


def test_unknown_fields_are_ignored(server: Live) -> None:
    assert server.chat(no_such_field={"a": 1}, user="me", store=False, metadata={}, n=1, tools=[], tool_choice="none").status_code == 200


@pytest.mark.parametrize("text", ["日本語と中文 🦙🏳️‍🌈 é", "🦙" * 5])
def test_characters_never_break_across_chunks(server: Live, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in server.chunks(CHAT, {"messages": messages})]
    assert "".join(pieces) == f"u:{text}\na:"
    assert not any("\ufffd" in piece for piece in pieces)
    assert server.chat(messages=messages).json()["choices"][0]["message"]["content"] == f"u:{text}\na:"


TEMPLATE_THAT_OPENS = "{{ messages[0].content }}<think>\n"


def says(text: str) -> FakeEngine:
    return FakeEngine(script=list(text.encode()))


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", TEMPLATE_THAT_OPENS])
def test_force_think_opens_the_tag_once(template: str) -> None:
    with live(template=template, force_think=True, reasoning_format="none") as server:
        assert server.chat().json()["choices"][0]["message"]["content"].startswith("<think>\n")
        assert bytes(server.engine.samplers[-1].prompt_ids) == b"hello<think>\n"
        server.post("/v1/completions", {"prompt": "raw"})
        assert bytes(server.engine.samplers[-1].prompt_ids) == b"raw"


@pytest.mark.parametrize(
    ("template", "raw", "force"),
    [
        ("{{ messages[0].content }}", "<think>\nhm\n</think>\n\nyes", False),
        ("{{ messages[0].content }}", "hm\n</think>\n\nyes", True),
        (TEMPLATE_THAT_OPENS, "hm\n</think>\n\nyes", False),
    ],
)
def test_reasoning_is_split_from_the_answer_streamed_or_not(template: str, raw: str, force: bool) -> None:
    with live(says(raw), template=template, force_think=force) as server:
        assert server.chat().json()["choices"][0]["message"] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
        deltas = [chunk["choices"][0]["delta"] for chunk in server.chunks(CHAT, {"messages": USER})]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
        assert "".join(delta.get("content", "") for delta in deltas) == "yes"


def test_reasoning_format_none_is_the_raw_reply() -> None:
    raw = "<think>\nhm\n</think>\n\nyes"
    with live(says(raw), reasoning_format="none") as server:
        assert server.chat().json()["choices"][0]["message"] == {"role": "assistant", "content": raw}
    with live(says("hm\n</think>\n\nyes"), reasoning_format="none", force_think=True) as server:
        assert server.chat().json()["choices"][0]["message"]["content"] == raw
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in server.chunks(CHAT, {"messages": USER})]
        assert "".join(pieces) == raw


def test_a_stream_that_waits_or_prefills_is_kept_alive_with_comments() -> None:
    with live(FakeEngine(step_s=0.02, prefill_chunk=8), keep_alive_s=0.03) as server:
        body = {"messages": [{"role": "user", "content": "x" * 60}], "stream": True, "max_tokens": 2}
        with server._http.stream("POST", CHAT, json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = list(response.iter_lines())
        comments = [line for line in lines if line.startswith(":")]
        assert any("prefilled" in comment and "of 65 tokens" in comment for comment in comments)
        assert [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines if line.startswith("data: {")][-1] == "length"


def test_a_failure_before_the_first_token_has_its_status_and_a_later_one_is_said_in_the_stream() -> None:
    with live(FakeEngine(fail_at=0)) as server:
        reply = server.chat(stream=True)
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    with live(FakeEngine(fail_at=4)) as server:
        lines = server.lines(CHAT, {"messages": USER})
        assert "[DONE]" not in lines
        error = json.loads(lines[-1])["error"]
        assert error["type"] == "server_error"
        assert "log" in error["message"]
        assert server.chat().json()["choices"][0]["message"]["content"] == ECHO
