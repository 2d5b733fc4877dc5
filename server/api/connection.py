"""Connections with deadlines, and not more than there are files for: uvicorn's HTTP/1.1, which by itself waits for ever for a head that never ends, and for a
client that never reads.

Three timers, one a direction and one for the end:
- a head, or the rest of a body that nobody wants any more, must arrive within `read_s`. (A body that a route reads is limits.py's, which can answer.)
- while more than the transport's high-water mark waits to be sent, some of it must leave every `write_s`.
- what a closed connection still holds must leave within `write_s`.

A connection beyond `most` gets 503 for whatever it asks first: the queue's own limit (429) is for those who were heard.
"""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.problems import Problem, openai

log = logging.getLogger(__name__)

OTHERS = 1000  # connections beside those whose requests run or wait: idle ones, pages, probes
FILES = 256  # open files that are no connections: the model's parts, logs, processes that try a grammar
RETRY_S = 5
TELL_S = 60
EXCESS_S = 1.0  # for a connection too many to say what it wants

TOO_MANY = f"The server has as many connections as it can hold. Close some, or try again in {RETRY_S} s."
NOT_HTTP = "This is not HTTP/1.1 as the server reads it: a damaged request line or header, or a head above 16 KB. Check the client, and http against https."
SLOW_HEAD = "The request's head did not arrive within {:g} s (--read_timeout_s)."


class Listener(socket.socket):
    """A listening socket that leaves half of FILES alone: a connection that would take of them is closed as it comes.

    They are too many even to be told so. Of those that shake no hands in TLS nothing else bounds the number, since a Connection is made only behind that.
    """

    told_at = -math.inf  # time.monotonic(), when the log last heard of it

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if connection.fileno() >= most - min(FILES, most) // 2:  # the kernel gives the lowest number that is free
            connection.close()
            self._tell()
            raise ConnectionAbortedError  # for asyncio one that left by itself; for want of a file it would log thousands of tracebacks a second
        return connection, address

    def _tell(self) -> None:
        if time.monotonic() - self.told_at > TELL_S:
            self.told_at = time.monotonic()
            log.warning("Nearly all of the files that this process may open are taken, by connections most likely: new ones are closed.")


class Connection(H11Protocol):
    """One connection; `with_limits` makes the class that uvicorn takes."""

    read_s: float
    write_s: float
    most: int
    told_at = -math.inf  # when the log was last told that all of them are taken; the loop's time

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.access_log = False  # access.py's line says more
        self._excess = False
        self._reading = _Timer(self.loop)
        self._writing = _Timer(self.loop)

    # --- Reading ---

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._excess = len(self.connections) > self.most
        if self._excess:
            self._tell()
        self._watch_reading()

    def _tell(self) -> None:
        """Once a minute: it may be a flood."""
        if self.loop.time() - type(self).told_at > TELL_S:
            type(self).told_at = self.loop.time()
            log.warning("All of the %d connections that there may be are taken: more of them get 503.", self.most)

    def data_received(self, data: bytes) -> None:
        if self._excess:  # only now: an answer to what is still on its way would be lost with it
            self._refuse(503, TOO_MANY, {"Retry-After": str(RETRY_S)})
            return
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
            self._reading.start(EXCESS_S if self._excess else self.read_s, self._read_enough)

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

    def _refuse(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Answer without the application, in the shape of its errors, and close."""
        kind = "service_unavailable_error" if status == 503 else "invalid_request_error"
        reply = JSONResponse(openai(Problem(status, message, kind)), status, {"Connection": "close", **(headers or {})})
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


def with_limits(read_timeout_s: float, write_timeout_s: float, most_connections: int) -> type[Connection]:
    """The class of a server's connections."""

    class Limited(Connection):
        read_s = read_timeout_s
        write_s = write_timeout_s
        most = most_connections

    return Limited


def most_connections(max_queue: int) -> int:
    """How many connections there may be at once: one for each request that runs or waits, and OTHERS, if the process may open as many files.

    Its soft limit is raised as far as that needs; where the hard one forbids it, the log says what remains.
    """
    wanted = 1 + max_queue + OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # Linux has no "unlimited" for it
    most = max(1, min(wanted, hard - FILES))
    if soft < most + FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most + FILES, hard), hard))
    if most < wanted:
        log.warning(
            "This process may open %d files, so at most %d clients can be connected at once: raise the limit (ulimit -n %d).", hard, most, wanted + FILES
        )
    return most
