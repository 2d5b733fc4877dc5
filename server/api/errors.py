"""Every error as OpenAI's JSON shape and HTTP status, whoever raises it: ours, the router's, or a bug."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.errors import MoespanError, QueueFull, RequestError, ShuttingDown

log = logging.getLogger(__name__)

LOADING_RETRY_S = 5


class Unauthorized(MoespanError):
    """The API key is missing or wrong (HTTP 401)."""


class NotFound(MoespanError):
    """No such model (HTTP 404)."""


class ClientGone(Exception):
    """The client closed its connection before it had an answer: there is nobody to tell."""


def body_of(error: Exception) -> dict[str, Any]:
    """`{"error": {...}}` in OpenAI's shape; an error that is not ours says nothing of the inside."""
    kind, code = _kind_and_code(error)
    message = str(error) if isinstance(error, MoespanError) else "The server failed on this request; its log has the traceback."
    return {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": code}}


def _kind_and_code(error: Exception) -> tuple[str, str | None]:
    match error:
        case RequestError():
            return "invalid_request_error", error.code
        case Unauthorized():
            return "authentication_error", "invalid_api_key"
        case NotFound():
            return "invalid_request_error", "model_not_found"
        case QueueFull():
            return "rate_limit_error", "queue_full"
        case ShuttingDown():
            return "service_unavailable_error", "service_unavailable"
        case _:
            return "server_error", None


def status_of(error: Exception) -> int:
    """The HTTP status of an error."""
    statuses: list[tuple[type[Exception], int]] = [(RequestError, 400), (Unauthorized, 401), (NotFound, 404), (QueueFull, 429), (ShuttingDown, 503)]
    return next((status for kind, status in statuses if isinstance(error, kind)), 500)


def response_to(error: Exception) -> JSONResponse:
    """The whole answer, with Retry-After where trying again helps."""
    headers: dict[str, str] = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, ShuttingDown):
        headers["Retry-After"] = str(LOADING_RETRY_S)
    elif isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error), status_of(error), headers)


def install(app: FastAPI) -> None:
    """Answer every exception of the application in OpenAI's shape."""
    app.add_exception_handler(MoespanError, _ours)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)  # while it was still sending its body
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(Exception, _ours)


async def _ours(request: Request, error: Exception) -> Response:
    return response_to(error)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for it; it is only ever seen in the log


async def _routing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: (f"There is no {request.method} {request.url.path} here. The API is under /v1, with the paths of OpenAI's.", "unknown_url"),
        405: (f"{request.url.path} does not take {request.method}. It takes {(error.headers or {}).get('Allow', 'other methods')}.", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, (str(error.detail), None))
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return JSONResponse(body, error.status_code, error.headers)
