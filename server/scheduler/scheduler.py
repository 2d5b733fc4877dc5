"""Which step runs next, and what the token that it drew means. Pure policy: no threads, no clocks, no engine.

    sequence = scheduler.admit()            # the oldest that waits, with its pages
    step = scheduler.next_step(sequence)    # a chunk of the prompt, or one token to decode
    reason = scheduler.advance(sequence, step, token)

One sequence runs at a time and the rest wait in order of arrival.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from server.engine.protocol import Sampler, Step
from server.scheduler.kv_pages import PageTable
from server.types import FinishReason, GenerateRequest


@dataclass(slots=True)
class Sequence:
    """One request on its way through the engine. The scheduler writes it, `sampler` excepted: that is the worker's."""

    request: GenerateRequest
    limit: int  # the most tokens that it may draw: max_tokens, or what the KV cache has left beside the prompt
    sampler: Sampler | None = None
    pages: tuple[int, ...] = ()
    computed: int = 0  # tokens in the KV cache
    generated: int = 0  # tokens drawn
    last_token: int = field(default=-1)  # drawn, and not in the KV cache yet

    @property
    def prefilling(self) -> bool:
        """Part of the prompt is still to be computed."""
        return self.computed < len(self.request.prompt_ids)


class Scheduler:
    """The waiting line, the one running sequence, and the pages. Touched by the worker's thread alone."""

    def __init__(self, pages: PageTable, prefill_chunk: int, cache_lens: int) -> None:
        self.pages = pages
        self.running: Sequence | None = None
        self._waiting: deque[Sequence] = deque()
        self._prefill_chunk = prefill_chunk
        self._cache_lens = cache_lens

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self.running is None and not self._waiting

    def add(self, request: GenerateRequest) -> Sequence:
        """Put a request at the end of the line. It fits: the service refused it otherwise."""
        room = self._cache_lens - len(request.prompt_ids)
        assert room >= 1, "the service lets no prompt pass that fills the cache"
        sequence = Sequence(request, limit=min(request.max_tokens, room))
        self._waiting.append(sequence)
        return sequence

    def admit(self) -> Sequence | None:
        """Start the oldest waiting sequence when nothing runs; None when there is none, or it has to wait."""
        if self.running is not None or not self._waiting:
            return None
        sequence = self._waiting[0]
        # The last token drawn never enters the cache.
        pages = self.pages.allocate(len(sequence.request.prompt_ids) + sequence.limit - 1)
        assert pages is not None, "an idle cache holds whatever the service lets pass"
        self._waiting.popleft()
        sequence.pages = pages
        self.running = sequence
        return sequence

    def next_step(self, sequence: Sequence) -> Step:
        """The next chunk of the prompt, or the token drawn last. Only a step that ends the prompt, or decodes, draws."""
        start = sequence.computed
        if not sequence.prefilling:
            return self._step(sequence, (sequence.last_token,), draws=True)
        prompt = sequence.request.prompt_ids
        end = min(start + self._prefill_chunk, len(prompt))
        return self._step(sequence, prompt[start:end], draws=end == len(prompt))

    def _step(self, sequence: Sequence, token_ids: tuple[int, ...], draws: bool) -> Step:
        covering = self.pages.pages_for(sequence.computed + len(token_ids))
        return Step(token_ids, sequence.computed, sequence.pages[:covering], sequence.sampler if draws else None)

    def advance(self, sequence: Sequence, step: Step, token_id: int | None) -> FinishReason | None:
        """Note that the step was computed and what it drew; why the sequence is over, or None when it goes on."""
        sequence.computed += len(step.token_ids)
        if token_id is None:
            return None
        sequence.generated += 1
        sequence.last_token = token_id
        if token_id in sequence.request.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.generated >= sequence.limit else None

    def find(self, request_id: str) -> Sequence | None:
        """The waiting or running sequence of a request; None when it is over."""
        if self.running is not None and self.running.request.request_id == request_id:
            return self.running
        return next((sequence for sequence in self._waiting if sequence.request.request_id == request_id), None)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        if sequence is self.running:
            self.running = None
            self.pages.release(sequence.pages)
        else:
            self._waiting.remove(sequence)
        sequence.pages = ()
        if self.running is None:
            self.pages.check_idle()

    def clear(self) -> None:
        """Forget every sequence and begin with all pages free, after a fault of our own that may have left any of it wrong."""
        self.running = None
        self._waiting.clear()
        self.pages.clear()

    def waiting(self) -> list[Sequence]:
        """Those that wait, oldest first."""
        return list(self._waiting)
