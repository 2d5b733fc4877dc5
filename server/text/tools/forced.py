"""Replies that must be calls, or whose calls must follow their functions' schemas: grammars in llguidance's Lark, in the model's own format.

Markers of calls are tokens that a reply shows, so to a grammar they are text like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.errors import RequestError
from server.text.tools.calls import Tool
from server.text.tools.formats import INDEX, PARAMETER, ToolFormat
from server.text.tools.typed import may_be_text

InlineJson = Callable[[Any], str]  # a schema -> `%json {...}`; RequestError for one that cannot be followed
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_NAME = r"/[^<>\n]+/"
_ANY = r"/(.|\n)*/"


class CallGrammar:
    """The grammar of one request's calls. Each method gives the whole of one, for one kind of reply."""

    def __init__(self, form: ToolFormat, tools: Sequence[Tool], inline_json: InlineJson, *, parallel: bool) -> None:
        self._form = form
        self._tools = tools
        self._inline_json = inline_json
        self._rules: dict[str, str] = {}  # right side -> name
        self._more: list[str] = []  # rules that are not of that kind
        tails = [f"{self._arguments(tool)} {_quoted(form.after)}" for tool in tools]
        heads = [form.head(tool.name) for tool in tools]
        one = _one_of(heads, tails)
        opening = _quoted(form.opening.removeprefix(form.marker))
        first = f"{opening} {one}" if form.opening else _one_of([head.removeprefix(form.marker) for head in heads], tails)
        several = f"({_quoted(form.separator)} {one})*" if parallel and form.separator is not None else ""
        self._rest = f"{first} {several} {_quoted(form.closing)}"  # of calls, behind their marker

    def forced(self) -> str:
        """The reply is a call, or several."""
        return self._text(f"{_quoted(self._form.marker)} {self._rest}")

    def or_json(self, schema: Mapping[str, Any]) -> str:
        """The reply is either JSON that fits a schema, or calls."""
        if not self._form.marker:  # both are JSON, and a grammar tells them apart only as one schema
            return self._text(self._json({"anyOf": [schema, *map(_bare_call, self._tools)]}))
        return self._text(f"{self._json(schema)} | {_quoted(self._form.marker)} {self._rest}")

    def free(self) -> str:
        """The reply is any text, and then calls or none."""
        if not self._form.marker:  # a call can only be the whole reply, and shows by its first character
            self._more.append(rf"PLAIN: /[ \n\r\t]*([^{{ \n\r\t](.|\n)*)?/ & ~{self._holding(self._form.parser.begins)}")
            return self._text(f"PLAIN | {self._rest}")
        others = [marker for marker in self._form.parser.begins if marker != self._form.marker]
        without = f" & ~{self._holding(others)}" if others else ""
        self._more += [f"PLAIN: {_ANY} & ~{self._holding(self._form.parser.begins)}", rf"before[lazy]: /(.|\n)*{_escaped(self._form.marker)}/{without}"]
        return self._text(f"PLAIN | before {self._rest}")

    def _holding(self, markers: Sequence[str]) -> str:
        """Any text with one of the markers in it."""
        return rf"/(.|\n)*({'|'.join(map(_escaped, markers))})(.|\n)*/"

    def _text(self, start: str) -> str:
        return "\n".join([f"start: {start}", *[f"{name}: {right_side}" for right_side, name in self._rules.items()], *self._more])

    def _arguments(self, tool: Tool) -> str:
        return self._json(_taken(tool)) if self._form.arguments == "json" else self._parameters(_taken(tool))

    def _json(self, schema: Mapping[str, Any]) -> str:
        return self._rules.setdefault(self._inline_json(schema), f"json_{len(self._rules)}")

    def _parameters(self, schema: Mapping[str, Any]) -> str:
        """Arguments one by one, in the schema's order; those that are not required may be left out."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise RequestError("A function's 'parameters' must have an object of 'properties', and a list of those that are 'required'.", param="tools")
        if not properties and schema.get("additionalProperties") is not False:
            return f"({self._parameter(_ANY_NAME, {'type': 'string'})})*"
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}  # what references point to
        properties = {key: {**each, **shared} if "$ref" in json.dumps(each) else each for key, each in properties.items()}
        return " ".join([f"({self._parameter(_quoted(key), each)}){'' if key in required else '?'}" for key, each in properties.items()])

    def _parameter(self, key: str, schema: Any) -> str:
        """One argument; a text is anything up to the closing tag, or one of those that the schema lists."""
        before, between, after = PARAMETER[self._form.arguments]
        head = f"{_quoted(before)} {key} {_quoted(between)}"
        if not may_be_text(schema):  # the others are read as they stand, without quotes (as_json)
            return f"{head} {self._json(schema)} {_quoted(after)}"
        listed = [_quoted(text) for text in _listed(schema) or []]
        return f"{head} ({' | '.join(listed)}) {_quoted(after)}" if listed else f"{head} {self._text_up_to(after)}"

    def _text_up_to(self, end: str) -> str:
        rule = f"text[suffix={_quoted(end)}]: {_ANY}"
        if rule not in self._more:
            self._more.append(rule)
        return "text"


def _taken(tool: Tool) -> Mapping[str, Any]:
    """The schema of a call's arguments; a function without parameters takes none."""
    return {**tool.parameters, "type": "object"} if tool.parameters else NO_ARGUMENTS


def _bare_call(tool: Tool) -> Mapping[str, Any]:
    """The schema of a call that is nothing but JSON."""
    parts = {"name": {"const": tool.name}, "parameters": _taken(tool)}
    return {"type": "object", "properties": parts, "required": ["name", "parameters"], "additionalProperties": False}


def _one_of(heads: Sequence[str], tails: Sequence[str]) -> str:
    """One of several calls: what stands before the arguments, in which the calls' numbers are any, and the rest."""
    written = [" /[0-9]{1,2}/ ".join([_quoted(part) for part in head.split(INDEX)]) for head in heads]
    return "(" + " | ".join([f"{head} {tail}" for head, tail in zip(written, tails, strict=True)]) + ")"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


def _listed(schema: Mapping[str, Any]) -> list[str] | None:
    """The texts that a value may be, as they are written; None: any."""
    if isinstance(schema.get("enum"), list):
        return ["null" if each is None else each for each in schema["enum"] if each is None or isinstance(each, str)]
    options = [each for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) for each in schema[key]]
    if not options or schema.get("type") is not None:
        return ["null"] if schema.get("type") == "null" else None
    lists = [_listed(each) for each in options if may_be_text(each) or (isinstance(each, Mapping) and each.get("type") == "null")]
    return None if None in lists else [text for each in lists for text in each or []]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
