"""The dense feed-forward block, SwiGLU (Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor

from server.engine.ops import Matrix, Ops


class FeedForward:
    """down(silu(gate(x)) * up(x)); gate and up are [ffn, hidden], down is [hidden, ffn]."""

    def __init__(self, ops: Ops, gate: Matrix, up: Matrix, down: Matrix) -> None:
        self._ops, self._gate, self._up, self._down = ops, gate, up, down

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual [n, hidden] += the block's output for x [n, hidden]."""
        self._ops.ffn(self._gate, self._up, self._down, x, residual, accumulate=True)
