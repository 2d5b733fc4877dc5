"""The bodies of OpenAI's API. Types are strict and ranges are OpenAI's."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import AfterValidator, Field, PlainValidator, model_validator

from server.api.schemas.body import Body
from server.api.schemas.forms import Formed
from server.api.schemas.tools import Choice, Named, ToolDefinition, tool_choice_of, tools_of
from server.api.sentences import quoted, type_name
from server.errors import RequestError

MAX_STOPS = 4
MAX_OTHERS_STOPS = 256  # where a protocol names no limit: each costs something for every character of the reply
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_SWITCHES_BYTES = 16384  # of chat_template_kwargs, as JSON

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
MAX_MESSAGES = 4096
MAX_PROMPTS = 256
MAX_BIASES = 1024

# Of OpenAI's API and of other servers of it.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "repeat_penalty": (1, 1.0),  # llama.cpp's names
    "n_predict": (-1,),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "chat_template": (),
}

INSTEAD = {
    "functions": "tools",  # OpenAI's older name of them
    "function_call": "tool_choice",
    "repeat_penalty": "repetition_penalty",
    "n_predict": "max_tokens",
    "chat_template": "chat_template_kwargs",
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


def _stops_of(value: object, most: int) -> list[str]:
    """One stop string or several."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or an array of strings.")
    if len(stops) > most:
        raise ValueError(f"holds {len(stops)} strings; at most {most} are possible.")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise ValueError(f"holds a string of {len(stop)} characters; each must have 1 to {MAX_STOP_CHARS}.")
    return stops


def _up_to(most: int) -> PlainValidator:
    return PlainValidator(lambda value: _stops_of(value, most), json_schema_input_type=str | list[str] | None)


Stops = Annotated[list[str], _up_to(MAX_STOPS)]
OthersStops = Annotated[list[str], _up_to(MAX_OTHERS_STOPS)]  # Anthropic's and Ollama's


def _prompts(value: object) -> list[Prompt]:
    """A completion's prompt, always as a list: a text, token ids, or a list of either."""
    if isinstance(value, str) or _are_ids(value):
        return [value]
    if isinstance(value, list) and len(value) > MAX_PROMPTS:
        raise ValueError(f"holds {len(value)} prompts; at most {MAX_PROMPTS} are possible.")
    if isinstance(value, list) and value and all(isinstance(each, str) or _are_ids(each) for each in value):
        return value
    raise ValueError("must be a string, an array of token ids, or an array of either, and not empty.")


def _are_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def switches_of(switches: dict[str, Any] | None) -> dict[str, Any] | None:
    """A template's switches, after a check of their size and of names that are not theirs."""
    taken = next((name for name in switches or {} if name in _NOT_SWITCHES), None)
    if taken is not None:
        raise ValueError(f"has {quoted(taken)}, which is not a switch of the template. Leave it out.")
    if (size := len(json.dumps(switches))) > MAX_SWITCHES_BYTES:
        raise ValueError(f"has {size} bytes; at most {MAX_SWITCHES_BYTES} are possible.")
    return switches


_NOT_SWITCHES = {
    "self",
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "range",
    "raise_exception",
    "strftime_now",
}


class Message(Body):
    """One message of a chat. What a template may use beside role and content is passed on to it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, PlainValidator(_content, json_schema_input_type=str | list[dict[str, Any]] | None)] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and not self.tool_calls and not self.reasoning_content:
            raise ValueError("has no content.")
        return self


class StreamOptions(Body):
    """Only with stream."""

    include_usage: bool | None = None


class Sampling(Formed):
    """What chat and completions have in common. None: as if it were absent."""

    unsupported = UNSUPPORTED
    instead = INSTEAD

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
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = None
    stop: Stops = Field(default_factory=list)
    stop_token_ids: list[int] | None = None  # each of them ends a reply too
    ignore_eos: bool | None = None  # the model's own end-of-text tokens do not
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None  # replies, drawn one after another
    best_of: Annotated[int, Field(ge=1)] | None = None  # only as many as are shown
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None and self.best_of != self.choices:
            said = f"'best_of' is {self.best_of} and 'n' is {self.choices}; this server shows every reply that it draws. Leave 'best_of' out."
            raise RequestError(said, param="best_of")
        return self

    @property
    def choices(self) -> int:
        """How many replies are asked for."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # the newer name of max_tokens, and the stronger one
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[ToolDefinition] | None, AfterValidator(tools_of)] = None
    tool_choice: Annotated[Choice | Named | None, PlainValidator(tool_choice_of, json_schema_input_type=Choice | dict[str, Any] | None)] = None  # None: auto
    parallel_tool_calls: bool | None = None  # None: true
    reasoning_effort: Effort | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, AfterValidator(switches_of)] = None  # the template's own switches
    add_generation_prompt: bool | None = None  # None: unless the last message is continued
    continue_final_message: bool | None = None  # None: if it is the assistant's

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or []]
        if isinstance(self.tool_choice, Named) and self.tool_choice.name not in names:
            raise RequestError(f"'tool_choice' names {quoted(self.tool_choice.name)}, but no such function is among the 'tools'.", param="tool_choice")
        if self.tool_choice == "required" and not names:
            raise RequestError("'tool_choice' is \"required\", but there are no 'tools' to choose from. Send some, or leave it out.", param="tool_choice")
        if self.add_generation_prompt and self.continue_final_message:
            said = "'continue_final_message' and 'add_generation_prompt' are both true; the last message is either continued or answered. Send one of them."
            raise RequestError(said, param="continue_final_message")
        return self

    @property
    def continues(self) -> bool:
        """Whether the reply goes on where the last message ends."""
        last = self.messages[-1]
        if self.continue_final_message is not None:
            return self.continue_final_message
        return last.role == "assistant" and not last.tool_calls and not self.add_generation_prompt


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]])]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None  # the reply begins with the prompt
    suffix: str | None = None  # what stands behind the text that is asked for

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise RequestError("'echo' is not possible with 'logprobs', since those of a prompt are not computed. Leave one of them out.", param="echo")
        return self


class OthersChat(ChatRequest):
    """The chat that a request of another protocol stands for, and which may have as many stop strings as that."""

    stop: OthersStops = Field(default_factory=list)


class OthersCompletion(CompletionRequest):
    """The same for a completion."""

    stop: OthersStops = Field(default_factory=list)


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a chat as the model's template writes it."""

    unsupported = UNSUPPORTED

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either 'prompt' or 'messages'.")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: list[int]
