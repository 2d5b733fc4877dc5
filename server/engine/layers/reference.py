"""The plain torch twin of the native operations: the formulas as the papers write them, in one float type, slow and easy to trust.

Matrices are dequantised by the `gguf` package and held in full, so this is for tests and small models only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from server.engine.gguf.quants import dequantize
from server.engine.ops import KVPages, Norm, Rotation, Span


class ReferenceOps:
    """server.engine.ops.Ops in torch; arithmetic in `dtype` (float32 or float64), results stored as the caller's float32."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def matrix(self, type_id: int, rows: int, cols: int, data: memoryview) -> Tensor:
        return torch.from_numpy(dequantize(data, type_id, (rows, cols)).copy()).to(self.dtype)

    def linear(self, matrices: Sequence[Tensor], x: Tensor, outs: Sequence[Tensor], accumulate: bool = False, norm: Norm | None = None) -> None:
        wide = self._normed(x, norm).reshape(-1, matrices[0].shape[1])
        for matrix, out in zip(matrices, outs, strict=True):
            _put(out, wide @ matrix.T, accumulate)

    def ffn(self, gate: Tensor, up: Tensor, down: Tensor, x: Tensor, out: Tensor, accumulate: bool = False, norm: Norm | None = None) -> None:
        wide = self._normed(x, norm)
        _put(out, (silu(wide @ gate.T) * (wide @ up.T)) @ down.T, accumulate)

    def dequantize_rows(self, matrix: Tensor, row_ids: Tensor, out: Tensor) -> None:
        out.copy_(matrix[row_ids])

    def rms_norm(self, x: Tensor, norm: Norm) -> None:
        x.copy_(self._normed(x, norm))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: KVPages, span: Span, scale: float, out: Tensor) -> None:
        self._rotate(q, rotation)
        self._rotate(k, rotation)
        self._store(k, v, cache, span)
        self._attention(q, cache, span, scale, out)

    def _normed(self, x: Tensor, norm: Norm | None) -> Tensor:
        wide = x.to(self.dtype)
        return wide if norm is None else wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight.to(self.dtype)

    def _rotate(self, x: Tensor, rotation: Rotation) -> None:
        table, interleaved = rotation.table, rotation.interleaved
        half = table.shape[1]
        pairs = x[..., : 2 * half].to(self.dtype)
        a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else (pairs[..., :half], pairs[..., half:])
        cos, sin = table[:, None, :, 0].to(self.dtype), table[:, None, :, 1].to(self.dtype)
        turned = (a * cos - b * sin, a * sin + b * cos)
        x[..., : 2 * half] = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)

    def _store(self, k: Tensor, v: Tensor, cache: KVPages, span: Span) -> None:
        page_size = cache.v.shape[2]
        for token in range(span.n):
            page, slot = divmod(span.start + token, page_size)
            cache.k[span.pages[page], :, :, slot] = k[token].to(cache.k.dtype)
            cache.v[span.pages[page], :, slot] = v[token].to(cache.v.dtype)

    def _attention(self, q: Tensor, cache: KVPages, span: Span, scale: float, out: Tensor) -> None:
        k, v = self._gather(cache, span)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q.to(self.dtype), k) * scale
        future = torch.arange(k.shape[0])[None] > span.start + torch.arange(span.n)[:, None]
        out.copy_(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v))

    def _gather(self, cache: KVPages, span: Span) -> tuple[Tensor, Tensor]:
        """The sequence's keys and values, [start + n, kv_heads, head_dim] each."""
        pages = list(span.pages)
        k = cache.k[pages].permute(0, 3, 1, 2).flatten(0, 1)
        v = cache.v[pages].permute(0, 2, 1, 3).flatten(0, 1)
        length = span.start + span.n
        return k[:length].to(self.dtype), v[:length].to(self.dtype)


def _put(out: Tensor, value: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(value)
    else:
        out.copy_(value)
