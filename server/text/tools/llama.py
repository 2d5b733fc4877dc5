"""Llama 3's: the reply is {"name": ..., "parameters": {...}} and nothing else, or that behind <|python_tag|>; several with semicolons between.

With no marker, JSON counts as a call at the reply's very start alone, and only where its name is that of a function that was offered.
"""

from __future__ import annotations

from server.text.tools.calls import CallParser
from server.text.tools.scanning import Wait

PYTHON_TAG = "<|python_tag|>"


class LlamaCalls(CallParser):
    """Bare JSON."""

    begins = (PYTHON_TAG,)

    def _reply(self) -> Wait[None]:
        yield from self._scanner.skip_space()
        if (yield from self._scanner.peek()) != "{" or not (yield from self._objects()):
            self._text("".join(self._scanner.consumed))
        yield from super()._reply()

    def _call(self, marker: str) -> Wait[bool]:
        yield from self._scanner.skip_space()
        return (yield from self._objects())

    def _objects(self) -> Wait[bool]:
        """One call or several. What follows and is no further call becomes text."""
        if not (yield from self._json_call()):
            return False
        while True:
            self._scanner.consumed.clear()
            yield from self._scanner.skip_space()
            yield from self._scanner.literal(";", ",")
            yield from self._scanner.skip_space()
            if (yield from self._scanner.peek()) != "{":
                return False
            if not (yield from self._json_call()):
                return False

    def _knows(self, name: str) -> bool:
        return name in self._tools
