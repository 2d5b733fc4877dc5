"""Calls in every family's format: found, streamed, the same for every cut; and what is none stays text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from server.text.tools.calls import Tool, ToolCall
from server.text.tools.deepseek import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR
from server.text.tools.formats import DEEPSEEK, DEEPSEEK_V31, FORMATS, GLM, HERMES, KIMI, LLAMA, MISTRAL, MISTRAL_NAMED, QWEN_CODER, ToolFormat
from tests.text.tools.replies import TOOLS, WEATHER, Part, calls, cuts, parsed

ARGUMENTS: dict[str, Any] = {"city": 'Köln "am" Rhein {]\n</b> \\ 今日', "days": 2, "unit": "C", "deep": {"list": [1, None, True, "}]"]}, "quick": False}
BARE = [LLAMA]  # no marker: a call is the whole reply
MARKED = [form for form in FORMATS.values() if form not in BARE]
every = pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
marked = pytest.mark.parametrize("form", MARKED, ids=lambda form: form.name)


def same_for_every_cut(form: ToolFormat, text: str, times: int = 60) -> list[Part]:
    whole = parsed(form, [text])
    for pieces in cuts(text, times):
        assert parsed(form, pieces) == whole, pieces
    return whole


def found(parts: list[Part]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for _, name, arguments in calls(parts)]


@every
def test_one_call(form: ToolFormat) -> None:
    parts = same_for_every_cut(form, form.write([("weather", ARGUMENTS)]))
    assert found(parts) == [("weather", ARGUMENTS)]
    assert len(parts) == 1


@every
def test_a_call_without_arguments(form: ToolFormat) -> None:
    assert found(same_for_every_cut(form, form.write([("clock", {})]))) == [("clock", {})]


@every
def test_several_calls(form: ToolFormat) -> None:
    text = (
        "; ".join(form.write([call]) for call in [("weather", ARGUMENTS), ("clock", {})])
        if form in BARE
        else form.write([("weather", ARGUMENTS), ("clock", {})])
    )
    parts = same_for_every_cut(form, text)
    assert found(parts) == [("weather", ARGUMENTS), ("clock", {})]
    assert len(parts) == 2


@marked
def test_text_before_and_after_stays(form: ToolFormat) -> None:
    parts = same_for_every_cut(form, f"Let me look.\n\n{form.write([('weather', ARGUMENTS)])}\n\nDone.\n")
    assert [part for part in parts if isinstance(part, str)] == ["Let me look.", "\n\nDone."]
    assert found(parts) == [("weather", ARGUMENTS)]


@every
@pytest.mark.parametrize(
    "text", ["no call", "  two words \n", "a < b, {c: [d]}, <tool", "{", '{"name": "nobody", "parameters": {}}', '{"city": "Köln"}', "", " \n "]
)
def test_what_is_no_call_is_text(form: ToolFormat, text: str) -> None:
    assert "".join(map(str, same_for_every_cut(form, text))) == text


@every
def test_whatever_is_cut_off_a_reply_nothing_is_lost_and_no_marker_is_shown_behind_a_call(form: ToolFormat) -> None:
    text = form.write([("weather", ARGUMENTS)])
    for size in range(len(text)):
        parts = parsed(form, list(text[:size]))
        if not calls(parts):
            assert "".join(map(str, parts)) == text[:size]
        else:
            [(_, name, arguments)] = calls(parts)
            assert (name, len(parts)) == ("weather", 1)
            assert json.dumps(ARGUMENTS, ensure_ascii=False).startswith(arguments)


@every
def test_arguments_come_as_soon_as_they_are_certain(form: ToolFormat) -> None:
    """All but a few characters behind what was written: a marker's length."""
    text = form.write([("weather", {"city": "x" * 500})])
    parser = form.parser(TOOLS, lambda: "id")
    shown = "".join(part.arguments for char in text[: text.index("x" * 500) + 300] for part in parser.push(char) if isinstance(part, ToolCall))
    assert 280 <= shown.count("x") <= 300


@every
def test_random_texts_are_the_same_for_every_cut(form: ToolFormat) -> None:
    """Markers, brackets and words in any order: nothing fails, and no character of a plain word is lost."""
    rng = random.Random(7)
    markers = [
        *form.parser.begins,
        *form.parser.ends,
        "{",
        "}",
        '"',
        "name",
        ":",
        "\n",
        " ",
        "weather",
        form.head("weather"),
        form.after,
        form.write([("clock", {})]),
    ]
    for _ in range(30):
        words = [rng.choice([*markers, f"w{number}w"]) for number in range(rng.randrange(1, 15))]
        parts = same_for_every_cut(form, "".join(words), times=3)
        joined = "".join("".join(part) for part in parts)
        if '"' not in words and "{" not in words and form in (HERMES, MISTRAL):  # else a word may stand where JSON is read
            assert all(word in joined for word in words if word.startswith("w") and word.endswith("w")), words


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (HERMES, '<tool_call>{"arguments": {"a": [1]}, "name": "f"}</tool_call>', [("f", '{"a": [1]}')]),  # the name last
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", '{"a": 1}')]),  # text within JSON
        (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
        (HERMES, '<tool_call>{"id": 7, "name": "f", "parameters": {}}\n', [("f", "{}")]),  # another key, no closing tag
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g", "arguments": {}}', [("f", "{}"), ("g", "{}")]),
        (DEEPSEEK, f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n{{}}\n```{CALL_END}", [("f", "{}")]),  # R1 without the outer marker
        (DEEPSEEK, f"{CALLS_BEGIN}\n{CALL_BEGIN}function{SEPARATOR}f\n{{}}\n{CALL_END}{CALLS_END}", [("f", "{}")]),  # without a fence
        (DEEPSEEK_V31, f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}f\n```json\n{{}}\n```{CALL_END}{CALLS_END}", [("f", "{}")]),  # the older form
        (
            LLAMA,
            '<|python_tag|>{"name": "clock", "parameters": {}}; {"name": "weather", "parameters": {"city": "x"}}',
            [("clock", "{}"), ("weather", '{"city": "x"}')],
        ),
        (LLAMA, ' {"name": "clock", "arguments": {}}', [("clock", "{}")]),
        (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "123456789"}]', [("f", "{}")]),
        (MISTRAL, '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}', [("f", '{"a": 1}')]),
        (MISTRAL_NAMED, '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{}', [("f", '{"a": 1}'), ("g", "{}")]),
        (GLM, "<tool_call>clock</tool_call>", [("clock", "{}")]),
        (GLM, "<tool_call>weather<arg_key>city</arg_key><arg_value>x</arg_value></tool_call>", [("weather", '{"city": "x"}')]),
        (QWEN_CODER, "<function=clock>\n</function>", [("clock", "{}")]),
        (QWEN_CODER, "<tool_call>\n<function=weather>\n<parameter=city>x</parameter></function></tool_call>", [("weather", '{"city": "x"}')]),
    ],
)
def test_what_models_write_too(form: ToolFormat, text: str, expected: list[tuple[str, str]]) -> None:
    parts = same_for_every_cut(form, text)
    assert [(name, arguments) for _, name, arguments in calls(parts)] == expected
    assert len(parts) == len(expected)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, "<tool_call>\nI would call f.\n</tool_call>"),
        (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
        (DEEPSEEK, f"{CALLS_BEGIN}nothing{CALLS_END}"),
        (DEEPSEEK, f"{CALLS_BEGIN}{CALL_BEGIN}function{CALL_END}{CALLS_END}"),
        (KIMI, "<|tool_calls_section_begin|>none<|tool_calls_section_end|>"),
        (MISTRAL, "[TOOL_CALLS] nothing to do"),
        (MISTRAL, '[TOOL_CALLS][{"name": 1}]'),
        (LLAMA, "<|python_tag|>brave_search.call(query='x')"),
        (LLAMA, '{"name": "weather"'),
        (GLM, "<tool_call>two words\n</tool_call>"),
        (QWEN_CODER, "<tool_call>\n<function=>\n</function>\n</tool_call>"),
        (QWEN_CODER, "<tool_call>no function</tool_call>"),
    ],
)
def test_a_malformed_call_is_text(form: ToolFormat, text: str) -> None:
    assert same_for_every_cut(form, text) == [text]


def test_what_follows_malformed_json_is_not_lost() -> None:
    [call, rest] = same_for_every_cut(HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}, oops}</tool_call> bye')
    assert call == ("id0", "f", '{"a": 1}')
    assert rest == ", oops} bye"


def test_a_special_token_ends_arguments_that_never_close() -> None:
    parts = same_for_every_cut(DEEPSEEK_V31, f'{CALLS_BEGIN}{CALL_BEGIN}f{SEPARATOR}{{"a": "open{CALL_END}{CALL_BEGIN}g{SEPARATOR}{{}}{CALL_END}{CALLS_END}')
    assert parts == [("id0", "f", '{"a": "open'), ("id1", "g", "{}")]


def test_kimis_own_ids_are_kept() -> None:
    assert parsed(KIMI, [KIMI.write([("weather", {}), ("clock", {})])]) == [("functions.weather:0", "weather", "{}"), ("functions.clock:1", "clock", "{}")]


def test_mistrals_ids_are_kept() -> None:
    assert parsed(MISTRAL, ["[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{}"]) == [("abc123XYZ", "f", "{}")]


def test_new_ids_are_openais_and_differ() -> None:
    parts = HERMES.parser(TOOLS).push(HERMES.write([("clock", {}), ("clock", {})]))
    ids = [part.call_id for part in parts if isinstance(part, ToolCall)]
    assert len({*ids}) == 2
    assert all(call_id and call_id.startswith("call_") and len(call_id) == 29 for call_id in ids)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "5", "5"),  # a text is a text, whatever it looks like
        ("city", "null", "null"),
        ("days", "5", 5),
        ("days", " 5 ", 5),
        ("days", "five", "five"),  # not what the schema wants, but what the model said
        ("quick", "True", True),  # as Qwen's template writes it
        ("quick", "false", False),
        ("deep", '{"a": [1, null]}', {"a": [1, None]}),
        ("deep", "{'a': (1, None)}", {"a": [1, None]}),
        ("deep", "1e999", "1e999"),
        ("note", "null", None),
        ("note", "5", "5"),
        ("unknown", "5", 5),
        ("unknown", "plain", "plain"),
    ],
)
@pytest.mark.parametrize("form", [QWEN_CODER, GLM], ids=lambda form: form.name)
def test_plain_values_become_what_the_schema_says(form: ToolFormat, key: str, text: str, value: object) -> None:
    assert found(same_for_every_cut(form, form.write([("weather", {key: text})]), times=5)) == [("weather", {key: value})]


def test_qwens_line_breaks_are_not_the_values() -> None:
    text = "<tool_call>\n<function=weather>\n<parameter=city>\n\n two\nlines \n\n</parameter>\n</function>\n</tool_call>"
    assert found(same_for_every_cut(QWEN_CODER, text)) == [("weather", {"city": "\n two\nlines \n"})]


def test_llamas_json_is_a_call_only_of_what_was_offered_and_only_at_the_start() -> None:
    text = '{"name": "weather", "parameters": {"city": "x"}}'
    assert calls(parsed(LLAMA, [text]))
    assert parsed(LLAMA, [text], tools=[]) == [text]
    assert parsed(LLAMA, [f"It is {text}"]) == [f"It is {text}"]
    assert parsed(LLAMA, [text + " is JSON"], tools=[WEATHER]) == [("id0", "weather", '{"city": "x"}'), " is JSON"]


@pytest.mark.parametrize("form", [QWEN_CODER, GLM], ids=lambda form: form.name)
@pytest.mark.parametrize(
    "parameters",
    [{"properties": 5}, {"properties": {"a": 5}}, {"properties": {"a": {"anyOf": 5, "enum": 6, "type": 7}}}, {"properties": {"a": {"type": {}, "oneOf": [1]}}}],
    ids=str,
)
def test_values_are_read_whatever_the_client_calls_a_schema(form: ToolFormat, parameters: dict[str, Any]) -> None:
    assert found(parsed(form, [form.write([("f", {"a": "5"})])], [Tool("f", parameters)])) == [("f", {"a": 5})]


@pytest.mark.parametrize("text", ["[" * 5000, "(" * 5000, "-" * 5000, "9" * 5000, "{" * 5000])
def test_values_that_python_cannot_read_are_text(text: str) -> None:
    assert found(parsed(GLM, [GLM.write([("weather", {"days": text})])])) == [("weather", {"days": text})]
    assert parsed(HERMES, [f'<tool_call>{{"name": "f", "arguments": {json.dumps(text)}}}</tool_call>']) == [("id0", "f", text)]
