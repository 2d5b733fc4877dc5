"""A tokenizer read from metadata is the tokenizer that was trained; its bytes are exact."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.errors import RequestError
from server.text.tokenizer import ByteTokenizer
from server.text.vocabulary import from_metadata
from tests.text.conftest import CONTROL, QWEN2_LIKE, STRINGS, VISIBLE, Trained, train


@pytest.mark.parametrize("text", STRINGS)
def test_encodes_and_decodes_as_the_original(trained: Trained, text: str) -> None:
    tokenizer = from_metadata(trained.metadata)
    ids = tokenizer.encode(text)
    assert ids == trained.original.encode(text).ids
    assert tokenizer.decode(ids) == trained.original.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special=False) == text


def test_other_threads_go_on_while_a_long_text_is_read(trained: Trained) -> None:
    """A server's event loop is one of them."""
    tokenizer, text = from_metadata(trained.metadata), " ".join(STRINGS) * 2000
    with ThreadPoolExecutor(1) as pool:
        reading, turns = pool.submit(tokenizer.encode, text), 0
        while not reading.done():
            turns += 1
            time.sleep(0.001)
    assert turns > 20  # with the library's other function: 1 or 2
    assert reading.result() == trained.original.encode(text).ids


@pytest.mark.parametrize("text", STRINGS)
def test_another_row_of_the_table(text: str) -> None:
    original, metadata = train(QWEN2_LIKE, "qwen2")
    assert from_metadata(metadata).encode(text.replace("e\u0301", "é")) == original.encode(text.replace("e\u0301", "é")).ids


def test_qwen2_composes_characters_first() -> None:
    tokenizer = from_metadata(train(QWEN2_LIKE, "qwen2").metadata)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_random_ids_decode_as_the_original(trained: Trained) -> None:
    tokenizer, rng = from_metadata(trained.metadata), random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(20)]
        assert tokenizer.decode(ids) == trained.original.decode(ids, skip_special_tokens=True)


def test_control_tokens_in_a_text_can_be_taken_as_plain_text(trained: Trained) -> None:
    tokenizer = from_metadata(trained.metadata)
    text = "a<|im_end|>b<think>"
    ids = tokenizer.encode(text, special=False)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert ids[-1] == trained.original.token_to_id("<think>"), "user-defined tokens are text, and stay one token"
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) != ids


def test_bytes_of_a_token(trained: Trained) -> None:
    tokenizer = from_metadata(trained.metadata)
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in tokenizer.encode("太阳 \n\x00")) == "太阳 \n\x00".encode()
    assert tokenizer.token_bytes(2) == b""
    assert tokenizer.token_bytes(2, skip_special=False) == b"<|im_end|>"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b"", "an embedding may be padded beyond the vocabulary"


def test_end_of_generation_comes_from_metadata_and_from_known_names(metadata: dict[str, object]) -> None:
    metadata["tokenizer.ggml.eot_token_id"] = 77
    assert from_metadata(metadata).stop_ids == {0, 2, 77}, "<|endoftext|> by its name, eos and eot by their keys"


def renamed(metadata: dict[str, object], names: dict[int, str]) -> dict[str, object]:
    """The metadata with other tokens in the place of some, and without the marked tokens' own names."""
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    renamed = [names.get(position, f"was {token}" if token in CONTROL + VISIBLE else token) for position, token in enumerate(tokens)]
    return {**metadata, "tokenizer.ggml.tokens": renamed, "tokenizer.ggml.merges": []}


@pytest.mark.parametrize(
    "name", ["<|eot_id|>", "<|im_end|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|EOT|>", "<|user|>", "<|observation|>", "[EOS]", "</s>"]
)
def test_known_names_end_a_reply_only_as_control_tokens(metadata: dict[str, object], name: str) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    for position, ends in ((1, {1, 2}), (270, {2}), (tokens.index("<think>"), {2})):  # a control token, one that only merges can give, one that is text
        assert from_metadata(renamed(metadata, {position: name})).stop_ids == ends


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<\uff5ctool\u2581calls\u2581begin\uff5c>", True),
        ("<\uff5ctool\u2581sep\uff5c>", True),
        ("<|tool_calls_section_begin|>", True),
        ("<|tool_call_argument_begin|>", True),
        ("<|python_tag|>", True),
        ("<tool_call>", True),
        ("</tool_call>", True),
        ("</arg_key>", True),
        ("<arg_value>", True),
        ("[TOOL_CALLS]", True),
        ("[CALL_ID]", True),
        ("[ARGS]", True),
        ("[INST]", False),
        ("</think>", True),
        ("<\uff5ctool\u2581outputs\u2581begin\uff5c>", False),
        ("<|im_start|>", False),
        ("<\uff5cUser\uff5c>", False),
    ],
)
def test_what_tells_of_calls_and_reasoning_is_shown_though_marked_as_control(metadata: dict[str, object], name: str, shown: bool) -> None:
    tokenizer = from_metadata(renamed(metadata, {1: name}))
    assert tokenizer.special_tokens[name] == 1
    assert tokenizer.decode(tokenizer.encode(f"a{name}b")) == (f"a{name}b" if shown else "ab")


def test_bos_goes_first_once(metadata: dict[str, object]) -> None:
    assert from_metadata(metadata).encode_prompt("hi") == from_metadata(metadata).encode("hi"), "smollm adds none by itself"
    metadata["tokenizer.ggml.add_bos_token"] = True
    tokenizer = from_metadata(metadata)
    assert tokenizer.encode_prompt("hi") == [1, *tokenizer.encode("hi")]
    assert tokenizer.encode_prompt("<|im_start|>hi") == [1, *tokenizer.encode("hi")], "the template wrote it already"
    del metadata["tokenizer.ggml.bos_token_id"]
    assert from_metadata(metadata).add_bos is False, "there is none to add"


def test_an_id_outside_the_vocabulary_is_the_callers_mistake(trained: Trained) -> None:
    tokenizer = from_metadata(trained.metadata)
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(RequestError, match=f"no token {token_id}: .* ids 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([token_id])


@pytest.mark.parametrize("special", [True, False])
def test_half_a_surrogate_pair_is_the_callers_mistake(trained: Trained, special: bool) -> None:
    for tokenizer in (from_metadata(trained.metadata), ByteTokenizer(vocab_size=256)):
        with pytest.raises(RequestError, match=r"Character 2 .* surrogate pair"):
            tokenizer.encode("ab\ud83d", special=special)


def test_byte_tokenizer_round_trips() -> None:
    tokenizer = ByteTokenizer(vocab_size=400, stop_ids=[399])
    assert tokenizer.encode("aé<300><999><7>") == [*b"a\xc3\xa9", 300, *b"<999><7>"]
    assert tokenizer.encode("<300>", special=False) == list(b"<300>")
    assert tokenizer.decode([*b"a\xc3\xa9", 300, 399]) == "aé<300>"
    assert tokenizer.text_of(399) == "<399>"
    assert tokenizer.text_of(None) == ""


def test_a_large_vocabulary_loads_in_about_a_second() -> None:
    """150,000 tokens, each a merge of an earlier one and a byte: as many merges as Qwen's vocabulary has."""
    tokens = train(QWEN2_LIKE, "qwen2").metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    alphabet = [token for token in tokens if len(token) == 1]
    merges = [f"{a}{b} {c}" for a in alphabet for b in alphabet for c in alphabet[:3]][:150_000]
    pairs = [f"{a} {b}" for a in alphabet for b in alphabet]
    words = [*alphabet, *(pair.replace(" ", "") for pair in pairs), *(merge.replace(" ", "") for merge in merges)]
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": pairs + merges,
        "tokenizer.ggml.token_type": [1] * len(words),
    }
    start = time.perf_counter()
    tokenizer = from_metadata(metadata)
    assert time.perf_counter() - start < 3, "generous: a shared machine; about 0.5 s on an idle one"
    assert tokenizer.vocab_size == len(words) > 150_000
