"""A weight matrix on the GPU, in the CPU's own order: what the native pool packed is copied as it is, so that one layout serves RAM, PCIe and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

STRIP_ROWS = 16  # rows of a strip in tile order (docs/kernels.md)


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """`count` matrices [rows, cols] of one GGUF type.

    data is uint8 [count, ceil(rows / 16), strip_bytes] in tile order, or for F32, F16 and BF16 [count, rows, cols] of that dtype.
    """

    type_id: int
    rows: int
    cols: int
    count: int
    data: Tensor

    @property
    def tiled(self) -> bool:
        """Whether it is in tile order; else its rows are floats."""
        return not self.data.dtype.is_floating_point
