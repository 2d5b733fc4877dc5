"""[TOOL_CALLS] and a list of {"name", "arguments"}: Mixtral 8x22B, Mistral Nemo. Newer ones: [TOOL_CALLS]NAME[CALL_ID]ID[ARGS]{...}, a marker each."""

from __future__ import annotations

import re

from server.text.tools.calls import CallParser
from server.text.tools.scanning import Wait

MARKER, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


class MistralCalls(CallParser):
    """Both forms; which one it is shows behind the marker."""

    begins = (MARKER,)

    def _call(self, marker: str) -> Wait[bool]:
        yield from self._scanner.skip_space()
        if (yield from self._scanner.peek()) not in ("[", "{"):
            return (yield from self._named())
        several = yield from self._scanner.literal("[")
        while True:
            yield from self._scanner.skip_space()
            if not (yield from self._json_call()):
                return False
            yield from self._scanner.skip_space()
            if not several or not (yield from self._scanner.literal(",")):
                break
        return not several or bool((yield from self._scanner.literal("]")))

    def _named(self) -> Wait[bool]:
        head: list[str] = []
        if (yield from self._scanner.until((ARGUMENTS, "{", MARKER, "\n"), head.append)) not in (ARGUMENTS, "{"):
            return False
        name, _, call_id = "".join(head).partition(CALL_ID)
        if not re.fullmatch(r"[\w.-]+", name.strip()):
            return False
        yield from self._scanner.literal(ARGUMENTS)
        return (yield from self._named_call(name, call_id.strip() or None))
