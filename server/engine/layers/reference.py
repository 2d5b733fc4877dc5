"""The plain torch twin of the native operations: the formulas as the papers write them, in one float type, slow and easy to trust.

Matrices are dequantised by the `gguf` package and held in full, so this is for tests and small models only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.functional import silu

from server.engine.gguf.quants import dequantize
from server.engine.ops import KVPages, LatentPages, Norm, Rotation, Routing, Span


class ReferenceOps:
    """server.engine.ops.Ops in torch; arithmetic in `dtype` (float32 or float64), results stored as the caller's float32."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def matrix(self, type_id: int, rows: int, cols: int, data: memoryview, count: int = 1) -> Tensor:
        """[rows, cols], or [count, rows, cols] where there are several."""
        values = torch.from_numpy(dequantize(data, type_id, (count * rows, cols)).copy()).to(self.dtype)
        return values if count == 1 else values.view(count, rows, cols)

    def spread_experts(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        pass

    def lay_out(self, matrix: Tensor) -> Iterator[tuple[int, int]]:
        return iter(())

    def linear(
        self, matrices: Sequence[Tensor], x: Tensor, outs: Sequence[Tensor], accumulate: bool = False, norm: Norm | None = None, biases: Sequence[Tensor] = ()
    ) -> None:
        wide = self._normed(x, norm).reshape(-1, matrices[0].shape[1])
        for matrix, out, bias in zip_longest(matrices, outs, biases):
            product = wide @ matrix.T
            _put(out, product if bias is None else product + bias.to(self.dtype), accumulate)

    def ffn(
        self, gate: Tensor, up: Tensor, down: Tensor, x: Tensor, out: Tensor, accumulate: bool = False, norm: Norm | None = None, scales: Tensor | None = None
    ) -> None:
        result = _swiglu(gate, up, down, self._normed(x, norm))
        _put(out, result if scales is None else result * scales.to(self.dtype)[:, None], accumulate)

    def route(self, router: Tensor, routing: Routing, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        logits = x.to(self.dtype) @ router.T
        scores = logits.softmax(-1) if routing.gating == "softmax" else logits.sigmoid()
        biased = scores if routing.bias is None else scores + routing.bias.to(self.dtype)
        chosen = _largest(_without_other_groups(biased, routing), routing.top_k)
        chosen_scores = scores.gather(1, chosen)
        if routing.normalize:
            chosen_scores = chosen_scores / (chosen_scores.sum(-1, keepdim=True) + 1e-20)  # DeepSeek's guard
        ids.copy_(chosen)
        weights.copy_(chosen_scores * routing.scale)

    def experts(self, gate: Tensor, up: Tensor, down: Tensor, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Callable[[], None]:
        gate, up, down = (m.view(-1, *m.shape[-2:]) for m in (gate, up, down))
        wide = x.to(self.dtype)
        total = torch.zeros(out.shape, dtype=self.dtype)
        for expert in range(len(gate)):
            token, j = torch.where(ids == expert)
            total.index_add_(0, token, _swiglu(gate[expert], up[expert], down[expert], wide[token]) * weights[token, j].to(self.dtype)[:, None])
        out.add_(total)
        return lambda: None

    def sigmoid(self, x: Tensor) -> None:
        x.sigmoid_()

    def dequantize_rows(self, matrix: Tensor, row_ids: Tensor, out: Tensor) -> None:
        out.copy_(matrix[row_ids])

    def rms_norm(self, x: Tensor, norm: Norm, out: Tensor | None = None) -> None:
        (x if out is None else out).copy_(self._normed(x, norm))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: KVPages, span: Span, scale: float, out: Tensor) -> None:
        self._rotate(q, rotation, span)
        self._rotate(k, rotation, span)
        self._store(k, v, cache, span)
        self._attention(q, cache, span, scale, out)

    def attend_latent(
        self,
        q: Tensor,
        latent: Tensor,
        norm: Norm,
        rotation: Rotation,
        cache: LatentPages,
        span: Span,
        k_b: Tensor,
        v_b: Tensor,
        scale: float,
        out: Tensor,
    ) -> None:
        """The expanded form: every head's keys and values are made from the cached latents, and nothing is absorbed."""
        heads, kv_lora, rope_dim = q.shape[1], norm.weight.numel(), 2 * rotation.table.shape[1]
        latent[:, :kv_lora] = self._normed(latent[:, :kv_lora], norm)
        self._rotate(latent[:, None, kv_lora:], rotation, span)
        self._rotate(q[..., q.shape[2] - rope_dim :], rotation, span)
        for token in range(span.n):
            page, slot = divmod(span.start + token, cache.latent.shape[1])
            cache.latent[span.pages[page], slot] = latent[token].to(cache.latent.dtype)
        seen = cache.latent[list(span.pages)].flatten(0, 1)[: span.start + span.n].to(self.dtype)
        compressed, k_rope = seen[:, None, :kv_lora], seen[:, None, kv_lora:].expand(-1, heads, -1)
        k_nope = torch.einsum("hcd,tuc->thd", k_b.view(heads, kv_lora, -1), compressed)
        v = torch.einsum("hdc,tuc->thd", v_b.view(heads, -1, kv_lora), compressed)
        self._softmax_attention(q, torch.cat((k_nope, k_rope), -1), v, span, scale, out)

    def _normed(self, x: Tensor, norm: Norm | None) -> Tensor:
        wide = x.to(self.dtype)
        return wide if norm is None else wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight.to(self.dtype)

    def _rotate(self, x: Tensor, rotation: Rotation, span: Span) -> None:
        table, interleaved = rotation.table[span.start : span.start + span.n], rotation.interleaved
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
        self._softmax_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), span, scale, out)

    def _softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float, out: Tensor) -> None:
        """q [n, heads, key_dim], k and v of all start + n positions, [start + n, heads, ...]."""
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


def _swiglu(gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def _largest(values: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row stand, best first, ties to the lower index."""
    return values.argsort(stable=True, dim=-1, descending=True)[:, :count]


def _without_other_groups(biased: Tensor, routing: Routing) -> Tensor:
    """biased [n, experts] with -inf in all groups but the best `groups_used` of each token."""
    groups = biased.view(biased.shape[0], routing.groups, -1)
    worth = groups.topk(routing.group_top, -1).values.sum(-1)
    used = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, _largest(worth, routing.groups_used), True)
    return groups.masked_fill(~used[..., None], -torch.inf).flatten(-2)


def _put(out: Tensor, value: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(value)
    else:
        out.copy_(value)
