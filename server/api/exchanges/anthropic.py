"""Anthropic's messages, as the chat that OpenAI's API would have."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from server.api import convert
from server.api.convert import Prepared
from server.api.exchanges.base import Exchange, in_words_of, new_id
from server.api.problems import Json
from server.api.schemas.anthropic import Block, CountRequest, Message, MessagesRequest, TextBlock, Tool, ToolChoice
from server.api.schemas.body import checked, read
from server.api.schemas.openai import OthersChat
from server.api.serving import Loaded, Serving
from server.api.shapes.anthropic import AnthropicShape


def messages(raw: bytes, serving: Serving, loaded: Loaded) -> Exchange:
    """POST /v1/messages."""
    body = read(MessagesRequest, raw)
    reply_id = new_id("msg_")
    prepared = _prepared(chat(body) | _sampling(body), serving, loaded, reply_id)
    shape = AnthropicShape(reply_id, serving.model_id, prepared.request, thinking=_shown(body))
    return Exchange([prepared], shape, bool(body.stream))


def count(raw: bytes, serving: Serving, loaded: Loaded) -> int:
    """POST /v1/messages/count_tokens: tokens of the prompt that the body would make."""
    body = read(CountRequest, raw)
    return len(_prepared(chat(body), serving, loaded, new_id("msg_")).request.prompt_ids)


def _prepared(written: Json, serving: Serving, loaded: Loaded, reply_id: str) -> Prepared:
    with in_words_of({"response_format": "output_config.format", "reasoning_effort": "thinking", "stop": "stop_sequences"}):
        return convert.chat(checked(OthersChat, written), loaded, serving.config, reply_id)


def chat(body: CountRequest) -> Json:
    """The body in OpenAI's words, but for how the reply is sampled."""
    written: Json = {"messages": [*_system(body.system), *itertools.chain.from_iterable(map(_message, body.messages))]}
    if body.tools:
        written["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        written |= _tool_choice(body.tool_choice)
    if body.output_config is not None and body.output_config.format is not None:
        written["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": body.output_config.format.json_schema}}
    return written | _thinking(body)


def _thinking(body: CountRequest) -> Json:
    """Clients ask every model to think, and say how hard: one that cannot is not to refuse them, so that only the template is told."""
    if body.thinking is not None and body.thinking.type == "disabled":
        return {"reasoning_effort": "none"}
    wishes: Json = {"enable_thinking": True, "thinking": True} if body.thinking is not None else {}
    if body.output_config is not None and body.output_config.effort is not None:
        wishes["reasoning_effort"] = body.output_config.effort
    return {"chat_template_kwargs": wishes} if wishes else {}


def _sampling(body: MessagesRequest) -> Json:
    names = ("max_tokens", "temperature", "top_p", "top_k")
    return {"stop": body.stop_sequences} | {name: value for name in names if (value := getattr(body, name)) is not None}


def _shown(body: MessagesRequest) -> bool:
    return body.thinking is None or (body.thinking.type != "disabled" and body.thinking.display != "omitted")


def _system(blocks: Sequence[TextBlock]) -> list[Json]:
    return [{"role": "system", "content": _text(blocks)}] if blocks else []


def _text(blocks: Iterable[TextBlock | Block]) -> str:
    return "\n".join([block.text for block in blocks])


def _message(message: Message) -> list[Json]:
    """OpenAI's messages for one of Anthropic's, whose results of tools stand between what the user says."""
    if message.role == "assistant":
        return [_assistant(message.content)]
    grouped = itertools.groupby(message.content, lambda block: block.type == "tool_result")
    return [each for are_results, blocks in grouped for each in (map(_result, blocks) if are_results else [{"role": message.role, "content": _text(blocks)}])]


def _assistant(blocks: Sequence[Block]) -> Json:
    texts = [block for block in blocks if block.type == "text"]
    written: Json = {"role": "assistant", "content": _text(texts)}
    if reasoning := "\n".join([block.thinking for block in blocks if block.type == "thinking"]):
        written["reasoning_content"] = reasoning
    if calls := [_call(block) for block in blocks if block.type == "tool_use"]:
        written["tool_calls"] = calls
    return written


def _call(block: Block) -> Json:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}}


def _result(block: Block) -> Json:
    failed = "Error: " if block.is_error else ""
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": failed + _text(block.content)}


def _tool(tool: Tool) -> Json:
    function: Json = {"name": tool.name, "parameters": tool.input_schema}
    function |= {name: value for name in ("description", "strict") if (value := getattr(tool, name)) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice) -> Json:
    named: dict[str, Any] = {"type": "function", "function": {"name": choice.name}}
    words: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none", "tool": named}
    parallel = {"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {}
    return {"tool_choice": words[choice.type], **parallel}
