"""The shapes of Ollama's /api/chat and /api/generate: one JSON object a line, each with the text that it adds; the last one has the counts and times."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime

from server.api import problems
from server.api.framing import LINES
from server.api.problems import Json, Problem
from server.api.shapes.base import Call, Choice, Shape
from server.api.shapes.tokens import with_alternatives
from server.scheduler.reply import Finished, Piece, ToolCall
from server.text.tokenizer import Tokenizer
from server.types import FinishReason


class OllamaLines(Shape):
    """What both have in common. `thinking`: the client is to see it."""

    framing = LINES

    def __init__(self, model: str, tokenizer: Tokenizer, *, thinking: bool) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._call: Call | None = None  # the one that is being written: calls are sent as a whole

    def piece(self, index: int, piece: Piece) -> list[Json]:
        if piece.kind == "reasoning" and not self._thinking:
            return []
        said = self._said(thinking=piece.text) if piece.kind == "reasoning" else self._said(piece.text)
        return [self._line({**said, **self._logprobs([piece])})]

    def call(self, index: int, call: ToolCall) -> list[Json]:
        if call.name is None:
            assert self._call is not None
            self._call.arguments += call.arguments
            return []
        ended = self._end_call()
        self._call = Call(call.call_id or "", call.name, call.arguments)
        return ended

    def ending(self, index: int, end: Finished) -> list[Json]:
        return [*self._end_call(), self._line(self._said(), end)]

    def failure(self, problem: Problem) -> list[Json]:
        return [problems.ollama(problem)]

    def alive(self, status: str) -> bytes:
        """A line that adds nothing: there is none that readers skip."""
        return self.framing.event(self._line(self._said()))

    def whole(self, choices: Sequence[Choice]) -> Json:
        (choice,) = choices
        thinking = choice.text("reasoning") if self._thinking else ""
        said = self._said(choice.text("content"), thinking, [_whole_call(call) for call in choice.calls])
        return self._line({**said, **self._logprobs(choice.pieces)}, choice.end)

    def loaded(self) -> Json:
        """The answer to a request that only wants the model to be loaded."""
        return {"model": self._model, "created_at": now(), **self._said(), "done": True, "done_reason": "load"}

    @abstractmethod
    def _said(self, content: str = "", thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        """The keys that carry what the model says."""

    def _line(self, said: Json, end: Finished | None = None) -> Json:
        line = {"model": self._model, "created_at": now(), **said, "done": end is not None}
        return line if end is None else {**line, **_counts(end)}

    def _end_call(self) -> list[Json]:
        ended, self._call = self._call, None
        return [] if ended is None else [self._line(self._said(calls=[_whole_call(ended)]))]

    def _logprobs(self, pieces: Sequence[Piece]) -> Json:
        found = [with_alternatives(self._tokenizer, entry) for piece in pieces for entry in piece.logprobs]
        return {"logprobs": found} if found else {}


class ChatLines(OllamaLines):
    """/api/chat: parts of a message."""

    def _said(self, content: str = "", thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        message: Json = {"role": "assistant", "content": content}
        message |= {"thinking": thinking} if thinking else {}
        message |= {"tool_calls": list(calls)} if calls else {}
        return {"message": message}


class GenerateLines(OllamaLines):
    """/api/generate: text. It has no tools, so that there are no calls."""

    def _said(self, content: str = "", thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        return {"response": content, **({"thinking": thinking} if thinking else {})}


def now() -> str:
    """The time as Ollama writes it."""
    return f"{datetime.now(UTC).replace(tzinfo=None).isoformat()}Z"


def _whole_call(call: Call) -> Json:
    return {"id": call.call_id, "function": {"name": call.name, "arguments": call.parsed()}}


def _counts(end: Finished) -> Json:
    """Counts, and durations in nanoseconds. Nothing is loaded for a request; while it waits is part of the total."""
    return {
        "done_reason": "length" if end.reason is FinishReason.LENGTH else "stop",
        "total_duration": _ns(end.timings.queue_s + end.timings.prefill_s + end.timings.decode_s),
        "load_duration": 0,
        "prompt_eval_count": end.prompt_tokens,
        "prompt_eval_duration": _ns(end.timings.prefill_s),
        "eval_count": end.completion_tokens,
        "eval_duration": _ns(end.timings.decode_s),
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
