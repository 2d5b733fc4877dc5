"""Messages to a prompt: the model's own chat template, run as Jinja in a sandbox, for it comes from a file that anyone may have written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

from server.errors import RequestError, UnsupportedModel
from server.text.reasoning import THINK_CLOSE, THINK_OPEN
from server.text.template_tools import ToolDialect, find_dialect

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatTemplate:
    """A compiled chat template; UnsupportedModel when its source is not valid Jinja. `with_tools`: another one, for chats with tools or calls."""

    def __init__(self, source: str, *, with_tools: str | None = None, bos_token: str = "", eos_token: str = "") -> None:
        self._with_tools = None if with_tools is None else ChatTemplate(with_tools, bos_token=bos_token, eos_token=eos_token)
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))  # what the template reads
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
        if tools or any(message.get("tool_calls") or message.get("role") == "tool" for message in messages):
            if self._with_tools is not None:
                return self._with_tools.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **kwargs)
            messages, tools = self.dialect.prepare(messages, tools)
        return self._render({**kwargs, **self._tokens, "tools": tools, "add_generation_prompt": add_generation_prompt}, messages)

    def continued(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any) -> str:
        """The prompt that ends within the last message, the assistant's, which the reply continues."""
        *others, last = messages
        said = last.get("content") or ""
        if not said and last.get("reasoning_content"):
            said = f"{THINK_OPEN}\n{last['reasoning_content']}"
        stand_in = {"role": last["role"], "content": _STAND_IN}  # the template may trim or cut the text itself
        before, found, _ = self.render([*others, stand_in], tools=tools, add_generation_prompt=False, **kwargs).rpartition(_STAND_IN)
        if not found:
            said = "The model's chat template leaves out the last message, so it cannot be continued. Let a user's message be the last."
            raise RequestError(said, param="messages")
        return (_without_empty_thoughts(before) if said.lstrip().startswith(THINK_OPEN) else before) + said

    @cached_property
    def dialect(self) -> ToolDialect:
        """How this template takes calls and tools."""
        if self._with_tools is not None:
            return self._with_tools.dialect
        return find_dialect(lambda messages, tools: self._render({**self._tokens, "tools": tools, "add_generation_prompt": True}, messages), self._source)

    def _render(self, names: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self._template.render(names, messages=messages, range=_bounded_range())
        except _Refused as error:
            raise RequestError(str(error), param="messages") from error
        except Exception as error:  # the template is a foreign program: whatever it raises is about these messages
            raise RequestError(f"The model's chat template cannot take these messages ({error}). Check their roles and contents.", param="messages") from error


_STAND_IN = "\u2402continue here\u2403"


def _without_empty_thoughts(prompt: str) -> str:
    """The prompt without the pair of tags that some templates put before a reply that has no thoughts."""
    opened, tag, between = prompt.rpartition(THINK_OPEN)
    return opened if tag and between.strip() == THINK_CLOSE else prompt


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
