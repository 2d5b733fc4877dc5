"""The scheduler as the other rooms see it: submit, cancel, drain, close; from any thread.

A request that was accepted hears exactly one last event through its sink, whatever happens. What can be refused is refused at once, in the
caller's thread: a prompt that can never fit, a full queue, a server that is going away.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from server.config import SchedulerConfig
from server.engine.protocol import Engine
from server.errors import ContextOverflow, MoespanError, QueueFull, ShuttingDown
from server.metrics import Metrics
from server.scheduler.kv_pages import PageTable
from server.scheduler.scheduler import Scheduler
from server.scheduler.worker import GOING_DOWN, Cancel, RefuseWaiting, Sink, Stop, Submit, Worker
from server.types import REQUEST_ID, FinishReason, GenerateRequest, TokenEvent

LONGEST_RETRY_S = 60  # a client told to come back later than this would rather be told nothing


class Service:
    """One engine behind one queue. Takes the engine over: `close` closes it.

    `on_start` runs in the engine's thread before anything else does (pinning).
    """

    def __init__(self, engine: Engine, config: SchedulerConfig, cache_lens: int, metrics: Metrics, on_start: Callable[[], None] | None = None) -> None:
        assert cache_lens <= engine.num_pages * engine.page_size, "the engine has fewer pages than --cache_lens"
        self.cache_lens = cache_lens
        self._max_queue = config.max_queue
        self._metrics = metrics
        self._pages = PageTable(engine.num_pages, engine.page_size)
        self._worker = Worker(engine, Scheduler(self._pages, engine.prefill_chunk, cache_lens), metrics, on_start)
        self._changed = threading.Condition()  # guards what follows, and the order of the worker's inbox
        self._open: set[str] = set()
        self._unfinished: set[str] = set()  # work of several requests, whose next one is still to come
        self._closing = False  # no new work
        self._closed = False  # no work at all
        self._typical_s = 1.0  # how long a request runs, a moving average
        metrics.queue_capacity.set(config.max_queue)
        metrics.kv_tokens.set(cache_lens)
        metrics.watch(running=lambda: min(self.open, 1), waiting=lambda: max(self.open - 1, 0), kv_usage=lambda: self._pages.usage)
        self._worker.start()

    @property
    def open(self) -> int:
        """Requests that were accepted and are not over."""
        return len(self._open)

    def check(self, request: GenerateRequest) -> None:
        """Raise ContextOverflow for a prompt that leaves no room for a reply."""
        if len(request.prompt_ids) >= self.cache_lens:
            error = ContextOverflow(len(request.prompt_ids), self.cache_lens)
            self._metrics.failed(error)
            raise error

    def check_room(self) -> None:
        """Raise what `submit` would of any request, before work is spent on reading one: ShuttingDown or QueueFull."""
        try:
            with self._changed:
                self._refuse_when_full(continues=False)
        except MoespanError as error:
            self.failed(error)
            raise

    def failed(self, error: Exception) -> None:
        """Count a request that ended with an error of which the engine does not know."""
        self._metrics.failed(error)

    def submit(self, request: GenerateRequest, sink: Sink, *, continues: bool = False) -> None:
        """Take a request; `sink` gets its events in the engine's thread, and must neither block nor take long.

        `continues`: the next part of work that was accepted already (a list of prompts), which neither a full queue nor a drain refuses.
        Raises ContextOverflow, QueueFull or ShuttingDown; then the sink hears nothing.
        """
        self.check(request)
        try:
            with self._changed:
                self._refuse_or_accept(request, continues)
                self._worker.post(Submit(request, lambda event: self._pass_on(event, sink), time.perf_counter(), REQUEST_ID.get(), continues))
        except MoespanError as error:
            self._metrics.failed(error)
            raise

    def expect_more(self, work: str) -> None:
        """More requests will follow as parts of `work`, which was accepted: a drain waits for them until `expect_no_more`."""
        with self._changed:
            self._unfinished.add(work)

    def expect_no_more(self, work: str) -> None:
        """All of the work is submitted, or it was given up. A second call does nothing."""
        with self._changed:
            self._unfinished.discard(work)
            self._changed.notify_all()

    def _refuse_or_accept(self, request: GenerateRequest, continues: bool) -> None:
        self._refuse_when_full(continues)
        assert request.request_id not in self._open, "request ids are unique"
        self._open.add(request.request_id)

    def _refuse_when_full(self, continues: bool) -> None:
        if self._closed or (self._closing and not continues):
            raise ShuttingDown(GOING_DOWN)
        waiting = max(self.open - 1, 0)
        if self._open and waiting >= self._max_queue and not continues:
            raise QueueFull(waiting, min(math.ceil(self._typical_s), LONGEST_RETRY_S))

    def _pass_on(self, event: TokenEvent, sink: Sink) -> None:
        """Runs in the engine's thread. The books are closed first, so that a client that hears the end may come back at once."""
        if event.finish_reason is not None or event.error is not None:
            self._note_end(event)
        sink(event)

    def _note_end(self, event: TokenEvent) -> None:
        with self._changed:
            self._open.discard(event.request_id)
            if event.timings is not None and event.timings.generated_tokens:
                self._typical_s += 0.2 * (event.timings.prefill_s + event.timings.decode_s - self._typical_s)
            self._changed.notify_all()

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request before its next token, with this reason; nothing happens when it is over already."""
        self._worker.post(Cancel(request_id, reason))

    def drain(self, grace_s: float) -> bool:
        """Take no more, refuse those that wait, and give the running request `grace_s` seconds. True when it ended in time."""
        with self._changed:
            self._closing = True
            self._worker.post(RefuseWaiting())
            return self._changed.wait_for(lambda: not self._open and not self._unfinished, timeout=grace_s)

    def close(self) -> None:
        """End whatever is left with ShuttingDown, close the engine, and wait for its thread. A second call does nothing."""
        with self._changed:
            self._closing = self._closed = True
            self._worker.post(Stop())
        self._worker.join()
