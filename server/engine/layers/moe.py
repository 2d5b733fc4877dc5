"""The mixture-of-experts feed-forward block: a router, its experts, and the shared experts that some families add (DeepSeekMoE, arXiv:2401.06066)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.ops import Matrix, Norm, Ops, Routing


@dataclass(frozen=True, slots=True)
class SharedExperts:
    """The experts that every token uses, side by side in one feed-forward block; Qwen2-MoE weighs what they give by sigmoid(y . weigh)."""

    gate: Matrix  # [shared_ffn, hidden]
    up: Matrix  # [shared_ffn, hidden]
    down: Matrix  # [hidden, shared_ffn]
    weigh: Matrix | None = None  # [1, hidden]


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """x += sum over the chosen experts of weight * ffn_expert(y), and += shared(y) where there are shared experts, with y = norm(x)."""

    ops: Ops
    norm: Norm
    router: Matrix  # [experts, hidden]
    routing: Routing
    gate: Matrix  # `experts` of [ffn, hidden]
    up: Matrix  # `experts` of [ffn, hidden]
    down: Matrix  # `experts` of [hidden, ffn]
    shared: SharedExperts | None = None

    def __call__(self, x: Tensor) -> None:
        """x [n, hidden] float32, in place."""
        y = torch.empty_like(x)
        self.ops.rms_norm(x, self.norm, y)
        ids, weights = self._route(y)
        finish = self.ops.experts(self.gate, self.up, self.down, y, ids, weights, x)
        if self.shared is not None:
            self._add_shared(self.shared, x, y)
        finish()

    def _route(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y [n, hidden] -> ids [n, top_k] int32, and their weights."""
        shape = y.shape[0], self.routing.top_k
        ids, weights = y.new_empty(shape, dtype=torch.int32), y.new_empty(shape)
        self.ops.route(self.router, self.routing, y, ids, weights)
        return ids, weights

    def _add_shared(self, shared: SharedExperts, x: Tensor, y: Tensor) -> None:
        scales = None
        if shared.weigh is not None:
            weights = y.new_empty(y.shape[0], 1)
            self.ops.linear((shared.weigh,), y, (weights,))
            self.ops.sigmoid(weights)
            scales = weights.view(-1)
        self.ops.ffn(shared.gate, shared.up, shared.down, y, x, accumulate=True, scales=scales)
