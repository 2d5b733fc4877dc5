"""The types that have a tile order (docs/kernels.md), as the kernels and their twins need them: how wide codes are, and what kind of scales they have.

A weight is `scale * (code - zero) + offset`; types with a table of 16 values have `VALUES[table][code]` in the place of the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gguf.constants import GGMLQuantizationType as Type

SUB_BLOCK = 32  # columns whose codes lie together
ONE = 0x3F800000  # the bits of 1.0, for kernels: an argument and no constant in the code, as an instruction with mask and exponent has room for one constant
LINE = 64  # bytes: 4 columns of a strip's 16 rows, or the bits of more
Scales = Literal["half", "half_min", "power", "k2", "k3", "k45", "k6", "iq4_xs"]

VALUES = {
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "mxfp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),  # doubled, so that they are whole
}


@dataclass(frozen=True, slots=True)
class TileFormat:
    """One type. Codes of 8 bits are signed, others are not."""

    bits: int
    scales: Scales
    zero: int = 0
    table: Literal["iq4", "mxfp4"] | None = None

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return 16 if self.scales in ("k2", "k3", "k6") else SUB_BLOCK


FORMATS: dict[int, TileFormat] = {
    Type.Q4_0: TileFormat(4, "half", 8),
    Type.Q4_1: TileFormat(4, "half_min"),
    Type.Q5_0: TileFormat(5, "half", 16),
    Type.Q5_1: TileFormat(5, "half_min"),
    Type.Q8_0: TileFormat(8, "half"),
    Type.Q2_K: TileFormat(2, "k2"),
    Type.Q3_K: TileFormat(3, "k3", 4),
    Type.Q4_K: TileFormat(4, "k45"),
    Type.Q5_K: TileFormat(5, "k45"),
    Type.Q6_K: TileFormat(6, "k6", 32),
    Type.IQ4_NL: TileFormat(4, "half", table="iq4"),
    Type.IQ4_XS: TileFormat(4, "iq4_xs", table="iq4"),
    Type.MXFP4: TileFormat(4, "power", table="mxfp4"),
}
