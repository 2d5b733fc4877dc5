"""Text that is still coming in, for parsers written as generators: each step waits, by `yield`, for what it cannot decide yet.

Every decision depends on the text alone and never on where it was cut, so the joined parts are the same for any cut.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Wait = Generator[None, None, T]  # `yield` asks for more text
Out = Callable[[str], None]

_SPACE = " \n\r\t"
_SCALAR = "+-.0123456789" + string.ascii_letters
_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')


class Scanner:
    """The text that was not consumed yet, and how to consume it."""

    def __init__(self) -> None:
        self.text = ""
        self.over = False  # nothing more will come
        self.consumed: list[str] = []  # since it was last cleared: what an attempt that fails gives back

    def take(self, size: int) -> str:
        """Consume so many characters."""
        taken, self.text = self.text[:size], self.text[size:]
        self.consumed.append(taken)
        return taken

    def more(self) -> Wait[bool]:
        """Wait until there is more text than now; False when the reply is over."""
        size = len(self.text)
        while len(self.text) == size and not self.over:
            yield
        return len(self.text) > size

    def peek(self) -> Wait[str]:
        """The next character, "" at the end."""
        while not self.text:
            if not (yield from self.more()):
                return ""
        return self.text[0]

    def skip_space(self) -> Wait[None]:
        """Consume white space."""
        while (yield from self.peek()) and self.text[0] in _SPACE:
            self.take(len(self.text) - len(self.text.lstrip(_SPACE)))

    def literal(self, *wanted: str) -> Wait[str]:
        """Consume the longest of `wanted` that comes next; "" when none does."""
        while any(len(each) > len(self.text) and each.startswith(self.text) for each in wanted):
            if not (yield from self.more()):
                break
        return self.take(max((len(each) for each in wanted if self.text.startswith(each)), default=0))

    def until(self, markers: tuple[str, ...], out: Out) -> Wait[str]:
        """Give `out` the text up to the first of `markers`, as soon as it is certain; returns the marker, unconsumed.

        "" at the end of the reply, where half a marker may be left unconsumed. No marker is the beginning of another one.
        """
        while True:
            at, marker = min(((at, each) for each in markers if (at := self.text.find(each)) >= 0), default=(-1, ""))
            if marker:
                self._give(at, out)
                return marker
            self._give(len(self.text) - self._held(markers), out)
            if not (yield from self.more()):
                return ""

    def _held(self, markers: tuple[str, ...]) -> int:
        """Characters at the end that may be the beginning of a marker."""
        longest = min(max(map(len, markers), default=1) - 1, len(self.text))
        return next((size for size in range(longest, 0, -1) if any(each.startswith(self.text[-size:]) for each in markers)), 0)

    def _give(self, size: int, out: Out) -> None:
        if size > 0:
            out(self.take(size))

    def json_value(self, out: Out, bounds: tuple[str, ...] = ()) -> Wait[bool]:
        """Give `out` the raw text of one JSON value as it comes. False when the reply, or a marker of `bounds`, ends it early.

        Nesting and strings are followed, the rest is not checked: what a model wrote goes to the client as it is.
        """
        first = yield from self.peek()
        if first == '"':
            return (yield from self._string(out, bounds))
        if first not in ("{", "["):
            return (yield from self._scalar(out))
        depth = 0
        while True:
            found = yield from self._next(_STRUCTURE, out, bounds)
            if not found or (found == '"' and not (yield from self._string(out, bounds))):
                return False
            if found != '"':
                self._give(1, out)
                depth += 1 if found in "{[" else -1
            if depth == 0:
                return True

    def _string(self, out: Out, bounds: tuple[str, ...]) -> Wait[bool]:
        self._give(1, out)
        while found := (yield from self._next(_STRING_END, out, bounds)):
            if found == '"':
                self._give(1, out)
                return True
            while len(self.text) < 2 and (yield from self.more()):
                pass
            self._give(2, out)  # a backslash, and what it escapes
        return False

    def _next(self, pattern: re.Pattern[str], out: Out, bounds: tuple[str, ...]) -> Wait[str]:
        """Give `out` what comes before the pattern's next character; returns that, unconsumed, or "" at the end or a marker."""
        while True:
            match = pattern.search(self.text)
            limit = match.start() if match else len(self.text)
            bound = min((at for each in bounds if 0 <= (at := self.text.find(each)) < limit), default=None)
            if bound is not None:
                self._give(bound, out)
                return ""
            if match:
                self._give(limit, out)
                return match.group()
            self._give(limit - self._held(bounds), out)
            if not (yield from self.more()):
                self._give(len(self.text), out)
                return ""

    def _scalar(self, out: Out) -> Wait[bool]:
        """A number or a word: whole or not at all."""
        while (size := len(self.text) - len(self.text.lstrip(_SCALAR))) == len(self.text) and (yield from self.more()):
            pass
        self._give(size, out)
        return size > 0

    def json_string(self) -> Wait[str | None]:
        """Consume one JSON string; None where there is none, or none that is valid."""
        pieces: list[str] = []
        if (yield from self.peek()) != '"' or not (yield from self.json_value(pieces.append)):
            return None
        try:
            text = str(json.loads("".join(pieces), strict=False))
            text.encode()  # half of a surrogate pair is no text
            return text
        except ValueError:
            return None
