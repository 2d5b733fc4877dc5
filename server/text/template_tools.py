"""How a chat template takes calls and tools, found by trying it, and what is done for templates that take them in no way that is known.

A template that writes no tools has them told in the system text, in the format that its calls have, else in Hermes' tags, which most models understand.
Calls and results of earlier turns that it cannot write become text of the assistant and of the user.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

from server.errors import RequestError
from server.text.tools.formats import HERMES, ToolFormat, find_format

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]  # messages and tools -> prompt; RequestError

_FUNCTION, _RESULT, _SYSTEM = "probed_function", "probed_result", "probed_system"
_VALUE = "probed_value"
_ARGUMENTS = {"probe": _VALUE}
_TOOL = {"type": "function", "function": {"name": _FUNCTION, "description": "probe", "parameters": {"type": "object", "properties": {}}}}
_USER = {"role": "user", "content": "probe"}
_CALLED: list[Message] = [
    _USER,
    {"role": "assistant", "tool_calls": [{"id": "probed_call_id", "type": "function", "function": {"name": _FUNCTION, "arguments": _ARGUMENTS}}]},
    {"role": "tool", "tool_call_id": "probed_call_id", "name": _FUNCTION, "content": _RESULT},
]
_SHORT_ID = 9  # characters, letters and digits: what Mistral's templates insist on


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template wants a call."""

    as_text: bool  # its arguments: JSON text, or the object itself
    nothing: str | None  # the content beside calls where there is none
    short_ids: bool

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their calls in this form."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        if self.short_ids and message.get("tool_call_id") is not None:
            message = {**message, "tool_call_id": _short_id(message["tool_call_id"])}
        if not message.get("tool_calls"):
            return message
        return {**message, "content": message.get("content") or self.nothing, "tool_calls": [self._call(call) for call in message["tool_calls"]]}

    def _call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        """The call rewritten; what is no call of a function is left for the template to refuse."""
        function = call.get("function")
        if not isinstance(function, Mapping):
            return call
        arguments = function.get("arguments", {})
        written = {**call, "function": {**function, "arguments": _as_json_text(arguments) if self.as_text else _as_object(arguments)}}
        return {**written, "id": _short_id(call["id"])} if self.short_ids and "id" in call else written


@dataclass(frozen=True, slots=True)
class ToolDialect:
    """What one template does with calls and tools."""

    format: ToolFormat  # of the calls in its model's replies
    known: bool  # the model was taught that format; else it is one for all, of which the model must be told
    form: CallForm | None  # None: it writes no calls
    writes_tools: bool
    takes_system: bool

    def prepare(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> tuple[list[Message], Sequence[Mapping[str, Any]] | None]:
        """Messages and tools as the template takes them."""
        prepared = self.form.apply(messages) if self.form else _calls_as_text(messages, self.format)
        if not tools or self.writes_tools:
            return prepared, tools
        return self._told(prepared, _description(tools, self.format)), None

    def _told(self, messages: list[Message], text: str) -> list[Message]:
        """The messages with a text for the model before them: in the system's, or in the first one where the template takes no system."""
        role = "system" if self.takes_system else "user"
        if messages and messages[0].get("role") == role:
            return [{**messages[0], "content": f"{messages[0].get('content') or ''}\n\n{text}".strip()}, *messages[1:]]
        return [{"role": role, "content": text}, *messages]


def find_dialect(render: Render, source: str) -> ToolDialect:
    """Try a template with a call, a tool and a system text. Where it writes no calls, its source may still tell the model how to write them."""
    form, written = _find_form(render)
    known = find_format(written) if form else find_format(source)
    tools = known is not None and _shows(render, [_USER], _FUNCTION, [_TOOL])
    return ToolDialect(known or HERMES, known is not None, form, tools, _shows(render, [{"role": "system", "content": _SYSTEM}, _USER], _SYSTEM))


def _find_form(render: Render) -> tuple[CallForm | None, str]:
    """The first form of calls with which all that was said stands in the prompt, and that prompt.

    By trying, since on the wrong form some templates fail, some go on without the call (DeepSeek's leave it out unless the content is null), and some
    write the object as Python does.
    """
    forms = [CallForm(as_text, nothing, short_ids) for short_ids in (False, True) for as_text in (False, True) for nothing in ("", None)]
    for form, tools in product(forms, (None, [_TOOL])):
        with suppress(RequestError):
            prompt = render(form.apply(_CALLED), tools)
            if _FUNCTION in prompt and _VALUE in prompt and _RESULT in prompt and str(_ARGUMENTS) not in prompt:
                return form, prompt
    return None, ""


def _shows(render: Render, messages: Sequence[Message], wanted: str, tools: Sequence[Mapping[str, Any]] | None = None) -> bool:
    with suppress(RequestError):
        return wanted in render(messages, tools)
    return False


def _description(tools: Iterable[Mapping[str, Any]], form: ToolFormat) -> str:
    """What a model is told whose template tells it nothing."""
    listed = "\n".join([json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools])
    example = form.write([("name_of_the_function", {"parameter": "value"})])
    return (
        f"You may call these functions, described in JSON:\n<tools>\n{listed}\n</tools>\n"
        f"To call one, write exactly this, with its name and arguments, and nothing behind it; the result comes with the next message:\n{example}"
    )


def _calls_as_text(messages: Sequence[Message], form: ToolFormat) -> list[Message]:
    """Calls as the assistant's text and results as the user's; what the user says next is put to the results, since turns must alternate."""
    written: list[Message] = []
    results_before = False
    for message in messages:
        plain = _as_text(message, form)
        is_result = message.get("role") == "tool"
        if written and results_before and plain["role"] == "user":
            written[-1] = {**written[-1], "content": f"{written[-1]['content']}\n{plain.get('content') or ''}"}
        else:
            written.append(plain)
        results_before = is_result or (results_before and plain["role"] == "user")
    return written


def _as_text(message: Message, form: ToolFormat) -> Message:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content')}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    functions = [call.get("function") for call in message["tool_calls"]]
    if not all(isinstance(function, Mapping) and isinstance(function.get("name"), str) for function in functions):
        raise RequestError("A message has tool_calls that are not calls of functions. Give each a 'function' with 'name' and 'arguments'.", param="messages")
    arguments = [_as_object(function.get("arguments", {})) for function in functions]
    calls = form.write([(function["name"], each if isinstance(each, Mapping) else {}) for function, each in zip(functions, arguments, strict=True)])
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, (message.get("content"), calls)))}


def _short_id(call_id: object) -> str:
    """Always the same nine letters and digits for an id; one that is so already stays."""
    text = str(call_id)
    return text if len(text) == _SHORT_ID and text.isalnum() else hashlib.sha256(text.encode()).hexdigest()[:_SHORT_ID]


def _as_object(arguments: Any) -> Any:
    """The object that JSON text holds, an empty one for none; text that is no JSON stays as a model wrote it."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments or "{}") or {}
    except (ValueError, RecursionError):
        return arguments


def _as_json_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
