"""Each row of the table cuts text as the model's own tokenizer.json does; the pieces are written out by hand."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from server.text.pretokenizers import PRE_TOKENIZERS
from server.text.vocabulary import from_metadata
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
        ("glm4", "It's 20245, I'LL", ["It", "'s", " ", "202", "45", ",", " I", "'LL"]),
        ("deepseek-llm", "It's 24, x\r\n  y\u3000。 ", ["It", "'", "s", " ", "2", "4", ",", " x", "\r", "\n", " ", " y", "\u3000。", " "]),
        ("deepseek-llm", "Ωa \u0531\u0561 北京가 ア", ["Ω", "a", " \u0531", "\u0561 ", "北京가", " ", "ア"]),
        ("deepseek-coder", "It's 24, x\r\n  y\u3000。 ", ["It", "'", "s", " ", "2", "4", ",", " x", "\r", "\n", " ", " y", "\u3000。", " "]),
        ("deepseek-coder", "Ωa \u0531\u0561 北京가 ア+", ["Ωa", " \u0531\u0561", " ", "北京가", " ", "ア", "+"]),
        ("deepseek-v3", "It's 20245, x\r\n  y\u3000。 ", ["It", "'s", " ", "202", "45", ",", " x", "\r\n", " ", " y", "\u3000", "。", " "]),
        ("deepseek-v3", "a.b()\n\ne\u0301c 北京ア가", ["a", ".b", "()\n\n", "e\u0301c", " ", "北京ア", "가"]),
        ("kimi-k2", "It's 20245, HTTPServer's fooBar", ["It's", " ", "202", "45", ",", " HTTPServer's", " foo", "Bar"]),
        ("kimi-k2", "a北京 ア가b\n\n  c", ["a", "北京", " ア가b", "\n\n", " ", " c"]),
    ],
)
def test_pieces(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(pre, text) == expected


@pytest.mark.parametrize("text", STRINGS)
def test_smollm_and_gpt2_are_what_the_library_calls_so(text: str) -> None:
    assert PRE_TOKENIZERS["smollm"].build().pre_tokenize_str(text) == SMOLLM_LIKE.pre_tokenize_str(text)
    assert PRE_TOKENIZERS["gpt-2"].build().pre_tokenize_str(text) == pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)


@pytest.mark.parametrize(("name", "same"), [("llama3", "llama-bpe"), ("llama-v3", "llama-bpe"), ("deepseek-r1-qwen", "qwen2")])
def test_other_names(name: str, same: str) -> None:
    assert PRE_TOKENIZERS[name] == PRE_TOKENIZERS[same]


@pytest.mark.parametrize(
    ("pre", "whole", "bos"),
    [(pre, pre in {"llama-bpe", "llama3", "llama-v3", "glm4", "kimi-k2"}, [1] if pre.startswith("llama") else []) for pre in PRE_TOKENIZERS],
)
def test_which_take_whole_words_and_start_with_bos(metadata: dict[str, object], pre: str, whole: bool, bos: list[int]) -> None:
    """The word is a token that no merge leads to."""
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    metadata |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": []}
    tokenizer = from_metadata(metadata)
    word = next(token for token in tokens if token.isascii() and token.isalpha() and len(token) > 1)
    expected = [tokens.index(word)] if whole else [tokens.index(char) for char in word]
    assert tokenizer.encode(word) == expected
    assert tokenizer.encode_prompt(word) == bos + expected
