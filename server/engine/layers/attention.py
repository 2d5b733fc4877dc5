"""Grouped-query attention (Ainslie et al. 2023) over the paged KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.layers.linear import Linear
from server.engine.layers.norm import RMSNorm
from server.engine.layers.rope import Rope
from server.engine.ops import KVPages, Ops, Span


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """softmax(q k^T / sqrt(head_dim)) v, with `heads` query heads sharing `kv_heads` key and value heads."""

    ops: Ops
    qkv: Linear  # three matrices: q [heads * head_dim, hidden], k and v [kv_heads * head_dim, hidden]
    output: Linear  # [hidden, heads * head_dim]
    rope: Rope
    heads: int
    kv_heads: int
    head_dim: int
    q_norm: RMSNorm | None = None  # over each head, before the rotation (Qwen3)
    k_norm: RMSNorm | None = None

    def add_to(self, residual: Tensor, x: Tensor, cache: KVPages, span: Span) -> None:
        """residual [n, hidden] += attention's output for x [n, hidden]; the span's keys and values are written to the cache."""
        q, k, v = self._project(x)
        table = self.rope.table(span.start, span.n)
        self.rope.rotate(q, table)
        self.rope.rotate(k, table)
        self.ops.store_kv(k, v, cache, span)
        mixed = torch.empty_like(q)
        self.ops.attention(q, cache, span, 1.0 / math.sqrt(self.head_dim), mixed)
        self.output.add_to(residual, mixed.view(span.n, -1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, hidden] -> q [n, heads, head_dim], k and v [n, kv_heads, head_dim], normed where the family norms them."""
        q, k, v = self.qkv(x)
        q = q.view(-1, self.heads, self.head_dim)
        k, v = (t.view(-1, self.kv_heads, self.head_dim) for t in (k, v))
        if self.q_norm is not None:
            self.q_norm.inplace(q)
        if self.k_norm is not None:
            self.k_norm.inplace(k)
        return q, k, v
