"""The model's tokenizer and chat template, from the GGUF's own metadata or from a local Hugging Face directory that overrides it.

`tokenizer.ggml.model` says which kind of vocabulary a GGUF holds; `MODELS` has one builder for each. Key names and token types are those of the
GGUF specification, section "Tokenizer".
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models

from server.errors import GGUFError, ModelError, ModelNotFound, UnsupportedModel
from server.text.pretokenizers import pre_tokenizer
from server.text.template import CHATML, ChatTemplate
from server.text.tokenizer import ByteTokenizer, FastTokenizer, Tokenizer

log = logging.getLogger(__name__)

Metadata = Mapping[str, object]


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type` that matter here."""

    CONTROL = 3  # never plain text: BOS, end of turn
    USER_DEFINED = 4  # matched before the merges, but visible text


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


def from_metadata(metadata: Metadata) -> Tokenizer:
    """The tokenizer that a GGUF's metadata describes; UnsupportedModel for a kind that `MODELS` lacks, GGUFError where keys contradict each other."""
    kind = metadata.get("tokenizer.ggml.model", "none")
    build = MODELS.get(kind) if isinstance(kind, str) else None
    if build is None:
        raise UnsupportedModel(
            f"The GGUF's tokenizer is of the kind {kind!r} (tokenizer.ggml.model); this version knows {', '.join(MODELS)}. "
            f"Give the model's Hugging Face directory with --model_path to use the tokenizer found there."
        )
    return build(metadata)


def _byte_level_bpe(metadata: Metadata) -> Tokenizer:
    row = pre_tokenizer(metadata.get("tokenizer.ggml.pre"))
    tokens = _array(metadata, "tokens")
    merges = [_pair(merge) for merge in _array(metadata, "merges")]
    vocab = {str(token): token_id for token_id, token in enumerate(tokens)}
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=row.ignore_merges))
    except Exception as error:  # the library raises nothing narrower for a merge of tokens that the vocabulary lacks
        raise GGUFError(f"The GGUF's tokenizer is damaged: its merges do not fit its tokens ({error}). Download the file again.") from error
    if (normalizer := row.normalizer()) is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = row.build()
    backend.decoder = decoders.ByteLevel()
    _add_marked_tokens(backend, tokens, _array(metadata, "token_type"))
    return FastTokenizer(backend, **_special_ids(metadata, len(tokens), add_bos=row.add_bos))


def _no_vocabulary(metadata: Metadata) -> Tokenizer:
    log.warning("The GGUF has no tokenizer: text is taken as bytes. `moespan bench` works; answers do not read as text.")
    size = metadata.get(f"{metadata.get('general.architecture')}.vocab_size")
    vocab_size = size if isinstance(size, int) and size > 0 else 256
    return ByteTokenizer(vocab_size=vocab_size, **_special_ids(metadata, vocab_size, add_bos=False))


MODELS: dict[str, Callable[[Metadata], Tokenizer]] = {"gpt2": _byte_level_bpe, "none": _no_vocabulary, "no_vocab": _no_vocabulary}


def _array(metadata: Metadata, name: str) -> Sequence[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if isinstance(value, list):
        return value
    raise GGUFError(f"The GGUF's tokenizer is incomplete: the array tokenizer.ggml.{name} is missing. Download the file again, or give --model_path.")


def _pair(merge: object) -> tuple[str, str]:
    left, space, right = str(merge).partition(" ")
    if not space:
        raise GGUFError(f"The GGUF's tokenizer is damaged: the merge {merge!r} is not two tokens with a space between. Download the file again.")
    return left, right


def _add_marked_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[Any], types: Sequence[Any]) -> None:
    """Tell the library which tokens are matched as a whole, before the merges."""
    if len(types) != len(tokens):
        raise GGUFError(f"The GGUF's tokenizer is damaged: {len(tokens)} tokens, but {len(types)} token types. Download the file again.")
    marked = {TokenType.CONTROL.value, TokenType.USER_DEFINED.value}
    kinds = [(str(token), int(kind)) for token, kind in zip(tokens, types, strict=True) if kind in marked]
    backend.add_tokens([AddedToken(token, special=kind == TokenType.CONTROL, normalized=False) for token, kind in kinds])


def _special_ids(metadata: Metadata, vocab_size: int, *, add_bos: bool) -> dict[str, Any]:
    """bos_id, eos_id, add_bos and stop_ids as the tokenizers take them."""
    ids = {name: _token_id(metadata, f"tokenizer.ggml.{name}_token_id", vocab_size) for name in ("bos", "eos", "eot", "eom")}
    return {
        "bos_id": ids["bos"],
        "eos_id": ids["eos"],
        "add_bos": bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        "stop_ids": [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None],
    }


def _token_id(metadata: Metadata, key: str, vocab_size: int) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < vocab_size:
        raise GGUFError(f"The GGUF's {key} is {value!r}, but its vocabulary has the ids 0 to {vocab_size - 1}. Download the file again.")
    return value


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
