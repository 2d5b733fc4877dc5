"""Kimi K2's special tokens: <|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>, in a section.

The id is the model's own and goes to the client as it is: the template writes it again beside the result, and the model reads the name there.
"""

from __future__ import annotations

import re

from server.text.tools.calls import CallParser
from server.text.tools.scanning import Wait

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENTS = "<|tool_call_argument_begin|>"


class KimiCalls(CallParser):
    """A call's name is in its id."""

    begins = (SECTION_BEGIN, CALL_BEGIN)
    ends = (CALL_END, SECTION_END)

    def _call(self, marker: str) -> Wait[bool]:
        if marker == SECTION_BEGIN:
            yield from self._scanner.skip_space()
            if not (yield from self._scanner.literal(CALL_BEGIN)):
                return False
        written: list[str] = []
        if (yield from self._scanner.until((ARGUMENTS, *self.begins, *self.ends), written.append)) != ARGUMENTS:
            return False
        call_id = "".join(written).strip()
        yield from self._scanner.literal(ARGUMENTS)
        return (yield from self._named_call(re.sub(r"^functions\.|:\d+$", "", call_id), call_id, self.ends))
