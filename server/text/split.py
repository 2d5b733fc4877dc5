"""A reply's text told apart while it streams in: reasoning, answer, and calls of tools in the answer."""

from __future__ import annotations

from typing import Literal

from server.text.reasoning import Kind, ReasoningParser
from server.text.tools.calls import ToolCall
from server.text.tools.formats import ToolRules

Split = tuple[Kind, str] | ToolCall


class Splitter:
    """One reply, pushed piece by piece. However the text is cut, the joined parts are the same.

    `reasoning`: the state in which the prompt leaves <think>; None: do not look for reasoning. `raw`: reasoning becomes content, with its tags. `tools`
    None: do not look for calls. Calls that are thought about, within the reasoning, are none.
    """

    def __init__(self, reasoning: Literal["opened", "closed"] | None, tools: ToolRules | None, *, raw: bool = False) -> None:
        self._reasoning = ReasoningParser(opened=reasoning == "opened", raw=raw) if reasoning else None
        self._thought: Kind = "content" if raw else "reasoning"
        self._calls = tools.parser() if tools else None
        self._parallel = tools is None or tools.parallel
        self.finished = False  # no more calls are wanted: the rest is dropped

    @property
    def thinking(self) -> bool:
        """Whether the reply, as far as it is known, ends within the reasoning."""
        return self._reasoning is not None and self._reasoning.thinking

    @property
    def called(self) -> bool:
        """Whether the reply holds a call so far."""
        return self._calls is not None and self._calls.calls > 0

    def push(self, text: str) -> list[Split]:
        """More of the reply; returns what is certain now, in order, nothing empty."""
        if self._reasoning is not None:
            return self._with_calls(self._reasoning.push(text))
        return self._with_calls([("content", text)] if text else [])

    def flush(self) -> list[Split]:
        """The reply is over; returns what was held back."""
        parts = self._with_calls(self._reasoning.flush()) if self._reasoning is not None else []
        return parts if self._calls is None or self.finished else [*parts, *self._wanted(self._calls.flush())]

    def _with_calls(self, pieces: list[tuple[Kind, str]]) -> list[Split]:
        parts: list[Split] = []
        for kind, text in pieces:
            if kind == "reasoning":
                parts.append((self._thought, text))
            else:
                parts += [(kind, text)] if self._calls is None else self._wanted(self._calls.push(text))
        return parts

    def _wanted(self, parts: list[str | ToolCall]) -> list[Split]:
        """The parts up to a second call, where one is all that is wanted."""
        wanted: list[Split] = []
        for part in parts:
            self.finished = self.finished or (isinstance(part, ToolCall) and part.index > 0 and not self._parallel)
            if not self.finished:
                wanted.append(part if isinstance(part, ToolCall) else ("content", part))
        return wanted
