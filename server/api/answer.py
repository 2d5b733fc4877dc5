"""One HTTP request's replies, from submission to the last byte: gathered into one body, or streamed.

A completion with several prompts runs them one after another; the request holds one place in the queue, and once it was accepted its later
prompts are not refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from server.api.convert import Prepared
from server.api.serving import Loaded
from server.api.shapes import Choice, Json, Shape, timings, usage
from server.scheduler.reply import AsyncReply, Finished, Part, Piece, Progress, ReplyText


class Answer:
    """Submits the first sequence when it is made, which raises what Service.submit raises. Close it, whatever happens."""

    def __init__(self, loaded: Loaded, prepared: Sequence[Prepared]) -> None:
        self._loaded = loaded
        self._prepared = prepared
        for each in prepared:
            loaded.service.check(each.request)
        self.status = "waiting"  # what a keep-alive comment says
        self._reply = self._submit(prepared[0])
        self._work = prepared[0].request.request_id
        if len(prepared) > 1:
            loaded.service.expect_more(self._work)

    def _submit(self, prepared: Prepared, *, continues: bool = False) -> AsyncReply:
        text = ReplyText(self._loaded.tokenizer, prepared.rules, len(prepared.request.prompt_ids))
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
            async for parts in self._reply.batches():
                yield index, parts

    def close(self) -> None:
        """Cancel what still runs or waits."""
        self._loaded.service.expect_no_more(self._work)
        self._reply.close()

    async def whole(self, shape: Shape) -> Json:
        """Everything as one reply."""
        choices = [Choice() for _ in self._prepared]
        async for index, parts in self.batches():
            for part in parts:
                if isinstance(part, Piece):
                    choices[index].pieces.append(part)
                elif isinstance(part, Finished):
                    choices[index].end = part
        return shape.whole(choices)

    async def chunks(self, shape: Shape, *, include_usage: bool) -> AsyncIterator[list[Json]]:
        """Everything as chunks, as many at a time as there are."""
        ends: list[Finished] = []
        yield shape.opening()
        async for index, parts in self.batches():
            chunks: list[Json] = []
            for part in parts:
                if isinstance(part, Piece):
                    self.status = "generating"
                    chunks.append(shape.piece(index, part))
                elif isinstance(part, Progress):
                    self.status = f"prefilled {part.prefilled} of {len(self._prepared[index].request.prompt_ids)} tokens"
                else:
                    ends.append(part)
                    chunks += self._last(shape, index, ends, include_usage)
            yield chunks

    def _last(self, shape: Shape, index: int, ends: Sequence[Finished], include_usage: bool) -> list[Json]:
        """A choice's last chunk. `timings` go with the very last one, which is the usage chunk where that was asked for."""
        if len(ends) < len(self._prepared):
            return [shape.ending(index, ends[-1])]
        if not include_usage:
            return [shape.ending(index, ends[-1], timings=timings(ends))]
        return [shape.ending(index, ends[-1]), shape.chunk([], usage=usage(ends), timings=timings(ends))]
