"""What crosses the rooms: requests going down, tokens coming up. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)  # the client's request that is worked on, for the log


class FinishReason(StrEnum):
    """Why a reply ended, in OpenAI's words."""

    STOP = "stop"  # an end-of-text token, or a stop string
    LENGTH = "length"  # max_tokens, or the end of the KV cache
    TOOL_CALLS = "tool_calls"  # ended by itself, and the reply holds calls of tools
    CANCELLED = "cancelled"  # the client went away; never seen on the wire


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. The defaults are OpenAI's; temperature 0 is greedy.

    The order is: constraint, logit_bias, penalties, temperature, top_k, top_p, min_p, draw.
    """

    temperature: float = 1.0  # >= 0
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # [0, 1], relative to the likeliest token
    seed: int | None = None  # None: drawn anew for each request
    presence_penalty: float = 0.0  # [-2, 2], on generated tokens
    frequency_penalty: float = 0.0  # [-2, 2], on generated tokens
    repetition_penalty: float = 1.0  # > 0, on prompt and generated tokens
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> [-100, 100]
    top_logprobs: int | None = None  # None: no logprobs; 0..20: that many beside the chosen one


class TokenMask(Protocol):
    """What one request's reply must look like, token by token. Made by text/grammar.py, asked by the engine's samplers, from the engine's thread alone."""

    def mask(self) -> memoryview | None:
        """Which tokens may come next: int32 words [ceil(vocab / 32)], token i where bit i % 32 of word i // 32 is set. None: all may.

        The words stay as they are until `accept`. Raises RequestError when no token may.
        """
        ...

    def accept(self, token_id: int) -> None:
        """The token that was drawn. Raises RequestError when it was not allowed."""
        ...


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to run: token ids in, at most max_tokens out. Text never comes this far down."""

    request_id: str
    prompt_ids: tuple[int, ...]  # at least one
    max_tokens: int  # >= 1; the scheduler also ends at the end of the KV cache
    sampling: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()  # end-of-text ids; the token that ends is not part of the reply
    constraint: TokenMask | None = None  # of this request alone, for it moves on with each token


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities under the model's own distribution (before penalties and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds and counts of one request, taken by the engine's thread."""

    queue_s: float = 0.0  # submitted -> first prefill chunk started
    prefill_s: float = 0.0  # first chunk started -> first token drawn
    decode_s: float = 0.0  # first token drawn -> last token drawn
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose KV was found in the cache
    generated_tokens: int = 0  # tokens drawn, the end-of-text token among them

    @property
    def prefill_per_s(self) -> float:
        """Prompt tokens computed a second; 0 when nothing was measured."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_per_s(self) -> float:
        """Tokens a second after the first one, which prefill drew; 0 when there was no second one."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What a GPU has done since the engine's start, and what it holds, whoever used it."""

    busy_s: float  # in which something ran on it
    memory_used: int  # bytes
    memory_total: int  # bytes


@dataclass(frozen=True, slots=True)
class EngineUse:
    """What the engine's parts have done since its start: counters, read while it works."""

    pool_threads: int
    pool_busy_s: float  # that all threads of the pool together worked
    expert_bytes: int  # of routed experts' weights that the pool read
    dense_bytes: int  # of other weights that the pool read
    streamed_bytes: int = 0  # of routed experts' weights that went to the GPU over PCIe
    roads: Mapping[str, int] | None = None  # with a GPU: a prompt's chunks of a layer of experts, by where they were computed
    gpu: GpuUse | None = None  # None: there is none, or nobody can say


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One thing that the engine's thread tells a reply: a token, progress, the end, or a failure.

    Exactly one event of a request has `finish_reason` or `error` set, and it is the last one.
    """

    request_id: str
    token_id: int | None = None  # None: no token in this event
    logprob: TokenLogprob | None = None
    prefilled: int | None = None  # prompt tokens done so far, while the prompt is processed
    finish_reason: FinishReason | None = None
    timings: Timings | None = None  # with finish_reason
    error: Exception | None = None  # a server.errors.MoespanError
