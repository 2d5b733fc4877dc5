"""What is wrong with a field, as a sentence: pydantic's error types in this server's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from server.errors import RequestError

LONGEST_QUOTE = 60

_TYPES: dict[type, str] = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    dict: "an object",
    type(None): "null",
}


def type_name(value: object) -> str:
    """A JSON value's type, with its article."""
    return _TYPES.get(type(value), "something else")


def quoted(value: object) -> str:
    """A client's value as a sentence can hold it."""
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def _wanted(kind: str) -> Callable[[Any, Mapping[str, Any]], str]:
    return lambda value, context: f"must be {kind}, not {value if type(value) in (int, float) else type_name(value)}."


# pydantic's error type -> (the value, the error's context) -> what follows the field's name.
_RULES: dict[str, Callable[[Any, Mapping[str, Any]], str]] = {
    "missing": lambda value, context: "is missing.",
    "string_type": _wanted("a string"),
    "int_type": _wanted("an integer"),
    "int_from_float": lambda value, context: f"must be an integer, not {value}.",
    "float_type": _wanted("a number"),
    "bool_type": _wanted("true or false"),
    "list_type": _wanted("an array"),
    "dict_type": _wanted("an object"),
    "model_type": _wanted("an object"),
    "model_attributes_type": _wanted("an object"),
    "too_long": lambda value, context: f"must not hold more than {context['max_length']}.",
    "too_short": lambda value, context: "must not be empty.",
    "literal_error": lambda value, context: f"must be {context['expected']}, not {quoted(value)}.",
    "greater_than_equal": lambda value, context: f"must be at least {context['ge']:g}, not {value}.",
    "greater_than": lambda value, context: f"must be above {context['gt']:g}, not {value}.",
    "less_than_equal": lambda value, context: f"must be at most {context['le']:g}, not {value}.",
    "less_than": lambda value, context: f"must be below {context['lt']:g}, not {value}.",
    "value_error": lambda value, context: str(context["error"]),
}


def request_error(error: Mapping[str, Any]) -> RequestError:
    """One of `ValidationError.errors()` as a sentence that begins with the field's path, such as 'messages[0].role'."""
    path = field_path(error["loc"])
    rule = _RULES.get(error["type"])
    said = rule(error["input"], error.get("ctx", {})) if rule else f"cannot be used: {error['msg']}."
    return RequestError(f"'{path}' {said}", param=path) if path else RequestError(f"The body {said}")


def field_path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> "messages[0].role"."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path
