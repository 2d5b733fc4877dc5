"""Products of each head's activations with that head's matrix, quantised: latent attention's way from queries to latents and from latents to values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from server.engine.gpu.matrix import DeviceMatrix
from server.engine.kernels.attention_plan import MATVEC_TOKENS, OPENED_BYTES


class HeadKernels(Protocol):
    """What latent attention asks of the kernels for quantised matrices."""

    def matvec(self, m: DeviceMatrix, x: Tensor, out: Tensor) -> None:
        """out [n, count, rows] = m.data[c] @ x [n, count, cols], float32, n <= 8; x may be strided in its first two dimensions."""
        ...

    def dequantize(self, m: DeviceMatrix, out: Tensor, first_row: int = 0, matrices: Tensor | None = None) -> None:
        """out [count, rows, cols], bfloat16 or wider = the matrices, or those whose int32 ids are in `matrices`."""
        ...


def apply_heads(m: DeviceMatrix, x: Tensor, out: Tensor, dtype: torch.dtype, kernels: HeadKernels) -> None:
    """out [n, heads, rows] = m[h] @ x[:, h] for each head h, x [n, heads, cols] float32; beyond MATVEC_TOKENS tokens as products in dtype."""
    if x.shape[0] <= MATVEC_TOKENS:
        kernels.matvec(m, x, out)
        return
    for heads, weights in opened(m, dtype, OPENED_BYTES // (m.rows * m.cols * dtype.itemsize), kernels):
        out[:, heads] = torch.bmm(x[:, heads].transpose(0, 1).to(dtype), weights.mT).transpose(0, 1)


def opened(m: DeviceMatrix, dtype: torch.dtype, at_once: int, kernels: HeadKernels) -> Iterator[tuple[slice, Tensor]]:
    """The matrices [count, rows, cols] in dtype, at_once of them, each time with the heads they are of; the next take the same memory."""
    at_once = max(1, min(at_once, m.count))
    for first in range(0, m.count, at_once):
        heads = slice(first, min(first + at_once, m.count))
        yield heads, open_heads(m, heads, dtype, kernels)


def open_heads(m: DeviceMatrix, heads: slice, dtype: torch.dtype, kernels: HeadKernels) -> Tensor:
    """Those heads' matrices, [heads, rows, cols] in dtype."""
    ids = torch.arange(heads.start, heads.stop, dtype=torch.int32, device=m.data.device)
    wide = torch.bfloat16 if dtype is torch.float16 else dtype
    out = torch.empty(len(ids), m.rows, m.cols, dtype=wide, device=m.data.device)
    kernels.dequantize(m, out, matrices=ids)
    return out.to(dtype)
