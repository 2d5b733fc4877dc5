"""The model's tokenizer and chat template, from the GGUF's own metadata or from a local Hugging Face directory that overrides it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import tokenizers

from server.errors import ModelError, ModelNotFound
from server.text.template import CHATML, ChatTemplate
from server.text.tokenizer import FastTokenizer, Tokenizer
from server.text.vocabulary import Metadata, from_metadata

log = logging.getLogger(__name__)


def load_tokenizer(metadata: Metadata, model_path: Path | None = None) -> Tokenizer:
    """The tokenizer of `model_path` where one is given, else the GGUF's own."""
    return from_metadata(metadata) if model_path is None else from_directory(model_path)


def load_template(metadata: Metadata, tokenizer: Tokenizer, model_path: Path | None = None) -> ChatTemplate:
    """The chat template of `model_path` where it has one, else the GGUF's own, else plain ChatML."""
    source = (_directory_template(model_path) if model_path is not None else None) or metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        log.warning("The model has no chat template: chats are written as plain ChatML.")
        source = CHATML
    return ChatTemplate(source, bos_token=tokenizer.text_of(tokenizer.bos_id), eos_token=tokenizer.text_of(tokenizer.eos_id))


def from_directory(model_path: Path) -> Tokenizer:
    """The tokenizer of a local Hugging Face directory: tokenizer.json, else whatever `transformers` makes of the files. Nothing is downloaded."""
    if not model_path.is_dir():
        raise ModelNotFound(f"--model_path {model_path} is not a directory. Give a local directory with the model's tokenizer.json.")
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
        raise ModelError(f"No tokenizer could be read from {model_path}: {error}. The directory needs the model's tokenizer.json.") from error
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ModelError(f"The tokenizer in {model_path} has no fast version. The directory needs the model's tokenizer.json.")
    return backend


def _named_id(backend: tokenizers.Tokenizer, token: object) -> int | None:
    """The id of a token as tokenizer_config.json writes it: its text, or an object with the text in `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(text) if isinstance(text, str) else None


def _directory_template(model_path: Path) -> str | None:
    file = model_path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _json(model_path / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several templates by name; "default" is the plain chat
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


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
