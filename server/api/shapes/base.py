"""What every protocol's reply has in common.

A reply is a sequence of parts: text of the reasoning or of the answer (Piece), calls of tools (ToolCall), and its end (Finished). A Shape turns
parts into events, which are plain dicts; its framing says how events become bytes.

Dicts and json.dumps rather than pydantic: an event is made for every token, on CPU cores that the model wants.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from server.api.framing import Framing, comment
from server.api.problems import Json, Problem
from server.scheduler.reply import Finished, Part, Piece, ToolCall
from server.text.reasoning import Kind
from server.types import TokenLogprob


@dataclass(slots=True)
class Call:
    """One whole call of a tool."""

    call_id: str
    name: str
    arguments: str  # JSON text

    def parsed(self) -> Json:
        """The arguments as an object. What a model wrote instead, or when it was cut off, stands in one, under the key that Anthropic's documents name."""
        try:
            made = json.loads(self.arguments or "{}")
            json.dumps(made, allow_nan=False, ensure_ascii=False).encode()  # NaN and half surrogate pairs cannot be sent
        except (ValueError, RecursionError):
            made = None
        return made if isinstance(made, dict) else {"INVALID_JSON": self.arguments}


@dataclass(slots=True)
class Choice:
    """One whole reply, gathered."""

    pieces: list[Piece] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    end: Finished | None = None

    def add(self, part: Part) -> None:
        """The next part of the reply."""
        match part:
            case Piece():
                self.pieces.append(part)
            case ToolCall(call_id=str(call_id), name=str(name)):
                self.calls.append(Call(call_id, name, part.arguments))
            case ToolCall():
                self.calls[part.index].arguments += part.arguments
            case Finished():
                self.end = part

    def text(self, kind: Kind) -> str:
        """All text of one kind."""
        return "".join([piece.text for piece in self.pieces if piece.kind == kind])

    def logprobs(self, kind: Kind) -> list[TokenLogprob]:
        """The log probabilities that came with text of one kind."""
        return [logprob for piece in self.pieces if piece.kind == kind for logprob in piece.logprobs]


class Shape(ABC):
    """How one request's replies are written, streamed and whole. One is made for each request and keeps what its events need to know of earlier ones.

    `index` is the place of a reply among those that the request asked for. Replies come one after another, each ends once, and nothing follows the
    last one's end.
    """

    framing: ClassVar[Framing]

    def opening(self) -> list[Json]:
        """The events before the first part."""
        return []

    @abstractmethod
    def piece(self, index: int, piece: Piece) -> list[Json]:
        """Some text."""

    @abstractmethod
    def call(self, index: int, call: ToolCall) -> list[Json]:
        """A part of a call."""

    @abstractmethod
    def ending(self, index: int, end: Finished) -> list[Json]:
        """The end of a reply; after the last one's also what ends the stream."""

    @abstractmethod
    def failure(self, problem: Problem) -> list[Json]:
        """What a stream says instead of an end."""

    def alive(self, status: str) -> bytes:
        """What keeps the connection open while nothing comes; `status` is for people. A comment, unless the protocol has something of its own."""
        return comment(status)

    @abstractmethod
    def whole(self, choices: Sequence[Choice]) -> Json:
        """The reply to a client that does not stream."""
