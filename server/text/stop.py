"""Stop strings found while text streams in, also across the borders of tokens.

They are looked for in the raw text of the reply, before reasoning and answer are told apart: a stop string inside the reasoning ends the reply too,
as it does in the engines that know nothing of reasoning, and one may be written across the closing tag.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """One reply, pushed piece by piece; however it is cut, the same text comes out.

    The stop string that is complete first ends the reply; of those complete at the same character the longest. It is never emitted, and no more text
    is held back than may yet become one. Each character costs a few steps for each stop string, whatever their length (Knuth, Morris and Pratt, 1977).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string is refused where the request is read"
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.found: str | None = None  # the stop string that ended the reply

    def push(self, text: str) -> tuple[str, bool]:
        """More of the reply; returns what may be shown now, and whether a stop string has ended it. Nothing is shown after that."""
        if self.found is not None:
            return "", True
        held = len(self._held)
        seen = self._held + text
        for position in range(held, len(seen)):
            matched = max((matcher.push(seen[position]) for matcher in self._matchers), default=0)
            if matched:
                begin = position + 1 - matched
                self._held, self.found = "", seen[begin : position + 1]
                return seen[:begin], True
        keep = max((matcher.matched for matcher in self._matchers), default=0)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep], False

    def flush(self) -> str:
        """The reply is over; returns what was held back."""
        rest, self._held = self._held, ""
        return rest


class _Matcher:
    """How much of one stop string the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._shorter = _borders(stop)
        self.matched = 0  # always less than len(stop) between pushes

    def push(self, char: str) -> int:
        """One more character; returns the stop string's length when it is complete now, else 0."""
        self.matched = _extend(self._stop, self._shorter, self.matched, char)
        if self.matched < len(self._stop):
            return 0
        self.matched = 0
        return len(self._stop)


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, by its length, the longest shorter prefix that it also ends with."""
    borders = [0, 0]
    for char in stop[1:]:
        borders.append(_extend(stop, borders, borders[-1], char))
    return borders


def _extend(stop: str, borders: list[int], matched: int, char: str) -> int:
    while matched and stop[matched] != char:
        matched = borders[matched]
    return matched + 1 if stop[matched] == char else 0
