"""Connections with deadlines: uvicorn's HTTP/1.1, which by itself waits for ever for a head that never ends, and for a client that never reads.

Three timers, one a direction and one for the end:
- a head, or the rest of a body that nobody wants any more, must arrive within `read_s`. (A body that a route reads is limits.py's, which can answer.)
- while more than the transport's high-water mark waits to be sent, some of it must leave every `write_s`.
- what a closed connection still holds must leave within `write_s`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.problems import Problem, openai

NOT_HTTP = "This is not HTTP/1.1 as the server reads it: a damaged request line or header, or a head above 16 KB. Check the client, and http against https."
SLOW_HEAD = "The request's head did not arrive within {:g} s (--read_timeout_s)."


class Connection(H11Protocol):
    """One connection; `with_deadlines` makes the class that uvicorn takes."""

    read_s: float
    write_s: float

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.access_log = False  # access.py's line says more
        self._reading = _Timer(self.loop)
        self._writing = _Timer(self.loop)

    # --- Reading ---

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_reading()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE:  # an idle connection is uvicorn's to close
            self._watch_reading()
        if self.transport.is_closing():
            self._let_go()

    def _watch_reading(self) -> None:
        """Start the clock when the client owes us something, and stop it when it does not; a clock that runs is left alone."""
        state = self.conn.their_state
        owes = state is h11.IDLE or (state is h11.SEND_BODY and self.cycle.response_complete)
        if self.transport.is_closing() or not owes:
            self._reading.stop()
        elif not self._reading.runs:
            self._reading.start(self.read_s, self._read_enough)

    def _read_enough(self) -> None:
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, SLOW_HEAD.format(self.read_s))
        else:
            self.transport.close()
            self._let_go()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's name for what follows a request that h11 cannot read."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(400, NOT_HTTP)
        else:  # in the middle of a reply: nothing can be said any more
            self.transport.close()
            self._let_go()

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the application, in the shape of its errors, and close."""
        reply = JSONResponse(openai(Problem(status, message, "invalid_request_error")), status, {"Connection": "close"})
        for event in (h11.Response(status_code=status, headers=reply.raw_headers), h11.Data(data=bytes(reply.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._let_go()

    # --- Writing ---

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing.stop()

    def _watch_writing(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._writing.start(self.write_s, lambda: self._check_written(waiting))

    def _check_written(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_writing()
        else:
            self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._let_go()

    def _let_go(self) -> None:
        """close() waits for the last bytes to leave; abort() does nothing once it has."""
        self.loop.call_later(self.write_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._reading.stop()
        self._writing.stop()
        super().connection_lost(exc)


class _Timer:
    """A call to come, or none."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float, call: Callable[[], None]) -> None:
        self.stop()
        self._handle = self._loop.call_later(seconds, call)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def with_deadlines(read_timeout_s: float, write_timeout_s: float) -> type[Connection]:
    """The class of a server's connections."""

    class Timed(Connection):
        read_s = read_timeout_s
        write_s = write_timeout_s

    return Timed
