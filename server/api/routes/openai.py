"""OpenAI's routes: chat, completions, models."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from server.api import convert
from server.api.answer import Answer
from server.api.convert import Prepared
from server.api.disconnect import while_connected
from server.api.errors import NotFound
from server.api.schemas import ChatRequest, CompletionRequest, Sampling, read
from server.api.sentences import quoted
from server.api.serving import Loaded, Serving
from server.api.shapes import ChatShape, CompletionShape, Shape
from server.api.sse import StreamResponse
from server.errors import ContextOverflow

FIRST_TEXT_S = 1.0  # an error before the first text has its own HTTP status, if it comes this soon; then the stream begins
LONG_BODY = 32768  # bytes; beyond them, template and tokenizer would hold up the other streams

Made = TypeVar("Made")


def router(serving: Serving) -> APIRouter:
    """The routes, for one served model."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        loaded, raw = serving.loaded(), await request.body()
        body = read(ChatRequest, raw)
        reply_id = f"chatcmpl-{uuid.uuid4().hex}"
        prepared = await _off_loop_when_long(raw, lambda: convert.chat(body, loaded, serving.config, reply_id))
        shape = ChatShape(reply_id, int(time.time()), serving.model_id, loaded.tokenizer, logprobs=bool(body.logprobs))
        return await _answer(request, serving, loaded, [prepared], shape, body)

    @routes.post("/completions")
    async def completions(request: Request) -> Response:
        loaded, raw = serving.loaded(), await request.body()
        body = read(CompletionRequest, raw)
        reply_id = f"cmpl-{uuid.uuid4().hex}"
        prepared = await _off_loop_when_long(raw, lambda: convert.completions(body, loaded, serving.config, reply_id))
        shape = CompletionShape(reply_id, int(time.time()), serving.model_id, loaded.tokenizer, logprobs=body.logprobs is not None)
        try:
            return await _answer(request, serving, loaded, prepared, shape, body)
        except ContextOverflow as error:
            error.param = "prompt"
            raise

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(serving)]}

    @routes.get("/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        if model_id != serving.model_id:
            raise NotFound(f"There is no model {quoted(model_id)} here; this server serves {serving.model_id!r}.")
        return _model(serving)

    return routes


def _model(serving: Serving) -> dict[str, Any]:
    """OpenAI's entry; an approximation that the person who runs the server asked for is shown beside it."""
    entry = {"id": serving.model_id, "object": "model", "created": serving.created, "owned_by": "moespan"}
    experts = serving.config.engine.experts_per_token
    return entry if experts is None else {**entry, "experts_per_token": experts}


async def _off_loop_when_long(raw: bytes, make: Callable[[], Made]) -> Made:
    return await run_in_threadpool(make) if len(raw) > LONG_BODY else make()


async def _answer(request: Request, serving: Serving, loaded: Loaded, prepared: Sequence[Prepared], shape: Shape, body: Sampling) -> Response:
    """Submit, and answer in the way that the client asked for. Whatever goes wrong from here on cancels the request."""
    answer = Answer(loaded, prepared)
    try:
        if not body.stream:
            return JSONResponse(await while_connected(request, answer.whole(shape)))
        keep_alive_s = serving.config.api.keep_alive_s
        await while_connected(request, answer.begin(min(keep_alive_s, FIRST_TEXT_S)))
    except BaseException:
        answer.close()
        raise
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return StreamResponse(answer, shape, include_usage=wants_usage, keep_alive_s=keep_alive_s)
