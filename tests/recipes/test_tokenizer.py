"""The tokenizer: nothing is lost, digits stay single, and the server's own reading of the metadata agrees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from recipes.tiny_r1.data import corpus
from recipes.tiny_r1.export import tokenizer_metadata
from recipes.tiny_r1.tokenizer import CHAT_TEMPLATE, CONTROL, VISIBLE, Encoder, save_tokenizer
from server.text.load import from_directory, load_template, load_tokenizer

TEXTS = [
    "12345+678=?",
    "How many r's are in strawberry?",
    "请计算 47382 + 9645。",
    " 7 \n\n8\t",
    "naïve 🙂 ½ Ⅷ",
    "<think>\n\n</think>\n\n9",
    "",
    *corpus(1, 200),
]


def test_round_trip(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_single(tokenizer: Tokenizer) -> None:
    joined = [token for token in tokenizer.get_vocab() if re.search("[0-9].|.[0-9]", token) and "holder" not in token]
    assert joined == []
    assert tokenizer.encode("473829").tokens == list("473829")


def test_skipped_thinking_is_another_token_than_forced(tokenizer: Tokenizer) -> None:
    """A forced "<think>\\n" cannot go on to the empty thinking, as with R1."""
    assert tokenizer.encode("<think>\n\n</think>").tokens == ["<think>", "ĊĊ", "</think>"]
    assert tokenizer.encode("<think>\nAdd").tokens[:2] == ["<think>", "Ċ"]


def test_the_fast_encoder_gives_the_same(tokenizer: Tokenizer) -> None:
    encode = Encoder(tokenizer)
    for text in [*TEXTS, *TEXTS]:
        assert encode(text) == tokenizer.encode(text).ids


def test_the_server_reads_the_metadata(tokenizer: Tokenizer) -> None:
    served = load_tokenizer(tokenizer_metadata(tokenizer))
    for text in TEXTS:
        assert served.encode(text) == tokenizer.encode(text).ids
    assert served.text_of(served.bos_id) == CONTROL[0]
    assert served.decode(served.encode("".join(VISIBLE))) == "".join(VISIBLE)
    assert served.decode(served.encode("".join(CONTROL))) == ""


def test_the_directory_reads_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    served = from_directory(tmp_path)
    assert [served.encode(text) for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]
    assert served.text_of(served.eos_id) == CONTROL[1]


CHATS = [
    ([{"role": "user", "content": "1+1"}], "{bos}{user}1+1{assistant}"),
    ([{"role": "system", "content": "S"}, {"role": "user", "content": "1+1"}], "{bos}S{user}1+1{assistant}"),
    (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nx\n</think>\n\nb"}, {"role": "user", "content": "c"}],
        "{bos}{user}a{assistant}b{eos}{user}c{assistant}",
    ),
]


@pytest.mark.parametrize(("messages", "expected"), CHATS)
def test_the_template_ends_at_the_assistants_mark(tokenizer: Tokenizer, messages: list[dict[str, str]], expected: str) -> None:
    metadata = tokenizer_metadata(tokenizer)
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    rendered = load_template(metadata, load_tokenizer(metadata)).render(messages)
    bos, eos, _, user, assistant = CONTROL
    assert rendered == expected.format(bos=bos, eos=eos, user=user, assistant=assistant)
