"""Anthropic's /v1/messages, with the official client and to the last key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from server.api.shapes.base import Call
from tests.api.calling import ARGUMENTS, SCHEMA, call_of, calling
from tests.api.live import ECHO, MODEL, USER, Live, live
from tests.fakes import FakeEngine

MESSAGES = "/v1/messages"
THINKS = "<think>\nhm\n</think>\n\nyes"


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[anthropic.Anthropic]:
    with client_of(server) as client:
        yield client


def client_of(server: Live, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", **{"api_key": "none", "max_retries": 0, "timeout": 20, **options})


def ask(client: anthropic.Anthropic, text: str = "hello", **options: Any) -> Any:
    return client.messages.create(**{"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": text}], **options})


def says(text: str) -> FakeEngine:
    return FakeEngine(script=list(text.encode()))


def events_of(server: Live, **body: Any) -> list[dict[str, Any]]:
    """The stream's events, after a check that each one's name is its type."""
    with server._http.stream("POST", MESSAGES, json={"max_tokens": 100, "messages": USER, "stream": True, **body}) as response:
        lines = [line for line in response.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert lines[::2] == [f"event: {event['type']}" for event in events]
    return events


def test_a_whole_message_has_anthropics_shape(server: Live) -> None:
    reply = server.post(MESSAGES, {"model": "any", "max_tokens": 100, "messages": USER}).json()
    assert reply.pop("id").startswith("msg_")
    assert reply == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": ECHO}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 11},
    }


def test_a_stream_has_anthropics_events() -> None:
    with live(says(THINKS)) as server:
        events = events_of(server)
    assert events[0]["message"]["usage"] == {"input_tokens": 10, "output_tokens": 0}
    assert events[0]["message"]["content"] == []
    assert events[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}}
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    assert [(event["index"], event["delta"]["type"]) for event in deltas] == [
        *[(0, "thinking_delta")] * 2,
        (0, "signature_delta"),
        *[(1, "text_delta")] * 3,
    ]
    assert events[6] == {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}}
    assert [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == len(THINKS) + 1


def test_the_client_reads_whole_and_streamed(client: anthropic.Anthropic) -> None:
    assert ask(client).content[0].text == ECHO
    with client.messages.stream(model=MODEL, max_tokens=100, messages=[{"role": "user", "content": "hello"}]) as stream:
        assert "".join(stream.text_stream) == ECHO
        message = stream.get_final_message()
    assert (message.content[0].text, message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == (ECHO, "end_turn", 10, 11)


@pytest.mark.parametrize(("thinking", "seen"), [(None, "hm"), ({"type": "adaptive"}, "hm"), ({"type": "disabled"}, None)])
def test_thinking_is_a_block_of_its_own_unless_it_is_disabled(thinking: Any, seen: str | None) -> None:
    options = {} if thinking is None else {"thinking": thinking}
    with live(says(THINKS)) as server, client_of(server) as client:
        whole = ask(client, **options)
        with client.messages.stream(model=MODEL, max_tokens=100, messages=[{"role": "user", "content": "x"}], **options) as stream:
            streamed = stream.get_final_message()
    for message in (whole, streamed):
        blocks = [(block.type, block.thinking if block.type == "thinking" else block.text) for block in message.content]
        assert blocks == [*([("thinking", seen)] if seen else []), ("text", "yes")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "reason", "sequence", "text"),
    [
        ({"stop_sequences": ["never", "llo"]}, "stop_sequence", "llo", "u:he"),
        ({"stop_sequences": [*(f"never {i}" for i in range(255)), "llo"]}, "stop_sequence", "llo", "u:he"),
        ({"max_tokens": 3}, "max_tokens", None, ECHO[:3]),
        ({"max_tokens": 2000}, "end_turn", None, ECHO),
    ],
)
def test_why_a_message_ended(client: anthropic.Anthropic, stream: bool, options: Any, reason: str, sequence: str | None, text: str) -> None:
    given = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}], **options}
    if stream:
        with client.messages.stream(**given) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**given)
    assert (message.stop_reason, message.stop_sequence, message.content[0].text) == (reason, sequence, text)


def test_stop_sequences_are_bounded(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"'stop_sequences' holds 257 strings; at most 256 are possible\."):
        ask(client, stop_sequences=["never"] * 257)


def test_the_end_of_the_cache_has_a_reason_of_its_own() -> None:
    with live(FakeEngine(script=[ord("x")] * 1000), cache_lens=32) as server, client_of(server) as client:
        assert ask(client, max_tokens=500).stop_reason == "model_context_window_exceeded"


def test_system_and_blocks_become_the_prompt(server: Live, client: anthropic.Anthropic) -> None:
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "c"}]},
        {"role": "user", "content": "d"},
    ]
    for system in ("be brief", [{"type": "text", "text": "be brief"}]):
        ask(client, messages=turns, system=system, extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 7})
        assert bytes(server.engine.samplers[-1].prompt_ids) == b"s:be brief\nu:a\nb\na:c\nu:d\na:"
    params = server.engine.samplers[-1].params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 7)


def test_tokens_are_counted_as_the_prompt_has_them(client: anthropic.Anthropic) -> None:
    given: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "system": "be brief"}
    counted = client.messages.count_tokens(**given)
    assert counted.input_tokens == client.messages.create(**given, max_tokens=1).usage.input_tokens


def test_the_model_is_listed_in_anthropics_shape(server: Live, client: anthropic.Anthropic) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.type, client.models.retrieve(MODEL).display_name) == (MODEL, "model", MODEL)
    assert server.get("/v1/models").json()["object"] == "list"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"max_tokens": None}, "'max_tokens' must be an integer, not null."),
        ({"max_tokens": 0}, "'max_tokens' must be at least 1, not 0."),
        ({"messages": []}, "'messages' must not be empty."),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'messages[0].content[0]' is of type 'image'; this server reads"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages[0].content[0]' is of type 'text' and has no 'text'."),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'messages[0].role' must be 'user', 'assistant' or 'system', not 'tool'."),
        ({"messages": USER, "tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'tools[0].type' must be 'custom'"),
        ({"messages": USER, "tool_choice": {"type": "tool"}}, "'tool_choice' is of type 'tool' and has no 'name'."),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}}, "The JSON schema cannot be followed"),
        ({"messages": USER, "mcp_servers": [{}]}, "'mcp_servers' is not supported by this server."),
        ({"messages": USER, "system": 5}, "'system' must be a string or an array of blocks, not a number."),
    ],
)
def test_what_is_wrong_is_said_in_anthropics_shape(server: Live, body: dict[str, Any], said: str) -> None:
    reply = server.post(MESSAGES, {"max_tokens": 5, "messages": USER, **body})
    assert reply.status_code == 400
    assert list(reply.json()) == ["type", "error"]
    assert (reply.json()["type"], reply.json()["error"]["type"]) == ("error", "invalid_request_error")
    assert said in reply.json()["error"]["message"]


def test_errors_are_the_clients_classes() -> None:
    with live(FakeEngine(fail_at=20), api_key=("sk-right",)) as server:
        with client_of(server, api_key="sk-right") as client:
            with pytest.raises(anthropic.BadRequestError, match="The prompt has 5005 tokens"):
                ask(client, "x" * 5000)
            with (
                pytest.raises(anthropic.APIStatusError, match="The engine failed"),
                client.messages.stream(model=MODEL, max_tokens=100, messages=[{"role": "user", "content": "x" * 50}]) as stream,
            ):
                stream.get_final_message()
        with client_of(server, api_key="wrong") as client, pytest.raises(anthropic.AuthenticationError, match="wrong"):
            ask(client)
        assert server.get("/v1/messages/nothing", headers={"x-api-key": "sk-right"}).json()["error"]["type"] == "not_found_error"


def test_leaving_a_stream_cancels() -> None:
    with live(FakeEngine(step_s=0.005)) as server, client_of(server) as client:
        with client.messages.stream(model=MODEL, max_tokens=500, messages=[{"role": "user", "content": "x" * 500}]) as stream:
            next(iter(stream.text_stream))
        server.wait_idle()
        assert len(server.engine.steps) < 100


def test_a_stream_that_waits_is_kept_alive_with_pings() -> None:
    with live(FakeEngine(step_s=0.02, prefill_chunk=8), keep_alive_s=0.03) as server:
        events = events_of(server, messages=[{"role": "user", "content": "x" * 60}], max_tokens=2)
        assert {"type": "ping"} in events
        assert events[-1] == {"type": "message_stop"}


TOOLS: Any = [{"name": "weather", "description": "x", "input_schema": SCHEMA}, {"name": "time", "input_schema": {"type": "object", "properties": {}}}]


def test_calls_are_blocks_of_their_own() -> None:
    given: Any = {"model": MODEL, "max_tokens": 500, "messages": USER, "tools": TOOLS}
    with calling() as server, client_of(server) as client:
        whole = client.messages.create(**given)
        with client.messages.stream(**given) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            streamed = stream.get_final_message()
    assert json.loads("".join(pieces).partition("}")[0] + "}") == ARGUMENTS
    for message in (whole, streamed):
        text, *calls = message.content
        assert text.text.strip() == "Let me see."
        assert [(call.name, call.input) for call in calls] == [("weather", ARGUMENTS), ("time", {})]
        assert len({call.id for call in calls}) == 2
        assert message.stop_reason == "tool_use"


def test_calls_and_their_results_become_the_prompt() -> None:
    turns: Any = [
        *USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "unsigned"},
                {"type": "tool_use", "id": "a", "name": "weather", "input": ARGUMENTS},
                {"type": "tool_use", "id": "b", "name": "time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "rain"}]},
                {"type": "tool_result", "tool_use_id": "b", "content": "no clock", "is_error": True},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    with calling() as server, client_of(server) as client:
        ask(client, messages=turns, tools=TOOLS)
        prompt = bytes(server.engine.samplers[-1].prompt_ids).decode()
    assert prompt == f"t:weather,time\nu:hello\na:(hm){call_of('weather', **ARGUMENTS)}{call_of('time')}\na:rain\nb:Error: no clock\nu:and?\na:"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}])
def test_a_call_can_be_asked_for(choice: Any) -> None:
    with calling(call_of("weather", **ARGUMENTS)) as server, client_of(server) as client:
        message = ask(client, tools=TOOLS, tool_choice=choice)
        assert [(block.name, block.input) for block in message.content] == [("weather", ARGUMENTS)]
        assert server.engine.samplers[-1].constraint is not None
        assert ask(client, tools=TOOLS, tool_choice={"type": "none"}).content[0].type == "text"


def test_calls_can_be_kept_to_one() -> None:
    with calling() as server, client_of(server) as client:
        message = ask(client, tools=TOOLS, max_tokens=500, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
        assert [block.type for block in message.content] == ["text", "tool_use"]


def test_a_call_that_the_limit_cuts_off_is_shown_as_it_is() -> None:
    cut = Call("a", "weather", '{"city": "Os')
    assert (cut.parsed(), Call("a", "time", "").parsed()) == ({"INVALID_JSON": '{"city": "Os'}, {})


def test_a_last_message_of_the_assistants_is_continued(server: Live, client: anthropic.Anthropic) -> None:
    ask(client, messages=[*USER, {"role": "assistant", "content": "It is"}])
    assert bytes(server.engine.samplers[-1].prompt_ids) == b"u:hello\na:It is"
