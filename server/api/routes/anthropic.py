"""Anthropic's routes: messages, and how many tokens they have. `/v1/models` is OpenAI's too, and answers each client in its own shape."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from server.api.exchanges import anthropic as exchanges
from server.api.problems import Json
from server.api.replying import respond, understood
from server.api.serving import Serving


def router(serving: Serving) -> APIRouter:
    """The routes, for one served model."""
    routes = APIRouter(prefix="/v1/messages", tags=["Anthropic"])

    @routes.post("")
    async def messages(request: Request) -> Response:
        return await respond(request, serving, exchanges.messages)

    @routes.post("/count_tokens")
    async def count_tokens(request: Request) -> dict[str, int]:
        return {"input_tokens": await understood(request, serving, exchanges.count)}

    return routes


def asks(request: Request) -> bool:
    """Whether the client is one of Anthropic's."""
    return "anthropic-version" in request.headers


def listed(serving: Serving) -> Json:
    """The models as Anthropic lists them."""
    return {"data": [model(serving)], "has_more": False, "first_id": serving.model_id, "last_id": serving.model_id}


def model(serving: Serving) -> Json:
    """Anthropic's entry of the model."""
    created = datetime.fromtimestamp(serving.created, UTC).isoformat()
    return {"type": "model", "id": serving.model_id, "display_name": serving.model_id, "created_at": created, "lifecycle": "active"}
