"""What all parsers share: text up to a marker, an attempt at a call behind it, and text again where it is none."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from server.text.tools.scanning import Out, Scanner, Wait

Schema = Mapping[str, Any]  # JSON Schema of an object: what a function takes


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Schema = field(default_factory=dict)
    strict: bool = False  # calls must follow the schema


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Part of one call; the first one of a call has its id and name."""

    index: int  # of the call within the reply
    arguments: str  # what is added to its arguments' JSON text
    call_id: str | None = None
    name: str | None = None


def new_call_id() -> str:
    """An id as OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"


class CallParser(ABC):
    """One reply, pushed piece by piece. Text and calls come out in order; markers of calls, and the white space beside them, are neither."""

    begins: ClassVar[tuple[str, ...]]  # each may begin a call; no marker is the beginning of another one
    ends: ClassVar[tuple[str, ...]] = ()  # dropped behind a call, text elsewhere
    within: ClassVar[tuple[str, ...]] = ()  # other syntax of calls; a reply that is cut in it does not show the half of it

    def __init__(self, tools: Sequence[Tool], new_id: Callable[[], str] = new_call_id) -> None:
        self.calls = 0  # so far
        self._tools = {tool.name: tool for tool in tools}
        self._new_id = new_id
        self._scanner = Scanner()
        self._parts: list[str | ToolCall] = []
        self._space = ""  # white space that is text only if more text follows
        self._steps = self._reply()

    def push(self, text: str) -> list[str | ToolCall]:
        """More of the reply; returns what is certain now, nothing empty."""
        self._scanner.text += text
        return self._run()

    def flush(self) -> list[str | ToolCall]:
        """The reply is over; returns what was held back."""
        self._scanner.over = True
        return self._run()

    def _run(self) -> list[str | ToolCall]:
        next(self._steps, None)
        parts, self._parts = self._parts, []
        return parts

    def _reply(self) -> Wait[None]:
        """The whole reply, as a sentence."""
        while marker := (yield from self._scanner.until((*self.begins, *self.ends), self._text)):
            yield from self._marked(marker)
        half = self._scanner.take(len(self._scanner.text))  # of a marker
        if not self.calls:
            self._add_text(self._space + half)

    def _marked(self, marker: str) -> Wait[None]:
        """What a marker introduces: a call, or nothing."""
        if marker in self.ends and self.calls:
            self._scanner.take(len(marker))
            self._space = ""
            return
        space, self._space = self._space, ""
        self._scanner.consumed = [space]
        self._scanner.take(len(marker))
        if marker in self.ends or not (yield from self._call(marker)):
            cut = self._scanner.over and not self._scanner.text
            self._text("" if cut and self.calls else "".join(self._scanner.consumed))

    @abstractmethod
    def _call(self, marker: str) -> Wait[bool]:
        """Parse what follows `marker`. False when it is no call, or goes on as none does: what was consumed since the last part becomes text."""

    def _text(self, text: str) -> None:
        """Text to show; white space at its end waits for what follows."""
        self._scanner.consumed.clear()
        if self._scanner.over and self.calls and any(marker.startswith(text) for marker in self.within):
            return
        whole = self._space + text
        shown = whole.rstrip()
        self._space = whole[len(shown) :]
        self._add_text(shown)

    def _add_text(self, text: str) -> None:
        if text and self._parts and isinstance(self._parts[-1], str):
            self._parts[-1] += text
        elif text:
            self._parts.append(text)

    def begin(self, name: str, call_id: str | None = None) -> Out:
        """A call begins; returns what takes its arguments' text."""
        index, self.calls = self.calls, self.calls + 1
        self._parts.append(ToolCall(index, "", call_id or self._new_id(), name))
        self._scanner.consumed.clear()
        return lambda arguments: self._add_arguments(index, arguments)

    def _add_arguments(self, index: int, arguments: str) -> None:
        self._scanner.consumed.clear()
        last = self._parts[-1] if self._parts else None
        if isinstance(last, ToolCall) and last.index == index:
            self._parts[-1] = ToolCall(index, last.arguments + arguments, last.call_id, last.name)
        elif arguments:
            self._parts.append(ToolCall(index, arguments))

    def schema(self, name: str) -> Schema:
        """What a function takes; empty for one that was not offered."""
        return self._tools[name].parameters if name in self._tools else {}

    def _knows(self, name: str) -> bool:
        """Whether a name is one that may begin a call. Where a marker stands before it any is: the client answers that there is no such function."""
        return bool(name.strip())

    def _named_call(self, name: str, call_id: str | None = None, bounds: tuple[str, ...] = ()) -> Wait[bool]:
        """A call whose name is known already, and whose arguments come now as JSON."""
        yield from self._scanner.skip_space()
        if not self._knows(name) or (yield from self._scanner.peek()) not in ("{", '"', "n"):  # an object, text of one, or null
            return False
        return (yield from self._json_arguments(self.begin(name.strip(), call_id), bounds))

    def _json_arguments(self, out: Out, bounds: tuple[str, ...] = ()) -> Wait[bool]:
        """A call's arguments as JSON: an object as it is; what a model wrote as text is opened, and nothing is an empty object."""
        first = yield from self._scanner.peek()
        if first == "{":
            return (yield from self._scanner.json_value(out, bounds))
        pieces: list[str] = []
        whole = yield from self._scanner.json_value(pieces.append, bounds)
        out(_as_object_text("".join(pieces)) if whole else "".join(pieces))
        return whole

    def _json_call(self) -> Wait[bool]:
        """{"name": ..., "arguments": ...}, its keys in any order; others are passed over."""
        if not (yield from self._scanner.literal("{")):
            return False
        call = _JsonCall(self)
        while (key := (yield from self._key())) is not None:
            if key == "name" and not call.name:
                call.name = (yield from self._scanner.json_string()) or ""
                if not self._knows(call.name):
                    return False
                call.begin_if_both()
            elif key in ("arguments", "parameters") and not call.has_arguments:
                if not (yield from self._json_arguments(call.arguments())):
                    return False
            elif not (yield from self._scanner.json_value(_drop)):
                return False
        return bool((yield from self._scanner.literal("}"))) and call.end()

    def _key(self) -> Wait[str | None]:
        """The next key of an object and its colon; None where there is none."""
        yield from self._scanner.skip_space()
        if (yield from self._scanner.literal(",")):
            yield from self._scanner.skip_space()
        key = yield from self._scanner.json_string()
        if key is None:
            return None
        yield from self._scanner.skip_space()
        if not (yield from self._scanner.literal(":")):
            return None
        yield from self._scanner.skip_space()
        return key


class _JsonCall:
    """A call whose name and arguments may come in either order; it begins once both do."""

    def __init__(self, parser: CallParser) -> None:
        self.name = ""
        self.has_arguments = False
        self._parser = parser
        self._out: Out | None = None
        self._early: list[str] = []  # arguments that came before the name

    def begin_if_both(self) -> None:
        """Called when the name, or the beginning of the arguments, was seen."""
        if self.name and self.has_arguments and self._out is None:
            self._out = self._parser.begin(self.name)
            self._out("".join(self._early))

    def arguments(self) -> Out:
        """What takes the arguments' text."""
        self.has_arguments = True
        self.begin_if_both()
        return self._out or self._early.append

    def end(self) -> bool:
        """The object is over: a call without arguments has an empty object of them. False when it has no name."""
        if not self.has_arguments:
            self.arguments()("{}")
        return bool(self.name)


def _drop(text: str) -> None:
    """A key that nobody asked for."""


def _as_object_text(value: str) -> str:
    """Arguments that are not written as an object: JSON text within a string is opened; null, and an empty string, are an empty object."""
    try:
        opened = json.loads(value, strict=False)
        str(opened).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        return value
    if opened is None or opened == "":
        return "{}"
    return opened if isinstance(opened, str) else value
