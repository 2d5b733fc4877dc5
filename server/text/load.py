"""The model's tokenizer and chat template, from the GGUF's own metadata or from a local Hugging Face directory that overrides it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from server.errors import ModelError, ModelNotFound
from server.text.template import CHATML, ChatTemplate
from server.text.tokenizer import FastTokenizer, Tokenizer
from server.text.vocabulary import Metadata, from_metadata

_TOOL_USE = "tool_use"  # the name of a second template, for chats with tools, that some models have

log = logging.getLogger(__name__)


def load_tokenizer(metadata: Metadata, model_path: Path | None = None) -> Tokenizer:
    """The tokenizer of `model_path` where one is given, else the GGUF's own."""
    return from_metadata(metadata) if model_path is None else from_directory(model_path)


def load_template(metadata: Metadata, tokenizer: Tokenizer, model_path: Path | None = None) -> ChatTemplate:
    """The chat template of `model_path` where it has one, else the GGUF's own, else plain ChatML."""
    own = {"default": metadata.get("tokenizer.chat_template"), _TOOL_USE: metadata.get(f"tokenizer.chat_template.{_TOOL_USE}")}
    named = _texts((_directory_templates(model_path) if model_path is not None else {}) or own)
    if "default" not in named:
        log.warning("The model has no chat template: chats are written as plain ChatML.")
    tokens = {"bos_token": tokenizer.text_of(tokenizer.bos_id), "eos_token": tokenizer.text_of(tokenizer.eos_id)}
    return ChatTemplate(named.get("default", CHATML), with_tools=named.get(_TOOL_USE), **tokens)


def from_directory(model_path: Path) -> Tokenizer:
    """The tokenizer of a local Hugging Face directory: tokenizer.json, else whatever `transformers` makes of the files. Nothing is downloaded."""
    if not model_path.is_dir():
        raise ModelNotFound(
            f"--model_path {model_path} is not a directory. Give a local directory with the model's tokenizer.json, or leave it out: the GGUF has its own."
        )
    backend = _directory_backend(model_path)
    config = _json(model_path / "tokenizer_config.json")
    bos_id, eos_id = (_named_id(backend, config.get(name)) for name in ("bos_token", "eos_token"))
    ends = _json(model_path / "generation_config.json").get("eos_token_id", [])
    stop_ids = {*(ends if isinstance(ends, list) else [ends]), eos_id} - {None}
    # Without a word in the configuration, the tokenizer's own post-processor tells whether a prompt starts with BOS.
    add_bos = config.get("add_bos_token", backend.encode("").ids[:1] == [bos_id])
    return FastTokenizer(backend, bos_id=bos_id, eos_id=eos_id, add_bos=bool(add_bos), stop_ids=stop_ids)


def _directory_backend(model_path: Path) -> tokenizers.Tokenizer:
    file = model_path / "tokenizer.json"
    try:
        if file.is_file():
            return tokenizers.Tokenizer.from_file(str(file))
        from transformers import AutoTokenizer  # takes seconds to import, and most directories have a tokenizer.json

        backend = AutoTokenizer.from_pretrained(str(model_path), local_files_only=True).backend_tokenizer
    except Exception as error:  # both libraries raise whatever their parsers do
        said = f": {error}" if file.is_file() else ""  # of the other files the library says what might have been, in a dozen lines
        raise ModelError(f"No tokenizer could be read from {model_path}{said}. The directory needs the model's tokenizer.json.") from error
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ModelError(f"The tokenizer in {model_path} has no fast version. The directory needs the model's tokenizer.json.")
    return backend


def _named_id(backend: tokenizers.Tokenizer, token: object) -> int | None:
    """The id of a token as tokenizer_config.json writes it: its text, or an object with the text in `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(text) if isinstance(text, str) else None


def _directory_templates(model_path: Path) -> dict[str, str]:
    """The directory's templates by name: "default" is the plain chat, and there may be one for chats with tools."""
    files = {"default": model_path / "chat_template.jinja", _TOOL_USE: model_path / "additional_chat_templates" / f"{_TOOL_USE}.jinja"}
    if files["default"].is_file():
        return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    template = _json(model_path / "tokenizer_config.json").get("chat_template")
    return _texts({entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else {"default": template})


def _texts(named: Mapping[str, object]) -> dict[str, str]:
    """Those that are there."""
    return {name: text for name, text in named.items() if isinstance(text, str)}


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}. Download the file again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object. Download the file again.")
    return content
