"""Messages to a prompt: the model's own chat template, run as Jinja in a sandbox, for it comes from a file that anyone may have written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
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
        """The prompt for `messages`; `kwargs` are the template's own switches. RequestError, in the template's words, when it refuses them."""
        names = {**kwargs, **self._tokens, "messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(names, range=_bounded_range())
        except _Refused as error:
            raise RequestError(str(error), param="messages") from error
        except Exception as error:  # the template is a foreign program: whatever it raises is about these messages
            raise RequestError(f"The model's chat template cannot take these messages ({error}). Check their roles and contents.", param="messages") from error


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


def _tojson(value: Any, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False, **_: Any) -> str:
    """JSON as models were trained on it: no ASCII escapes, no HTML escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


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
