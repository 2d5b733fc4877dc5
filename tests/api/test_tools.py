"""Tools over the wire: offered, called, streamed, forced, answered; with OpenAI's own client where it reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from server.text.tools.formats import DEEPSEEK, HERMES
from tests.api.calling import calling
from tests.api.live import USER, Live, live
from tests.fakes import FakeEngine

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city", "days"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
CALLS: list[tuple[str, dict[str, Any]]] = [("weather", {"city": "Köln", "days": 2}), ("clock", {})]

# Qwen's, in short: it lists tools, and writes calls and results.
TEMPLATE = """\
{%- for tool in tools or [] %}{{ 'tool: ' + tool.function.name + '\\n' }}{% endfor %}
{%- for m in messages %}{{ m.role + ': ' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{ '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def says(text: str) -> FakeEngine:
    return FakeEngine(script=list(text.encode()))


@contextmanager
def serving(text: str, **options: Any) -> Iterator[Live]:
    with live(says(text), **{"template": TEMPLATE, **options}) as server:
        yield server
        server.wait_idle()


def prompt(server: Live) -> str:
    """The last one that was run."""
    return server.ran()[-1].decode()


def without_ids(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(call["id"].startswith("call_") for call in calls)
    return [{key: value for key, value in call.items() if key != "id"} for call in calls]


def called(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def test_calls_are_parts_of_the_message_and_the_text_beside_them_stays() -> None:
    with serving(f"Let me look.\n{HERMES.write(CALLS)}") as server:
        choice = server.chat(tools=TOOLS).json()["choices"][0]
        assert prompt(server) == "tool: weather\ntool: clock\nuser: hello\nassistant: "
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    assert without_ids(choice["message"]["tool_calls"]) == [called(*call) for call in CALLS]


def test_a_call_that_is_only_thought_of_is_none_whatever_becomes_of_thoughts() -> None:
    thought = f"Perhaps {HERMES.write(CALLS[:1])}? No."
    reply = f"<think>{thought}</think>Hi."
    for form, expected in (("deepseek", {"reasoning_content": thought, "content": "Hi."}), ("none", {"content": reply})):
        with serving(reply, reasoning_format=form) as server:
            choice = server.chat(tools=TOOLS).json()["choices"][0]
        assert (choice["finish_reason"], choice["message"]) == ("stop", {"role": "assistant", **expected})


def test_without_text_the_content_is_null() -> None:
    with serving(HERMES.write(CALLS[:1])) as server:
        assert server.chat(tools=TOOLS).json()["choices"][0]["message"]["content"] is None


def test_a_stream_has_openais_deltas() -> None:
    with serving(f"So:\n{HERMES.write(CALLS)}") as server:
        chunks = server.chunks(CHAT, {"messages": USER, "tools": TOOLS})
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert choices[-1]["delta"] == {}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "So:"
    deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    begun = [delta for delta in deltas if "id" in delta]
    assert [(delta["index"], delta["type"], delta["function"]["name"]) for delta in begun] == [(0, "function", "weather"), (1, "function", "clock")]
    assert all("name" not in delta["function"] for delta in deltas if "id" not in delta)
    for index, (_, arguments) in enumerate(CALLS):
        pieces = [delta["function"]["arguments"] for delta in deltas if delta["index"] == index]
        assert json.loads("".join(pieces)) == arguments
    assert len(deltas) > 10, "arguments are to be streamed"


def test_openais_client_reads_a_stream_of_calls() -> None:
    with serving(HERMES.write(CALLS)) as server:
        tools: Any = TOOLS
        with server.client().chat.completions.stream(model="m", messages=[{"role": "user", "content": "hello"}], tools=tools) as events:
            for _ in events:
                pass
            message = events.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == CALLS


def test_calls_and_results_go_back_to_the_model_in_its_own_form() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln", "days": 2}'}}
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1", "content": "21 °C"}]
    with serving("Warm.") as server:
        choice = server.chat(messages=messages, tools=[WEATHER]).json()["choices"][0]
        assert prompt(server) == (
            'tool: weather\nuser: hello\nassistant: \n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>\n'
            "tool: 21 °C\nassistant: "
        )
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Warm.", "stop")
    assert "tool_calls" not in choice["message"]


def test_none_means_none() -> None:
    """The model is told of no tools, and what it writes is text."""
    with serving(HERMES.write(CALLS)) as server:
        choice = server.chat(tools=TOOLS, tool_choice="none").json()["choices"][0]
        assert "tool:" not in prompt(server)
    assert (choice["message"]["content"], choice["finish_reason"]) == (HERMES.write(CALLS), "stop")


def test_one_call_ends_the_reply_where_they_must_not_be_parallel() -> None:
    with serving(HERMES.write([*CALLS, *CALLS])) as server:
        choice = server.chat(tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]
    assert without_ids(choice["message"]["tool_calls"]) == [called(*CALLS[0])]
    assert choice["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_short_ends_with_length() -> None:
    with serving(HERMES.write(CALLS[:1])) as server:
        choice = server.chat(tools=TOOLS, max_tokens=60).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert json.dumps(CALLS[0][1], ensure_ascii=False).startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])


def test_what_is_thought_is_no_call() -> None:
    thought = f"<think>\nI could write {HERMES.write(CALLS)}\n</think>\n\n"
    with serving(thought + HERMES.write(CALLS[1:])) as server:
        message = server.chat(tools=TOOLS).json()["choices"][0]["message"]
    assert without_ids(message["tool_calls"]) == [called("clock", {})]
    assert HERMES.write(CALLS) in message["reasoning_content"]


def test_log_probabilities_are_those_of_the_text() -> None:
    with serving(f"So:\n{HERMES.write(CALLS)}") as server:
        choice = server.chat(tools=TOOLS, logprobs=True).json()["choices"][0]
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == "So:"


# What the fake engine would say is no call; what may not be said it leaves out.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("choice", "names"), [("required", {"weather", "clock"}), ({"type": "function", "function": {"name": "clock"}}, {"clock"})])
def test_a_call_can_be_forced(choice: object, names: set[str], stream: bool) -> None:
    with serving("I would rather talk.") as server:
        body = {"messages": USER, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 300}
        if stream:
            choices = [chunk["choices"][0] for chunk in server.chunks(CHAT, body)]
            calls = [call for each in choices for call in each["delta"].get("tool_calls", [])]
            name, reason = calls[0]["function"]["name"], choices[-1]["finish_reason"]
            assert not any(each["delta"].get("content") for each in choices)
        else:
            whole = server.post(CHAT, body).json()["choices"][0]
            name, reason = whole["message"]["tool_calls"][0]["function"]["name"], whole["finish_reason"]
            assert whole["message"]["content"] is None
    assert name in names
    assert reason in ("tool_calls", "length")


def test_a_forced_call_follows_the_functions_schema() -> None:
    with serving(HERMES.write([("weather", {"city": "Köln", "days": "two"})])) as server:
        named = {"type": "function", "function": {"name": "weather"}}
        choice = server.chat(tools=TOOLS, tool_choice=named, max_tokens=500).json()["choices"][0]
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert arguments.startswith('{"city": "Köln", "days": ')
    assert not arguments.startswith('{"city": "Köln", "days": "')


def test_a_strict_function_is_called_by_its_schema_or_not_at_all() -> None:
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    text = HERMES.write([("weather", {"city": "Köln", "days": "two"})])
    with serving(f"Sure.\n{text}") as server:
        loose = server.chat(tools=[WEATHER], max_tokens=500).json()["choices"][0]["message"]
        held = server.chat(tools=[strict], max_tokens=500).json()["choices"][0]["message"]
    assert '"two"' in loose["tool_calls"][0]["function"]["arguments"]
    assert held["content"] == "Sure."
    assert '"days": "' not in held["tool_calls"][0]["function"]["arguments"]
    with serving("Just text.") as server:
        assert server.chat(tools=[strict]).json()["choices"][0]["message"]["content"] == "Just text."


def test_an_answer_in_json_or_a_call() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}}
    with serving('{"n": 5}') as server:
        assert server.chat(tools=TOOLS, response_format=form).json()["choices"][0]["message"]["content"] == '{"n": 5}'
    with serving(HERMES.write(CALLS[1:])) as server:
        assert server.chat(tools=TOOLS, response_format=form).json()["choices"][0]["finish_reason"] == "tool_calls"


def oops(**more: Any) -> dict[str, Any]:
    """A function whose schema cannot be followed."""
    return {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "oops"}}}, **more}}


def test_a_schema_that_cannot_be_followed_is_let_be_where_the_function_is_not_strict() -> None:
    with serving(HERMES.write([("f", {"a": 1})])) as server:
        message = server.chat(tools=[oops()], tool_choice="required").json()["choices"][0]["message"]
    assert without_ids(message["tool_calls"]) == [called("f", {"a": 1})]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "The reply cannot be a call and have a form of its own"),
        ({"guided_regex": "a+"}, "'guided_regex' cannot stand beside 'tools'"),
        ({"guided_regex": "a+", "grammar": 'start: "a"'}, "The reply cannot have several forms at once, but grammar and guided_regex each ask for one."),
        ({"tools": [oops(strict=True)], "tool_choice": "required"}, "The grammar cannot be followed"),
    ],
)
def test_what_cannot_be_forced_is_refused(body: dict[str, Any], said: str) -> None:
    with serving("x") as server:
        reply = server.chat(**{"tools": TOOLS, **body})
        assert reply.status_code == 400
        assert said in reply.json()["error"]["message"]


def test_a_model_that_knows_no_tools_is_told_of_them_only_where_a_call_must_come() -> None:
    with live(says("Hello."), template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ") as server:
        assert server.chat(tools=TOOLS).json()["choices"][0]["message"]["content"] == "Hello."
        assert prompt(server) == "user: hello\nassistant: "
        message = server.chat(tools=TOOLS, tool_choice="required", max_tokens=300, parallel_tool_calls=False).json()["choices"][0]["message"]
        assert '{"name": "weather", "description": "Tells the weather."' in prompt(server)
        assert "<tool_call>" in prompt(server)
        assert message["tool_calls"]


def test_a_model_that_writes_calls_but_lists_no_tools_is_told_of_them() -> None:
    """As DeepSeek's first templates do."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% elif m.role == 'tool' %}<T>{{ m.content }}"
        "{% elif m.role == 'assistant' and m.tool_calls %}{% for c in m.tool_calls %}"
        "<\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>{{ c.function.name }}\n```json\n{{ c.function.arguments }}\n```{% endfor %}"
        "{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}<A>"
    )
    with live(says(DEEPSEEK.write(CALLS)), template=template) as server:
        message = server.chat(tools=TOOLS, messages=[{"role": "system", "content": "Be brief."}, *USER]).json()["choices"][0]["message"]
        assert prompt(server).startswith("Be brief.\n\nYou may call these functions")
        assert DEEPSEEK.write([("name_of_the_function", {"parameter": "value"})]) in prompt(server)
        assert prompt(server).endswith("<U>hello<A>")
    assert without_ids(message["tool_calls"]) == [called(*call) for call in CALLS]


@pytest.mark.parametrize(
    "arguments",
    ['{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud83d"}', '"{\\"a\\": \\"\\ud83d\\"}"', '{"a": ' + "[" * 3000],
    ids=["nan", "inf", "half", "text", "deep"],
)
def test_arguments_that_no_json_can_hold_cost_no_reply(arguments: str) -> None:
    """Models write what they like, and every protocol's reply is JSON in UTF-8."""
    said = f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'
    anthropic = [{"name": "weather", "input_schema": {"type": "object"}}]
    with calling(said) as server:
        for path, body in (
            ("/v1/chat/completions", {"messages": USER, "tools": TOOLS}),
            ("/v1/messages", {"messages": USER, "tools": anthropic, "max_tokens": 7000}),
            ("/api/chat", {"messages": USER, "tools": TOOLS, "stream": False}),
            ("/api/chat", {"messages": USER, "tools": TOOLS, "stream": True}),
        ):
            reply = server.post(path, body)
            assert reply.status_code == 200, (path, reply.text)
            for line in reply.text.splitlines() if body.get("stream") else [reply.text]:
                json.loads(line, parse_constant=pytest.fail)
