"""Products with weight matrices that stay in their GGUF blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.ops import Matrix, Norm, Ops


class Linear:
    """y = norm(x) W^T + b for one matrix [rows, cols], or for several of the same cols that share the norm and one quantisation of x.

    biases: one float32 [rows_i] for each matrix, or none at all.
    """

    def __init__(self, ops: Ops, matrices: Sequence[Matrix], rows: Sequence[int], norm: Norm | None = None, biases: Sequence[Tensor] = ()) -> None:
        self._ops, self._matrices, self._rows, self._norm, self._biases = ops, tuple(matrices), tuple(rows), norm, tuple(biases)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [n, cols] -> one [n, rows_i] for each matrix, float32."""
        n = x.shape[0]
        outs = [x.new_empty(n, rows) for rows in self._rows]
        self._ops.linear(self._matrices, x, outs, norm=self._norm, biases=self._biases)
        return outs

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual [n, rows] += y, for a single matrix without a bias."""
        self._ops.linear(self._matrices, x, (residual,), accumulate=True, norm=self._norm)


class Embedding:
    """Rows of the token embedding, dequantised as they are looked up."""

    def __init__(self, ops: Ops, matrix: Matrix, hidden: int) -> None:
        self._ops, self._matrix, self._hidden = ops, matrix, hidden

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [n] int64, the CPU's -> [n, hidden] float32, the maker's."""
        out = torch.empty(token_ids.shape[0], self._hidden, device=self._ops.device)
        self._ops.dequantize_rows(self._matrix, token_ids, out)
        return out
