"""The one thread that drives the engine.

A turn reads: take the messages, admit, run a step, tell what it drew. Messages come through a queue and answers leave through each request's
sink, so that no lock is shared with a client and a slow one delays nobody. With nothing to do the thread blocks on its queue.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from server.engine.protocol import Engine, Step
from server.errors import EngineFailure, MoespanError, RequestError, ShuttingDown
from server.metrics import Metrics
from server.scheduler.scheduler import Scheduler, Sequence
from server.types import REQUEST_ID, FinishReason, GenerateRequest, Timings, TokenEvent, TokenLogprob

log = logging.getLogger(__name__)

GOING_DOWN = "The server is shutting down. Send the request again once it is back."

Sink = Callable[[TokenEvent], None]


@dataclass(frozen=True, slots=True)
class Submit:
    """A new request for the end of the line; `at` is time.perf_counter() when it came, `log_id` the REQUEST_ID of whoever sent it."""

    request: GenerateRequest
    sink: Sink
    at: float
    log_id: str | None
    continues: bool = False  # a part of work that runs already: a drain does not refuse it


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a request with this reason, wherever it is."""

    request_id: str
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class RefuseWaiting:
    """End every request that waits with ShuttingDown; the running one goes on."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End everything with ShuttingDown, close the engine and let the thread go."""


Message = Submit | Cancel | RefuseWaiting | Stop


@dataclass(slots=True)
class Ticket:
    """What the worker knows about one request beside its sequence: where its events go, and when things happened (perf_counter)."""

    sequence: Sequence
    sink: Sink
    submitted_at: float
    log_id: str | None
    continues: bool = False
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.sequence.request.request_id

    def timings(self, now: float) -> Timings:
        """The request's times up to `now`, its end."""
        sequence = self.sequence
        started = now if self.started_at is None else self.started_at
        first = now if self.first_token_at is None else self.first_token_at
        last = first if self.last_token_at is None else self.last_token_at
        return Timings(
            queue_s=started - self.submitted_at,
            prefill_s=first - started,
            decode_s=last - first,
            prompt_tokens=min(sequence.computed, len(sequence.request.prompt_ids)),
            generated_tokens=sequence.generated,
        )


class Worker:
    """Owns the engine and the scheduler from `start` on. `post` may be called from any thread, everything else happens in its own."""

    def __init__(self, engine: Engine, scheduler: Scheduler, metrics: Metrics, on_start: Callable[[], None] | None = None) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._metrics = metrics
        self._on_start = on_start
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._tickets: dict[str, Ticket] = {}
        self._stopping = False
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread; raises what on_start raised."""
        self._thread.start()
        self._ready.result()

    def post(self, message: Message) -> None:
        """Leave a message; it is read before the next step."""
        self._inbox.put(message)

    def join(self) -> None:
        """Wait for the thread's end, after Stop."""
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._on_start is not None:
                self._on_start()
        except Exception as error:
            try:
                self._engine.close()
            finally:
                self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        self._loop()
        self._engine.close()

    def _loop(self) -> None:
        while not self._stopping:
            try:
                self._take_messages()
                self._turn()
            except Exception:  # our own bug; those who wait must hear of it
                log.exception("The engine's thread failed outside the engine")
                self._start_over(EngineFailure("The server failed; its log has the traceback."))

    def _take_messages(self) -> None:
        """Read what is there; wait for something only when there is nothing to compute."""
        if self._scheduler.idle:
            self._handle(self._inbox.get())
        while not self._inbox.empty():
            self._handle(self._inbox.get())

    def _handle(self, message: Message) -> None:
        match message:
            case Submit(request, sink, at, log_id, continues):
                self._tickets[request.request_id] = Ticket(self._scheduler.add(request), sink, at, log_id, continues)
            case Cancel(request_id, reason):
                sequence = self._scheduler.find(request_id)
                if sequence is not None:  # else it ended while the message was on its way
                    self._finish(self._ticket(sequence), reason)
            case RefuseWaiting():
                for sequence in self._scheduler.waiting():
                    if not self._ticket(sequence).continues:
                        self._fail(self._ticket(sequence), ShuttingDown(GOING_DOWN))
            case Stop():
                self._stopping = True
                self._end_all(ShuttingDown(GOING_DOWN))

    def _end_all(self, error: MoespanError) -> None:
        for ticket in list(self._tickets.values()):
            self._fail(ticket, error)

    def _start_over(self, error: MoespanError) -> None:
        """End everything, whatever state it is in: nothing of the books is relied on."""
        tickets = list(self._tickets.values())
        self._tickets.clear()
        self._scheduler.clear()
        for ticket in tickets:
            self._tell_failure(ticket, error)

    def _turn(self) -> None:
        """Schedule, run, tell. Whatever goes wrong costs the running request, never the thread."""
        ticket = self._running()
        if ticket is None:
            return
        REQUEST_ID.set(ticket.log_id)  # whatever the engine logs in this turn is about it
        try:
            step = self._scheduler.next_step(ticket.sequence)
            began = time.perf_counter()
            drawn = self._engine.step(step)
            self._metrics.stepped(prefill=ticket.first_token_at is None, seconds=time.perf_counter() - began)
        except Exception as error:
            self._fail(ticket, self._failure(ticket, error))
            return
        self._advance(ticket, step, drawn.token_id if drawn else None, drawn.logprob if drawn else None)

    def _running(self) -> Ticket | None:
        """The request that runs, or the next one, admitted now; None when there is none or it could not be started."""
        if self._scheduler.running is not None:
            return self._ticket(self._scheduler.running)
        sequence = self._scheduler.admit()
        return self._started(self._ticket(sequence)) if sequence is not None else None

    def _started(self, ticket: Ticket) -> Ticket | None:
        request = ticket.sequence.request
        ticket.started_at = time.perf_counter()
        self._emit(ticket, TokenEvent(request.request_id, prefilled=0))
        try:
            ticket.sequence.sampler = self._engine.new_sampler(request.sampling, request.prompt_ids, request.constraint)
        except Exception as error:
            self._fail(ticket, self._failure(ticket, error))
            return None
        return ticket

    def _advance(self, ticket: Ticket, step: Step, token_id: int | None, logprob: TokenLogprob | None) -> None:
        """Put the step's result down and tell the request."""
        if ticket.first_token_at is None:
            self._metrics.prompt_tokens.inc(len(step.token_ids))
        reason = self._scheduler.advance(ticket.sequence, step, token_id)
        if token_id is None:
            log.info("%s: %d of %d prompt tokens are done", ticket.request_id, ticket.sequence.computed, len(ticket.sequence.request.prompt_ids))
            self._emit(ticket, TokenEvent(ticket.request_id, prefilled=ticket.sequence.computed))
            return
        self._drawn(ticket, time.perf_counter())
        if reason is FinishReason.STOP:  # the token that ends is not part of the reply
            self._finish(ticket, reason)
        elif reason is not None:
            self._finish(ticket, reason, token_id, logprob)
        else:
            self._emit(ticket, TokenEvent(ticket.request_id, token_id, logprob))

    def _drawn(self, ticket: Ticket, now: float) -> None:
        self._metrics.generation_tokens.inc()
        if ticket.last_token_at is None:
            ticket.first_token_at = now
        else:
            self._metrics.inter_token.observe(now - ticket.last_token_at)
        ticket.last_token_at = now

    def _finish(self, ticket: Ticket, reason: FinishReason, token_id: int | None = None, logprob: TokenLogprob | None = None) -> None:
        """The request's last event, sent once its pages are free, so that whoever hears it may rely on them."""
        timings = ticket.timings(time.perf_counter())
        self._forget(ticket)
        self._metrics.finished(reason, timings)
        log.info(
            "%s: %d prompt tokens at %.1f tok/s, %d tokens at %.1f tok/s, %s",
            ticket.request_id,
            timings.prompt_tokens,
            timings.prefill_per_s,
            timings.generated_tokens,
            timings.decode_per_s,
            reason.value,
            extra={"request_id": ticket.log_id},
        )
        self._emit(ticket, TokenEvent(ticket.request_id, token_id, logprob, finish_reason=reason, timings=timings))

    def _fail(self, ticket: Ticket, error: MoespanError) -> None:
        self._forget(ticket)
        self._tell_failure(ticket, error)

    def _tell_failure(self, ticket: Ticket, error: MoespanError) -> None:
        self._metrics.failed(error)
        self._emit(ticket, TokenEvent(ticket.request_id, error=error))

    def _failure(self, ticket: Ticket, error: Exception) -> MoespanError:
        """What the person is told of an engine's exception; the log gets the traceback, unless the request was at fault."""
        if isinstance(error, RequestError):
            return error
        log.error("The engine failed on request %s", ticket.request_id, exc_info=error, extra={"request_id": ticket.log_id})
        if isinstance(error, EngineFailure):
            return error
        return EngineFailure(f"The engine failed on this request ({type(error).__name__}); the server's log has the traceback under {ticket.request_id}.")

    def _forget(self, ticket: Ticket) -> None:
        self._scheduler.remove(ticket.sequence)
        del self._tickets[ticket.request_id]  # last: should the scheduler find its books wrong, the request is still told

    def _ticket(self, sequence: Sequence) -> Ticket:
        return self._tickets[sequence.request.request_id]

    def _emit(self, ticket: Ticket, event: TokenEvent) -> None:
        try:
            ticket.sink(event)
        except Exception:  # a listener's fault must not stop the engine for the others
            log.exception("Request %s could not be told of an event and is cancelled", event.request_id)
            self.post(Cancel(event.request_id, FinishReason.CANCELLED))
