"""Every error as HTTP status and JSON body, whoever raises it: ours, the router's, or a bug. The body is in the shape of the path's protocol."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.api.problems import Problem, writer_for
from server.errors import Busy, MoespanError, QueueFull, RequestError, ShuttingDown, SlowReader

log = logging.getLogger(__name__)

LOADING_RETRY_S = 5


class Unauthorized(MoespanError):
    """The API key is missing or wrong (HTTP 401)."""


class NotFound(MoespanError):
    """No such model (HTTP 404)."""


class NotImplementedHere(MoespanError):
    """A route of a protocol that this server does not serve (HTTP 501)."""


class Forbidden(MoespanError):
    """A web page, or a name of this server, that it does not know (HTTP 403)."""


class BodyTooLarge(MoespanError):
    """The body is above --max_body_mb (HTTP 413)."""

    def __init__(self, max_body_mb: float) -> None:
        super().__init__(f"The body is larger than {max_body_mb:g} MB. Send less, or start the server with a larger --max_body_mb.")


class BodyTooSlow(MoespanError):
    """The body did not arrive in time (HTTP 408)."""

    def __init__(self, read_timeout_s: float) -> None:
        super().__init__(f"The body did not arrive within {read_timeout_s:g} s. Send it again, or start the server with a larger --read_timeout_s.")


class RequestTimeout(MoespanError):
    """The request waited and ran for longer than --request_timeout_s (HTTP 504)."""

    def __init__(self, request_timeout_s: float) -> None:
        super().__init__(
            f"The request took longer than the {request_timeout_s:g} s that this server allows (--request_timeout_s), and was ended. "
            "Ask for fewer tokens, or ask when fewer requests wait."
        )


class ClientGone(Exception):
    """The client closed its connection before it had an answer: there is nobody to tell."""


def problem_of(error: Exception) -> Problem:
    """An error as the client hears of it; one that is not ours says nothing of the inside."""
    if not isinstance(error, MoespanError):
        return Problem(500, "The server failed on this request; its log has the traceback.", "server_error")
    status, kind, code = next((row for raised, row in _OURS.items() if isinstance(error, raised)), (500, "server_error", None))
    return Problem(status, str(error), kind, getattr(error, "param", None), getattr(error, "code", None) or code)


# Error -> (HTTP status, OpenAI's type, OpenAI's code unless the error has one of its own).
_OURS: dict[type[MoespanError], tuple[int, str, str | None]] = {
    RequestError: (400, "invalid_request_error", None),
    Unauthorized: (401, "authentication_error", "invalid_api_key"),
    NotFound: (404, "invalid_request_error", "model_not_found"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    Busy: (429, "rate_limit_error", "busy"),
    ShuttingDown: (503, "service_unavailable_error", "service_unavailable"),
    NotImplementedHere: (501, "not_implemented_error", "not_implemented"),
    Forbidden: (403, "permission_error", "forbidden"),
    BodyTooLarge: (413, "invalid_request_error", "body_too_large"),
    BodyTooSlow: (408, "invalid_request_error", "body_timeout"),
    RequestTimeout: (504, "timeout_error", "request_timeout"),
    SlowReader: (500, "slow_reader_error", "slow_reader"),
}


def response_to(path: str, error: Exception) -> JSONResponse:
    """The whole answer to a request for `path`, with Retry-After where trying again helps."""
    headers: dict[str, str] = {}
    if isinstance(error, (QueueFull, Busy)):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, ShuttingDown):
        headers["Retry-After"] = str(LOADING_RETRY_S)
    elif isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, BodyTooSlow):
        headers["Connection"] = "close"  # the rest of it could be taken for the next request
    elif isinstance(error, RequestTimeout):
        headers["x-should-retry"] = "false"  # OpenAI's and Anthropic's clients would: the same work again, for the same end
    return _written(path, problem_of(error), headers)


def _written(path: str, problem: Problem, headers: Mapping[str, str] | None) -> JSONResponse:
    return JSONResponse(writer_for(path)(problem), problem.status, headers)


def install(app: FastAPI) -> None:
    """Answer every exception of the application."""
    app.add_exception_handler(MoespanError, _ours)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)  # while it was still sending its body
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(Exception, _ours)


async def _ours(request: Request, error: Exception) -> Response:
    return response_to(request.url.path, error)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for it; it is only ever seen in the log


async def _routing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: (f"There is no {request.method} {request.url.path} here. The API is under /v1 (OpenAI's and Anthropic's) and /api (Ollama's).", "unknown_url"),
        405: (f"{request.url.path} does not take {request.method}. It takes {(error.headers or {}).get('Allow', 'other methods')}.", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, (str(error.detail), None))
    return _written(request.url.path, Problem(error.status_code, message, "invalid_request_error", code=code), error.headers)
