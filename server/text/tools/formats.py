"""Every format that calls are written in, a row each: who reads it, and how it is written, for examples and for replies that must be calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.text.tools import deepseek, kimi, mistral
from server.text.tools.calls import CallParser, Tool
from server.text.tools.deepseek import DeepSeekCalls
from server.text.tools.glm import GlmCalls
from server.text.tools.hermes import HermesCalls
from server.text.tools.kimi import KimiCalls
from server.text.tools.llama import LlamaCalls
from server.text.tools.mistral import MistralCalls
from server.text.tools.qwen_coder import QwenCoderCalls

NAME, INDEX = "\0name\0", "\0index\0"  # stand for a function's name, and for the number of a call, in what is written before arguments


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One row. A reply's calls are: opening, calls with `separator` between them, closing; a call is: before, arguments, after."""

    name: str
    parser: type[CallParser]
    before: str
    after: str
    opening: str = ""
    closing: str = ""
    separator: str | None = "\n"  # None: one call a reply
    arguments: Literal["json", "qwen", "glm"] = "json"

    @property
    def marker(self) -> str:
        """What calls begin with; "" where that is JSON."""
        return next((marker for marker in self.parser.begins if (self.opening or self.before).startswith(marker)), "")

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls, each a name and arguments, as the model writes them."""
        written = [self.head(name).replace(INDEX, str(index)) + self._arguments(arguments) + self.after for index, (name, arguments) in enumerate(calls)]
        return self.opening + ("" if self.separator is None else self.separator).join(written) + self.closing

    def head(self, name: str) -> str:
        """What stands before the arguments of a call of `name`; INDEX stands in it yet."""
        return self.before.replace(NAME, name)

    def _arguments(self, arguments: Mapping[str, Any]) -> str:
        if self.arguments == "json":
            return json.dumps(arguments, ensure_ascii=False)
        before, between, after = PARAMETER[self.arguments]
        texts = {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in arguments.items()}
        return "".join([f"{before}{key}{between}{text}{after}" for key, text in texts.items()])


PARAMETER = {  # before the key, before the value, behind it
    "qwen": ("<parameter=", ">\n", "\n</parameter>\n"),
    "glm": ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
}

HERMES = ToolFormat("hermes", HermesCalls, f'<tool_call>\n{{"name": "{NAME}", "arguments": ', "}\n</tool_call>")
DEEPSEEK = ToolFormat(
    "deepseek",
    DeepSeekCalls,
    f"{deepseek.CALL_BEGIN}function{deepseek.SEPARATOR}{NAME}\n```json\n",
    f"\n```{deepseek.CALL_END}",
    opening=deepseek.CALLS_BEGIN,
    closing=deepseek.CALLS_END,
)
DEEPSEEK_V31 = ToolFormat(
    "deepseek-v3.1",
    DeepSeekCalls,
    f"{deepseek.CALL_BEGIN}{NAME}{deepseek.SEPARATOR}",
    deepseek.CALL_END,
    opening=deepseek.CALLS_BEGIN,
    closing=deepseek.CALLS_END,
    separator="",
)
KIMI = ToolFormat(
    "kimi",
    KimiCalls,
    f"{kimi.CALL_BEGIN}functions.{NAME}:{INDEX}{kimi.ARGUMENTS}",
    kimi.CALL_END,
    opening=kimi.SECTION_BEGIN,
    closing=kimi.SECTION_END,
    separator="",
)
MISTRAL = ToolFormat("mistral", MistralCalls, f'{{"name": "{NAME}", "arguments": ', "}", opening=f"{mistral.MARKER}[", closing="]", separator=", ")
MISTRAL_NAMED = ToolFormat("mistral-named", MistralCalls, f"{mistral.MARKER}{NAME}{mistral.ARGUMENTS}", "", separator="")
LLAMA = ToolFormat("llama", LlamaCalls, f'{{"name": "{NAME}", "parameters": ', "}", separator=None)
QWEN_CODER = ToolFormat("qwen-coder", QwenCoderCalls, f"<tool_call>\n<function={NAME}>\n", "</function>\n</tool_call>", arguments="qwen")
GLM = ToolFormat("glm", GlmCalls, f"<tool_call>{NAME}\n", "</tool_call>", arguments="glm")

FORMATS = {row.name: row for row in (HERMES, DEEPSEEK, DEEPSEEK_V31, KIMI, MISTRAL, MISTRAL_NAMED, LLAMA, QWEN_CODER, GLM)}

# What shows each format in a chat that its template wrote: the first row counts all of whose texts are there.
_SIGNS: list[tuple[tuple[str, ...], ToolFormat]] = [
    ((deepseek.CALL_BEGIN, "```"), DEEPSEEK),
    ((deepseek.CALL_BEGIN,), DEEPSEEK_V31),
    ((kimi.CALL_BEGIN,), KIMI),
    ((mistral.MARKER, mistral.ARGUMENTS), MISTRAL_NAMED),
    ((mistral.MARKER,), MISTRAL),
    (("<tool_call>", "<function="), QWEN_CODER),
    (("<tool_call>", "<arg_key>"), GLM),
    (("<tool_call>", '"arguments":'), HERMES),
    (('{"name": ', '"parameters": {'), LLAMA),
]


def find_format(written: str) -> ToolFormat | None:
    """The format of a call in `written`, a chat as the model's template writes it; None where it is none that is known."""
    return next((row for signs, row in _SIGNS if all(sign in written for sign in signs)), None)


@dataclass(frozen=True, slots=True)
class ToolRules:
    """Which calls are looked for in a reply; written by whoever made the prompt."""

    format: ToolFormat
    tools: tuple[Tool, ...]
    parallel: bool = True  # else the reply ends behind its first call

    def parser(self) -> CallParser:
        """One reply's parser."""
        return self.format.parser(self.tools)
