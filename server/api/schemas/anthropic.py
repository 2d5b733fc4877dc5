"""The bodies of Anthropic's /v1/messages. Text alone: a block of another kind is refused, since a model that did not see it would answer as if it had."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from server.api.schemas.body import Body
from server.api.schemas.openai import OthersStops
from server.api.sentences import quoted, type_name

UNSUPPORTED: dict[str, tuple[object, ...]] = {"container": (), "mcp_servers": ([],)}

# Type of a block -> the fields that it must have.
_NEEDED = {
    "text": ("text",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}


def _as_blocks(value: object) -> object:
    """Text is short for one block of it."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError(f"must be a string or an array of blocks, not {type_name(value)}.")
    return value


class TextBlock(Body):
    """What a system prompt and a tool's result are made of."""

    type: Literal["text"]
    text: str


class Block(Body):
    """One part of a message. Which fields it has depends on its type."""

    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = Field(default_factory=dict)
    tool_use_id: str = ""
    content: Annotated[list[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])] = Field(default_factory=list)
    is_error: bool | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if self.type not in _NEEDED:
            raise ValueError(f"is of type {quoted(self.type)}; this server reads the types {', '.join(_NEEDED)} only.")
        missing = next((field for field in _NEEDED[self.type] if field not in self.model_fields_set), None)
        if missing:
            raise ValueError(f"is of type '{self.type}' and has no '{missing}'.")
        return self


class Message(Body):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])]


class Tool(Body):
    """A function of the client's own; Anthropic runs others itself, and this server does not."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Body):
    """Whether and which tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.type == "tool" and self.name is None:
            raise ValueError("is of type 'tool' and has no 'name'.")
        return self


class Thinking(Body):
    """Whether the model thinks, and whether the client is to see it. `budget_tokens` is taken and not enforced: max_tokens holds for both together."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    """The schema that an answer must follow."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Body):
    """POST /v1/messages/count_tokens: what there is of a prompt."""

    unsupported = UNSUPPORTED

    model: str | None = None  # any name is taken; the reply carries the one that is served
    messages: Annotated[list[Message], Field(min_length=1)]
    system: Annotated[list[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])] = Field(default_factory=list)
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: OthersStops = Field(default_factory=list)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
