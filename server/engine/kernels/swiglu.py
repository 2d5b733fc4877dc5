"""SwiGLU's elementwise part on the GPU, between the products with gate and up and the one with down (Shazeer 2020)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def swiglu(gate: Tensor, up: Tensor, out: Tensor, scales: Tensor | None = None) -> None:
    """out [n, ffn] (float32 or bf16) = silu(gate) * up * scales[:, None], reckoned in float32; gate and up [n, ffn] of any float type, rows apart
    by any stride (they may be halves of one product); scales [n] float32, 1 without. out may be gate or up.
    """
    n, ffn = out.shape
    strides = (gate.stride(0), up.stride(0), out.stride(0))
    scaled = scales is not None
    _swiglu[(triton.cdiv(ffn, _BLOCK), n)](gate, up, scales if scaled else out, out, ffn, *strides, SCALED=scaled, BLOCK=_BLOCK)


@triton.jit
def _swiglu(gate, up, scales, out, ffn, gate_stride, up_stride, out_stride, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = col < ffn
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    product = g / (1.0 + tl.exp(-g)) * u
    if SCALED:
        product *= tl.load(scales + row)
    tl.store(out + row * out_stride + col, product.to(out.dtype.element_ty), mask=inside)
