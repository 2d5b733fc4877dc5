"""A small byte-level BPE, trained here, as the original `tokenizers` object and as the metadata a GGUF would carry."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

SMOLLM_LIKE = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
# Qwen2's own tokenizer.json, with its contractions spelled out in both cases.
QWEN2_LIKE = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(
            Regex(
                r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
CORPUS = [
    "The capital of France is Paris. It's known for the tower, the river and the bread; they're all there.",
    "我爱北京天安门、天安门上太阳升。你好、世界。",
    "def add(a, b):\n    return a + b  # adds 12 and 345\n\n\n",
    "I'LL say: don't. 1999, 2024 and 31415926535 are numbers. 👨‍👩‍👧 🙂🙂",
] * 3
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISIBLE = ["<think>", "</think>"]
STRINGS = [
    *CORPUS[:4],
    "",
    " ",
    "  two  spaces \n\n and\ttabs\r\n",
    "12345 ½ ² \u0663\u0664",
    "👨‍👩‍👧‍👦🇩🇪❤️‍🔥 e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<think>\nso</think>\n\nyes",
    "\x00\x7f\u00a0\u3000",
    "it's they're I'LL we've 'S",
]


class Trained(NamedTuple):
    """The original and the metadata that describe the same tokenizer."""

    original: tokenizers.Tokenizer
    metadata: dict[str, object]


def train(like: pre_tokenizers.PreTokenizer, pre: str, corpus: Iterable[str] = CORPUS, vocab_size: int = 500) -> Trained:
    """A byte-level BPE over the corpus, cut by `like`, which a GGUF names `pre`."""
    original = tokenizers.Tokenizer(models.BPE())
    original.pre_tokenizer, original.decoder = like, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False)
    original.train_from_iterator(corpus, trainer)
    original.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in VISIBLE])
    vocab = original.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [" ".join(pair) for pair in json.loads(original.to_str())["model"]["merges"]]
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3 if token in CONTROL else 4 if token in VISIBLE else 1 for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return Trained(original, metadata)


@pytest.fixture(scope="session")
def trained() -> Trained:
    """A tokenizer of SmolLM2's make."""
    return train(SMOLLM_LIKE, "smollm")


@pytest.fixture
def metadata(trained: Trained) -> dict[str, object]:
    """A copy of its metadata, to be damaged."""
    return dict(trained.metadata)


def cuts(text: str, most: int = 3) -> list[list[str]]:
    """Every way to cut `text` into one, two (and three) non-empty pieces, and the one into single characters."""
    ways = [[text], list(text)]
    ways += [[text[:i], text[i:]] for i in range(1, len(text))]
    if most >= 3:
        ways += [[text[:i], text[i:j], text[j:]] for i in range(1, len(text)) for j in range(i + 1, len(text))]
    return ways
