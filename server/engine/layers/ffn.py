"""The dense feed-forward block, SwiGLU (Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor

from server.engine.ops import Matrix, Norm, Ops


class FeedForward:
    """x += down(silu(gate(y)) * up(y)) with y = norm(x); gate and up are [ffn, hidden], down is [hidden, ffn]."""

    def __init__(self, ops: Ops, norm: Norm, gate: Matrix, up: Matrix, down: Matrix) -> None:
        self._ops, self._norm, self._gate, self._up, self._down = ops, norm, gate, up, down

    def __call__(self, x: Tensor) -> None:
        """x [n, hidden] in place."""
        self._ops.ffn(self._gate, self._up, self._down, x, x, accumulate=True, norm=self._norm)
