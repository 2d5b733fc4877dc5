"""What a layer may ask of the machine: a dozen operations on float32 tensors and quantised matrices.

Three makers exist: `NativeOps` (engine/native.py), which runs them on the pinned pool; `GpuOps` (engine/gpu/ops.py), which runs them on a GPU but for the
routed experts; and `ReferenceOps` (layers/reference.py), the plain torch twin that the tests hold both to. Layers and families are written against this
protocol alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

# A maker's own handle on one weight matrix [rows, cols]; layers only hand it back.
Matrix = Any


@dataclass(frozen=True, slots=True)
class Span:
    """Where a step's tokens stand in their sequence: positions start .. start + n - 1, in these pages of the KV cache."""

    start: int
    n: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Norm:
    """Root-mean-square layer norm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight; weight is float32."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary angles by position, as many as the cache has room for: table [positions, rot_dim / 2, 2] of (cos, sin), and which values make a pair
    (layers/rope.py)."""

    table: Tensor
    interleaved: bool


@dataclass(frozen=True, slots=True)
class KVPages:
    """One layer's KV storage, allocated by kv_cache.py, float16 or float32.

    k is [num_pages, kv_heads, head_dim, page_size], transposed within the page, so that scores need no horizontal sums;
    v is [num_pages, kv_heads, page_size, head_dim].
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class LatentPages:
    """One layer's storage of multi-head latent attention, float16 or float32: what all heads share of a token, once.

    latent is [num_pages, page_size, kv_lora + rope]: the normed compressed latent, then the rotated key part.
    """

    latent: Tensor


Cache = KVPages | LatentPages  # one layer's storage


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router's logits become the experts of a token and their weights.

    scores = gating(logits). Experts stand in `groups` runs of equal length; the `groups_used` best runs stay, a run being worth the sum of its
    `group_top` best biased scores (DeepSeek-V2 takes 1, the maximum; V3 takes 2). Of those the `top_k` best biased scores win, ties to the lower
    id. The weights are the unbiased scores, made to sum to 1 where `normalize`, times `scale`. Sources: DeepSeek-V2 (arXiv:2405.04434), 2.1.2;
    DeepSeek-V3 (arXiv:2412.19437), 2.1.2; Mixtral (arXiv:2401.04088), where a softmax over the chosen logits is the same as `normalize`.
    """

    top_k: int
    gating: Literal["softmax", "sigmoid"]
    normalize: bool
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    group_top: int = 1
    bias: Tensor | None = None  # [experts] float32, added for the choice only


class Ops(Protocol):
    """Operations of one device. Activations are contiguous float32; `n` is the number of tokens.

    Between the embedding and the logits a model computes by these operations alone, never by torch itself, so that a maker can record a step.
    """

    @property
    def device(self) -> torch.device:
        """Where activations, norms, biases and rotary tables live. Token ids and a Span are always the CPU's."""
        ...

    def matrix(self, type_id: int, rows: int, cols: int, data: memoryview, count: int = 1) -> Matrix:
        """Take a weight matrix in GGUF blocks, without a copy where the maker can; `count` of them, one behind the other, for experts and heads."""
        ...

    def spread_experts(self, gate: Matrix, up: Matrix, down: Matrix) -> None:
        """Told before they are laid out: these are the routed experts of one layer. The maker may spread them over nodes of memory (engine/numa.py).

        Only `experts` takes them from then on.
        """
        ...

    def lay_out(self, matrix: Matrix) -> Iterator[tuple[int, int]]:
        """Bring a matrix into the order that the maker is fastest with; nothing, where that is how it came.

        Yields the ranges of bytes of its `data`, in order, each before it is read; the one before is then not needed any more. The rows of what has
        been laid out can no longer be looked up (`dequantize_rows`).
        """
        ...

    def linear(
        self, matrices: Sequence[Matrix], x: Tensor, outs: Sequence[Tensor], accumulate: bool = False, norm: Norm | None = None, biases: Sequence[Tensor] = ()
    ) -> None:
        """outs[i] [n, rows_i] (+)= norm(x) [n, cols] @ matrices[i].T (+ biases[i]); without a norm, x as it is. Biases are not for what is accumulated."""
        ...

    def ffn(
        self, gate: Matrix, up: Matrix, down: Matrix, x: Tensor, out: Tensor, accumulate: bool = False, norm: Norm | None = None, scales: Tensor | None = None
    ) -> None:
        """out [n, hidden] (+)= scales * down(silu(gate(y)) * up(y)) with y = norm(x), x [n, hidden] (SwiGLU, Shazeer 2020).

        scales [n] is one factor a token, 1 without. With a norm, out may be x.
        """
        ...

    def route(self, router: Matrix, routing: Routing, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Choose each token's experts: ids [n, top_k] int32, best first, and weights [n, top_k] float32, from x [n, hidden] and router [experts, hidden]."""
        ...

    def experts(self, gate: Matrix, up: Matrix, down: Matrix, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Callable[[], None]:
        """Begin out [n, hidden] += sum over j of weights[:, j] * ffn of expert ids[:, j] (x); gate, up, down hold `count` experts. out is not x.

        It has happened once what is returned has been called; what is asked for in between, which may add to `out` too, can run beside it.
        """
        ...

    def sigmoid(self, x: Tensor) -> None:
        """1 / (1 + exp(-x)), in place."""
        ...

    def dequantize_rows(self, matrix: Matrix, row_ids: Tensor, out: Tensor) -> None:
        """out [n, cols] = the matrix's rows row_ids [n] (int64), as float32."""
        ...

    def rms_norm(self, x: Tensor, norm: Norm, out: Tensor | None = None) -> None:
        """out = norm(x) over the last dimension, which has the weight's length; in place without an out."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: KVPages, span: Span, scale: float, out: Tensor) -> None:
        """Rotate q and k in place, write k and v into the span's pages, and attend: out = softmax(q K^T * scale) V over start + n tokens, causal.

        q and out are [n, heads, head_dim], k and v [n, kv_heads, head_dim]; heads is a multiple of kv_heads.
        """
        ...

    def attend_latent(
        self,
        q: Tensor,
        latent: Tensor,
        norm: Norm,
        rotation: Rotation,
        cache: LatentPages,
        span: Span,
        k_b: Matrix,
        v_b: Matrix,
        scale: float,
        out: Tensor,
    ) -> None:
        """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1), in the absorbed form: keys and values are never expanded.

        q [n, heads, nope + rope]; latent [n, kv_lora + rope], as attn_kv_a_mqa gives it. The last rope values of each query and of the latent are
        rotated, the latent's first kv_lora are normed, and what results is written to the span's pages. Then, for head h, causal over start + n tokens,
            score = scale * ((k_b[h] q_nope) . c + q_rope . k_rope),   out[h] = v_b[h] (softmax(score) c)
        with k_b `heads` matrices [kv_lora, nope], v_b `heads` matrices [v_dim, kv_lora], out [n, heads, v_dim]. q and latent may be left overwritten.
        """
        ...
