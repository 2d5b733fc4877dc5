"""OpenAI's /v1/responses, with the official client and to the last key."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.calling import ARGUMENTS, SCHEMA, call_of, calling
from tests.api.live import ECHO, MODEL, Live, live
from tests.fakes import FakeEngine

RESPONSES = "/v1/responses"
THINKS = "<think>\nhm\n</think>\n\nyes"


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def says(text: str) -> FakeEngine:
    return FakeEngine(script=list(text.encode()))


def events_of(server: Live, **body: Any) -> list[dict[str, Any]]:
    """The stream's events, after a check of their names and numbers."""
    with server._http.stream("POST", RESPONSES, json={"input": "hello", "stream": True, **body}) as response:
        lines = [line for line in response.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert lines[::2] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_a_whole_response_has_openais_shape(server: Live) -> None:
    reply = server.post(RESPONSES, {"input": "hello"}).json()
    assert reply.pop("id").startswith("resp_")
    assert abs(reply.pop("created_at") - time.time()) < 10
    (message,) = reply.pop("output")
    assert message.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": ECHO, "annotations": [], "logprobs": []}
    assert message == {"type": "message", "status": "completed", "role": "assistant", "content": [part]}
    assert reply.pop("usage") == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 11,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 21,
    }
    assert (reply["object"], reply["status"], reply["model"], reply["store"]) == ("response", "completed", MODEL, False)
    assert (reply["error"], reply["incomplete_details"], reply["text"]) == (None, None, {"format": {"type": "text"}})


def test_a_stream_has_openais_events() -> None:
    with live(says(THINKS)) as server:
        events = events_of(server)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for kind in kinds if not kind.endswith("delta")] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert (kinds.count("reasoning_text.delta"), kinds.count("output_text.delta")) == (2, 3)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    assert [item["content"][0]["text"] for item in done] == ["hm", "yes"]
    assert done[0] == {"id": done[0]["id"], "type": "reasoning", "status": "completed", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    assert [event["output_index"] for event in events[2:-1]] == [0] * 7 + [1] * 8
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["usage"] is None


def test_the_client_reads_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input="hello")
    assert (whole.output_text, whole.status) == (ECHO, "completed")
    with client.responses.stream(model=MODEL, input="hello") as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == ECHO
        final = stream.get_final_response()
    assert final.output_text == ECHO
    assert final.usage is not None
    assert final.usage.output_tokens == 11


def test_the_conversation_becomes_the_prompt(server: Live, client: openai.OpenAI) -> None:
    turns: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {"role": "user", "content": "d"},
    ]
    client.responses.create(model=MODEL, input=turns, instructions="be brief", temperature=0.5, top_p=0.9, metadata={"a": "b"})
    sampler = server.engine.samplers[-1]
    assert bytes(sampler.prompt_ids) == b"s:be brief\nu:a\nb\na:c\nu:d\na:"
    assert (sampler.params.temperature, sampler.params.top_p) == (0.5, 0.9)


def test_what_a_response_was_can_be_sent_back(server: Live, client: openai.OpenAI) -> None:
    with live(says(THINKS)) as thinking, thinking.client() as other:
        first = other.responses.create(model=MODEL, input="a")
    assert [item.type for item in first.output] == ["reasoning", "message"]
    said: Any = [{"role": "user", "content": "a"}, *[item.to_dict() for item in first.output], {"role": "user", "content": "b"}]
    client.responses.create(model=MODEL, input=said)
    assert bytes(server.engine.samplers[-1].prompt_ids) == b"u:a\na:yes\nu:b\na:"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_the_limit_ends_is_incomplete(server: Live, stream: bool) -> None:
    reply = events_of(server, max_output_tokens=3)[-1]["response"] if stream else server.post(RESPONSES, {"input": "hello", "max_output_tokens": 3}).json()
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (reply["output"][0]["status"], reply["output"][0]["content"][0]["text"]) == ("incomplete", ECHO[:3])


def test_log_probabilities(client: openai.OpenAI) -> None:
    reply: Any = client.responses.create(model=MODEL, input="hello", include=["message.output_text.logprobs"], top_logprobs=2)
    entries = reply.output[0].content[0].logprobs
    assert [entry.token for entry in entries] == list(ECHO)
    assert [len(entry.top_logprobs) for entry in entries[:3]] == [2, 2, 2]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"input": None}, "input", "'input' must be a string or an array of items, not null."),
        ({"input": []}, "input", "'input' must not be empty."),
        ({"store": True}, "store", "'store' is not supported by this server."),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "'previous_response_id' is not supported by this server."),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "'input[0]' is of type 'item_reference'; this server reads"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content", "has a part of type 'input_image'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]", "'input[0]' is of type 'function_call' and has no 'call_id'."),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'tools[0].type' must be 'function', not 'web_search'."),
        ({"input": [{"type": {}}]}, "input[0]", "'input[0]' is of type {}; this server reads"),
        ({"include": [{}]}, "include", "'include' holds {}; this server can include"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "so a 'reasoning.effort' of 'high' is not possible"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type", "'text.format.type' must be"),
        ({"include": ["file_search_call.results"]}, "include", "'include' holds 'file_search_call.results'"),
        ({"text": {"verbosity": "low"}}, "verbosity", "'verbosity' is supported only as \"medium\""),
        ({"input": "x" * 5000}, "input", "The prompt has 5005 tokens"),
    ],
)
def test_what_is_wrong_is_said_in_openais_shape(server: Live, body: dict[str, Any], param: str, said: str) -> None:
    reply = server.post(RESPONSES, {"input": "hello", **body})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]


def test_a_late_failure_is_an_event() -> None:
    with live(FakeEngine(fail_at=5)) as server:
        last = events_of(server)[-1]
        assert (last["type"], last["response"]["status"], last["response"]["error"]["code"]) == ("response.failed", "failed", "server_error")
        assert "The engine failed" in last["response"]["error"]["message"]
        assert last["response"]["output"][0]["status"] == "incomplete"


def test_leaving_a_stream_cancels() -> None:
    with live(FakeEngine(step_s=0.005)) as server, server.client() as client:
        with client.responses.create(model=MODEL, input="x" * 500, stream=True) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    break
        server.wait_idle()
        assert len(server.engine.steps) < 100


@pytest.mark.parametrize("path", ["embeddings", "images/generations", "audio/speech", "audio/transcriptions", "moderations"])
def test_what_this_server_does_not_make_is_not_implemented(server: Live, path: str) -> None:
    reply = server.post(f"/v1/{path}", {"input": "hello"})
    assert reply.status_code == 501
    assert reply.json()["error"]["type"] == "not_implemented_error"
    assert f"/v1/{path} is not served: this server makes text" in reply.json()["error"]["message"]


TOOLS: Any = [
    {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False},
    {"type": "function", "name": "time", "parameters": {}, "strict": False},
]


def test_calls_are_items_of_their_own() -> None:
    with calling() as server, server.client() as client:
        whole = client.responses.create(model=MODEL, input="hello", tools=TOOLS)
        with client.responses.stream(model=MODEL, input="hello", tools=TOOLS) as stream:
            pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
            streamed = stream.get_final_response()
    assert json.loads("".join(pieces).partition("}")[0] + "}") == ARGUMENTS
    for response in (whole, streamed):
        calls: Any = [item for item in response.output if item.type == "function_call"]
        assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
        assert [(call.name, json.loads(call.arguments), call.status) for call in calls] == [("weather", ARGUMENTS, "completed"), ("time", {}, "completed")]
        assert len({call.call_id for call in calls}) == 2
        assert response.output_text.strip() == "Let me see."


def test_calls_and_their_results_become_the_prompt() -> None:
    items: Any = [
        {"role": "user", "content": "hello"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": json.dumps(ARGUMENTS)},
        {"type": "function_call", "call_id": "call_2", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "noon"}]},
    ]
    with calling() as server, server.client() as client:
        client.responses.create(model=MODEL, input=items, tools=TOOLS)
        prompt = bytes(server.engine.samplers[-1].prompt_ids).decode()
    assert prompt == f"t:weather,time\nu:hello\na:(hm){call_of('weather', **ARGUMENTS)}{call_of('time')}\ncall_1:rain\ncall_2:noon\na:"


def test_choices_and_formats_reach_the_sampler() -> None:
    forced: Any = {"type": "function", "name": "weather"}
    schema: Any = {
        "format": {"type": "json_schema", "name": "answer", "schema": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}}
    }
    with calling(call_of("weather", **ARGUMENTS)) as server, server.client() as client:
        response: Any = client.responses.create(model=MODEL, input="hello", tools=TOOLS, tool_choice=forced)
        assert [item.name for item in response.output] == ["weather"]
        assert server.engine.samplers[-1].constraint is not None
        client.responses.create(model=MODEL, input="hello", text=schema, max_output_tokens=5)
        assert server.engine.samplers[-1].constraint is not None
