"""What those who run the server ask: is it up, is it ready, and (unless they have a port of their own) its metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from server.api.errors import LOADING_RETRY_S
from server.api.serving import Serving


def router(serving: Serving) -> APIRouter:
    """The routes, for one served model."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> Response:
        body = {"status": serving.state, "model": serving.model_id}
        if serving.state == "ready":
            return JSONResponse(body)
        return JSONResponse(body, 503, {"Retry-After": str(LOADING_RETRY_S)})

    if serving.config.api.metrics_port is None:

        @routes.get("/metrics")
        async def metrics() -> Response:
            body, media_type = serving.metrics.exposition()
            return Response(body, headers={"Content-Type": media_type})

    return routes
