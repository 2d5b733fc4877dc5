"""The bodies of Ollama's API.

Its rules here: what a model is loaded with (num_gpu, num_thread, ...) and how long it stays (keep_alive) was decided when the server started, and is
ignored; num_ctx may be anything that the KV cache holds; what would change a reply and is not supported is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from server.api.schemas.body import Body
from server.api.schemas.openai import MAX_TOP_LOGPROBS, OthersStops
from server.api.sentences import quoted, type_name

EFFORTS = ("low", "medium", "high")

UNSUPPORTED: dict[str, tuple[object, ...]] = {"images": ([],), "suffix": ("",), "template": ("",), "context": ([],)}
UNSUPPORTED_OPTIONS: dict[str, tuple[object, ...]] = {
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "mirostat": (0,),
    "penalize_newline": (True,),
}


def _format(value: object) -> dict[str, Any] | None:
    """A format in OpenAI's words: nothing, any JSON object, or a schema."""
    if value in (None, ""):
        return None
    if value == "json":
        return {"type": "json_object"}
    if isinstance(value, dict):
        return {"type": "json_schema", "json_schema": {"name": "format", "schema": value}}
    raise ValueError(f"must be 'json' or a JSON schema, not {type_name(value)}.")


def _think(value: object) -> bool | str | None:
    """Whether the model thinks, or how much."""
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value in EFFORTS):
        return value
    raise ValueError(f"must be true, false or one of {', '.join(EFFORTS)}, not {quoted(value)}.")


class Options(Body):
    """How the reply is sampled."""

    unsupported = UNSUPPORTED_OPTIONS

    num_ctx: Annotated[int, Field(ge=1)] | None = None
    num_predict: Annotated[int, Field(ge=-2)] | None = None  # below 0: as many as the KV cache holds
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: OthersStops = Field(default_factory=list)
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.repeat_last_n not in (None, -1) and self.repeat_penalty not in (None, 1.0):
            raise ValueError(f"has repeat_last_n {self.repeat_last_n}; here repeat_penalty is of the prompt and all of the reply. Leave it out, or send -1.")
        return self


class Function(Body):
    """What a call calls."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Call(Body):
    """A call that the model made earlier."""

    id: str | None = None
    function: Function


class Message(Body):
    """One message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_images(self) -> Self:
        if self.images:
            raise ValueError("has images; this server's models read text only.")
        return self


class Asked(Body):
    """What chats and prompts have in common."""

    unsupported = UNSUPPORTED

    model: str | None = None  # any name is taken; the reply carries the one that is served
    stream: bool | None = None  # absent: true
    options: Options | None = None
    format: Annotated[dict[str, Any] | None, PlainValidator(_format, json_schema_input_type=Literal["json", ""] | dict[str, Any] | None)] = None
    think: Annotated[bool | str | None, PlainValidator(_think, json_schema_input_type=bool | Literal["low", "medium", "high"] | None)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class ChatRequest(Asked):
    """POST /api/chat. Without messages it asks for the model to be loaded."""

    messages: list[Message] = Field(default_factory=list)
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(Asked):
    """POST /api/generate. Without a prompt it asks for the model to be loaded."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None


class ShowRequest(Body):
    """POST /api/show."""

    model: str | None = None
    name: str | None = None  # the older name of `model`
