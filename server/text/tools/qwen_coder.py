"""Qwen3-Coder's tags: <tool_call><function=NAME><parameter=KEY>\\nVALUE\\n</parameter>...</function></tool_call>; values are plain text."""

from __future__ import annotations

from server.text.tools.calls import CallParser
from server.text.tools.scanning import Wait
from server.text.tools.typed import TypedArguments

FUNCTION, PARAMETER = "<function=", "<parameter="


class QwenCoderCalls(CallParser):
    """The outer tags are left out at times."""

    begins = ("<tool_call>", FUNCTION)
    ends = ("</function>", "</tool_call>")
    within = (PARAMETER,)

    def _call(self, marker: str) -> Wait[bool]:
        if marker != FUNCTION:
            yield from self._scanner.skip_space()
            if not (yield from self._scanner.literal(FUNCTION)):
                return False
        name = yield from self._name()
        if name is None or not self._knows(name):
            return False
        arguments = TypedArguments(self._scanner, self.schema(name), self.begin(name))
        while (key := (yield from self._parameter())) is not None:
            if not (yield from arguments.add(key, "</parameter>", line_breaks=True)):
                return True
        if (yield from self._scanner.literal(*self.ends)) or not self._scanner.over:  # else it was cut short
            arguments.end()
        return True

    def _parameter(self) -> Wait[str | None]:
        """The next parameter's key; None behind the last one."""
        yield from self._scanner.skip_space()
        if not (yield from self._scanner.literal(PARAMETER)):
            return None
        return (yield from self._name())

    def _name(self) -> Wait[str | None]:
        """What stands up to the next ">", on one line."""
        pieces: list[str] = []
        if (yield from self._scanner.until((">", "\n", "<"), pieces.append)) != ">":
            return None
        self._scanner.take(1)
        return "".join(pieces).strip()
