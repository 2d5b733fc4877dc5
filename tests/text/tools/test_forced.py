"""Grammars of calls: what each format's allows is what its parser reads, and nothing else gets through."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import RequestError
from server.text.grammar import GrammarText, compile_constraint, inline_json
from server.text.tokenizer import ByteTokenizer
from server.text.tools.calls import Tool, ToolCall
from server.text.tools.forced import CallGrammar
from server.text.tools.formats import FORMATS, GLM, HERMES, QWEN_CODER, ToolFormat, ToolRules
from tests.text.tools.replies import CLOCK, WEATHER

TOKENIZER = ByteTokenizer(vocab_size=257, stop_ids=[256])
every = pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)

GOOD: dict[str, Any] = {"city": "Köln < am > Rhein", "days": 2, "unit": "C"}
WRONG: list[dict[str, Any]] = [{"city": "x", "days": "two"}, {"city": "x", "unit": "K"}, {"days": 2}]


def grammar(form: ToolFormat, *tools: Tool, parallel: bool = True) -> CallGrammar:
    return CallGrammar(form, tools or (WEATHER, CLOCK), lambda schema: inline_json(schema, "tools"), parallel=parallel)


def follows(lark: str, text: str) -> bool:
    """Whether the whole text may be drawn, and the reply may then end."""
    constraint = compile_constraint(GrammarText(lark, "tools"), TOKENIZER, after_think=False)
    for byte in [*text.encode(), 256]:
        words = constraint.mask()
        if words is not None and not words[byte // 32] >> byte % 32 & 1:
            return False
        if byte != 256:
            constraint.accept(byte)
    return True


@every
def test_a_forced_reply_is_a_call(form: ToolFormat) -> None:
    lark = grammar(form).forced()
    assert follows(lark, form.write([("weather", GOOD)]))
    assert follows(lark, form.write([("clock", {})]))
    assert not follows(lark, "hello")
    assert not follows(lark, f"Well: {form.write([('clock', {})])}")
    assert not follows(lark, form.write([("nobody", {})]))


@every
def test_arguments_follow_the_schema(form: ToolFormat) -> None:
    lark = grammar(form).forced()
    for arguments in WRONG:
        assert not follows(lark, form.write([("weather", arguments)])), arguments
    assert not follows(lark, form.write([("clock", {"zone": "x"})]))


@every
def test_several_calls_where_that_is_allowed(form: ToolFormat) -> None:
    text = form.write([("weather", GOOD), ("clock", {}), ("weather", GOOD)])
    assert follows(grammar(form).forced(), text) is (form.separator is not None)
    assert not follows(grammar(form, parallel=False).forced(), text)


@every
def test_a_free_reply_is_text_or_calls_by_their_schemas(form: ToolFormat) -> None:
    lark = grammar(form).free()
    assert follows(lark, "Just text, with < and [ in it.\n")
    assert follows(lark, form.write([("weather", GOOD)]))
    if form.marker:
        assert follows(lark, f"Let me look.\n{form.write([('weather', GOOD), ('clock', {})])}")
    for arguments in WRONG:
        assert not follows(lark, form.write([("weather", arguments)]))


@every
def test_json_or_calls(form: ToolFormat) -> None:
    lark = grammar(form).or_json({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False})
    assert follows(lark, '{"n": 5}')
    assert follows(lark, form.write([("weather", GOOD)]))
    assert not follows(lark, '{"n": "x"}')
    assert not follows(lark, "text")


@pytest.mark.parametrize("form", [QWEN_CODER, GLM], ids=lambda form: form.name)
def test_a_function_of_any_arguments_takes_any_in_tags(form: ToolFormat) -> None:
    lark = grammar(form, Tool("any", {"type": "object"})).forced()
    assert follows(lark, form.write([("any", {"a": "1", "b": "two\nlines"})]))
    assert follows(lark, form.write([("any", {})]))


def test_several_texts_in_tags_do_not_swallow_each_other() -> None:
    tool = Tool("f", {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "required": ["a", "b"]})
    for form in (QWEN_CODER, GLM):
        assert follows(grammar(form, tool).forced(), form.write([("f", {"a": "one", "b": "two"})]))
        assert not follows(grammar(form, tool).forced(), form.write([("f", {"a": "one"})]))


def test_a_schema_that_cannot_be_followed_is_told() -> None:
    tool = Tool("f", {"type": "object", "properties": {"a": {"type": "oops"}}})
    with pytest.raises(RequestError):
        follows(grammar(HERMES, tool).forced(), "")


@pytest.mark.parametrize("form", [HERMES, GLM], ids=lambda form: form.name)
@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": 5},
        {"properties": {"a": 5}},
        {"properties": {"a": None}, "required": 7},
        {"required": ["a"], "properties": []},
        {"properties": {"a": {"enum": 5}}},
    ],
    ids=str,
)
def test_what_is_no_schema_is_told_whatever_it_is(form: ToolFormat, parameters: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        follows(grammar(form, Tool("f", parameters)).forced(), "")


@pytest.mark.parametrize("form", [QWEN_CODER, GLM], ids=lambda form: form.name)
@pytest.mark.parametrize(
    "schema",
    [{"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}, {"enum": ["x", "y"]}, {"type": ["string", "integer"]}],
    ids=["list", "anyOf", "enum", "mixed"],
)
def test_what_may_be_text_is_written_without_quotes(form: ToolFormat, schema: dict[str, Any]) -> None:
    """It is read as it stands, so quotes would be part of the value."""
    tool = Tool("f", {"type": "object", "properties": {"t": schema}, "required": ["t"]})
    forced, text = grammar(form, tool).forced(), form.write([("f", {"t": "x"})])
    assert follows(forced, text)
    if "enum" in schema:
        assert not follows(forced, form.write([("f", {"t": "z"})]))


@pytest.mark.parametrize("form", [QWEN_CODER, GLM], ids=lambda form: form.name)
def test_references_into_a_functions_own_definitions(form: ToolFormat) -> None:
    definitions = {"R": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}}
    tool = Tool("f", {"type": "object", "properties": {"r": {"$ref": "#/$defs/R"}}, "required": ["r"], "$defs": definitions}, strict=True)
    forced = grammar(form, tool).forced()
    assert follows(forced, form.write([("f", {"r": {"n": 1}})]))
    assert not follows(forced, form.write([("f", {"r": {"n": "one"}})]))


@every
def test_no_call_that_the_parser_would_take_escapes_a_strict_schema(form: ToolFormat) -> None:
    """However it begins."""
    written = form.write([("weather", {"city": "x", "days": "two"})])
    ways = [written, f" {written}", f"\n{written}"]
    for begin in form.parser.begins:
        ways.append(written[written.find(begin) :] if begin in written else begin + written)
    free = grammar(form).free()
    for way in ways:
        parser = ToolRules(form, (WEATHER, CLOCK)).parser()
        parts = parser.push(way) + parser.flush()
        if any(isinstance(part, ToolCall) for part in parts):
            assert not follows(free, way), way
