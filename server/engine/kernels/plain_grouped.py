"""Matrix products of a group of experts, each with the tokens that chose it: the plain twins of kernels/grouped.py, and what both take.

Tokens are sorted by expert: sorted row i belongs to token tokens[i], and an expert of the group has a run of rows. A run may be empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu

TILE_MEANS = (16, 32, 80)  # mean tokens of an expert up to which each tile of the kernels is used; there is one more beyond


@dataclass(frozen=True, slots=True)
class Runs:
    """Which sorted rows each expert of a group has: starts[e] .. starts[e + 1] - 1, one run behind the other.

    The host knows them (it issues the copies by them), so that grids and tiles fit; kernels read the same from the device.
    """

    starts: tuple[int, ...]  # [experts + 1]
    offsets: Tensor  # int32 [experts + 1] on the device

    @property
    def first(self) -> int:
        """The group's first sorted row, which is row 0 of its own buffers."""
        return self.starts[0]

    @property
    def rows(self) -> int:
        return self.starts[-1] - self.starts[0]

    @property
    def experts(self) -> int:
        return len(self.starts) - 1

    def counts(self) -> list[int]:
        """Rows of each expert."""
        return [end - start for start, end in pairwise(self.starts)]


def gated(x: Tensor, tokens: Tensor, gate: Tensor, up: Tensor, runs: Runs, out: Tensor) -> None:
    """out[i] = silu(gate[e] y) * (up[e] y) with y = x[tokens[runs.first + i]], e the row's expert.

    x [n, cols] and gate, up [experts, ffn, cols] bf16, tokens int32 [all sorted rows], out [runs.rows, ffn] bf16. Sums are float32.
    """
    for e, (start, end) in enumerate(pairwise(runs.starts)):
        y = x[tokens[start:end]].float()
        product = silu(y @ gate[e].float().T) * (y @ up[e].float().T)
        out[start - runs.first : end - runs.first] = product.to(out.dtype)


def grouped(x: Tensor, weights: Tensor, runs: Runs, out: Tensor) -> None:
    """out[i] = weights[e] x[i], e the row's expert: x [runs.rows, cols] and weights [experts, rows, cols] bf16, out [runs.rows, rows] float32."""
    for e, (start, end) in enumerate(pairwise(runs.starts)):
        own = slice(start - runs.first, end - runs.first)
        torch.matmul(x[own].float(), weights[e].float().T, out=out[own])


def combine(h: Tensor, slots: Tensor, weights: Tensor, runs: Runs, out: Tensor) -> None:
    """out[t] += sum over j, in order, of weights[t, j] * h[slots[t, j] - runs.first], for those slots that are rows of the group.

    h [runs.rows, hidden] float32, slots int32 [n, top_k]: the sorted row of each token's j-th expert, weights [n, top_k], out [n, hidden] float32.
    """
    inside = (slots >= runs.first) & (slots < runs.starts[-1])
    rows = (slots - runs.first).clamp(0, max(runs.rows - 1, 0))
    factors = torch.where(inside, weights, torch.zeros_like(weights))
    for j in range(slots.shape[1] if runs.rows else 0):
        out.addcmul_(h[rows[:, j]], factors[:, j, None])
