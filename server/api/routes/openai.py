"""OpenAI's routes: chat, completions, models."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.api.errors import NotFound
from server.api.exchanges import openai as exchanges
from server.api.problems import Json
from server.api.replying import respond
from server.api.routes import anthropic
from server.api.sentences import quoted
from server.api.serving import Serving


def router(serving: Serving) -> APIRouter:
    """The routes, for one served model."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await respond(request, serving, exchanges.chat)

    @routes.post("/completions")
    async def completions(request: Request) -> Response:
        return await respond(request, serving, exchanges.completion)

    @routes.get("/models")
    async def models(request: Request) -> Json:
        if anthropic.asks(request):
            return anthropic.listed(serving)
        return {"object": "list", "data": [_model(serving)]}

    @routes.get("/models/{model_id:path}")
    async def model(request: Request, model_id: str) -> Json:
        if model_id != serving.model_id:
            raise NotFound(f"There is no model {quoted(model_id)} here; this server serves {serving.model_id!r}.")
        return anthropic.model(serving) if anthropic.asks(request) else _model(serving)

    return routes


def _model(serving: Serving) -> Json:
    """OpenAI's entry; an approximation that the person who runs the server asked for is shown beside it."""
    entry = {"id": serving.model_id, "object": "model", "created": serving.created, "owned_by": "moespan"}
    experts = serving.config.engine.experts_per_token
    return entry if experts is None else {**entry, "experts_per_token": experts}
