"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from server.engine.ops import Rotation

_FIRST_TABLE = 1024  # positions; the table doubles when a sequence grows beyond it


class Rope:
    """Rotates pairs of a head's first `dim` values by position * base^(-2i / dim) / factor_i.

    interleaved: pairs are (2i, 2i + 1), as llama's GGUF files are permuted for; otherwise (i, i + dim / 2).
    factors [dim / 2] is a file's `rope_freqs.weight` (Llama 3.1's frequency factors); scale divides all positions (linear scaling).
    Angles are taken in float64: at position 100,000 float32 has lost two digits.
    """

    def __init__(self, dim: int, base: float, *, interleaved: bool, scale: float = 1.0, factors: Tensor | None = None) -> None:
        self._interleaved = interleaved
        inverse = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        self._frequencies = inverse / scale if factors is None else inverse / scale / factors.double()
        self._table = self._angles(_FIRST_TABLE)
        self._span, self._rotation = (0, 0), Rotation(self._table[:0], interleaved)

    def rotation(self, start: int, n: int) -> Rotation:
        """The angles of positions start .. start + n - 1; all layers of a step ask for the same, which is kept."""
        if self._span != (start, n):
            while start + n > self._table.shape[0]:
                self._table = self._angles(2 * self._table.shape[0])
            self._span, self._rotation = (start, n), Rotation(self._table[start : start + n], self._interleaved)
        return self._rotation

    def _angles(self, positions: int) -> Tensor:
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * self._frequencies
        return torch.stack((angles.cos(), angles.sin()), -1).float()
