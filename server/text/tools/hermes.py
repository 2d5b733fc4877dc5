"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen2.5, Qwen3, and models that were taught nothing else."""

from __future__ import annotations

from server.text.tools.calls import CallParser
from server.text.tools.scanning import Wait


class HermesCalls(CallParser):
    """One JSON object between two tags."""

    begins = ("<tool_call>",)
    ends = ("</tool_call>",)

    def _call(self, marker: str) -> Wait[bool]:
        yield from self._scanner.skip_space()
        return (yield from self._json_call())
