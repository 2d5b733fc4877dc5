"""A model of the recipe's making, small enough for seconds on a CPU, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer

from recipes.tiny_r1.data import corpus
from recipes.tiny_r1.shape import Shape
from recipes.tiny_r1.tokenizer import train_tokenizer

SMALL = Shape(
    vocab=1024, hidden=64, layers=2, leading_dense=1, heads=2, q_lora=64, kv_lora=64, rope_dim=16, nope_dim=32, v_dim=32, ffn=128, experts=8, expert_ffn=32,
    top_k=2, groups=4, groups_used=2, context=384, yarn_original=96,
)  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(corpus(0, 600), SMALL.vocab)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more by waiting for a second thread than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
