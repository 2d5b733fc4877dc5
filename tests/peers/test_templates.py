"""Chat templates of real models, as llama.cpp's source carries them, render here as in `transformers`.

    MOESPAN_LLAMA_CPP=DIR python -m pytest -m peers tests/peers/test_templates.py

DIR is a llama.cpp source tree; the source archive of llama-cpp-python has one under vendor/.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import jinja2
import pytest

from server.errors import RequestError
from server.text.template import ChatTemplate
from tests.text.chats import CHATS, TOOLS, Chat

pytestmark = pytest.mark.peers

ROOT = os.environ.get("MOESPAN_LLAMA_CPP")
FILES = sorted((Path(ROOT) / "models" / "templates").glob("*.jinja")) if ROOT else []
FAMILIES: dict[str, set[str]] = {  # and the chats that a template refuses itself
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": set(),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": set(),
    "deepseek-ai-DeepSeek-V3.1": set(),
    "Qwen-Qwen2.5-7B-Instruct": set(),
    "Qwen-Qwen3-0.6B": set(),
    "GLM-4.6": set(),
    "moonshotai-Kimi-K2": set(),
    "meta-llama-Llama-3.1-8B-Instruct": {"called twice"},
}
FORMATS = {  # of the calls in their models' replies
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek",
    "deepseek-ai-DeepSeek-V3.1": "deepseek-v3.1",
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen3-Coder": "qwen-coder",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "GLM-4.6": "glm",
    "GLM-4.7-Flash": "glm",
    "moonshotai-Kimi-K2": "kimi",
    "Kimi-K2-Instruct": "kimi",
    "meta-llama-Llama-3.1-8B-Instruct": "llama",
    "meta-llama-Llama-3.3-70B-Instruct": "llama",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral-named",
}
SWITCHES: list[dict[str, Any]] = [{}, {"enable_thinking": False}, {"enable_thinking": True}]
TOKENS = {"bos_token": "<BOS>", "eos_token": "<EOS>"}


@pytest.fixture(autouse=True, scope="module")
def _directory() -> None:
    if ROOT is None:
        pytest.skip("MOESPAN_LLAMA_CPP names no llama.cpp source tree")


def ours(template: ChatTemplate, chat: Chat, tools: list[dict[str, Any]] | None, switches: dict[str, Any]) -> str | None:
    try:
        return template.render(chat, tools=tools, **switches)
    except RequestError:
        return None


def theirs(source: str, chat: Chat, tools: list[dict[str, Any]] | None, switches: dict[str, Any]) -> str | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        return render_jinja_template([chat], tools=tools, chat_template=source, add_generation_prompt=True, **TOKENS, **switches)[0][0]
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError):
        return None


def forms(chat: Chat) -> list[Chat]:
    """The chat with calls written in every way there is: arguments as an object or as JSON text, content as null or as empty text."""

    def rewritten(message: dict[str, Any], as_text: bool, nothing: str | None) -> dict[str, Any]:
        if "tool_calls" not in message:
            return message
        functions = [call["function"] for call in message["tool_calls"]]
        arguments = [json.dumps(function["arguments"], ensure_ascii=False) if as_text else function["arguments"] for function in functions]
        calls = [{**call, "function": {**call["function"], "arguments": text}} for call, text in zip(message["tool_calls"], arguments, strict=True)]
        return {**message, "tool_calls": calls, "content": message["content"] or nothing}

    return [[rewritten(message, as_text, nothing) for message in chat] for as_text in (False, True) for nothing in (None, "")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_renders_as_transformers_does(file: Path) -> None:
    """`transformers` takes arguments and contents only as a template expects them, so ours has to be one of its renderings."""
    source = file.read_text(encoding="utf-8")
    template = ChatTemplate(source, **TOKENS)
    dialect = template.dialect
    for (name, chat), tools, switches in itertools.product(CHATS.items(), (None, TOOLS), SWITCHES):
        if (tools and not dialect.writes_tools) or ("called" in name and (dialect.form is None or dialect.form.short_ids)):
            continue  # ours are then told of in other ways, or have other ids
        references = {theirs(source, form, tools, switches) for form in forms(chat)}
        assert ours(template, chat, tools, switches) in references, (name, tools, switches)


def test_families_formats_of_calls_are_found() -> None:
    found = {file.stem: ChatTemplate(file.read_text(encoding="utf-8"), **TOKENS).dialect for file in FILES}
    assert {name: found[name].format.name for name in FORMATS} == FORMATS
    assert all(found[name].known for name in FORMATS)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_take_every_chat(family: str) -> None:
    [file] = [file for file in FILES if file.stem == family]
    template = ChatTemplate(file.read_text(encoding="utf-8"), **TOKENS)
    for tools in (None, TOOLS):
        prompts = {name: ours(template, chat, tools, {}) for name, chat in CHATS.items()}
        assert {name for name, prompt in prompts.items() if prompt is None} == FAMILIES[family]
        for name in ("called", "called with empty text", "called twice"):
            prompt = prompts[name]
            assert prompt is None or '{"city": "Köln", "days": 2' in prompt or "<arg_value>Köln" in prompt, name
            assert prompt is None or "None" not in prompt
