"""What a request's body may be: so large, and read within so long. Counted while it is read, whether or not it says its length."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import BodyTooLarge, BodyTooSlow
from server.config import ApiConfig
from server.errors import Busy

MOST_HELD = 16  # bodies of the largest size, of all requests together
RETRY_S = 5


class BodyLimits:
    """Middleware. A route that reads too large or too slow a body raises BodyTooLarge or BodyTooSlow, and Busy where those of all requests are too much
    together; at most the limit was buffered by then."""

    def __init__(self, app: ASGIApp, config: ApiConfig) -> None:
        self._app = app
        self._config = config
        self.held = 0  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(Headers(scope=scope), receive, self._config, self)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self.held -= body.size


class _Body:
    """One request's body, on its way in."""

    def __init__(self, headers: Headers, receive: Receive, config: ApiConfig, limits: BodyLimits) -> None:
        length = headers.get("content-length", "0")
        self._declared = int(length) if length.isdecimal() else 0
        self._most = int(config.max_body_mb * 1_000_000)
        self._receive = receive
        self._config = config
        self._deadline = asyncio.get_running_loop().time() + config.read_timeout_s
        self._limits = limits
        self.size = 0  # of what was read
        self._complete = False

    async def receive(self) -> Message:
        """The next piece; once all is there, the client's disconnect, however long that takes."""
        if self._complete:
            return await self._receive()
        self._check(self._declared)  # before a client that waits for `100 Continue` is told to go on
        message = await self._in_time()
        self._count(len(message.get("body", b"")))
        self._check(self.size)
        self._complete = not message.get("more_body", False)
        return message

    async def _in_time(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._receive()
        except TimeoutError:
            raise BodyTooSlow(self._config.read_timeout_s) from None

    def _count(self, size: int) -> None:
        self.size += size
        self._limits.held += size
        if self._limits.held > MOST_HELD * self._most:
            raise Busy("it holds as many bodies of requests as it may", RETRY_S)

    def _check(self, size: int) -> None:
        if size > self._most:
            raise BodyTooLarge(self._config.max_body_mb)
