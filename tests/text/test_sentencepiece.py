"""SentencePiece vocabularies from metadata give the ids of the `sentencepiece` library that trained them, and its text."""

from __future__ import annotations

import io
import random
import re
from itertools import pairwise

import pytest
import sentencepiece

from server.errors import GGUFError
from server.text.detokenizer import IncrementalDetokenizer
from server.text.sentencepiece import build, merges_by_score
from server.text.vocabulary import from_metadata
from tests.text.strings import WORDS, random_strings

COUNT = 2000
USER_DEFINED = ["<think>", "</think>"]
CONTROL = ["[INST]", "[/INST]"]
KNOWN = {*map(chr, range(0x250)), *"".join(WORDS)}  # other characters have no piece
MARKED = re.compile("(" + "|".join(re.escape(token) for token in ["<unk>", "<s>", "</s>", *CONTROL, *USER_DEFINED]) + ")")


def trained(*, byte_fallback: bool = True, add_dummy_prefix: bool = True) -> sentencepiece.SentencePieceProcessor:
    """A small model of Llama 2's make: BPE, no normalization, digits alone, runs of spaces as pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=("".join(filter(KNOWN.__contains__, text)) for text in random_strings(3000, seed=0)),
        model_writer=model,
        model_type="bpe",
        vocab_size=1200,
        character_coverage=1.0,
        byte_fallback=byte_fallback,
        add_dummy_prefix=add_dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        control_symbols=CONTROL,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def metadata_of(model: sentencepiece.SentencePieceProcessor) -> dict[str, object]:
    """What a converter writes of it: the pieces, and added tokens behind them."""

    def kind(piece: int) -> int:
        tests = {2: model.is_unknown, 3: model.is_control, 5: model.is_unused, 6: model.is_byte}
        return next((value for value, holds in tests.items() if holds(piece)), 1)

    size = model.get_piece_size()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*map(model.id_to_piece, range(size)), *USER_DEFINED],
        "tokenizer.ggml.scores": [*map(model.get_score, range(size)), *(0.0 for _ in USER_DEFINED)],
        "tokenizer.ggml.token_type": [*map(kind, range(size)), *(4 for _ in USER_DEFINED)],
    }


@pytest.fixture(scope="module")
def model() -> sentencepiece.SentencePieceProcessor:
    return trained()


@pytest.fixture
def metadata(model: sentencepiece.SentencePieceProcessor) -> dict[str, object]:
    return metadata_of(model)


def expected(model: sentencepiece.SentencePieceProcessor, metadata: dict[str, object], text: str) -> list[int]:
    """The library's ids for each stretch of text between marked tokens, and the ids of these."""
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    parts = [part for part in MARKED.split(text) if part]
    return [token_id for part in parts for token_id in ([tokens.index(part)] if MARKED.fullmatch(part) else model.encode(part))]


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_ids_of_random_strings(byte_fallback: bool, prefix: bool) -> None:
    model = trained(byte_fallback=byte_fallback, add_dummy_prefix=prefix)
    metadata = {**metadata_of(model), "tokenizer.ggml.add_space_prefix": prefix}
    tokenizer = from_metadata(metadata)
    different = [text for text in random_strings(COUNT, seed=1) if tokenizer.encode(text) != expected(model, metadata, text)]
    assert not different, f"{len(different)} of {COUNT}, the first {different[0]!a}"


def test_control_tokens_in_a_text_can_be_taken_as_plain_text(model: sentencepiece.SentencePieceProcessor, metadata: dict[str, object]) -> None:
    tokenizer = from_metadata(metadata)
    text = "[INST] a</s>"
    assert tokenizer.encode(text, special=False) == model.encode(text)
    assert not set(tokenizer.encode(text, special=False)) & set(tokenizer.special_tokens.values())
    assert tokenizer.encode(text) == [model.piece_to_id("[INST]"), *model.encode(" a"), 2]


def test_no_joining_of_text_gives_a_control_token() -> None:
    tokens = ["<unk>", "<s>", "</s>", "<", "s", ">", "<s", "s>"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert from_metadata(metadata).encode("<s>", special=False) == [tokens.index("<s"), tokens.index(">")]
    assert from_metadata(metadata).encode("<s>") == [1]


def test_text_streams_as_it_decodes(metadata: dict[str, object]) -> None:
    """A reply goes on where the prompt ended, so the space before its first word belongs to it."""
    tokenizer = from_metadata(metadata)
    assert tokenizer.decode(tokenizer.encode("hi")) == " hi"
    for text in random_strings(COUNT, seed=2):
        ids = tokenizer.encode(text, special=False)
        detokenizer = IncrementalDetokenizer(tokenizer)
        streamed = [detokenizer.push(token_id) for token_id in ids]
        assert "".join([*streamed, detokenizer.flush()]) == tokenizer.decode(ids)
        assert all("\ufffd" not in piece for piece in streamed) or "\ufffd" in text, "no half characters"
    assert tokenizer.decode(tokenizer.encode("<think>a\n \u0e01 b", special=False)) == "<think> a\n \u0e01 b"


def test_a_vocabulary_with_the_letters_of_byte_level_bpe(metadata: dict[str, object]) -> None:
    """A g with a dot is what byte-level BPE writes for a space; here it is a letter."""
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert "\u0120" in tokens
    assert from_metadata(metadata).decode([tokens.index("\u0120")]) == "\u0120"


def test_ids_decode_as_the_library_does(model: sentencepiece.SentencePieceProcessor, metadata: dict[str, object]) -> None:
    tokenizer, rng = from_metadata(metadata), random.Random(3)
    written = [piece for piece in range(model.get_piece_size()) if not (model.is_unknown(piece) or model.is_byte(piece))]
    for _ in range(500):
        ids = rng.choices(written, k=20)
        assert tokenizer.decode(ids).removeprefix(" ") == model.decode(ids)


def test_what_holds_when_the_metadata_is_silent(metadata: dict[str, object]) -> None:
    tokenizer = from_metadata(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.stop_ids == {2}
    assert tokenizer.encode_prompt("hi") == [1, *tokenizer.encode("hi")]
    assert tokenizer.encode_prompt("<s>hi") == [1, *tokenizer.encode("hi")]
    assert from_metadata({**metadata, "tokenizer.ggml.add_bos_token": False}).add_bos is False
    assert tokenizer.token_bytes(0) == b"", "an unknown token has no text"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("scores", None, "scores is missing"), ("scores", [0.0], "scores has 1 entries"), ("unknown_token_id", -1, "unknown_token_id is -1")],
)
def test_metadata_that_cannot_be_used(metadata: dict[str, object], key: str, value: object, words: str) -> None:
    metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(GGUFError, match=words):
        from_metadata(metadata)


def test_scores_that_are_no_numbers(metadata: dict[str, object]) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    with pytest.raises(GGUFError, match="scores holds something else than numbers"):
        from_metadata({**metadata, "tokenizer.ggml.scores": ["low"] * len(tokens)})


def joined(text: str, scores: dict[str, float]) -> list[str]:
    """The rule itself: join the best pair of neighbours, the leftmost of equals, until there is none."""
    pieces = list(text)
    while pairs := [(-scores[left + right], i) for i, (left, right) in enumerate(pairwise(pieces)) if left + right in scores]:
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


@pytest.mark.parametrize("seed", range(40))
def test_joining_by_rank_is_joining_by_score(seed: int) -> None:
    """Two letters only, so that tokens overlap in many ways."""
    rng = random.Random(seed)
    scores = {"a": -98.0, "b": -99.0}
    while len(scores) < 9:
        token = "".join(rng.choices(list(scores), k=2))
        if len(token) < 8:
            scores.setdefault(token, -rng.random())
    backend = build({token: i for i, token in enumerate(["?", *scores])}, merges_by_score(scores), unknown="?", add_space_prefix=False)
    for _ in range(100):
        text = "".join(rng.choices("ab", k=rng.randrange(1, 25)))
        assert backend.encode(text).tokens == joined(text, scores)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 18, 20, 31, 33, 48, 100])
def test_runs_of_spaces_with_one_score(length: int) -> None:
    """Llama 2 gives its runs of 2 to 16 spaces one score: the run is grown from the left."""
    scores = {"\u2581": -1.0, **{"\u2581" * n: -1e9 for n in range(2, 17)}}
    backend = build({token: i for i, token in enumerate(["?", *scores])}, merges_by_score(scores), unknown="?", add_space_prefix=False)
    assert backend.encode(" " * length).tokens == joined("\u2581" * length, scores)
