"""One line of log for each request, with its id: what was asked, what came of it, how long it took.

The id is the client's `x-request-id`, if that is one, or a new one. It goes back in the same header, and into every line that is logged for the
request (REQUEST_ID), in the engine's thread too.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.scheduler.reply import Finished
from server.types import REQUEST_ID

log = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_QUIET = ("/health", "/ready", "/metrics", "/stats", "/")  # probes and the built-in page, every second: only with --verbose


@dataclass(slots=True)
class Notes:
    """What a request's replies came to; several choices are added up. Seconds; written by `note_end`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float | None = None  # of the first choice
    ttft_s: float | None = None  # submitted -> first token drawn, of the first choice
    tok_s: float | None = None  # in decode, of the last choice
    finish_reason: str | None = None  # of the last choice


_NOTES: ContextVar[Notes | None] = ContextVar("notes", default=None)


def note_end(end: Finished) -> None:
    """Put down a choice's end for the line of the request that this runs for; nothing happens outside one."""
    notes = _NOTES.get()
    if notes is None:
        return
    if notes.queue_s is None:
        notes.queue_s = round(end.timings.queue_s, 4)
        notes.ttft_s = round(end.timings.queue_s + end.timings.prefill_s, 4)
    notes.prompt_tokens += end.prompt_tokens
    notes.completion_tokens += end.completion_tokens
    notes.tok_s = round(end.timings.decode_per_s, 2)
    notes.finish_reason = end.reason.value


class AccessLog:
    """Middleware, the outermost one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's own start and end
            await self._app(scope, receive, send)
            return
        request = _Request(scope, send)
        tokens = REQUEST_ID.set(request.id), _NOTES.set(request.notes)
        try:
            await self._app(scope, receive, request.send)
        finally:
            request.log()
            REQUEST_ID.reset(tokens[0])
            _NOTES.reset(tokens[1])


class _Request:
    """What one request's line is made of."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.id = request_id(Headers(scope=scope).get("x-request-id", ""))
        self.notes = Notes()
        self._scope = scope
        self._send = send
        self._status = 499  # nginx's number for a client that left before it had an answer
        self._start = time.perf_counter()

    async def send(self, message: Message) -> None:
        """Pass a message on; the first one gets the id."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)

    def log(self) -> None:
        """The line."""
        seconds = round(time.perf_counter() - self._start, 4)
        client = ascii((self._scope.get("client") or ("-",))[0])[1:-1]  # X-Forwarded-For may hold anything
        fields = {"client": client, "method": self._scope["method"], "route": self._route(), "status": self._status, "seconds": seconds}
        level = logging.DEBUG if self._scope["path"] in _QUIET or self._scope["path"].startswith("/page/") else logging.INFO
        log.log(level, "%s %s %s %d in %.3f s%s", *fields.values(), _words(self.notes), extra={"fields": {**fields, **_known(self.notes)}})

    def _route(self) -> str:
        """The route's own path: what a client puts into the place of a parameter, or after an unknown path, is its own."""
        route = self._scope.get("route")
        return getattr(route, "path", None) or ascii(self._scope["path"][:100])[1:-1]


def request_id(given: str) -> str:
    """The client's, if it could be an id, else a new one."""
    return given if _SANE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def _known(notes: Notes) -> dict[str, Any]:
    return asdict(notes) if notes.finish_reason is not None else {}


def _words(notes: Notes) -> str:
    if notes.finish_reason is None:
        return ""
    counts = f"{notes.prompt_tokens} + {notes.completion_tokens} tokens"
    return f": {counts}, queued {notes.queue_s:.3f} s, first after {notes.ttft_s:.3f} s, {notes.tok_s:.1f} tok/s, {notes.finish_reason}"
