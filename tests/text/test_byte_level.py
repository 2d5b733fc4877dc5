"""Byte-level BPE gives the ids of the models' own tokenizers, whose definitions are written here as they were published."""

from __future__ import annotations

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from server.text.detokenizer import IncrementalDetokenizer
from server.text.vocabulary import from_metadata
from tests.text.conftest import QWEN2_LIKE, SMOLLM_LIKE, Trained, train
from tests.text.strings import random_strings

COUNT = 2000


def sequence(*steps: str | pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(step), "isolated") if isinstance(step, str) else step for step in steps]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


DIGITS = pre_tokenizers.Digits(individual_digits=True)
# cl100k's pattern, with its contractions spelled out: the long s is the only other letter that "s" stands for in any case.
LLAMA3_LIKE = sequence(
    r"'[sS\u017f]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}\p{N}?\p{N}?| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CODER_LIKE = sequence("[\r\n]", r"[\s]?\p{L}+", r"[\s]?\p{P}+", "[\u0800-\u9fa5\uac00-\ud7ff]+", DIGITS)
V3_LIKE = sequence(
    r"\p{N}\p{N}?\p{N}?",
    "[\u3040-\u30ff\u4e00-\u9fa5]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
UPPER, LOWER = (rf"(?:(?!\p{{Han}})[\p{{Lm}}\p{{Lo}}\p{{M}}{cases}])" for cases in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
SUFFIX = r"(?:'[sS\u017f]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
KIMI_LIKE = sequence(
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?(?:{UPPER}*{LOWER}+{SUFFIX}|{UPPER}+{LOWER}*{SUFFIX})"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LIKE = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": SMOLLM_LIKE,
    "qwen2": QWEN2_LIKE,
    "llama-bpe": LLAMA3_LIKE,
    "glm4": LLAMA3_LIKE,
    "deepseek-coder": CODER_LIKE,
    "deepseek-v3": V3_LIKE,
    "kimi-k2": KIMI_LIKE,
}


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Every script, so that there are merges in all of them."""
    return list(random_strings(3000, seed=0))


def trained_as(pre: str, corpus: list[str]) -> Trained:
    made = train(LIKE[pre], pre, corpus, vocab_size=2500)
    if pre == "qwen2":
        made.original.normalizer = normalizers.NFC()
    if pre in {"llama-bpe", "glm4", "kimi-k2"}:
        made.original.model.ignore_merges = True
    return made


@pytest.mark.parametrize("pre", LIKE)
def test_ids_of_random_strings(corpus: list[str], pre: str) -> None:
    original, metadata = trained_as(pre, corpus)
    tokenizer = from_metadata(metadata)
    different = [text for text in random_strings(COUNT, seed=1) if tokenizer.encode(text) != original.encode(text).ids]
    assert not different, f"{len(different)} of {COUNT}, the first {different[0]!a}"


@pytest.mark.parametrize("pre", LIKE)
def test_streamed_text_is_decoded_text(corpus: list[str], pre: str) -> None:
    tokenizer = from_metadata(trained_as(pre, corpus).metadata)
    for text in random_strings(COUNT // 10, seed=2):
        ids = tokenizer.encode(text, special=False)
        detokenizer = IncrementalDetokenizer(tokenizer)
        streamed = "".join([*map(detokenizer.push, ids), detokenizer.flush()])
        assert streamed == tokenizer.decode(ids)
        if pre != "qwen2":  # which composes characters before it encodes them
            assert streamed == text
