"""Each row of the table cuts text as the model's own tokenizer.json does; the pieces are written out by hand."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from server.text.load import from_metadata
from server.text.pretokenizers import PRE_TOKENIZERS
from tests.text.conftest import SMOLLM_LIKE, STRINGS


def pieces(pre: str, text: str) -> list[str]:
    row = PRE_TOKENIZERS[pre].build()
    return [text[start:end] for _, (start, end) in row.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "It's 2024, I'LL", ["It", "'s", " 2024", ",", " I", "'", "LL"]),
        ("gpt-2", "a  b\n\n c½", ["a", " ", " b", "\n\n", " c", "½"]),
        ("smollm", "It's 2024½, I'LL", ["It", "'s", " ", "2", "0", "2", "4", "½", ",", " I", "'", "LL"]),
        ("smollm", "x1y", ["x", "1", "y"]),
        ("qwen2", "It'S 2024½, I'LL", ["It", "'S", " ", "2", "0", "2", "4", "½", ",", " I", "'LL"]),
        ("qwen2", "a(b);\n\n  c\n d", ["a", "(b", ");\n\n", " ", " c", "\n", " d"]),
        ("llama-bpe", "It's 20245, I'LL", ["It", "'s", " ", "202", "45", ",", " I", "'LL"]),
        ("llama-bpe", "a(b);\n\n  c\n d", ["a", "(b", ");\n\n", " ", " c", "\n", " d"]),
    ],
)
def test_pieces(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(pre, text) == expected


@pytest.mark.parametrize("text", STRINGS)
def test_smollm_and_gpt2_are_what_the_library_calls_so(text: str) -> None:
    assert PRE_TOKENIZERS["smollm"].build().pre_tokenize_str(text) == SMOLLM_LIKE.pre_tokenize_str(text)
    assert PRE_TOKENIZERS["gpt-2"].build().pre_tokenize_str(text) == pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)


@pytest.mark.parametrize(("pre", "whole", "bos"), [("llama-bpe", True, [1]), ("gpt-2", False, []), ("smollm", False, []), ("qwen2", False, [])])
def test_llama_takes_whole_words_and_starts_with_bos(metadata: dict[str, object], pre: str, whole: bool, bos: list[int]) -> None:
    """The word is a token that no merge leads to."""
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    metadata |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": []}
    tokenizer = from_metadata(metadata)
    word = next(token for token in tokens if token.isascii() and token.isalpha() and len(token) > 1)
    expected = [tokens.index(word)] if whole else [tokens.index(char) for char in word]
    assert tokenizer.encode(word) == expected
    assert tokenizer.encode_prompt(word) == bos + expected
