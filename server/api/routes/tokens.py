"""Token ids of a text or a chat, and back: for clients that count before they send."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.api.prompts import template_messages
from server.api.replying import understood
from server.api.schemas.body import read
from server.api.schemas.openai import DetokenizeRequest, TokenizeRequest
from server.api.serving import Loaded, Serving


def router(serving: Serving) -> APIRouter:
    """The routes, for one served model."""
    routes = APIRouter(tags=["tokens"])

    @routes.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        return await understood(request, serving, _tokenized)

    @routes.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        return await understood(request, serving, _detokenized)

    return routes


def _tokenized(raw: bytes, serving: Serving, loaded: Loaded) -> dict[str, Any]:
    body = read(TokenizeRequest, raw)
    text = loaded.template.render(template_messages(body.messages)) if body.messages else body.prompt or ""
    ids = loaded.tokenizer.encode_prompt(text)
    return {"tokens": ids, "count": len(ids), "max_model_len": loaded.service.cache_lens}


def _detokenized(raw: bytes, serving: Serving, loaded: Loaded) -> dict[str, Any]:
    return {"prompt": loaded.tokenizer.decode(read(DetokenizeRequest, raw).tokens, skip_special=False)}
