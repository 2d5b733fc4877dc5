"""The shape of OpenAI's /v1/responses: items of reasoning, text and calls, each begun, filled and ended by events of its own."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from server.api.framing import NAMED
from server.api.problems import Json, Problem
from server.api.shapes.base import Call, Choice, Shape
from server.api.shapes.tokens import with_alternatives
from server.scheduler.reply import Finished, Piece, ToolCall
from server.text.reasoning import Kind
from server.text.tokenizer import Tokenizer
from server.types import FinishReason, TokenLogprob

Event = tuple[str, Json]  # the event's type, and what it says beside its number and the item's place


class ResponsesShape(Shape):
    """One response. `head`: what every state of it says of the request."""

    framing = NAMED

    def __init__(self, head: Json, tokenizer: Tokenizer) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._number = 0  # of the next event
        self._ended: list[Json] = []  # items
        self._open: _Item | None = None

    def opening(self) -> list[Json]:
        begun = self._response("in_progress", [])
        return [self._event("response.created", response=begun), self._event("response.in_progress", response=begun)]

    def piece(self, index: int, piece: Piece) -> list[Json]:
        if not piece.text:
            return []
        begun: list[Json] = []
        if not (isinstance(self._open, _Text) and self._open.kind == piece.kind):
            begun = self._begin(_Text(piece.kind))
        assert isinstance(self._open, _Text)
        return [*begun, *self._of_item(self._open.add(piece.text, self._logprobs(piece.logprobs)))]

    def call(self, index: int, call: ToolCall) -> list[Json]:
        begun = [] if call.name is None else self._begin(_Function(Call(call.call_id or "", call.name, "")))
        assert isinstance(self._open, _Function)
        return [*begun, *self._of_item(self._open.add(call.arguments))]

    def ending(self, index: int, end: Finished) -> list[Json]:
        status = _status(end)
        ended = self._end_item(status)
        return [*ended, self._event(f"response.{status}", response=self._response(status, self._ended, end))]

    def failure(self, problem: Problem) -> list[Json]:
        ended = self._end_item("incomplete")
        failed = self._response("failed", self._ended)
        return [*ended, self._event("response.failed", response={**failed, "error": {"code": "server_error", "message": problem.message}})]

    def whole(self, choices: Sequence[Choice]) -> Json:
        (choice,) = choices
        assert choice.end is not None
        items: list[_Item] = [_Text(kind, [text], self._logprobs(choice.logprobs(kind))) for kind in _PARTS if (text := choice.text(kind))]
        items += [_Function(call) for call in choice.calls]
        written = [item.written("completed") for item in items[:-1]] + [item.written(_status(choice.end)) for item in items[-1:]]
        return self._response(_status(choice.end), written, choice.end)

    def _response(self, status: str, output: Sequence[Json], end: Finished | None = None) -> Json:
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        usage = None if end is None else _usage(end)
        return {**self._head, "status": status, "error": None, "incomplete_details": details, "output": list(output), "usage": usage}

    def _event(self, kind: str, **said: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **said}

    def _of_item(self, events: Sequence[Event]) -> list[Json]:
        """Events of the open item."""
        return [self._event(kind, output_index=len(self._ended), **said) for kind, said in events]

    def _begin(self, item: _Item) -> list[Json]:
        ended = self._end_item("completed")
        self._open = item
        return [*ended, *self._of_item([("response.output_item.added", {"item": item.empty()}), *item.begun()])]

    def _end_item(self, status: str) -> list[Json]:
        if self._open is None:
            return []
        written = self._open.written(status)
        events = self._of_item([*self._open.ended(), ("response.output_item.done", {"item": written})])
        self._ended.append(written)
        self._open = None
        return events

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> list[Json]:
        return [with_alternatives(self._tokenizer, entry) for entry in entries]


class _Item(ABC):
    """One item of the output, while it is written."""

    @abstractmethod
    def empty(self) -> Json:
        """The item as it begins."""

    @abstractmethod
    def begun(self) -> list[Event]:
        """What follows the item's beginning."""

    @abstractmethod
    def ended(self) -> list[Event]:
        """What comes before the item's end."""

    @abstractmethod
    def written(self, status: str) -> Json:
        """The item as it is now."""


# Kind of text -> type of its item, the beginning of the item's id, type of its one part, and the name of the events that fill it.
_PARTS: dict[Kind, tuple[str, str, str, str]] = {
    "reasoning": ("reasoning", "rs_", "reasoning_text", "response.reasoning_text"),
    "content": ("message", "msg_", "output_text", "response.output_text"),
}


@dataclass
class _Text(_Item):
    """A message, or what came before it in the model's mind."""

    kind: Kind
    texts: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._type, prefix, self._part_type, self._events = _PARTS[self.kind]
        self._id = f"{prefix}{uuid.uuid4().hex}"

    def add(self, text: str, logprobs: list[Json]) -> list[Event]:
        self.texts.append(text)
        self.logprobs += logprobs
        return [self._event("delta", delta=text, **self._with_logprobs(logprobs))]

    def empty(self) -> Json:
        return self._item("in_progress", [])

    def begun(self) -> list[Event]:
        return [("response.content_part.added", self._placed(part=self._part("", [])))]

    def ended(self) -> list[Event]:
        text = "".join(self.texts)
        done = self._event("done", text=text, **self._with_logprobs(self.logprobs))
        return [done, ("response.content_part.done", self._placed(part=self._part(text, self.logprobs)))]

    def written(self, status: str) -> Json:
        return self._item(status, [self._part("".join(self.texts), self.logprobs)])

    def _item(self, status: str, content: list[Json]) -> Json:
        own: Json = {"role": "assistant"} if self.kind == "content" else {"summary": []}
        return {"id": self._id, "type": self._type, "status": status, **own, "content": content}

    def _part(self, text: str, logprobs: list[Json]) -> Json:
        own = {"annotations": [], "logprobs": logprobs} if self.kind == "content" else {}
        return {"type": self._part_type, "text": text, **own}

    def _with_logprobs(self, logprobs: list[Json]) -> Json:
        return {"logprobs": logprobs} if self.kind == "content" else {}

    def _event(self, what: str, **said: Any) -> Event:
        return f"{self._events}.{what}", self._placed(**said)

    def _placed(self, **said: Any) -> Json:
        return {"item_id": self._id, "content_index": 0, **said}


@dataclass
class _Function(_Item):
    """A call."""

    made: Call

    def __post_init__(self) -> None:
        self._id = f"fc_{uuid.uuid4().hex}"

    def add(self, arguments: str) -> list[Event]:
        self.made.arguments += arguments
        return [("response.function_call_arguments.delta", {"item_id": self._id, "delta": arguments})] if arguments else []

    def empty(self) -> Json:
        return self.written("in_progress")

    def begun(self) -> list[Event]:
        return []

    def ended(self) -> list[Event]:
        return [("response.function_call_arguments.done", {"item_id": self._id, "name": self.made.name, "arguments": self.made.arguments})]

    def written(self, status: str) -> Json:
        call = self.made
        return {"id": self._id, "type": "function_call", "status": status, "call_id": call.call_id, "name": call.name, "arguments": call.arguments}


def _status(end: Finished) -> str:
    return "incomplete" if end.reason is FinishReason.LENGTH else "completed"


def _usage(end: Finished) -> Json:
    return {
        "input_tokens": end.prompt_tokens,
        "input_tokens_details": {"cached_tokens": end.timings.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": end.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": end.reasoning_tokens},
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }
