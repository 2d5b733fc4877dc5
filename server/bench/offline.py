"""Prefill and decode speed of an engine, with nothing in between: no HTTP, no scheduler, no text.

One run fills an empty KV cache with the prompt, chunk by chunk, and then decodes token by token after it, as a chat does.
Prefill ends when the first token is drawn; each decode step feeds the token drawn before it. The first run warms up and is not counted.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.protocol import Drawn, Engine, Sampler, Step
from server.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Spread:
    """Tokens per second of every timed run, in order."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def low(self) -> float:
        return min(self.runs)

    @property
    def high(self) -> float:
        return max(self.runs)


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured."""

    prompt: int  # tokens prefilled
    gen: int  # tokens decoded after them
    prefill: Spread
    decode: Spread


def measure(engine: Engine, vocab_size: int, *, prompt: int, gen: int, repeat: int, progress: Callable[[int], None] | None = None) -> Speed:
    """Time `repeat` runs; `progress` is told the number of runs done. The engine needs prompt + gen tokens of KV cache and no other user."""
    draw = random.Random(0)  # the same tokens on every machine
    prompt_ids = tuple(draw.randrange(vocab_size) for _ in range(prompt))
    _run(engine, prompt_ids, min(gen, 4))
    times = []
    for done in range(1, repeat + 1):
        times.append(_run(engine, prompt_ids, gen))
        if progress:
            progress(done)
    return Speed(prompt, gen, Spread(tuple(prompt / prefill for prefill, _ in times)), Spread(tuple(gen / decode for _, decode in times)))


def _run(engine: Engine, prompt_ids: tuple[int, ...], gen: int) -> tuple[float, float]:
    """Seconds of prefill and of decode."""
    sampler = engine.new_sampler(SamplingParams(temperature=0.0), prompt_ids)
    began = time.perf_counter()
    drawn = _prefill(engine, prompt_ids, sampler)
    prefilled = time.perf_counter()
    for position in range(len(prompt_ids), len(prompt_ids) + gen):
        drawn = _step(engine, (drawn.token_id,), position, sampler)
    return prefilled - began, time.perf_counter() - prefilled


def _prefill(engine: Engine, prompt_ids: tuple[int, ...], sampler: Sampler) -> Drawn:
    """Feed the prompt; only its last chunk draws."""
    last = (len(prompt_ids) - 1) // engine.prefill_chunk * engine.prefill_chunk
    for start in range(0, last, engine.prefill_chunk):
        engine.step(Step(prompt_ids[start : start + engine.prefill_chunk], start, _pages(engine, start + engine.prefill_chunk), None))
    return _step(engine, prompt_ids[last:], last, sampler)


def _step(engine: Engine, token_ids: tuple[int, ...], start: int, sampler: Sampler) -> Drawn:
    drawn = engine.step(Step(token_ids, start, _pages(engine, start + len(token_ids)), sampler))
    assert drawn is not None, "a step with a sampler draws a token"
    return drawn


def _pages(engine: Engine, tokens: int) -> tuple[int, ...]:
    """The first pages of the cache, as many as cover the tokens: nobody else uses it."""
    return tuple(range(-(-tokens // engine.page_size)))
