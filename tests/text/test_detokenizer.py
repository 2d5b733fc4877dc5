"""Streamed text equals decoded text, whatever the ids; no half character is ever shown."""

from __future__ import annotations

import random

import pytest

from server.text.detokenizer import IncrementalDetokenizer
from server.text.tokenizer import ByteTokenizer, Tokenizer
from server.text.vocabulary import from_metadata
from tests.text.conftest import STRINGS, Trained


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", STRINGS)
@pytest.mark.parametrize("by_byte", [True, False])
def test_valid_text_streams_in_whole_characters(trained: Trained, text: str, by_byte: bool) -> None:
    tokenizer = ByteTokenizer(vocab_size=256) if by_byte else from_metadata(trained.metadata)
    ids = tokenizer.encode(text, special=False)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert "\ufffd" not in "".join(pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    assert stream(ByteTokenizer(vocab_size=256), [*"a🙂".encode()]) == ["a", "", "", "", "🙂", ""]


def test_a_character_cut_short_is_replaced_at_the_end() -> None:
    assert stream(ByteTokenizer(vocab_size=256), [*b"a\xf0\x9f"]) == ["a", "", "", "\ufffd"]


def test_random_bytes_stream_as_they_decode() -> None:
    tokenizer, rng = ByteTokenizer(vocab_size=256), random.Random(1)
    lively = [0x41, 0x80, 0xBF, 0xC2, 0xE0, 0xE4, 0xED, 0xA0, 0xF0, 0x90, 0xF4, 0xFF, 0x9F, 0x99, 0x82]
    for _ in range(3000):
        ids = rng.choices(lively, k=rng.randrange(1, 12))
        assert "".join(stream(tokenizer, ids)) == bytes(ids).decode(errors="replace")


def test_random_tokens_stream_as_they_decode(trained: Trained) -> None:
    tokenizer, rng = from_metadata(trained.metadata), random.Random(2)
    for _ in range(1000):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(25)]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == trained.original.decode(ids)
