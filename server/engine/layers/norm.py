"""Root-mean-square layer norm (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from server.engine.ops import Ops


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last `len(weight)` values; weight is float32."""

    def __init__(self, ops: Ops, weight: Tensor, eps: float) -> None:
        self._ops, self._weight, self._eps = ops, weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor of x's shape."""
        out = torch.empty_like(x)
        self._ops.rms_norm(x, self._weight, self._eps, out)
        return out

    def inplace(self, x: Tensor) -> None:
        self._ops.rms_norm(x, self._weight, self._eps, x)
