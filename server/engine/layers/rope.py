"""Rotary position embedding (Su et al. 2021), and its extension to longer contexts by YaRN (Peng et al. 2023, arXiv:2309.00071)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from server.engine.models.config import Yarn
from server.engine.ops import Rotation


def rotation(
    dim: int, base: float, positions: int, *, interleaved: bool, scale: float = 1.0, factors: Tensor | None = None, yarn: Yarn | None = None
) -> Rotation:
    """The angles by which pairs of a head's first `dim` values turn: position * base^(-2i / dim) / factor_i, for positions 0 .. positions - 1.

    interleaved: pairs are (2i, 2i + 1), as llama's GGUF files are permuted for; otherwise (i, i + dim / 2).
    factors [dim / 2] is a file's `rope_freqs.weight` (Llama 3.1's frequency factors); scale divides all positions (linear scaling); yarn slows the
    slow pairs alone. Angles are taken in float64: at position 100,000 float32 has lost two digits.
    """
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) / scale
    if factors is not None:
        frequencies = frequencies / factors.double().cpu()
    if yarn is not None:
        frequencies = _slowed(frequencies, base, yarn)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    table = torch.stack((angles.cos(), angles.sin()), -1) * (1.0 if yarn is None else yarn.attention_factor)
    return Rotation(table.float(), interleaved)


def _slowed(inverse: Tensor, base: float, yarn: Yarn) -> Tensor:
    """YaRN's frequencies (section 3.2, "NTK-by-parts"): pairs that turn more than beta_fast times within the original context keep theirs, those
    that turn less than beta_slow times are slowed by `factor`, and between, counted in whole pairs, a ramp leads over."""
    pairs = inverse.shape[0]

    def pair(turns: float) -> float:
        """The pair that turns so often; the inverse of turns = original_context * base^(-pair / pairs) / 2 pi."""
        return pairs * math.log(yarn.original_context / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(pair(yarn.beta_fast)), 0)
    last = min(math.ceil(pair(yarn.beta_slow)), 2 * pairs - 1)
    ramp = ((torch.arange(pairs, dtype=torch.float64) - first) / max(last - first, 0.001)).clamp(0, 1)
    return inverse * (1 - ramp) + inverse / yarn.factor * ramp
