"""The seam between scheduler and engine: token ids and pages in, one token out. The fake in tests/fakes.py is the other side of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from server.types import SamplingParams, TokenLogprob, TokenMask


class Sampler(Protocol):
    """The drawing state of one request: its random stream and the counts that penalties need."""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of one sequence. Written by the scheduler's worker, read by the engine."""

    token_ids: tuple[int, ...]  # the new tokens, at positions start .. start + len - 1
    start: int  # how many tokens of the sequence are in the KV cache already
    pages: tuple[int, ...]  # the sequence's pages in order; they cover start + len(token_ids) tokens
    sampler: Sampler | None  # None: a prefill chunk after which no token is drawn


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token that a step drew, with its log probabilities when the request asked for them."""

    token_id: int
    logprob: TokenLogprob | None = None


class Engine(Protocol):
    """One model on one machine. Every method is called from one thread, the scheduler's worker."""

    @property
    def page_size(self) -> int:
        """KV tokens a page."""
        ...

    @property
    def num_pages(self) -> int:
        """Pages in the KV cache; num_pages * page_size >= --cache_lens."""
        ...

    @property
    def prefill_chunk(self) -> int:
        """The most tokens that one step takes."""
        ...

    def new_sampler(self, params: SamplingParams, prompt_ids: tuple[int, ...], constraint: TokenMask | None = None) -> Sampler:
        """The drawing state for a new request; `constraint` is its own and tells which tokens may be drawn."""
        ...

    def step(self, step: Step) -> Drawn | None:
        """Run the new tokens through the model; draw the next token when the step has a sampler."""
        ...

    def close(self) -> None:
        """Free threads and memory; the engine is of no use afterwards."""
        ...
