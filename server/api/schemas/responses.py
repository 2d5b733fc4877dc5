"""The body of OpenAI's /v1/responses, as far as text and calls of the client's own tools go. Nothing is stored: a conversation is sent as a whole each time."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from server.api.schemas.body import Body
from server.api.schemas.openai import MAX_TOP_LOGPROBS
from server.api.sentences import quoted, type_name

UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "store": (False,),
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "max_tool_calls": (),
    "truncation": ("disabled",),
    "moderation": (),
}

# What a client may wish to have included. Reasoning is not encrypted here, and always there.
INCLUDED = ("message.output_text.logprobs", "reasoning.encrypted_content")

# Type of an item -> the fields that it must have.
_NEEDED = {
    "message": ("role", "content"),
    "reasoning": (),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")


def _text(value: object) -> str:
    """Text, or an array of parts that are text, which are joined with newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"must be a string or an array of text parts, not {type_name(value)}.")
    return "\n".join([_part(part) for part in value])


def _part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in _TEXTS:
        raise ValueError(f"has a part of type {quoted(kind)}; this server reads parts of text only, such as 'input_text'.")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise ValueError(f"has a part of type {quoted(kind)} whose text must be a string, not {type_name(text)}.")
    return text


def _as_items(value: object) -> object:
    """Text is short for one message of the user's."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"must be a string or an array of items, not {type_name(value)}.")
    return value


def _included(value: object) -> list[str]:
    wished = [] if value is None else value
    if not isinstance(wished, list):
        raise ValueError(f"must be an array, not {type_name(value)}.")
    unknown = [each for each in wished if each not in INCLUDED]
    if unknown:
        raise ValueError(f"holds {quoted(unknown[0])}; this server can include {' and '.join(INCLUDED)} only.")
    return wished


class Item(Body):
    """One part of the conversation. Which fields it has depends on its type; without one it is a message."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Annotated[str | None, PlainValidator(_text, json_schema_input_type=str | list[dict[str, Any]] | None)] = None
    summary: Annotated[str | None, PlainValidator(_text, json_schema_input_type=str | list[dict[str, Any]] | None)] = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Annotated[str | None, PlainValidator(_text, json_schema_input_type=str | list[dict[str, Any]] | None)] = None

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, value: object) -> object:
        """Before the fields are read: those of other types are no mistakes of their own."""
        kind = value.get("type", "message") if isinstance(value, dict) else "message"
        if not isinstance(kind, str) or kind not in _NEEDED:
            raise ValueError(f"is of type {quoted(kind)}; this server reads the types {', '.join(_NEEDED)} only.")
        return {name: field for name, field in value.items() if field is not None} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        missing = next((field for field in _NEEDED[self.type] if getattr(self, field) is None), None)
        if missing:
            raise ValueError(f"is of type '{self.type}' and has no '{missing}'.")
        return self


class Tool(Body):
    """A function of the client's own; OpenAI runs others itself, and this server does not."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Text(Body):
    """How the answer is to be written."""

    unsupported: ClassVar = {"verbosity": ("medium",)}

    format: dict[str, Any] | None = None


class Reasoning(Body):
    """How much the model thinks. `summary` is taken: what it thinks is sent as it is, which is more."""

    effort: str | None = None


class ResponsesRequest(Body):
    """POST /v1/responses."""

    unsupported = UNSUPPORTED

    model: str | None = None  # any name is taken; the reply carries the one that is served
    input: Annotated[list[Item], BeforeValidator(_as_items, json_schema_input_type=str | list[Item]), Field(min_length=1)]
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None  # read by the chat that this becomes
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[str], PlainValidator(_included, json_schema_input_type=list[str] | None)] = Field(default_factory=list)
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    metadata: dict[str, Any] | None = None
    stream: bool | None = None
