"""Chunks as Server-Sent Events: one `data:` line each, comments while nothing comes, [DONE] at the end; an error in mid-stream is the last data line."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from server.api.answer import Answer
from server.api.errors import body_of
from server.api.shapes import Json, Shape
from server.errors import MoespanError, ShuttingDown

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def data(body: Json) -> bytes:
    """One event. Text is UTF-8 as it is, which is shorter than escapes and as valid."""
    return b"data: " + _ENCODER.encode(body).encode() + b"\n\n"


async def events(answer: Answer, shape: Shape, *, include_usage: bool) -> AsyncIterator[bytes]:
    """The whole stream; what is there at once goes out as one write."""
    try:
        async for chunks in answer.chunks(shape, include_usage=include_usage):
            if chunks:
                yield b"".join([data(chunk) for chunk in chunks])
        yield DONE
    except Exception as error:  # the status line is sent already: all that is left is to say it here
        level = logging.INFO if isinstance(error, ShuttingDown) else logging.ERROR
        log.log(level, "A stream ended with an error: %s", error, exc_info=not isinstance(error, MoespanError))
        yield data(body_of(error))


class StreamResponse(EventSourceResponse):
    """A stream that cancels its request when it ends early, however that happens; a comment every `keep_alive_s` keeps the connection alive."""

    def __init__(self, answer: Answer, shape: Shape, *, include_usage: bool, keep_alive_s: float) -> None:
        self._answer = answer
        stream = events(answer, shape, include_usage=include_usage)
        super().__init__(stream, ping=keep_alive_s, ping_message_factory=lambda: ServerSentEvent(comment=answer.status, sep="\n"), sep="\n")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()
