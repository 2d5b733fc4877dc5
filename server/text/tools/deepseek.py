"""DeepSeek's special tokens. V2.5, V3 and R1 write a kind, a name and a fenced block of JSON; V3.1 a name and bare JSON.

CALLS_BEGIN CALL_BEGIN function SEPARATOR name, then a block fenced as ```json, CALL_END ... CALLS_END
CALLS_BEGIN CALL_BEGIN name SEPARATOR {...} CALL_END ... CALLS_END
"""

from __future__ import annotations

from server.text.tools.calls import CallParser
from server.text.tools.scanning import Wait

CALLS_BEGIN = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
CALLS_END = "<\uff5ctool\u2581calls\u2581end\uff5c>"
CALL_BEGIN = "<\uff5ctool\u2581call\u2581begin\uff5c>"
CALL_END = "<\uff5ctool\u2581call\u2581end\uff5c>"
SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"

_FENCE = "```"


class DeepSeekCalls(CallParser):
    """Both forms; which one it is shows behind the separator."""

    begins = (CALLS_BEGIN, CALL_BEGIN)  # R1 leaves the first one out at times
    ends = (CALL_END, CALLS_END)
    within = (_FENCE,)

    def _call(self, marker: str) -> Wait[bool]:
        if marker == CALLS_BEGIN:
            yield from self._scanner.skip_space()
            if not (yield from self._scanner.literal(CALL_BEGIN)):
                return False
        before: list[str] = []
        if (yield from self._scanner.until((SEPARATOR, *self.begins, *self.ends), before.append)) != SEPARATOR:
            return False
        yield from self._scanner.literal(SEPARATOR)
        yield from self._scanner.skip_space()
        if (yield from self._scanner.peek()) == "{":
            return (yield from self._named_call("".join(before), bounds=self.ends))
        return (yield from self._fenced())

    def _fenced(self) -> Wait[bool]:
        name: list[str] = []
        if (yield from self._scanner.until(("\n", "{", _FENCE, *self.begins, *self.ends), name.append)) in (*self.begins, *self.ends, ""):
            return False
        yield from self._scanner.skip_space()
        if (yield from self._scanner.literal(_FENCE)):
            yield from self._scanner.literal("json")
        if not (yield from self._named_call("".join(name), bounds=self.ends)):
            return False
        yield from self._scanner.skip_space()
        yield from self._scanner.literal(_FENCE)
        return True
