"""Grouped-query attention (Ainslie et al. 2023) over the paged KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.layers.linear import Linear
from server.engine.layers.norm import HeadNorm
from server.engine.ops import KVPages, Ops, Rotation, Span


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """x += output(softmax(q k^T / sqrt(head_dim)) v), with `heads` query heads sharing `kv_heads` key and value heads."""

    ops: Ops
    qkv: Linear  # of the normed hidden state: q [heads * head_dim, hidden], k and v [kv_heads * head_dim, hidden]
    output: Linear  # [hidden, heads * head_dim]
    rotation: Rotation
    heads: int
    kv_heads: int
    head_dim: int
    q_norm: HeadNorm | None = None  # before the rotation
    k_norm: HeadNorm | None = None

    def __call__(self, x: Tensor, cache: KVPages, span: Span) -> None:
        """x [n, hidden] in place; the span's keys and values are written to the cache."""
        q, k, v = self._project(x)
        mixed = torch.empty_like(q)
        self.ops.attend(q, k, v, self.rotation, cache, span, 1.0 / math.sqrt(self.head_dim), mixed)
        self.output.add_to(x, mixed)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, hidden] -> q [n, heads, head_dim], k and v [n, kv_heads, head_dim], normed where the family norms them."""
        q, k, v = self.qkv(x)
        q = q.view(-1, self.heads, self.head_dim)
        k, v = (t.view(-1, self.kv_heads, self.head_dim) for t in (k, v))
        if self.q_norm is not None:
            self.q_norm(q)
        if self.k_norm is not None:
            self.k_norm(k)
        return q, k, v
