"""What OpenAI's two older shapes, chats and completions, have in common: chunks of choices.

`timings` is llama.cpp's addition, which Open WebUI shows; it is left out where there is none, because null breaks that client.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from server.api import problems
from server.api.framing import DATA
from server.api.problems import Json, Problem
from server.api.shapes.base import Choice, Shape
from server.api.shapes.usage import timings, usage
from server.scheduler.reply import Finished
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the client asked for, as far as the reply's shape goes."""

    choices: int = 1
    logprobs: bool = False
    include_usage: bool = False  # in a chunk of its own at the end of a stream


class OpenAIShape(Shape):
    """Chunks that share a head."""

    framing = DATA
    reply_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, reply_id: str, created: int, model: str, tokenizer: Tokenizer, wanted: Wanted) -> None:
        self._head: Json = {"id": reply_id, "object": self.chunk_object, "created": created, "model": model}
        self._tokenizer = tokenizer
        self._wanted = wanted
        self._ends: list[Finished] = []

    def ending(self, index: int, end: Finished) -> list[Json]:
        """`timings` go with the very last chunk, which is the usage chunk where that was asked for."""
        self._ends.append(end)
        if len(self._ends) < self._wanted.choices:
            return [self._chunk([self._last(index, end)])]
        if not self._wanted.include_usage:
            return [self._chunk([self._last(index, end)], timings=timings(self._ends))]
        return [self._chunk([self._last(index, end)]), self._chunk([], usage=usage(self._ends), timings=timings(self._ends))]

    def failure(self, problem: Problem) -> list[Json]:
        return [problems.openai(problem)]

    def whole(self, choices: Sequence[Choice]) -> Json:
        ends = [choice.end for choice in choices if choice.end is not None]
        written = [self._choice(index, choice, end) for index, (choice, end) in enumerate(zip(choices, ends, strict=True))]
        return {**self._head, "object": self.reply_object, "choices": written, "usage": usage(ends), "timings": timings(ends)}

    def _chunk(self, choices: list[Json], **more: Any) -> Json:
        return {**self._head, "choices": choices, **more}

    @abstractmethod
    def _last(self, index: int, end: Finished) -> Json:
        """The choice that carries a finish_reason in a stream."""

    @abstractmethod
    def _choice(self, index: int, choice: Choice, end: Finished) -> Json:
        """A choice of a whole reply."""
