"""The other side of the engine's seam, in a few lines: a model that repeats its prompt, read back from its pages."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from server.engine.protocol import Drawn, Step
from server.types import SamplingParams, TokenLogprob, TokenMask

STOP_ID = 256  # what the fake model draws when it has nothing more to say


@dataclass
class FakeSampler:
    """Carries the request's parameters to the step, as the real one does."""

    params: SamplingParams
    prompt_ids: tuple[int, ...]
    constraint: TokenMask | None = None
    drawn: int = 0

    def allowed(self, wished: int) -> int:
        """The token that the engine wishes to say, or where the constraint forbids it, the first one allowed; the constraint moves on."""
        if self.constraint is None:
            return wished
        words = self.constraint.mask()
        token_id = wished if words is None or words[wished // 32] >> wished % 32 & 1 else _first_allowed(words)
        self.constraint.accept(token_id)
        return token_id


class FakeMask:
    """A constraint that allows these tokens, step by step and then over again (None: all), and remembers what was drawn."""

    def __init__(self, *allowed: set[int] | None, words: int) -> None:
        self.allowed = allowed
        self.words = words
        self.accepted: list[int] = []

    def mask(self) -> memoryview | None:
        now = self.allowed[len(self.accepted) % len(self.allowed)]
        if now is None:
            return None
        bits = sum(1 << token_id for token_id in now)
        return memoryview(bits.to_bytes(4 * self.words, "little")).cast("i")

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def _first_allowed(words: memoryview) -> int:
    return next(i * 32 + bit for i, word in enumerate(words) for bit in range(32) if word >> bit & 1)


@dataclass
class FakeEngine:
    """Echoes the prompt (or says `script`), then draws STOP_ID. It reads the echo out of its pages, so pages that were mixed up show as wrong text."""

    page_size: int = 16
    num_pages: int = 64
    prefill_chunk: int = 32
    script: list[int] | None = None
    step_s: float = 0.0
    fail_at: int | None = None  # the step, counted from 0, that raises
    steps: list[Step] = field(default_factory=list)
    samplers: list[FakeSampler] = field(default_factory=list)
    closed: bool = False
    _slots: dict[tuple[int, int], int] = field(default_factory=dict)

    def new_sampler(self, params: SamplingParams, prompt_ids: tuple[int, ...], constraint: TokenMask | None = None) -> FakeSampler:
        self.samplers.append(FakeSampler(params, prompt_ids, constraint))
        return self.samplers[-1]

    def step(self, step: Step) -> Drawn | None:
        assert 1 <= len(step.token_ids) <= self.prefill_chunk
        assert len(step.pages) == math.ceil((step.start + len(step.token_ids)) / self.page_size)
        time.sleep(self.step_s)
        self.steps.append(step)
        if self.fail_at == len(self.steps) - 1:
            raise RuntimeError("the fake engine was told to fail")
        for position, token_id in enumerate(step.token_ids, step.start):
            self._slots[self._slot(step, position)] = token_id
        return self._draw(step, step.sampler) if isinstance(step.sampler, FakeSampler) else None

    def _draw(self, step: Step, sampler: FakeSampler) -> Drawn:
        words = self.script if self.script is not None else [self._slots[self._slot(step, i)] for i in range(len(sampler.prompt_ids))]
        token_id = sampler.allowed(words[sampler.drawn] if sampler.drawn < len(words) else STOP_ID)
        sampler.drawn += 1
        top = sampler.params.top_logprobs
        return Drawn(token_id, None if top is None else TokenLogprob(token_id, -0.5, tuple((token_id + i, -0.5 - i) for i in range(top))))

    def _slot(self, step: Step, position: int) -> tuple[int, int]:
        return step.pages[position // self.page_size], position % self.page_size

    def close(self) -> None:
        self.closed = True
