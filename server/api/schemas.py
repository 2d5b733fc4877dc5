"""The bodies that clients send, as pydantic models; the only module that knows pydantic.

Types are strict and ranges are OpenAI's. A field that nobody knows is ignored, as OpenAI does; one that the field knows and this server does not
support is refused (UNSUPPORTED), unless its value asks for nothing. `read` makes every mistake a RequestError with a sentence.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from server.api.sentences import quoted, request_error, type_name
from server.errors import RequestError

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20

# Fields of OpenAI's API and of other servers that change a reply and are not supported, each with the values that ask for nothing beside null.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "repeat_penalty": (1, 1.0),  # llama.cpp's name of repetition_penalty
    "n_predict": (-1,),  # llama.cpp's name of max_tokens
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "suffix": ("",),
    "echo": (False,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "stop_token_ids": ([],),
    "grammar": ("",),
    "json_schema": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}

Prompt = str | list[int]


def _content(value: object) -> str | None:
    """A message's content: text, or an array of text parts, which are joined with newlines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"must be a string or an array of text parts, not {type_name(value)}.")
    if not value:
        raise ValueError("must not be an empty array.")
    return "\n".join([_part_text(part) for part in value])


def _part_text(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise ValueError(f"has a part of type {quoted(kind)}; this server reads parts of type 'text' only.")
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"has a text part whose 'text' must be a string, not {type_name(text)}.")
    return text


def _stops(value: object) -> list[str]:
    """One stop string or several."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or an array of strings.")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"holds {len(stops)} strings; at most {MAX_STOPS} are possible.")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise ValueError(f"holds a string of {len(stop)} characters; each must have 1 to {MAX_STOP_CHARS}.")
    return stops


def _prompts(value: object) -> list[Prompt]:
    """A completion's prompt, always as a list: a text, token ids, or a list of either."""
    if isinstance(value, str) or _are_ids(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(each, str) or _are_ids(each) for each in value):
        return value
    raise ValueError("must be a string, an array of token ids, or an array of either, and not empty.")


def _are_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Message(Body):
    """One message of a chat. What a template may use beside role and content is passed on to it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, PlainValidator(_content)] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("has no content.")
        return self


class StreamOptions(Body):
    """Only with stream."""

    include_usage: bool | None = None


class Sampling(Body):
    """What chat and completions have in common. None: as if it were absent."""

    model: str | None = None  # any name is taken; the reply carries the one that is served
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: Annotated[list[str], PlainValidator(_stops)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # the newer name of max_tokens, and the stronger one
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a chat as the model's template writes it."""

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either 'prompt' or 'messages'.")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: list[int]


Model = TypeVar("Model", bound=Body)


def read(model: type[Model], raw: bytes) -> Model:
    """The body as `model`. RequestError for what is not JSON, not an object, unsupported, of a wrong type or out of range."""
    body = _json_object(raw)
    refuse_unsupported(body)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise request_error(error.errors(include_url=False)[0]) from error


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw, parse_constant=_no_constant)
        if re.search(rb"\\u[dD][89a-fA-F]", raw):  # a lone half of a surrogate pair is no text that can be tokenised
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not valid JSON: {error}. Send one JSON object in UTF-8.") from error
    if not isinstance(body, dict):
        raise RequestError(f"The body must be a JSON object, not {type_name(body)}.")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def refuse_unsupported(body: dict[str, Any]) -> None:
    """RequestError for the first field whose value asks for something that this server does not do."""
    for name, harmless in UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and (value not in harmless or isinstance(value, bool) is not isinstance(harmless[0], bool)):
            only = " or ".join(json.dumps(each) for each in harmless if each)
            said = f"'{name}' is supported only as {only}" if only else f"'{name}' is not supported"
            raise RequestError(f"{said} by this server. Leave it out.", param=name, code="unsupported_parameter")
