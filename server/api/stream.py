"""A reply as a stream: events as they come, signs of life while nothing comes; an error in mid-stream is the last event."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from server.api.answer import Answer
from server.api.errors import problem_of
from server.api.problems import Json
from server.api.shapes.base import Shape
from server.errors import MoespanError, ShuttingDown

log = logging.getLogger(__name__)


async def written(answer: Answer, shape: Shape) -> AsyncIterator[bytes]:
    """The whole stream; what is there at once goes out as one write."""
    try:
        async for events in answer.events(shape):
            if events:
                yield _joined(shape, events)
        if shape.framing.end:
            yield shape.framing.end
    except Exception as error:  # the status line is sent already: all that is left is to say it here
        level = logging.INFO if isinstance(error, ShuttingDown) else logging.ERROR
        log.log(level, "A stream ended with an error: %s", error, exc_info=not isinstance(error, MoespanError))
        yield _joined(shape, shape.failure(problem_of(error)))


def _joined(shape: Shape, events: list[Json]) -> bytes:
    return b"".join([shape.framing.event(event) for event in events])


class StreamResponse(EventSourceResponse):
    """A stream that cancels its request when it ends early, however that happens; a sign of life every `keep_alive_s` keeps the connection open.

    The library's class does for lines of JSON too: all that it adds to the bytes that it is given are headers against caches and proxies.
    """

    def __init__(self, answer: Answer, shape: Shape, *, keep_alive_s: float) -> None:
        self._answer = answer
        super().__init__(
            written(answer, shape),
            media_type=shape.framing.media_type,
            ping=keep_alive_s,
            ping_message_factory=lambda: _Written(shape.alive(answer.status)),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


class _Written(ServerSentEvent):
    """Bytes that are framed already."""

    def __init__(self, framed: bytes) -> None:
        super().__init__()
        self._framed = framed

    def encode(self) -> bytes:
        return self._framed
