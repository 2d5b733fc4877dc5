"""The application: routes and errors, and around them what every request passes. It needs `serving` alone; it can be made before the model is loaded.

From the outside in: the log's line, Host and Origin, CORS, the key, the body's limits, the routes.
"""

from __future__ import annotations

import logging

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from server.api import errors
from server.api.access import AccessLog
from server.api.auth import KeyCheck, all_keys
from server.api.guard import HostGuard, is_loopback
from server.api.limits import BodyLimits
from server.api.openapi import Api
from server.api.routes import anthropic, ollama, openai, operations, page, responses, tokens
from server.api.serving import Serving
from server.config import ApiConfig

log = logging.getLogger(__name__)


def create_app(serving: Serving) -> ASGIApp:
    """The HTTP side of one served model. Raises ConfigError for a file of keys that cannot be used."""
    return _guarded(routes(serving), serving.config.api)


def routes(serving: Serving) -> FastAPI:
    """The routes alone, with nobody at the door."""
    app = Api(keys=bool(serving.config.api.api_key or serving.config.api.api_key_file))
    errors.install(app)
    app.include_router(openai.router(serving))
    app.include_router(responses.router(serving))
    app.include_router(anthropic.router(serving))
    app.include_router(ollama.router(serving))
    app.include_router(tokens.router(serving))
    app.include_router(operations.router(serving))
    app.include_router(page.router(serving))
    return app


def _guarded(app: ASGIApp, config: ApiConfig) -> ASGIApp:
    keys = all_keys(config)
    if not keys and not is_loopback(config.host):
        log.warning("Whoever reaches %s port %d can use this server: it asks for no key. Set --api_key or --api_key_file.", config.host, config.port)
    app = BodyLimits(app, config)
    if keys:
        app = KeyCheck(app, keys)
    if config.cors_origins:
        app = CORSMiddleware(app, config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=["x-request-id"])
    if HostGuard.wanted(config, keys=bool(keys)):
        app = HostGuard(app, config)
    return AccessLog(app)
