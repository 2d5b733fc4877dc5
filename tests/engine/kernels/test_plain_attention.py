"""The plain twins of attention against the reference, both in float64: sums of a few hundred terms differ by less than 1e-12 of their norm."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from server.engine.kernels import plain_attention
from tests.engine.kernels.attention_cases import Grouped, How, Latent, distance

TOLERANCE = 1e-12
CUTS = [(150,), (1,) * 5, (63, 1, 1, 64), (9, 120, 8, 13), (300, 1)]  # a sequence's tokens, step by step


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_attention, "_BLOCK_PAGES", 2)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("captured", [False, True])
def test_attend_is_the_reference(cuts: Sequence[int], captured: bool) -> None:
    for layer in (Grouped(6, 2, 24, 24), Grouped(5, 5, 16, 6, interleaved=True), Grouped(8, 1, 10, 4)):
        got, expected = layer.run(plain_attention.attend, How(cuts, captured=captured)), layer.run(None, How(cuts))
        assert distance(got, expected) < TOLERANCE


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("captured", [False, True])
def test_attend_latent_is_the_reference(cuts: Sequence[int], captured: bool) -> None:
    layer = Latent(5, 24, 8, 12, 20)
    got, expected = layer.run(plain_attention.attend_latent, How(cuts, captured=captured)), layer.run(None, How(cuts))
    assert distance(got, expected) < TOLERANCE


def test_halves_in_the_cache_round_as_the_reference() -> None:
    how = How((70, 5), cache=torch.float16)
    assert distance(Grouped(4, 2, 16, 16).run(plain_attention.attend, how), Grouped(4, 2, 16, 16).run(None, how)) < TOLERANCE
