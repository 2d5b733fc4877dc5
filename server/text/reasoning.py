"""Reasoning and answer told apart while a reply streams in: what stands between <think> and </think> at its start, and what follows."""

from __future__ import annotations

from enum import Enum, auto
from typing import Literal

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

Kind = Literal["reasoning", "content"]


class _State(Enum):
    START = auto()  # only whitespace, or a beginning of <think>, so far
    REASONING = auto()
    ANSWER = auto()  # </think> seen; newlines before the answer are dropped
    CONTENT = auto()


class ReasoningParser:
    """One reply, pushed piece by piece. However the text is cut, the joined pieces of each kind are the same.

    `opened`: the prompt ended inside <think>, so the reply starts in the reasoning. Otherwise <think> counts only at the very start of the reply,
    after whitespace; a reply without it is all content, a reply that never closes it is all reasoning. Neither tag is part of either text, nor are
    the newlines next to them. A second <think> right after an opened one is dropped as well: some models repeat the tag. `raw`: nothing is dropped, and
    the tags are part of the reasoning.
    """

    def __init__(self, *, opened: bool, raw: bool = False) -> None:
        self._opened = opened
        self._raw = raw
        self._state = _State.START
        self._held = ""  # text that cannot be told yet
        self._bare = True  # no reasoning has come yet: leading newlines are dropped

    @property
    def thinking(self) -> bool:
        """Whether the reply, as far as it is known, ends within the reasoning."""
        return self._state is _State.REASONING or (self._state is _State.START and self._opened)

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """More of the reply; returns what is certain now, in order, nothing empty."""
        self._held += text
        pieces: list[tuple[Kind, str]] = []
        if self._state is _State.START:
            self._start()
        if self._state is _State.REASONING:
            pieces.append(("reasoning", self._reasoning()))
        if self._state is _State.ANSWER:
            self._answer()
        if self._state is _State.CONTENT:
            pieces.append(("content", self._take(len(self._held))))
        return [piece for piece in pieces if piece[1]]

    def flush(self) -> list[tuple[Kind, str]]:
        """The reply is over; returns what was held back."""
        reasoning = self.thinking
        rest = self._take(len(self._held))
        if reasoning and self._bare and not self._raw:
            rest = rest.lstrip("\n")
        return [("reasoning" if reasoning else "content", rest)] if rest and self._state is not _State.ANSWER else []

    def _start(self) -> None:
        begin = self._held.lstrip()
        if begin.startswith(THINK_OPEN):
            self._held = self._held if self._raw else begin.removeprefix(THINK_OPEN)
            self._state = _State.REASONING
        elif not THINK_OPEN.startswith(begin):
            self._state = _State.REASONING if self._opened else _State.CONTENT

    def _reasoning(self) -> str:
        """Certain reasoning: up to the tag, or all but what may be the tag's beginning and the newlines before it."""
        if self._bare and not self._raw:
            self._held = self._held.lstrip("\n")
        before, tag, after = self._held.partition(THINK_CLOSE)
        if tag:
            self._held, self._state = after, _State.ANSWER
            return before + tag if self._raw else before.rstrip("\n")
        keep = next(size for size in range(len(THINK_CLOSE) - 1, -1, -1) if self._held.endswith(THINK_CLOSE[:size]))
        told = self._held[: len(self._held) - keep]
        certain = self._take(len(told if self._raw else told.rstrip("\n")))
        self._bare = self._bare and not certain
        return certain

    def _answer(self) -> None:
        if not self._raw:
            self._held = self._held.lstrip("\n")
        if self._held:
            self._state = _State.CONTENT

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        return taken
