"""One HTTP request's replies, from submission to the last byte: gathered into one body, or streamed.

A completion with several prompts runs them one after another; the request holds one place in the queue, and once it was accepted its later
prompts are not refused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from server.api.access import note_end
from server.api.convert import Prepared
from server.api.errors import RequestTimeout
from server.api.problems import Json
from server.api.serving import Loaded
from server.api.shapes.base import Choice, Shape
from server.scheduler.reply import AsyncReply, Finished, Part, Piece, Progress, ReplyText, ToolCall


class Answer:
    """Submits the first sequence when it is made, which raises what Service.submit raises. Close it, whatever happens.

    With `timeout_s`, RequestTimeout is raised instead of what would come later than so many seconds from now.
    """

    def __init__(self, loaded: Loaded, prepared: Sequence[Prepared], timeout_s: float | None = None) -> None:
        self._loaded = loaded
        self._prepared = prepared
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        for each in prepared:
            loaded.service.check(each.request)
        self.status = "waiting"  # what a keep-alive comment says
        self._reply = self._submit(prepared[0])
        self._work = prepared[0].request.request_id
        if len(prepared) > 1:
            loaded.service.expect_more(self._work)

    def _submit(self, prepared: Prepared, *, continues: bool = False) -> AsyncReply:
        counted = len(prepared.request.prompt_ids) if prepared.first else 0
        text = ReplyText(self._loaded.tokenizer, prepared.rules, counted)
        return AsyncReply(self._loaded.service, prepared.request, text, continues=continues)

    async def begin(self, timeout_s: float) -> None:
        """Wait at most so long for the first text, so that a failure before it has its own HTTP status."""
        await self._reply.begin(timeout_s)

    async def batches(self) -> AsyncIterator[tuple[int, list[Part]]]:
        """(choice, what there is of it) until the last choice has ended. Raises the error of a reply that failed."""
        for index, prepared in enumerate(self._prepared):
            if index > 0:
                self.status = "waiting"
                self._reply = self._submit(prepared, continues=True)
                if index == len(self._prepared) - 1:
                    self._loaded.service.expect_no_more(self._work)
            async for parts in self._in_time(self._reply.batches()):
                for part in parts:
                    if isinstance(part, Finished):
                        note_end(part)
                yield index, parts

    async def _in_time(self, batches: AsyncIterator[list[Part]]) -> AsyncIterator[list[Part]]:
        """The same, up to the deadline."""
        with contextlib.suppress(StopAsyncIteration):
            while True:
                try:
                    async with asyncio.timeout_at(self._deadline):
                        parts = await anext(batches)
                except TimeoutError:
                    assert self._timeout_s is not None
                    error = RequestTimeout(self._timeout_s)
                    self._loaded.service.failed(error)
                    raise error from None
                yield parts

    def close(self) -> None:
        """Cancel what still runs or waits."""
        self._loaded.service.expect_no_more(self._work)
        self._reply.close()

    async def whole(self, shape: Shape) -> Json:
        """Everything as one reply."""
        choices = [Choice() for _ in self._prepared]
        async for index, parts in self.batches():
            for part in parts:
                choices[index].add(part)
        return shape.whole(choices)

    async def events(self, shape: Shape) -> AsyncIterator[list[Json]]:
        """Everything as a stream's events, as many at a time as there are."""
        yield shape.opening()
        async for index, parts in self.batches():
            yield [event for part in parts for event in self._events(shape, index, part)]

    def _events(self, shape: Shape, index: int, part: Part) -> list[Json]:
        match part:
            case Progress():
                self.status = f"prefilled {part.prefilled} of {len(self._prepared[index].request.prompt_ids)} tokens"
                return []
            case Finished():
                return shape.ending(index, part)
            case Piece():
                self.status = "generating"
                return shape.piece(index, part)
            case ToolCall():
                self.status = "generating"
                return shape.call(index, part)
