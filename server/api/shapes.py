"""OpenAI's reply shapes as plain dicts, streamed and whole, for chats and completions.

Dicts and json.dumps rather than pydantic: a chunk is made for every token, on CPU cores that the model wants. `timings` is llama.cpp's addition,
which Open WebUI shows; it is left out where there is none, because null breaks that client.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from server.scheduler.reply import Finished, Piece
from server.text.tokenizer import Tokenizer
from server.types import TokenLogprob

Json = dict[str, Any]


@dataclass(slots=True)
class Choice:
    """One whole reply, gathered."""

    pieces: list[Piece] = field(default_factory=list)
    end: Finished | None = None

    def text(self, kind: str) -> str:
        """All text of one kind."""
        return "".join([piece.text for piece in self.pieces if piece.kind == kind])

    def logprobs(self, kind: str) -> list[TokenLogprob]:
        """The log probabilities that came with text of one kind."""
        return [logprob for piece in self.pieces if piece.kind == kind for logprob in piece.logprobs]


class Shape(ABC):
    """How one request's replies are written. `logprobs`: the client asked for them."""

    reply_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, reply_id: str, created: int, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._head: Json = {"id": reply_id, "object": self.chunk_object, "created": created, "model": model}
        self._tokenizer = tokenizer
        self._wants_logprobs = logprobs

    def chunk(self, choices: list[Json], **more: Any) -> Json:
        """One chunk of a stream."""
        return {**self._head, "choices": choices, **more}

    @abstractmethod
    def opening(self) -> list[Json]:
        """The chunks before the first text."""

    @abstractmethod
    def piece(self, index: int, piece: Piece) -> Json:
        """The chunk of some text."""

    @abstractmethod
    def ending(self, index: int, end: Finished, **more: Any) -> Json:
        """The chunk that carries a choice's finish_reason."""

    @abstractmethod
    def choice(self, index: int, choice: Choice, end: Finished) -> Json:
        """A choice of a whole reply."""

    def whole(self, choices: Sequence[Choice]) -> Json:
        """The reply to a client that does not stream."""
        ends = [choice.end for choice in choices if choice.end is not None]
        written = [self.choice(index, choice, end) for index, (choice, end) in enumerate(zip(choices, ends, strict=True))]
        return {**self._head, "object": self.reply_object, "choices": written, "usage": usage(ends), "timings": timings(ends)}


class ChatShape(Shape):
    """/v1/chat/completions."""

    reply_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> list[Json]:
        return [self._delta(0, {"role": "assistant", "content": ""})]

    def piece(self, index: int, piece: Piece) -> Json:
        delta = {_CHAT_KEY[piece.kind]: piece.text}
        return self._delta(index, delta, {_CHAT_LOGPROBS_KEY[piece.kind]: piece.logprobs} if piece.logprobs else None)

    def ending(self, index: int, end: Finished, **more: Any) -> Json:
        return self.chunk([{"index": index, "delta": {}, "logprobs": None, "finish_reason": end.reason.value}], **more)

    def choice(self, index: int, choice: Choice, end: Finished) -> Json:
        message = {"role": "assistant", "content": choice.text("content")}
        if reasoning := choice.text("reasoning"):
            message["reasoning_content"] = reasoning
        logprobs = {key: found for kind, key in _CHAT_LOGPROBS_KEY.items() if (found := choice.logprobs(kind)) or kind == "content"}
        written = self._logprobs(logprobs) if self._wants_logprobs else None
        return {"index": index, "message": message, "logprobs": written, "finish_reason": end.reason.value}

    def _delta(self, index: int, delta: Json, logprobs: dict[str, Sequence[TokenLogprob]] | None = None) -> Json:
        written = self._logprobs(logprobs) if logprobs is not None else None
        return self.chunk([{"index": index, "delta": delta, "logprobs": written, "finish_reason": None}])

    def _logprobs(self, by_key: dict[str, Any]) -> Json:
        return {key: [self._token(entry) for entry in entries] for key, entries in by_key.items()}

    def _token(self, entry: TokenLogprob) -> Json:
        return {**self._alternative(entry.token_id, entry.logprob), "top_logprobs": [self._alternative(*each) for each in entry.top]}

    def _alternative(self, token_id: int, logprob: float) -> Json:
        raw = self._tokenizer.token_bytes(token_id, skip_special=False)
        return {"token": raw.decode("utf-8", errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


_CHAT_KEY = {"content": "content", "reasoning": "reasoning_content"}
_CHAT_LOGPROBS_KEY = _CHAT_KEY  # as DeepSeek's API names them


class CompletionShape(Shape):
    """/v1/completions."""

    reply_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, reply_id: str, created: int, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        super().__init__(reply_id, created, model, tokenizer, logprobs=logprobs)
        self._offsets: dict[int, int] = {}  # characters of each streamed choice so far, for text_offset

    def opening(self) -> list[Json]:
        return []

    def piece(self, index: int, piece: Piece) -> Json:
        logprobs = self._logprobs(piece.logprobs, self._offsets.get(index, 0)) if piece.logprobs else None
        self._offsets[index] = self._offsets.get(index, 0) + len(piece.text)
        return self.chunk([{"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}])

    def ending(self, index: int, end: Finished, **more: Any) -> Json:
        return self.chunk([{"index": index, "text": "", "logprobs": None, "finish_reason": end.reason.value}], **more)

    def choice(self, index: int, choice: Choice, end: Finished) -> Json:
        logprobs = self._logprobs(choice.logprobs("content"), 0) if self._wants_logprobs else None
        return {"index": index, "text": choice.text("content"), "logprobs": logprobs, "finish_reason": end.reason.value}

    def _logprobs(self, entries: Sequence[TokenLogprob], offset: int) -> Json:
        tokens = [self._text(entry.token_id) for entry in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": [{self._text(each): finite(logprob) for each, logprob in _with_chosen(entry)} for entry in entries],
            "text_offset": [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))],
        }

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special=False)


def _with_chosen(entry: TokenLogprob) -> list[tuple[int, float]]:
    """The alternatives, and the chosen token where it is none of them, as OpenAI's completions list them."""
    return [*entry.top, *([] if entry.token_id in dict(entry.top) else [(entry.token_id, entry.logprob)])]


def finite(logprob: float) -> float:
    """JSON has no infinities; OpenAI writes -9999 for a token that cannot be."""
    return max(logprob, -9999.0)


def usage(ends: Sequence[Finished]) -> Json:
    """Token counts over all choices."""
    prompt = sum(end.prompt_tokens for end in ends)
    completion = sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.timings.cached_tokens for end in ends)},
    }


def timings(ends: Sequence[Finished]) -> Json:
    """llama.cpp's `timings`, over all choices: counts, milliseconds, tokens a second."""
    each = [end.timings for end in ends]
    cached, computed = sum(t.cached_tokens for t in each), sum(t.prompt_tokens - t.cached_tokens for t in each)
    prefill_s, decode_s = sum(t.prefill_s for t in each), sum(t.decode_s for t in each)
    decoded = sum(max(t.generated_tokens - 1, 0) for t in each)  # the first token of each reply is prefill's
    return {
        "cache_n": cached,
        "prompt_n": computed,
        "prompt_ms": round(prefill_s * 1e3, 3),
        "prompt_per_second": round(_rate(computed, prefill_s), 3),
        "predicted_n": sum(t.generated_tokens for t in each),
        "predicted_ms": round(decode_s * 1e3, 3),
        "predicted_per_second": round(_rate(decoded, decode_s), 3),
    }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
