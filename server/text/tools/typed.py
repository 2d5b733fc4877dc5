"""Arguments that a model writes as plain text, one by one, brought to JSON by the function's schema: Qwen3-Coder's and GLM's."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from server.text.tools.calls import Schema
from server.text.tools.scanning import Out, Scanner, Wait

_LONGEST_PYTHON = 4096  # characters of a value that are read as Python's
_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


class TypedArguments:
    """One call's arguments: {"key": value, ...} is given to `out` as the pieces become certain."""

    def __init__(self, scanner: Scanner, schema: Schema, out: Out) -> None:
        self._scanner = scanner
        self._properties = schema.get("properties")
        self._out = out
        self._count = 0

    def add(self, key: str, close: str, line_breaks: bool) -> Wait[bool]:
        """Read the value of `key` up to `close`, which is consumed; a text comes as it streams in. `line_breaks`: one at each end is not the value's.

        False when the reply ends first: what was cut short is not closed, so that nobody runs it.
        """
        self._out(("{" if self._count == 0 else ", ") + _ENCODE(key) + ": ")
        self._count += 1
        schema = self._properties.get(key) if isinstance(self._properties, Mapping) else None
        if line_breaks:
            yield from self._scanner.literal("\n")
        ends = (f"\n{close}", close) if line_breaks else (close,)
        if is_text(schema):
            self._out('"')
            whole = yield from self._scanner.until(ends, lambda text: self._out(_ENCODE(text)[1:-1]))
            self._out('"' if whole else "")
        else:
            pieces: list[str] = []
            whole = yield from self._scanner.until(ends, pieces.append)
            self._out(as_json("".join(pieces), schema) if whole else "".join(pieces))
        if not whole:
            self._scanner.take(len(self._scanner.text))  # half of the closing tag
        return bool((yield from self._scanner.literal(*ends)))

    def end(self) -> None:
        """The call is over."""
        self._out("}" if self._count else "{}")


def is_text(schema: Any) -> bool:
    """Whether a value can be nothing but text, so that it may be streamed."""
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def as_json(text: str, schema: Any) -> str:
    """JSON of a value that was written as plain text. What the schema does not call a text is read as JSON, or as Python writes it, where it is either."""
    if may_be_text(schema) and text.strip() != "null":
        return _ENCODE(text)
    for read in (_read_json, _read_python):
        try:
            made = _ENCODE(read(text.strip()))
            made.encode()  # half of a surrogate pair is no text
            return made
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return _ENCODE(text)


def _read_json(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def _read_python(text: str) -> Any:
    if len(text) > _LONGEST_PYTHON:
        raise ValueError("too long")
    return ast.literal_eval(text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def may_be_text(schema: Any) -> bool:
    """Whether a schema allows a text, alone or among other types. It is a client's, and checked only where a call is forced."""
    if not isinstance(schema, Mapping):
        return False
    named, listed = schema.get("type"), schema.get("enum")
    options = [each for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) for each in schema[key]]
    return (
        named == "string"
        or (isinstance(named, list) and "string" in named)
        or (isinstance(listed, list) and any(isinstance(each, str) for each in listed))
        or any(map(may_be_text, options))
    )
