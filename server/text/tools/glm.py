"""GLM-4.5's tags: <tool_call>NAME\\n<arg_key>KEY</arg_key>\\n<arg_value>VALUE</arg_value>...</tool_call>; values are plain text or JSON."""

from __future__ import annotations

from server.text.tools.calls import CallParser
from server.text.tools.scanning import Wait
from server.text.tools.typed import TypedArguments

KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


class GlmCalls(CallParser):
    """The name stands on the tag's own line, or right before the first key."""

    begins = ("<tool_call>",)
    ends = ("</tool_call>",)
    within = (KEY, KEY_END, VALUE)

    def _call(self, marker: str) -> Wait[bool]:
        yield from self._scanner.skip_space()
        name: list[str] = []
        found = yield from self._scanner.until(("\n", KEY, *self.ends), name.append)
        written = "".join(name).strip()
        if not found or not self._knows(written) or not written.replace("-", "").replace(".", "").isidentifier():
            return False
        arguments = TypedArguments(self._scanner, self.schema(written), self.begin(written))
        while (key := (yield from self._key_of_value())) is not None:
            if not (yield from arguments.add(key, VALUE_END, line_breaks=False)):
                return True
        if (yield from self._scanner.literal(*self.ends)) or not self._scanner.over:  # else it was cut short
            arguments.end()
        return True

    def _key_of_value(self) -> Wait[str | None]:
        """The next argument's key, up to its value; None behind the last one."""
        yield from self._scanner.skip_space()
        if not (yield from self._scanner.literal(KEY)):
            return None
        key: list[str] = []
        if not (yield from self._scanner.until((KEY_END,), key.append)):
            return None
        yield from self._scanner.literal(KEY_END)
        yield from self._scanner.skip_space()
        return "".join(key).strip() if (yield from self._scanner.literal(VALUE)) else None
