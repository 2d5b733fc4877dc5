"""Grouped-query attention in Triton against its plain twin in float64.

With a float32 cache products are exact to float32: sums of up to 300 terms err by about sqrt(300) * 2^-24 of their norm, 1e-6; the softmax multiplies what
scores err by, 2^-24 times their size of about 10. With bfloat16, queries, keys, values and the softmax's terms are each off by 2^-9 of themselves, or 2^-8
in the interpreter, which cuts bits off where a GPU rounds. The first errors of a term are independent: 3 * 2^-8 of the norm is a bound with room.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from server.engine.kernels import attention, plain_attention
from tests.engine.kernels.attention_cases import Grouped, How, distance

EXACT, ROUNDED = 1e-5, 3 * 2**-8
SMALL = Grouped(3, 1, 24, 24)
LAYERS = [
    Grouped(6, 2, 24, 24),
    Grouped(5, 5, 16, 6, interleaved=True),
    Grouped(8, 1, 80, 32),
    Grouped(2, 1, 128, 128, interleaved=True),
    Grouped(20, 1, 48, 48),
]


def check(layer: Grouped, cuts: Sequence[int], device: str, cache: torch.dtype, tolerance: float, captured: bool = False, filled: int = 0) -> None:
    got = layer.run(attention.attend, How(cuts, torch.float32, cache, device, captured, filled))
    expected = layer.run(plain_attention.attend, How(cuts, cache=torch.float64 if cache is torch.float32 else cache, filled=filled))
    assert distance(got, expected) < tolerance


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_chunks(device: str, layer: Grouped) -> None:
    check(layer, (11, 30), device, torch.float32, EXACT)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_single_tokens(device: str, layer: Grouped) -> None:
    check(layer, (1,), device, torch.float32, EXACT, captured=True, filled=150)


@pytest.mark.parametrize("filled", [0, 31, 62, 126, 300])
def test_single_tokens_at_page_borders(device: str, filled: int) -> None:
    check(SMALL, (1, 1), device, torch.float32, EXACT, captured=True, filled=filled)


@pytest.mark.parametrize("n", [2, 17, 130])
def test_a_chunk_after_others(device: str, n: int) -> None:
    check(SMALL, (n,), device, torch.float32, EXACT, filled=100)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16])
def test_halves_in_the_cache(device: str, cache: torch.dtype) -> None:
    check(Grouped(2, 1, 32, 32), (1, 20), device, cache, ROUNDED, filled=70)
