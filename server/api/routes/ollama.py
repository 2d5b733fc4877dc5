"""Ollama's routes, for clients that speak nothing else. The one model is always loaded; models are not fetched, made or deleted here."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from server.api.errors import NotFound, NotImplementedHere
from server.api.exchanges import ollama as exchanges
from server.api.problems import Json
from server.api.replying import respond
from server.api.schemas.body import read
from server.api.schemas.ollama import ShowRequest
from server.api.sentences import quoted
from server.api.serving import Serving

API_VERSION = "0.12.6"  # of the Ollama whose API this is; clients look whether it is new enough for tools and thinking
NEVER = "9999-12-31T23:59:59Z"  # when the model will be unloaded

MANAGING = ("pull", "push", "create", "copy", "delete", "blobs/{digest}")
EMBEDDING = ("embed", "embeddings")


def router(serving: Serving) -> APIRouter:
    """The routes, for one served model."""
    routes = APIRouter(tags=["Ollama"])

    @routes.post("/api/chat")
    async def chat(request: Request) -> Response:
        return await respond(request, serving, exchanges.chat)

    @routes.post("/api/generate")
    async def generate(request: Request) -> Response:
        return await respond(request, serving, exchanges.generate)

    @routes.get("/api/tags")
    async def tags() -> Json:
        return {"models": [_entry(serving) | {"modified_at": _created(serving)}]}

    @routes.get("/api/ps")
    async def ps() -> Json:
        if serving.state == "loading":
            return {"models": []}
        entry = _entry(serving) | {"expires_at": NEVER, "context_length": serving.loaded().service.cache_lens}
        return {"models": [entry]}

    @routes.post("/api/show")
    async def show(request: Request) -> Json:
        body = read(ShowRequest, await request.body())
        name = body.model or body.name or ""
        if name.removesuffix(":latest") != serving.model_id.removesuffix(":latest"):
            raise NotFound(f"There is no model {quoted(name)} here; this server serves {serving.model_id!r}.")
        return _shown(serving)

    @routes.get("/api/version")
    async def version() -> dict[str, str]:
        return {"version": API_VERSION}

    @routes.head("/")
    async def up() -> Response:
        return Response()

    for path in MANAGING:
        routes.add_api_route(f"/api/{path}", _not_managed, methods=["POST", "DELETE", "HEAD"])
    for path in EMBEDDING:
        routes.add_api_route(f"/api/{path}", _not_embedded, methods=["POST"])
    return routes


async def _not_managed(request: Request) -> Response:
    raise NotImplementedHere(f"{request.url.path} is not served: this server has the one model that it was started with. Start it with another --gguf_path.")


async def _not_embedded(request: Request) -> Response:
    raise NotImplementedHere(f"{request.url.path} is not served: this server makes no embeddings. Ask a server with an embedding model for them.")


def _entry(serving: Serving) -> Json:
    """What every listing says of the model. Its digest is of its name and size: files of hundreds of gigabytes are not read for it."""
    digest = hashlib.sha256(f"{serving.model_id} {serving.facts.nbytes}".encode()).hexdigest()
    return {"name": serving.model_id, "model": serving.model_id, "size": serving.facts.nbytes, "digest": digest, "details": _details(serving)}


def _details(serving: Serving) -> Json:
    facts = serving.facts
    return {
        "parent_model": "",
        "format": "gguf",
        "family": facts.architecture,
        "families": [facts.architecture],
        "parameter_size": f"{facts.parameters / 1e9:.1f}B" if facts.parameters >= 1e9 else f"{facts.parameters / 1e6:.1f}M",
        "quantization_level": facts.quantization,
    }


def _shown(serving: Serving) -> Json:
    facts = serving.facts
    capabilities = ["completion", *(["tools"] if "tools" in facts.template else []), *(["thinking"] if "think" in facts.template else [])]
    return {
        "modelfile": "",
        "parameters": "",
        "template": facts.template,
        "details": _details(serving),
        "model_info": {**facts.keys, "general.parameter_count": facts.parameters},
        "capabilities": capabilities,
        "modified_at": _created(serving),
    }


def _created(serving: Serving) -> str:
    return f"{datetime.fromtimestamp(serving.created, UTC).replace(tzinfo=None).isoformat()}Z"
