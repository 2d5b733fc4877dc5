"""OpenAI's /v1/responses, as the chat that it stands for."""

from __future__ import annotations

import time
from collections.abc import Sequence

from server.api import convert
from server.api.exchanges.base import Exchange, in_words_of, new_id
from server.api.problems import Json
from server.api.schemas.body import checked, read
from server.api.schemas.openai import ChatRequest
from server.api.schemas.responses import Item, ResponsesRequest, Text, Tool
from server.api.serving import Loaded, Serving
from server.api.shapes.responses import ResponsesShape


def response(raw: bytes, serving: Serving, loaded: Loaded) -> Exchange:
    """POST /v1/responses."""
    body = read(ResponsesRequest, raw)
    reply_id = new_id("resp_")
    with in_words_of({"messages": "input", "response_format": "text.format", "reasoning_effort": "reasoning.effort"}):
        prepared = convert.chat(checked(ChatRequest, _chat(body)), loaded, serving.config, reply_id)
    shape = ResponsesShape(_head(body, reply_id, serving.model_id), loaded.tokenizer)
    return Exchange([prepared], shape, bool(body.stream), prompt_field="input")


def _chat(body: ResponsesRequest) -> Json:
    """The body in the words of OpenAI's chats."""
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    written: Json = {"messages": [*instructions, *_messages(body.input)]}
    given = {
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": _tool_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body.text),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
    }
    if _wants_logprobs(body):
        given |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    return written | {name: value for name, value in given.items() if value is not None}


def _wants_logprobs(body: ResponsesRequest) -> bool:
    return bool(body.top_logprobs) or "message.output_text.logprobs" in body.include


def _messages(items: Sequence[Item]) -> list[Json]:
    """A turn of the assistant's is one message, which what it thought, said and called are items of."""
    messages: list[Json] = []
    for item in items:
        if item.type == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        elif item.type == "message" and item.role != "assistant":
            messages.append({"role": item.role, "content": item.content})
        else:
            _add_to_turn(messages, item)
    return messages


def _add_to_turn(messages: list[Json], item: Item) -> None:
    """The item as part of the assistant's last message, or as the beginning of a new one where it comes before what that one has already."""
    key = {"reasoning": "reasoning_content", "message": "content", "function_call": "tool_calls"}[item.type]
    turn = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if turn is None or (key != "tool_calls" and (turn["content"] or "tool_calls" in turn)):
        turn = {"role": "assistant", "content": ""}
        messages.append(turn)
    match item.type:
        case "reasoning":
            turn[key] = item.content or item.summary or ""
        case "message":
            turn[key] = item.content
        case _:
            call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
            turn[key] = [*turn.get(key, []), call]


def _tool(tool: Tool) -> Json:
    return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}


def _tool_choice(choice: object) -> object:
    """A named function stands one level deeper in a chat."""
    if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _format(text: Text | None) -> Json | None:
    """As do a schema and its name."""
    if text is None or text.format is None:
        return None
    if text.format.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {key: value for key, value in text.format.items() if key != "type"}}
    return text.format


def _head(body: ResponsesRequest, reply_id: str, model: str) -> Json:
    """What the response says of the request, whether it was asked for or is the default."""
    return {
        "id": reply_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": (body.text and body.text.format) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.model_dump() for tool in body.tools or []],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
    }
