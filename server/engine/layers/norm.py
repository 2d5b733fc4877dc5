"""The norm over each attention head that some families have; norms over the hidden state are part of the product that reads it."""

from __future__ import annotations

from torch import Tensor

from server.engine.ops import Norm, Ops


class HeadNorm:
    """RMSNorm over each head of a query or key (Qwen3); the weight has head_dim values."""

    def __init__(self, ops: Ops, norm: Norm) -> None:
        self._ops, self._norm = ops, norm

    def __call__(self, heads: Tensor) -> None:
        """heads [n, heads, head_dim] in place."""
        self._ops.rms_norm(heads, self._norm)
