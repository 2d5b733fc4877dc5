"""The tokenizer that a GGUF's metadata describes.

`tokenizer.ggml.model` says which kind of vocabulary it is; `MODELS` has one builder for each. Key names and token types are those of the GGUF
specification, section "Tokenizer"; what holds where a key is missing is what llama.cpp takes then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models

from server.errors import GGUFError, UnsupportedModel
from server.text import sentencepiece
from server.text.pretokenizers import pre_tokenizer
from server.text.tokenizer import ByteTokenizer, FastTokenizer, Tokenizer

log = logging.getLogger(__name__)

Metadata = Mapping[str, object]


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2  # stands for what the vocabulary cannot write
    CONTROL = 3  # never plain text: BOS, end of turn
    USER_DEFINED = 4  # matched before the merges, but visible text
    UNUSED = 5
    BYTE = 6  # <0x00> to <0xFF>, for characters that have no token


_HIDDEN = {TokenType.UNKNOWN.value, TokenType.CONTROL.value}
_MARKED = _HIDDEN | {TokenType.USER_DEFINED.value}
_MERGED = {TokenType.NORMAL.value, TokenType.UNUSED.value}  # what joining pieces of text may give


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
    types = _array(metadata, "token_type", len(tokens))
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
    _add_marked_tokens(backend, tokens, types)
    return FastTokenizer(backend, **_special_ids(metadata, len(tokens), add_bos=row.add_bos))


def _sentencepiece(metadata: Metadata) -> Tokenizer:
    tokens = [str(token) for token in _array(metadata, "tokens")]
    scores, types = _array(metadata, "scores", len(tokens)), _array(metadata, "token_type", len(tokens))
    if not all(isinstance(score, int | float) for score in scores):
        raise GGUFError("The GGUF's tokenizer is damaged: tokenizer.ggml.scores holds something else than numbers. Download the file again.")
    merged = {token: float(score) for token, score, kind in zip(tokens, scores, types, strict=True) if kind in _MERGED}
    unknown = _token_id(metadata, "unknown", len(tokens), default=0)
    backend = sentencepiece.build(
        {token: token_id for token_id, token in enumerate(tokens)},
        sentencepiece.merges_by_score(merged),
        unknown=tokens[unknown or 0],
        add_space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
    )
    _add_marked_tokens(backend, tokens, types)
    return FastTokenizer(backend, **_special_ids(metadata, len(tokens), add_bos=True, bos=1, eos=2))


def _no_vocabulary(metadata: Metadata) -> Tokenizer:
    log.warning("The GGUF has no tokenizer: text is taken as bytes. `moespan bench` works; answers do not read as text.")
    size = metadata.get(f"{metadata.get('general.architecture')}.vocab_size")
    vocab_size = size if isinstance(size, int) and size > 0 else 256
    return ByteTokenizer(vocab_size=vocab_size, **_special_ids(metadata, vocab_size, add_bos=False))


MODELS: dict[str, Callable[[Metadata], Tokenizer]] = {
    "gpt2": _byte_level_bpe,
    "llama": _sentencepiece,
    "none": _no_vocabulary,
    "no_vocab": _no_vocabulary,
}


def _array(metadata: Metadata, name: str, length: int | None = None) -> Sequence[Any]:
    """One array of the tokenizer, `length` entries long."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list):
        raise GGUFError(f"The GGUF's tokenizer is incomplete: the array tokenizer.ggml.{name} is missing. Download the file again, or give --model_path.")
    if length is not None and len(value) != length:
        raise GGUFError(f"The GGUF's tokenizer is damaged: {length} tokens, but tokenizer.ggml.{name} has {len(value)} entries. Download the file again.")
    return value


def _pair(merge: object) -> tuple[str, str]:
    left, space, right = str(merge).partition(" ")
    if not space:
        raise GGUFError(f"The GGUF's tokenizer is damaged: the merge {merge!r} is not two tokens with a space between. Download the file again.")
    return left, right


def _add_marked_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[Any], types: Sequence[Any]) -> None:
    """Tell the library which tokens are matched as a whole, before the merges."""
    marked = [(str(token), kind in _HIDDEN) for token, kind in zip(tokens, types, strict=True) if kind in _MARKED]
    backend.add_tokens([AddedToken(token, special=hidden, normalized=False) for token, hidden in marked])


def _special_ids(metadata: Metadata, vocab_size: int, *, add_bos: bool, bos: int | None = None, eos: int | None = None) -> dict[str, Any]:
    """bos_id, eos_id, add_bos and stop_ids as the tokenizers take them; `bos`, `eos` and `add_bos` hold where the metadata says nothing."""
    bos_id, eos_id = _token_id(metadata, "bos", vocab_size, default=bos), _token_id(metadata, "eos", vocab_size, default=eos)
    ends = [eos_id, *(_token_id(metadata, name, vocab_size) for name in ("eot", "eom"))]
    return {
        "bos_id": bos_id,
        "eos_id": eos_id,
        "add_bos": bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        "stop_ids": [token_id for token_id in ends if token_id is not None],
    }


def _token_id(metadata: Metadata, name: str, vocab_size: int, *, default: int | None = None) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or not 0 <= value < vocab_size:
        raise GGUFError(f"The GGUF's {key} is {value!r}, but its vocabulary has the ids 0 to {vocab_size - 1}. Download the file again.")
    return value
