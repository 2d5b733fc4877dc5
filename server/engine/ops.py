"""What a layer may ask of the machine: a dozen operations on float32 tensors and quantised matrices.

Two makers exist: `NativeOps` (engine/native.py), which runs them on the pinned pool, and `ReferenceOps` (layers/reference.py), the plain
torch twin that the tests hold it to. A GPU stage is a third. Layers and families are written against this protocol alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
    """Rotary angles of a step's tokens: table [n, rot_dim / 2, 2] of (cos, sin), and which values make a pair (layers/rope.py)."""

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


class Ops(Protocol):
    """Operations of one device. Activations are contiguous float32; `n` is the number of tokens."""

    def matrix(self, type_id: int, rows: int, cols: int, data: memoryview) -> Matrix:
        """Take a weight matrix in GGUF blocks, without a copy where the maker can."""
        ...

    def linear(self, matrices: Sequence[Matrix], x: Tensor, outs: Sequence[Tensor], accumulate: bool = False, norm: Norm | None = None) -> None:
        """outs[i] [n, rows_i] (+)= norm(x) [n, cols] @ matrices[i].T; without a norm, x as it is."""
        ...

    def ffn(self, gate: Matrix, up: Matrix, down: Matrix, x: Tensor, out: Tensor, accumulate: bool = False, norm: Norm | None = None) -> None:
        """out [n, hidden] (+)= down(silu(gate(y)) * up(y)) with y = norm(x), x [n, hidden] (SwiGLU, Shazeer 2020); with a norm, out may be x."""
        ...

    def dequantize_rows(self, matrix: Matrix, row_ids: Tensor, out: Tensor) -> None:
        """out [n, cols] = the matrix's rows row_ids [n] (int64), as float32."""
        ...

    def rms_norm(self, x: Tensor, norm: Norm) -> None:
        """Norm x in place over its last dimension, which has the weight's length."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: KVPages, span: Span, scale: float, out: Tensor) -> None:
        """Rotate q and k in place, write k and v into the span's pages, and attend: out = softmax(q K^T * scale) V over start + n tokens, causal.

        q and out are [n, heads, head_dim], k and v [n, kv_heads, head_dim]; heads is a multiple of kv_heads.
        """
        ...
