"""Quantised blocks in numpy: the reference that every kernel is held to, and what tests and synthetic models are made with.

`dequantize` is gguf's own and is the truth about each format. `quantize` is gguf's where it has one; Q4_K, Q5_K and Q6_K are ours, see there.
`random_blocks` makes weights of a wanted spread without quantising anything, which is what large synthetic files need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import gguf.quants
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from server.engine.gguf.kquants import quantize_q4_k, quantize_q5_k, quantize_q6_k

_BLOCKS_AT_ONCE = 1 << 12  # bounds the quantisers' temporaries to some tens of MB
_OURS = {GGMLQuantizationType.Q4_K: quantize_q4_k, GGMLQuantizationType.Q5_K: quantize_q5_k, GGMLQuantizationType.Q6_K: quantize_q6_k}


def row_bytes(type_id: int, cols: int) -> int:
    """Bytes of a row of `cols` values. Raises ValueError where the type is unknown or its blocks do not fill the row."""
    kind = GGMLQuantizationType(type_id)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if cols % block:
        raise ValueError(f"a row of {cols} values is not a whole number of {kind.name} blocks of {block}")
    return cols // block * block_bytes


def dequantize(data: bytes | memoryview | NDArray[np.uint8], type_id: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Blocks -> float32 of `shape` (numpy order). F32 is a view of `data`, the rest is new."""
    kind = GGMLQuantizationType(type_id)
    rows = np.frombuffer(data, np.uint8).reshape(math.prod(shape[:-1]), row_bytes(kind, shape[-1]))
    values: NDArray[np.float32] = gguf.quants.dequantize(rows, kind)
    return values.reshape(shape)


def quantize(array: NDArray[np.floating], type_id: int) -> NDArray[np.uint8]:
    """Floats [..., cols] -> blocks, uint8 [..., row_bytes]. Raises ValueError on a type without a quantiser here."""
    kind = GGMLQuantizationType(type_id)
    values = np.ascontiguousarray(array, np.float32)
    shape = (*values.shape[:-1], row_bytes(kind, values.shape[-1]))
    if kind in _OURS:
        blocks = values.reshape(-1, GGML_QUANT_SIZES[kind][0])
        parts = [_OURS[kind](blocks[i : i + _BLOCKS_AT_ONCE]) for i in range(0, len(blocks), _BLOCKS_AT_ONCE)]
        return np.concatenate(parts).reshape(shape)
    try:
        data: NDArray[np.uint8] = gguf.quants.quantize(values, kind)
    except NotImplementedError:
        raise ValueError(f"there is no quantiser for {kind.name}") from None
    return np.ascontiguousarray(data).view(np.uint8).reshape(shape)


def random_blocks(type_id: int, rows: int, cols: int, std: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random valid blocks, uint8 [rows, row_bytes], whose values have mean 0 and standard deviation `std`.

    The integers are uniform, so only the half-float scales are set, to std over the spread of the integers; they keep their 11 bits
    for std >= 0.1 and lose them below (the smallest half float is 6e-8).
    """
    kind = GGMLQuantizationType(type_id)
    if kind not in _SPREADS:
        return quantize(rng.standard_normal((rows, cols), np.float32) * np.float32(std), kind)
    block_bytes = GGML_QUANT_SIZES[kind][1]
    count = rows * row_bytes(kind, cols) // block_bytes
    data = rng.integers(0, 256, (count, block_bytes), np.uint8)
    unit, scale_at, offset_at, offset = _SPREADS[kind]
    # A sign for each block, since the integers of the symmetric types lean to the negative side (-8 .. 7).
    scale = std / unit * rng.choice([-1.0, 1.0], count)
    _put_half(data, scale_at, scale)
    if offset_at is not None:
        _put_half(data, offset_at, scale * offset)
    if kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K):
        _tie_minima(data)
    return data.reshape(rows, -1)


def _uniform(low: int, high: int) -> float:
    """Root mean square of the integers low .. high, all equally likely."""
    return float(np.sqrt(np.mean(np.arange(low, high + 1, dtype=np.float64) ** 2)))


# type -> (spread of the values at scale 1, where the scale lies, where the offset lies, offset / scale). Every field is uniform over its bits.
# Q4_K and Q5_K subtract dmin * m from d * sc * q: with m = sc and dmin = d * (middle of q) each sub-block is centred.
_SPREADS: dict[GGMLQuantizationType, tuple[float, int, int | None, float]] = {
    GGMLQuantizationType.Q4_0: (_uniform(-8, 7), 0, None, 0.0),
    GGMLQuantizationType.Q5_0: (_uniform(-16, 15), 0, None, 0.0),
    GGMLQuantizationType.Q8_0: (_uniform(-128, 127), 0, None, 0.0),
    GGMLQuantizationType.Q6_K: (_uniform(-32, 31) * _uniform(-128, 127), 208, None, 0.0),
    GGMLQuantizationType.Q4_1: (16 / math.sqrt(12), 0, 2, -7.5),
    GGMLQuantizationType.Q5_1: (32 / math.sqrt(12), 0, 2, -15.5),
    GGMLQuantizationType.Q4_K: (16 / math.sqrt(12) * _uniform(0, 63), 0, 2, 7.5),
    GGMLQuantizationType.Q5_K: (32 / math.sqrt(12) * _uniform(0, 63), 0, 2, 15.5),
}


def _put_half(data: NDArray[np.uint8], at: int, values: NDArray[np.float64]) -> None:
    data[:, at : at + 2] = values.astype("<f2").reshape(-1, 1).view(np.uint8)


def _tie_minima(data: NDArray[np.uint8]) -> None:
    """Make each min index equal to its scale index (12 bytes at 4: scales' low 6 bits, minima's low 6 bits, four bits of each)."""
    data[:, 8:12] = data[:, 4:8]
    data[:, 12:16] = (data[:, 12:16] & 0x0F) * 0x11
