"""Quantised blocks in numpy: the reference that every kernel is held to, and what tests and synthetic models are made with.

`dequantize` is gguf's own and is the truth about each format. `quantize` is gguf's where it has one; the K-quants and the IQ4 types are ours, see
kquants. `random_blocks` makes weights of a wanted spread without quantising anything, which is what large synthetic files need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import gguf.quants
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from server.engine.gguf.iq4 import quantize_iq4_nl, quantize_iq4_xs
from server.engine.gguf.kquants import quantize_q2_k, quantize_q3_k, quantize_q4_k, quantize_q5_k, quantize_q6_k

_BLOCKS_AT_ONCE = 1 << 12  # bounds the quantisers' temporaries to some tens of MB
_T = GGMLQuantizationType
_OURS = {
    _T.Q2_K: quantize_q2_k,
    _T.Q3_K: quantize_q3_k,
    _T.Q4_K: quantize_q4_k,
    _T.Q5_K: quantize_q5_k,
    _T.Q6_K: quantize_q6_k,
    _T.IQ4_NL: quantize_iq4_nl,
    _T.IQ4_XS: quantize_iq4_xs,
}


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
    if kind in _FLOATS:
        return quantize(rng.standard_normal((rows, cols), np.float32) * np.float32(std), kind)
    block_bytes = GGML_QUANT_SIZES[kind][1]
    count = rows * row_bytes(kind, cols) // block_bytes
    data = rng.integers(0, 256, (count, block_bytes), np.uint8)
    # A sign for each block, since the integers of the symmetric types lean to the negative side (-8 .. 7).
    _put_scales(data, kind, std / _unit_spread(kind) * rng.choice([-1.0, 1.0], count), rng)
    return data.reshape(rows, -1)


_FLOATS = frozenset({_T.F32, _T.F16, _T.BF16})
# Where the half-float scale lies, and where the offset lies with its share of the scale. Q2_K, Q4_K and Q5_K subtract dmin * m from d * sc * q:
# with m = sc and dmin = d * (middle of q) each sub-block is centred.
_SCALE_AT = {_T.Q2_K: 80, _T.Q3_K: 108, _T.Q6_K: 208}  # 0 in the others
_OFFSETS = {_T.Q4_1: (2, -7.5), _T.Q5_1: (2, -15.5), _T.Q2_K: (82, 1.5), _T.Q4_K: (2, 7.5), _T.Q5_K: (2, 15.5)}


def _put_scales(data: NDArray[np.uint8], kind: GGMLQuantizationType, scale: NDArray[np.float64], rng: np.random.Generator) -> None:
    """Write each block's own scale, and its offset where it has one."""
    if kind is _T.MXFP4:
        data[:, 0] = _random_exponents(np.abs(scale), rng)
    elif kind is _T.IQ1_M:
        _scatter_half(data, scale)
    else:
        _put_half(data, _SCALE_AT.get(kind, 0), scale)
    if kind in _OFFSETS:
        at, share = _OFFSETS[kind]
        _put_half(data, at, scale * share)
    if kind is _T.Q2_K:
        data[:, :16] = (data[:, :16] & 0x0F) * 0x11  # nibbles: scale and min
    elif kind in (_T.Q4_K, _T.Q5_K):
        _tie_minima(data)


@cache
def _unit_spread(kind: GGMLQuantizationType) -> float:
    """Root mean square of the values (the offset taken off) where the block's scale is 1 and every field is uniform over its bits."""
    if kind in _GRIDS:
        grid, factor, scale_bits, shift = _GRIDS[kind]
        gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)  # only then does the package unpack its grid
        assert grid.grid is not None
        values = math.hypot(_spread(grid.grid), shift)  # the shift is added or taken away
        return factor * values * _spread(2 * np.arange(2**scale_bits) + 1)
    return _SPREADS[kind]


def _spread(values: NDArray[np.floating] | NDArray[np.integer]) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.asarray(values, np.float64) ** 2)))


def _uniform(low: float, high: float) -> float:
    """Root mean square of low, low + 1, .. high, all equally likely."""
    return _spread(np.arange(low, high + 1))


_SPREADS: dict[GGMLQuantizationType, float] = {
    _T.Q4_0: _uniform(-8, 7),
    _T.Q5_0: _uniform(-16, 15),
    _T.Q8_0: _uniform(-128, 127),
    _T.Q4_1: _uniform(-7.5, 7.5),
    _T.Q5_1: _uniform(-15.5, 15.5),
    _T.Q2_K: _uniform(-1.5, 1.5) * _uniform(0, 15),
    _T.Q3_K: _uniform(-4, 3) * _uniform(-32, 31),
    _T.Q4_K: _uniform(-7.5, 7.5) * _uniform(0, 63),
    _T.Q5_K: _uniform(-15.5, 15.5) * _uniform(0, 63),
    _T.Q6_K: _uniform(-32, 31) * _uniform(-128, 127),
    _T.IQ4_NL: _spread(np.array(gguf.quants.IQ4_NL.kvalues)),
    _T.IQ4_XS: _spread(np.array(gguf.quants.IQ4_NL.kvalues)) * _uniform(-32, 31),
    _T.MXFP4: _spread(np.array(gguf.quants.MXFP4.kvalues)),
}
# Types with a grid: the class that has it, the factor of (2 scale + 1), the bits of the scale, what is added to or taken from each value.
_GRIDS = {
    _T.IQ1_S: (gguf.quants.IQ1_S, 1.0, 3, 0.125),
    _T.IQ1_M: (gguf.quants.IQ1_M, 1.0, 3, 0.125),
    _T.IQ2_XXS: (gguf.quants.IQ2_XXS, 1 / 8, 4, 0.0),
    _T.IQ2_XS: (gguf.quants.IQ2_XS, 1 / 8, 4, 0.0),
    _T.IQ2_S: (gguf.quants.IQ2_S, 1 / 8, 4, 0.0),
    _T.IQ3_XXS: (gguf.quants.IQ3_XXS, 1 / 4, 4, 0.0),
    _T.IQ3_S: (gguf.quants.IQ3_S, 1.0, 4, 0.0),
}


def _put_half(data: NDArray[np.uint8], at: int, values: NDArray[np.float64]) -> None:
    data[:, at : at + 2] = values.astype("<f2").reshape(-1, 1).view(np.uint8)


def _scatter_half(data: NDArray[np.uint8], values: NDArray[np.float64]) -> None:
    """IQ1_M's scale: its nibbles, the lowest first, are the highest of the four 16-bit words at 48."""
    nibbles = values.astype("<f2").view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 0x0F
    data[:, 49::2] = data[:, 49::2] & 0x0F | nibbles.astype(np.uint8) << 4


def _random_exponents(scale: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """MXFP4's scales 2^(e - 128): the power below each wanted one or that above, so that their mean square is what is wanted."""
    below = np.floor(np.log2(scale))
    above = rng.random(len(scale)) < (4.0 ** (np.log2(scale) - below) - 1) / 3
    return (128 + below + above).astype(np.uint8)


def _tie_minima(data: NDArray[np.uint8]) -> None:
    """Make each min index equal to its scale index (12 bytes at 4: scales' low 6 bits, minima's low 6 bits, four bits of each)."""
    data[:, 8:12] = data[:, 4:8]
    data[:, 12:16] = (data[:, 12:16] & 0x0F) * 0x11
