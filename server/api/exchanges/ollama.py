"""Ollama's chats and prompts, as OpenAI's API would have them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from server.api import convert
from server.api.convert import Prepared
from server.api.exchanges.base import Exchange, in_words_of, new_id
from server.api.problems import Json
from server.api.schemas import ollama as schemas
from server.api.schemas.body import checked, read
from server.api.schemas.ollama import Asked, Call, Message, Options
from server.api.schemas.openai import OthersChat, OthersCompletion
from server.api.serving import Loaded, Serving
from server.api.shapes.ollama import ChatLines, GenerateLines
from server.errors import RequestError


def chat(raw: bytes, serving: Serving, loaded: Loaded) -> Exchange | Json:
    """POST /api/chat. Without messages the answer is there at once: the model is loaded."""
    body = read(schemas.ChatRequest, raw)
    if not body.messages:
        return ChatLines(serving.model_id, loaded.tokenizer, thinking=False).loaded()
    written: Json = {"messages": list(_messages(body.messages)), **_asked(body, loaded)}
    if body.tools:
        written["tools"] = body.tools
    prepared = _prepared(written, serving, loaded)
    return Exchange([prepared], ChatLines(serving.model_id, loaded.tokenizer, thinking=body.think is not False), body.stream is not False)


def generate(raw: bytes, serving: Serving, loaded: Loaded) -> Exchange | Json:
    """POST /api/generate. Without a prompt the answer is there at once: the model is loaded."""
    body = read(schemas.GenerateRequest, raw)
    shape = GenerateLines(serving.model_id, loaded.tokenizer, thinking=body.think is not False)
    if not body.prompt:
        return shape.loaded()
    prepared = _raw(body, body.prompt, serving, loaded) if body.raw else _templated(body, serving, loaded)
    return Exchange([prepared], shape, body.stream is not False, prompt_field="prompt")


def _templated(body: schemas.GenerateRequest, serving: Serving, loaded: Loaded) -> Prepared:
    system = [{"role": "system", "content": body.system}] if body.system else []
    return _prepared({"messages": [*system, {"role": "user", "content": body.prompt}], **_asked(body, loaded)}, serving, loaded)


def _raw(body: schemas.GenerateRequest, prompt: str, serving: Serving, loaded: Loaded) -> Prepared:
    """The prompt as it is, without the model's template."""
    for field in ("system", "think"):
        if getattr(body, field) not in (None, ""):
            raise RequestError(f"'{field}' needs the model's template, and 'raw' leaves that out. Say it in 'prompt', or leave out one of them.", param=field)
    written = {"prompt": prompt, **_asked(body, loaded)}
    if "logprobs" in written:  # which are a number there
        written["logprobs"] = written.pop("top_logprobs")
    with in_words_of(_WORDS):
        return convert.completions(checked(OthersCompletion, written), loaded, serving.config, new_id("ollama-"))[0]


def _prepared(written: Json, serving: Serving, loaded: Loaded) -> Prepared:
    with in_words_of(_WORDS):
        return convert.chat(checked(OthersChat, written), loaded, serving.config, new_id("ollama-"))


_WORDS = {"response_format": "format", "reasoning_effort": "think", "max_tokens": "options.num_predict"}


def _asked(body: Asked, loaded: Loaded) -> Json:
    """What is not the prompt."""
    written: Json = _sampled(body.options, loaded.service.cache_lens) if body.options else {}
    if body.format is not None:
        written["response_format"] = body.format
    if body.think is not None:
        written["reasoning_effort"] = _EFFORTS.get(body.think, body.think)
    if body.logprobs:
        written |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    return written


_EFFORTS: dict[bool | str, str] = {True: "medium", False: "none"}
_SAME = ("temperature", "top_k", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty")


def _sampled(options: Options, cache_lens: int) -> Json:
    """Ollama's options by OpenAI's names. `cache_lens`: the tokens that the KV cache holds."""
    if options.num_ctx is not None and options.num_ctx > cache_lens:
        raise RequestError(
            f"'options.num_ctx' is {options.num_ctx}, but the KV cache holds {cache_lens} tokens. Lower it, or start the server with a larger --cache_lens.",
            param="options.num_ctx",
        )
    given = {name: getattr(options, name) for name in _SAME}
    given |= {"repetition_penalty": options.repeat_penalty, "max_tokens": options.num_predict, "stop": options.stop}
    if options.num_predict is not None and options.num_predict < 0:
        given["max_tokens"] = cache_lens
    return {name: value for name, value in given.items() if value is not None}


def _messages(messages: Sequence[Message]) -> Iterator[Json]:
    """OpenAI's messages. Its calls have ids, which Ollama's need not have: a result without one belongs to the first call of its tool that has none yet."""
    open_calls: list[tuple[str, str]] = []  # (id, name)
    for number, message in enumerate(messages):
        written: Json = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            written["reasoning_content"] = message.thinking
        if message.tool_calls:
            calls = [(call.id or f"call_{number}_{i}", call) for i, call in enumerate(message.tool_calls)]
            open_calls += [(call_id, call.function.name) for call_id, call in calls]
            written["tool_calls"] = [_call(call_id, call) for call_id, call in calls]
        if message.role == "tool":
            written |= _answered(message, open_calls)
        yield written


def _call(call_id: str, call: Call) -> Json:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _answered(message: Message, open_calls: list[tuple[str, str]]) -> Json:
    """Which call a result is of; it is open no longer."""
    matching = [call for call in open_calls if message.tool_call_id in (None, call[0]) and message.tool_name in (None, call[1])]
    if not matching:
        return {"tool_call_id": message.tool_call_id or "", **({"name": message.tool_name} if message.tool_name else {})}
    open_calls.remove(matching[0])
    return {"tool_call_id": matching[0][0], "name": matching[0][1]}
