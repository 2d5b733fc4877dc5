"""Messages to a prompt: the model's own chat template, run as Jinja in a sandbox, for it comes from a file that anyone may have written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

from server.errors import RequestError, UnsupportedModel
from server.text.reasoning import THINK_OPEN

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatTemplate:
    """A compiled chat template; UnsupportedModel when its source is not valid Jinja."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UnsupportedModel(
                f"The model's chat template is not valid Jinja (line {error.lineno}: {error.message}). Give a directory with another one with --model_path."
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`; `kwargs` are the template's own switches. RequestError, in the template's words, when it refuses them.

        Messages are as on OpenAI's wire; a call's `arguments` may be JSON text or the object itself, and content beside calls may be null or absent.
        """
        names = {**kwargs, **self._tokens, "tools": tools, "add_generation_prompt": add_generation_prompt}
        if any(message.get("tool_calls") for message in messages):
            messages = _with_calls(messages, *self._call_form)
        return self._render(names, messages)

    @cached_property
    def _call_form(self) -> tuple[Callable[[Any], Any], str | None]:
        """How this template expects a call: arguments as an object or as JSON text, no content as empty text or as null.

        Found by trying, since on the wrong form some fail, some go on without the call (DeepSeek's leave it out unless the content is null), and
        some write the object as Python does.
        """
        forms: list[tuple[Callable[[Any], Any], str | None]] = [(_as_object, ""), (_as_object, None), (_as_json_text, ""), (_as_json_text, None)]
        for form in forms:
            with suppress(RequestError):
                prompt = self._render({**self._tokens, "tools": None}, _with_calls(_PROBE, *form))
                if _PROBED in prompt and str(_PROBED_ARGUMENTS) not in prompt:
                    return form
        return _as_object, ""

    def _render(self, names: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self._template.render(names, messages=messages, range=_bounded_range())
        except _Refused as error:
            raise RequestError(str(error), param="messages") from error
        except Exception as error:  # the template is a foreign program: whatever it raises is about these messages
            raise RequestError(f"The model's chat template cannot take these messages ({error}). Check their roles and contents.", param="messages") from error


_PROBED = "probed_function"
_PROBED_ARGUMENTS = {"probe": "probe"}
_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "probe"},
    {"role": "assistant", "tool_calls": [{"id": "probe0001", "type": "function", "function": {"name": _PROBED, "arguments": _PROBED_ARGUMENTS}}]},
    {"role": "tool", "tool_call_id": "probe0001", "name": "probe", "content": "probe"},
]


def _with_calls(messages: Sequence[Mapping[str, Any]], arguments: Callable[[Any], Any], nothing: str | None) -> list[Mapping[str, Any]]:
    """The messages with `arguments` applied to each call's, and `nothing` as the content of calls that have none."""
    return [
        {**message, "content": message.get("content") or nothing, "tool_calls": [_with_arguments(call, arguments) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_arguments(call: Mapping[str, Any], arguments: Callable[[Any], Any]) -> Mapping[str, Any]:
    """The call with its arguments rewritten; what is no call of a function is left for the template to refuse."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    return {**call, "function": {**function, "arguments": arguments(function.get("arguments", {}))}}


def _as_object(arguments: Any) -> Any:
    """The object that JSON text holds; text that is no JSON stays as a model wrote it."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _as_json_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else _tojson(arguments)


def force_think(prompt: str) -> str:
    """`prompt` ending in "<think>\\n" exactly once, whether or not its template had opened the tag."""
    opened = prompt.rstrip() if opens_think(prompt) else prompt + THINK_OPEN
    return opened + "\n"


def opens_think(prompt: str) -> bool:
    """Whether the reply to `prompt` starts inside the reasoning."""
    return prompt.rstrip().endswith(THINK_OPEN)


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates expect to find, as `transformers` gives it to them."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Refused(jinja2.TemplateError):
    """A template's own refusal."""


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """JSON as models were trained on it: no HTML escapes, and ASCII escapes only on request."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bounded_range() -> Callable[..., range]:
    """A `range` whose calls together give one rendering at most MAX_RANGE turns: the sandbox bounds each call alone, and loops nest."""
    left = MAX_RANGE

    def bounded(*arguments: int) -> range:
        nonlocal left
        numbers = range(*arguments)
        left -= len(numbers)
        if left < 0:
            raise OverflowError(f"it counts further than {MAX_RANGE}")
        return numbers

    return bounded


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said, for training; here the block is just its body."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
