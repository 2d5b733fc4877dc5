"""Root-mean-square norm on the GPU: one program a few rows, each row read once and kept in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_VALUES = 1024  # short rows (the heads' norms) share a program until it has as many values as this


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out [n, dim] (float32 or bf16; may be x) = x / sqrt(mean(x^2) + eps) * weight; x [n, dim] float32, rows apart by any stride; weight [dim] float32."""
    n, dim = x.shape
    block = triton.next_power_of_2(dim)
    rows = max(1, _VALUES // block)
    warps = min(max(rows * block // 512, 1), 16)
    _rms_norm[(triton.cdiv(n, rows),)](x, weight, out, n, dim, x.stride(0), out.stride(0), eps, ROWS=rows, BLOCK=block, num_warps=warps)


@triton.jit
def _rms_norm(x, weight, out, n, dim, x_stride, out_stride, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < n) & (col < dim)
    values = tl.load(x + row * x_stride + col, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / dim + eps)
    normed = values * scale[:, None] * tl.load(weight + col, mask=col < dim, other=0.0)
    tl.store(out + row * out_stride + col, normed.to(out.dtype.element_ty), mask=inside)
