"""The vocabulary tests that llama.cpp's source carries: texts (.inp) and their token ids (.out) for the tokenizers of real models.

    MOESPAN_LLAMA_CPP=DIR python -m pytest -m peers tests/peers/test_vocabularies.py

DIR is a llama.cpp source tree; the source archive of llama-cpp-python has one under vendor/.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.engine.gguf.reader import GGUFFile
from server.errors import UnsupportedModel
from server.text.tokenizer import Tokenizer
from server.text.vocabulary import from_metadata

pytestmark = pytest.mark.peers

OURS = ["deepseek-coder", "deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2"]
OTHERS = ["aquila", "bert-bge", "command-r", "falcon", "gemma-4", "gpt-neox", "mpt", "nomic-bert-moe", "qwen35", "refact", "starcoder"]
SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.fixture(scope="module")
def directory() -> Path:
    root = os.environ.get("MOESPAN_LLAMA_CPP")
    if root is None:
        pytest.skip("MOESPAN_LLAMA_CPP names no llama.cpp source tree")
    return Path(root) / "models"


def load(directory: Path, name: str) -> Tokenizer:
    file = directory / f"ggml-vocab-{name}.gguf"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return from_metadata(GGUFFile.open(file).metadata)


def cases(directory: Path, name: str) -> list[tuple[str, list[int]]]:
    texts = (directory / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split(SEPARATOR)[:-1]
    lines = (directory / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    return [(text, [int(word) for word in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize("name", OURS)
def test_ids_are_llama_cpps(directory: Path, name: str) -> None:
    tokenizer, pairs = load(directory, name), cases(directory, name)
    assert len(pairs) >= 40
    different = {text: (ours, ids) for text, ids in pairs if (ours := tokenizer.encode(text, special=False)) != ids}
    assert not different, f"{len(different)} of {len(pairs)} differ"


@pytest.mark.parametrize("name", OURS)
def test_ids_read_as_the_text(directory: Path, name: str) -> None:
    tokenizer = load(directory, name)
    for text, ids in cases(directory, name):
        assert tokenizer.decode(ids).removeprefix(" ").strip() == text.strip()


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_told(directory: Path, name: str) -> None:
    with pytest.raises(UnsupportedModel, match="Give the model's Hugging Face directory with --model_path"):
        load(directory, name)
