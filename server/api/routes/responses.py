"""OpenAI's newer route for replies, and its routes for what this server does not make."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.api.errors import NotImplementedHere
from server.api.exchanges import responses as exchanges
from server.api.replying import respond
from server.api.serving import Serving

# Path -> what this server does not make.
ABSENT = {
    "embeddings": "embeddings",
    "images/generations": "images",
    "audio/speech": "sound",
    "audio/transcriptions": "transcriptions",
    "moderations": "moderations",
}


def router(serving: Serving) -> APIRouter:
    """The routes, for one served model."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/responses")
    async def response(request: Request) -> Response:
        return await respond(request, serving, exchanges.response)

    for path in ABSENT:
        routes.add_api_route(f"/{path}", _absent, methods=["POST"])
    return routes


async def _absent(request: Request) -> Response:
    path = request.url.path
    raise NotImplementedHere(f"{path} is not served: this server makes text, and no {ABSENT[path.removeprefix('/v1/')]}. Ask a server that does.")
