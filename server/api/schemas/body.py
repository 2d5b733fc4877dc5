"""What the bodies of every protocol share: strict types, and `read`, which makes every mistake a RequestError with a sentence.

A field that nobody knows is ignored, as OpenAI does; one that the field knows and this server does not support is refused (`Body.unsupported`),
unless its value asks for nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from server.api.sentences import quoted, request_error, type_name
from server.errors import RequestError

MAX_DEPTH = 100


class Body(BaseModel):
    """One JSON object that a client sends, or a part of it."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, json_schema_extra=lambda schema, body: _say_unsupported(schema, body))

    # Fields that change a reply and are not supported, each with the values that ask for nothing beside null.
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    instead: ClassVar[Mapping[str, str]] = {}  # what to send in place of some of them

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: object) -> object:
        if isinstance(value, dict):
            refuse_unsupported(value, cls.unsupported, cls.instead)
        return value


def _say_unsupported(schema: dict[str, Any], body: type[BaseModel]) -> None:
    """For the document of the API: a field that is refused may have the values that ask for nothing."""
    for name, harmless in body.unsupported.items() if issubclass(body, Body) else ():
        schema.setdefault("properties", {})[name] = {"enum": [*harmless, None], "description": "Not supported."}


Model = TypeVar("Model", bound=Body)


def read(model: type[Model], raw: bytes) -> Model:
    """The body as `model`. RequestError for what is not JSON, not an object, unsupported, of a wrong type or out of range."""
    return checked(model, json_object(raw))


def checked(model: type[Model], body: Mapping[str, Any]) -> Model:
    """A JSON object as `model`; RequestError for the same, but for what is not JSON."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise request_error(error.errors(include_url=False)[0]) from error


def json_object(raw: bytes) -> dict[str, Any]:
    """What the body holds; RequestError when that is not one JSON object."""
    try:
        body = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
        if re.search(rb"\\u[dD][89a-fA-F]", raw):  # a lone half of a surrogate pair is no text that can be tokenised
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not valid JSON: {error}. Send one JSON object in UTF-8.") from error
    if not isinstance(body, dict):
        raise RequestError(f"The body must be a JSON object, not {type_name(body)}.")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_deeper(body, MAX_DEPTH):
        raise RequestError(f"The body has arrays and objects more than {MAX_DEPTH} deep in one another. Send a flatter one.")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{quoted(text)} is too large for a number")
    return number


def _is_deeper(value: object, depth: int) -> bool:
    """Level by level: what calls itself for each level would end with Python's stack, and so would what works on such a body later."""
    level = [value]
    for _ in range(depth):
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
    return bool(level)


def _children(node: object) -> Iterable[object]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def refuse_unsupported(body: Mapping[str, Any], unsupported: Mapping[str, tuple[object, ...]], instead: Mapping[str, str] | None = None) -> None:
    """RequestError for the first field whose value asks for something that this server does not do."""
    for name, harmless in unsupported.items():
        value = body.get(name)
        if value is not None and (value not in harmless or isinstance(value, bool) is not isinstance(harmless[0], bool)):
            only = " or ".join(json.dumps(each) for each in harmless if each)
            said = f"'{name}' is supported only as {only}" if only else f"'{name}' is not supported"
            advice = f"Send '{instead[name]}' instead." if instead and name in instead else "Leave it out."
            raise RequestError(f"{said} by this server. {advice}", param=name, code="unsupported_parameter")
