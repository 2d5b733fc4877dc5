"""OpenAI's chats and completions."""

from __future__ import annotations

import time

from server.api import convert
from server.api.exchanges.base import Exchange, new_id
from server.api.schemas.body import read
from server.api.schemas.openai import ChatRequest, CompletionRequest
from server.api.serving import Loaded, Serving
from server.api.shapes.chat import ChatShape
from server.api.shapes.completion import CompletionShape
from server.api.shapes.openai import Wanted


def chat(raw: bytes, serving: Serving, loaded: Loaded) -> Exchange:
    """POST /v1/chat/completions."""
    body = read(ChatRequest, raw)
    reply_id = new_id("chatcmpl-")
    prepared = convert.chats(body, loaded, serving.config, reply_id)
    wanted = Wanted(len(prepared), logprobs=bool(body.logprobs), include_usage=body.wants_usage)
    return Exchange(prepared, ChatShape(reply_id, int(time.time()), serving.model_id, loaded.tokenizer, wanted), bool(body.stream))


def completion(raw: bytes, serving: Serving, loaded: Loaded) -> Exchange:
    """POST /v1/completions."""
    body = read(CompletionRequest, raw)
    reply_id = new_id("cmpl-")
    prepared = convert.completions(body, loaded, serving.config, reply_id)
    wanted = Wanted(len(prepared), logprobs=body.logprobs is not None, include_usage=body.wants_usage)
    shape = CompletionShape(reply_id, int(time.time()), serving.model_id, loaded.tokenizer, wanted)
    return Exchange(prepared, shape, bool(body.stream), prompt_field="prompt")
