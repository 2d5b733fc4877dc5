"""One request's text side: token ids -> text -> stop strings -> reasoning, answer and calls of tools. The same for HTTP and for `moespan chat`.

`ReplyText` is the pure part: it turns each TokenEvent into a few small parts. Two readers feed it, `AsyncReply` for an event loop and `SyncReply`
for a plain loop; both submit when they are made and cancel when they are closed early.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from server.errors import MoespanError, SlowReader
from server.scheduler.service import Service
from server.scheduler.worker import Sink
from server.text.detokenizer import IncrementalDetokenizer
from server.text.reasoning import Kind
from server.text.split import Split, Splitter
from server.text.stop import StopStrings
from server.text.tokenizer import Tokenizer
from server.text.tools.calls import ToolCall as ToolCall  # one of the parts
from server.text.tools.formats import ToolRules
from server.types import FinishReason, GenerateRequest, Timings, TokenEvent, TokenLogprob

MOST_WAITING = 8192  # events that a client may leave lying; with 20 log probabilities each they take 20 MB


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to show, never empty unless it carries log probabilities that have no text of their own."""

    kind: Kind
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens that this text completes


@dataclass(frozen=True, slots=True)
class Progress:
    """The request left the queue; `prefilled` prompt tokens are done."""

    prefilled: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a reply."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int  # up to the stop, the end-of-text token among them
    timings: Timings
    stop_string: str | None = None  # the one that ended it
    reasoning_tokens: int = 0  # of completion_tokens


Part = Piece | ToolCall | Progress | Finished


@dataclass(frozen=True, slots=True)
class TextRules:
    """How a reply's ids become text; written by whoever made the prompt."""

    stops: Sequence[str] = ()
    reasoning: Literal["opened", "closed"] | None = None  # the state in which the prompt leaves <think>; None: do not look for reasoning
    raw: bool = False  # reasoning stays in the content, with its tags
    prefix: str = ""  # what the reply begins with although the prompt holds it (a forced <think>)
    tools: ToolRules | None = None  # in which format calls are looked for; None: they are not


class ReplyText:
    """The state of one reply's text. Push each of its events in order."""

    def __init__(self, tokenizer: Tokenizer, rules: TextRules, prompt_tokens: int) -> None:
        self.stopped = False  # by a stop string, or behind the one call that was wanted: the engine has to be told
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopStrings(rules.stops)
        self._splitter = Splitter(rules.reasoning, rules.tools, raw=rules.raw)
        self._prefix = rules.prefix
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        self._reasoning_tokens = 0
        self._made = 0  # characters that the tokens so far have made
        self._shown = 0  # of them, those that no stop string holds back
        self._logprobs: deque[tuple[int, TokenLogprob]] = deque()  # of tokens not shown yet, each with the characters made before it

    def push(self, event: TokenEvent) -> list[Part]:
        """What the event adds to the reply. Raises the event's error."""
        if event.error is not None:
            raise event.error
        parts: list[Part] = []
        if event.prefilled is not None:
            parts.append(Progress(event.prefilled))
        if event.token_id is not None and not self.stopped:
            parts += self._token(event.token_id, event.logprob)
        if event.finish_reason is not None:
            parts += self._finish(event.finish_reason, event.timings or Timings())
        return parts

    def _token(self, token_id: int, logprob: TokenLogprob | None) -> list[Piece | ToolCall]:
        self._tokens += 1
        if logprob is not None:
            self._logprobs.append((self._made, logprob))
        thinking = self._splitter.thinking
        parts = self._show(self._detokenizer.push(token_id))
        if thinking or self._splitter.thinking:
            self._reasoning_tokens = self._tokens
        return parts

    def _show(self, text: str) -> list[Piece | ToolCall]:
        """What of the text may be seen already."""
        seen, stopped = self._stops.push(text)
        self._made += len(text)
        self._shown += len(seen)
        prefix, self._prefix = self._prefix, ""
        parts = self._parts(self._splitter.push(prefix + seen) + (self._splitter.flush() if stopped else []))
        self.stopped = stopped or self._splitter.finished
        return parts

    def _parts(self, split: list[Split]) -> list[Piece | ToolCall]:
        """The log probabilities of the tokens that may be seen now go with the first of the new text; those of a call's tokens go with nothing."""
        if not split:
            return []
        logprobs: list[TokenLogprob] = []
        while self._logprobs and self._logprobs[0][0] < self._shown:
            logprobs.append(self._logprobs.popleft()[1])
        parts: list[Piece | ToolCall] = []
        for part in split:
            if isinstance(part, ToolCall):
                parts.append(part)
            else:
                parts.append(Piece(*part, tuple(logprobs)))
                logprobs = []
        return parts

    def _finish(self, reason: FinishReason, timings: Timings) -> list[Part]:
        cut_by_us = self.stopped
        parts: list[Part] = [] if cut_by_us else [*self._flush()]
        tokens = self._tokens if cut_by_us else timings.generated_tokens
        return [*parts, Finished(self._reason(reason), self._prompt_tokens, tokens, timings, self._stops.found, self._reasoning_tokens)]

    def _reason(self, reason: FinishReason) -> FinishReason:
        """Why the reply ended, now that its text is known."""
        if self.stopped:
            reason = FinishReason.STOP
        called = self._splitter.called and self._stops.found is None
        return FinishReason.TOOL_CALLS if called and reason is FinishReason.STOP else reason

    def _flush(self) -> list[Piece | ToolCall]:
        """What was held back, now that nothing can follow. The last half character may still complete a stop string."""
        parts = self._show(self._detokenizer.flush())
        if not self.stopped:
            self._shown = self._made
            parts += self._parts(self._splitter.push(self._stops.flush()) + self._splitter.flush())
        if self._logprobs and not self.stopped and not self._splitter.called:  # of tokens without text
            parts.append(Piece("content", "", tuple(logprob for _, logprob in self._logprobs)))
        return parts


class Mailbox:
    """Events from the engine's thread to one coroutine. While the coroutine has not woken yet, further events cost it no further wake-up.

    The engine waits for nobody, so what a slow client has not taken gathers here, up to MOST_WAITING. One event more ends the request: `on_full` is
    called, and the coroutine, should it come back, finds what there was and then SlowReader.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_full: Callable[[SlowReader], None]) -> None:
        self._loop = loop
        self._on_full = on_full
        self._full = False
        self._events: deque[TokenEvent] = deque()
        self._ready = asyncio.Event()
        self._woken = False

    def put(self, event: TokenEvent) -> None:
        """Called in the engine's thread; never blocks."""
        if self._full:
            return
        if len(self._events) >= MOST_WAITING and event.finish_reason is None and event.error is None:
            self._full = True
            slow = SlowReader(len(self._events))
            event = TokenEvent(event.request_id, error=slow)
            self._on_full(slow)
        self._events.append(event)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._ready.set)

    async def take(self) -> list[TokenEvent]:
        """Every event that is there, at least one. Cancelled while it waits, it has taken nothing."""
        while not self._events:
            await self._ready.wait()
            self._ready.clear()
            self._woken = False  # before the events are taken: one that comes later wakes us again
        return [self._events.popleft() for _ in range(len(self._events))]


class _Submitted:
    """What both readers share: the request is submitted when this is made, and cancelled when it is closed before its end."""

    def __init__(self, service: Service, request: GenerateRequest, text: ReplyText, sink: Sink, *, continues: bool = False) -> None:
        self._service = service
        self._request_id = request.request_id
        self._text = text
        self._over = False
        service.submit(request, sink, continues=continues)

    def _push(self, event: TokenEvent) -> list[Part]:
        """The event's parts; tells the engine when a stop string, or the one call that is wanted, has ended the reply, and raises the event's error."""
        self._over = event.finish_reason is not None or event.error is not None
        was_stopped = self._text.stopped
        parts = self._text.push(event)
        if self._text.stopped and not was_stopped and not self._over:
            self._service.cancel(self._request_id, FinishReason.STOP)
        return parts

    def close(self) -> None:
        """Cancel the request unless it is over."""
        if not self._over:
            self._over = True
            self._service.cancel(self._request_id)


class AsyncReply(_Submitted):
    """A request that was submitted, read in the running event loop. Raises what Service.submit raises. Close it, whatever happens."""

    def __init__(self, service: Service, request: GenerateRequest, text: ReplyText, *, continues: bool = False) -> None:
        self._mailbox = Mailbox(asyncio.get_running_loop(), on_full=self._cut)
        self._early: list[Part] = []
        self._error: Exception | None = None
        super().__init__(service, request, text, self._mailbox.put, continues=continues)

    def _cut(self, error: SlowReader) -> None:
        """In the engine's thread."""
        self._service.failed(error)
        self._service.cancel(self._request_id)

    async def begin(self, timeout_s: float) -> None:
        """Wait for the first text or the end, at most so long. Raises the error of a request that fails before its first text."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._over and not any(isinstance(part, Piece | ToolCall) for part in self._early):
                    self._early += await self._next()
        if self._error is not None and not any(isinstance(part, Piece | ToolCall) for part in self._early):
            raise self._error

    async def batches(self) -> AsyncIterator[list[Part]]:
        """The reply, as much at a time as there is, Finished last. Raises the request's error after what came before it."""
        if self._early:
            yield self._early
        while not self._over:
            if parts := await self._next():
                yield parts
        if self._error is not None:
            raise self._error

    async def _next(self) -> list[Part]:
        parts: list[Part] = []
        for event in await self._mailbox.take():
            try:
                parts += self._push(event)
            except MoespanError as error:
                self._error = error
        return parts


class SyncReply(_Submitted):
    """A request that was submitted, read by a plain loop: `with closing(SyncReply(...)) as reply: for part in reply: ...`."""

    def __init__(self, service: Service, request: GenerateRequest, text: ReplyText) -> None:
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        super().__init__(service, request, text, self._events.put)

    def __iter__(self) -> Iterator[Part]:
        while not self._over:
            yield from self._push(self._events.get())
