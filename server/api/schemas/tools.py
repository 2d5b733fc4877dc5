"""Functions that a chat offers to the model, and how it may use them, as OpenAI writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import field_validator

from server.api.schemas.body import Body
from server.api.sentences import quoted, type_name

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Function(Body):
    """What is known of one function."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON Schema of an object; None: it takes nothing
    strict: bool | None = None  # calls must follow the schema

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("must be of 1 to 128 letters, digits and the characters _ . : and -.")
        return name


class ToolDefinition(Body):
    """One of `tools`."""

    type: Literal["function"]
    function: Function


Choice = Literal["none", "auto", "required"]


class Named(Body):
    """A `tool_choice` that names the one function to call."""

    name: str


def tools_of(tools: Sequence[ToolDefinition] | None) -> Sequence[ToolDefinition] | None:
    """The tools, after a check that each name stands for one of them."""
    names = [tool.function.name for tool in tools or []]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"has two functions of the name {quoted(twice)}. Give each its own name.")
    return tools


def tool_choice_of(value: object) -> Choice | Named | None:
    """none, auto, required, or {"type": "function", "function": {"name": ...}}."""
    if value is None or value == "none" or value == "auto" or value == "required":
        return value
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        said = quoted(value) if isinstance(value, str) else type_name(value)
        raise ValueError(f'must be "none", "auto", "required" or {{"type": "function", "function": {{"name": ...}}}}, not {said}.')
    return Named(name=name)
