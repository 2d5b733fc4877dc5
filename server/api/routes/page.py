"""The page at `/`: a chat and the live speeds, three files without a build step; and what it asks for, GET /stats.

The page fetches nothing from anywhere else, and its policy tells the browser so: whatever a model writes, nothing of it can load or run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.errors import NotFound
from server.api.sentences import quoted
from server.api.serving import Serving

FILES = Path(__file__).parents[1] / "page"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asked for anew, by its ETag: an older page may not fit a newer server
}


def router(serving: Serving) -> APIRouter:
    """The routes, for one served model."""
    routes = APIRouter(tags=["page"])
    files = {file.name: file.read_bytes() for file in sorted(FILES.iterdir()) if file.suffix in TYPES}

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return _file(request, "page.html", files["page.html"])

    @routes.get("/page/{name}", include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFound(f"The page has no file {quoted(name)}.")
        return _file(request, name, files[name])

    @routes.get("/stats")
    async def stats() -> dict[str, Any]:
        return {"model": serving.model_id, **serving.metrics.live()}

    return routes


def _file(request: Request, name: str, content: bytes) -> Response:
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**HEADERS, "ETag": etag}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers={**headers, "Content-Type": TYPES[Path(name).suffix]})
