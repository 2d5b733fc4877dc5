"""Templates written as the families' are (the same features of Jinja, in few words of our own) render as `transformers` renders them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from server.errors import RequestError
from server.text.template import CHATML, ChatTemplate, force_think, opens_think
from tests.text.chats import CALL, CALLING, CHATS, OTHER_CALL, RESULT, TOOLS, USER, Chat
from tests.text.family_templates import (
    DEEPSEEK_R1,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    GLM,
    KIMI,
    LLAMA31,
    MISTRAL,
    MISTRAL_NAMED,
    MIXTRAL,
    QWEN,
    QWEN_CODER,
)

TOKENS = {"bos_token": "<BOS>", "eos_token": "<EOS>"}

TALKS = ["user", "system", "turns", "thought", "reasoned"]
CALLS = ["called", "called with text", "called with empty text", "called twice"]
# Each template, the chats that it takes, and how it wants calls: is an object written for arguments, and what for no content.
FAMILIES: dict[str, tuple[str, list[str], bool, str | None]] = {
    "deepseek v2": (DEEPSEEK_V2, TALKS, True, ""),
    "deepseek v3": (DEEPSEEK_V3, [*TALKS, *CALLS], False, None),
    "deepseek r1": (DEEPSEEK_R1, [*TALKS, *CALLS], False, None),
    "qwen": (QWEN, [*TALKS, *CALLS], True, ""),
    "glm": (GLM, [*TALKS, *CALLS], True, ""),
    "mixtral": (MIXTRAL, TALKS, True, ""),
    "llama 3.1": (LLAMA31, [*TALKS, "called", "called with text", "called with empty text"], True, ""),
    "deepseek v3.1": (DEEPSEEK_V31, [*TALKS, *CALLS], False, ""),
    "mistral": (MISTRAL, ["user", "turns", *CALLS], True, ""),
    "mistral named": (MISTRAL_NAMED, ["user", *CALLS], True, ""),
    "qwen coder": (QWEN_CODER, [*TALKS, *CALLS], True, ""),
    "kimi": (KIMI, [*TALKS, *CALLS], True, ""),
}
# The format of each one's calls, whether it was taught to its model, and whether the template lists tools.
DIALECTS = {
    "deepseek v2": ("hermes", False, False),
    "deepseek v3": ("deepseek", True, False),
    "deepseek r1": ("deepseek", True, False),
    "qwen": ("hermes", True, True),
    "glm": ("glm", True, True),
    "mixtral": ("hermes", False, False),
    "llama 3.1": ("llama", True, True),
    "deepseek v3.1": ("deepseek-v3.1", True, False),
    "mistral": ("mistral", True, True),
    "mistral named": ("mistral-named", True, True),
    "qwen coder": ("qwen-coder", True, True),
    "kimi": ("kimi", True, True),
}


def as_wanted(chat: Chat, objects: bool, nothing: str | None) -> Chat:
    """The chat as somebody writes it who knows the template."""

    def call_as_wanted(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        return {**call, "function": {**call["function"], "arguments": arguments if objects else json.dumps(arguments, ensure_ascii=False)}}

    return [
        {**message, "content": message["content"] or nothing, "tool_calls": [call_as_wanted(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in chat
    ]


@pytest.mark.parametrize("switches", [{}, {"enable_thinking": False}, {"enable_thinking": True}], ids=str)
@pytest.mark.parametrize(("family", "tools"), [(family, tools) for family in FAMILIES for tools in (None, TOOLS) if not tools or DIALECTS[family][2]])
def test_renders_as_transformers_does(family: str, tools: list[dict[str, Any]] | None, switches: dict[str, Any]) -> None:
    source, names, objects, nothing = FAMILIES[family]
    template = ChatTemplate(source, **TOKENS)
    for name in names:
        chat = as_wanted(CHATS[name], objects, nothing)
        [reference] = render_jinja_template([chat], tools=tools, chat_template=source, add_generation_prompt=True, **TOKENS, **switches)[0]
        assert template.render(CHATS[name], tools=tools, **switches) == reference, name


@pytest.mark.parametrize("family", [family for family, (_, names, *_) in FAMILIES.items() if "called" in names])
def test_calls_as_they_come_over_the_wire(family: str) -> None:
    """Arguments as JSON text, and no content at all."""
    template = ChatTemplate(FAMILIES[family][0], **TOKENS)
    function = {"name": "weather", "arguments": json.dumps(CALL["function"]["arguments"], ensure_ascii=False)}
    wire = {"role": "assistant", "tool_calls": [{**CALL, "function": function}]}
    prompt = template.render([USER, wire, RESULT])
    assert prompt == template.render([USER, CALLING, RESULT])
    assert "weather" in prompt
    assert "Köln" in prompt
    assert "None" not in prompt


def test_arguments_that_are_no_json_stay_as_the_model_wrote_them() -> None:
    broken = {"role": "assistant", "content": None, "tool_calls": [{**OTHER_CALL, "function": {"name": "clock", "arguments": '{"zone": '}}]}
    assert '{"zone": \n```' in ChatTemplate(DEEPSEEK_V3).render([USER, broken])
    assert '"arguments": {"zone": }' in ChatTemplate(QWEN).render([USER, broken])


def test_an_object_is_never_written_as_python_does() -> None:
    call = "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments }}){% endfor %}"
    template = ChatTemplate(f"{{% for m in messages %}}{{{{ m.content or '' }}}}{call}{{% endfor %}}")
    assert template.render([{**USER, "content": ""}, CALLING]) == 'weather({"city": "Köln", "days": 2, "deep": {"list": [1, null, true]}})'


def test_what_is_no_call_is_refused() -> None:
    with pytest.raises(RequestError, match="cannot take these messages"):
        ChatTemplate(QWEN).render([USER, {"role": "assistant", "tool_calls": [{"function": None}]}])


def test_both_forms_of_r1_open_the_reasoning_once() -> None:
    january, february = (ChatTemplate(source).render([USER]) for source in (DEEPSEEK_V3, DEEPSEEK_R1))
    assert not opens_think(january)
    assert opens_think(february)
    assert force_think(january) == force_think(february) == february


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dialect_is_found(family: str) -> None:
    dialect = ChatTemplate(FAMILIES[family][0], **TOKENS).dialect
    assert (dialect.format.name, dialect.known, dialect.writes_tools) == DIALECTS[family]


@pytest.mark.parametrize("family", [family for family, (_, _, lists) in DIALECTS.items() if not lists])
def test_tools_are_told_where_a_template_lists_none(family: str) -> None:
    template = ChatTemplate(FAMILIES[family][0], **TOKENS)
    prompt = template.render([USER], tools=TOOLS)
    assert '{"name": "weather", "description": "Tells the weather — now."' in prompt
    assert template.dialect.format.write([("name_of_the_function", {"parameter": "value"})]) in prompt
    with_system = template.render(CHATS["system"], tools=TOOLS)
    assert with_system.index("Be brief & <polite>.\n\nYou may call these functions") < with_system.index("Köln")


def test_where_no_system_text_is_taken_the_user_tells_of_the_tools() -> None:
    refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert ChatTemplate(refusing).render([USER], tools=TOOLS).startswith("<user>Wetter in Köln, 今日?\n\nYou may call these functions")


def test_calls_that_a_template_does_not_write_are_text() -> None:
    """And results stand in one user's message with what the user says next, since turns alternate."""
    prompt = ChatTemplate(MIXTRAL, **TOKENS).render(CHATS["called twice"])
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"' in prompt
    assert '[INST] <tool_response>\n{"celsius": 21}\n</tool_response>\n<tool_response>\n12:00\n</tool_response> [/INST]' in prompt
    assert "None" not in prompt
    again = ChatTemplate(CHATML).render([USER, {**CALLING, "content": "Let me look."}, RESULT, USER])
    assert "<|im_start|>assistant\nLet me look.\n<tool_call>\n" in again
    assert "</tool_response>\nWetter in Köln, 今日?<|im_end|>" in again


def test_what_is_no_call_cannot_become_text() -> None:
    with pytest.raises(RequestError, match=r"tool_calls that are not calls of functions\. Give each a 'function' with 'name' and 'arguments'\."):
        ChatTemplate(CHATML).render([USER, {"role": "assistant", "tool_calls": [{"function": None}]}])


def test_a_template_that_fails_on_calls_may_still_say_how_they_are_written() -> None:
    """Kimi K2's keeps a list of ids, which the sandbox does not allow it."""
    failing = KIMI.replace("{%- for call in", "{%- set ids = [] %}{% set _ = ids.append(1) %}{% for call in")
    dialect = ChatTemplate(failing).dialect
    assert (dialect.format.name, dialect.known, dialect.form, dialect.writes_tools) == ("kimi", True, None, True)
    assert "functions.weather:0<|tool_call_argument_begin|>" in ChatTemplate(failing).render(CHATS["called"])


def test_ids_are_shortened_alike_where_a_template_insists() -> None:
    long = "call_0123456789abcdef"
    call = {**CALL, "id": long}
    prompt = ChatTemplate(MISTRAL).render([USER, {**CALLING, "tool_calls": [call]}, {**RESULT, "tool_call_id": long}])
    [written] = re.findall(r'"id": "(\w+)"', prompt)
    assert len(written) == 9
    assert f"{written}[/TOOL_RESULTS]" in prompt
    assert '"id": "call00001"' in ChatTemplate(MISTRAL).render([USER, CALLING, RESULT])


def test_the_variables_that_a_template_reads() -> None:
    assert "enable_thinking" in ChatTemplate(QWEN).variables
    assert "thinking" in ChatTemplate(DEEPSEEK_V31).variables
    assert not {"enable_thinking", "thinking"} & ChatTemplate(DEEPSEEK_V3).variables
