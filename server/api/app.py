"""The application: routes, the API key, errors. Everything that it needs comes in through `serving`; it can be made before the model is loaded."""

from __future__ import annotations

from fastapi import Depends, FastAPI

from server.api import errors
from server.api.auth import require_key
from server.api.routes import openai, operations, tokens
from server.api.serving import Serving


def create_app(serving: Serving) -> FastAPI:
    """The HTTP side of one served model."""
    # No generated pages: bodies are read by server.api.schemas, for its sentences, so FastAPI knows nothing of them.
    app = FastAPI(title="moespan", openapi_url=None)
    errors.install(app)
    key = [Depends(require_key(serving.config.api.api_key))]
    app.include_router(openai.router(serving), dependencies=key)
    app.include_router(tokens.router(serving), dependencies=key)
    app.include_router(operations.router(serving))
    return app
