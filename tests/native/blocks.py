"""Random weight matrices in every GGUF type, with the `gguf` package's own dequantisation as the truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Type

FLOAT_TYPES = [Type.F32, Type.F16, Type.BF16]
SIMPLE_TYPES = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.IQ4_NL, Type.MXFP4]
K_TYPES = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]
IQ_TYPES = [Type.IQ4_XS, Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S]
QUANTISED_TYPES = SIMPLE_TYPES + K_TYPES + IQ_TYPES
GROUPS_OF_16 = {Type.Q2_K, Type.Q3_K, Type.Q6_K, Type.IQ1_M, Type.IQ2_XS, Type.IQ2_S}  # values that share a scale; 32 in the others
TYPES = FLOAT_TYPES + QUANTISED_TYPES

# Byte offset of each half-float scale in a block, with the magnitude that makes the values about 1; and where the codes lie.
_HALVES = {
    Type.Q4_0: {0: 1 / 4.6},
    Type.Q4_1: {0: 1 / 4.6, 2: 7.5 / 4.6},
    Type.Q5_0: {0: 1 / 9.2},
    Type.Q5_1: {0: 1 / 9.2, 2: 15.5 / 9.2},
    Type.Q8_0: {0: 1 / 64},
    Type.IQ4_NL: {0: 1 / 64},
    Type.MXFP4: {},
    Type.Q2_K: {80: 1 / 12, 82: 1.5 / 12},
    Type.Q3_K: {108: 1 / 43},
    Type.Q4_K: {0: 1 / 165, 2: 7.5 / 165},
    Type.Q5_K: {0: 1 / 330, 2: 15.5 / 330},
    Type.Q6_K: {208: 1 / 1200},
    Type.IQ4_XS: {0: 1 / 1200},
    Type.IQ1_S: {0: 1 / 7.5},
    Type.IQ1_M: {},
    Type.IQ2_XXS: {0: 1 / 52},
    Type.IQ2_XS: {0: 1 / 55},
    Type.IQ2_S: {0: 1 / 60},
    Type.IQ3_XXS: {0: 1 / 110},
    Type.IQ3_S: {0: 1 / 150},
}
# Slices, or masks of the bytes at an offset. What is left over is scales.
_CODES: dict[Type, list[tuple[slice, int]]] = {
    Type.Q4_0: [(slice(2, 18), 0xFF)],
    Type.Q4_1: [(slice(4, 20), 0xFF)],
    Type.Q5_0: [(slice(2, 22), 0xFF)],
    Type.Q5_1: [(slice(4, 24), 0xFF)],
    Type.Q8_0: [(slice(2, 34), 0xFF)],
    Type.IQ4_NL: [(slice(2, 18), 0xFF)],
    Type.MXFP4: [(slice(1, 17), 0xFF)],
    Type.Q2_K: [(slice(16, 80), 0xFF)],
    Type.Q3_K: [(slice(0, 96), 0xFF)],
    Type.Q4_K: [(slice(16, 144), 0xFF)],
    Type.Q5_K: [(slice(16, 176), 0xFF)],
    Type.Q6_K: [(slice(0, 192), 0xFF)],
    Type.IQ4_XS: [(slice(8, 136), 0xFF)],
    Type.IQ1_S: [(slice(2, 34), 0xFF), (slice(34, 50, 2), 0xFF), (slice(35, 50, 2), 0x0F)],
    Type.IQ1_M: [(slice(0, 48), 0xFF)],
    Type.IQ2_XXS: [(slice(2 + 8 * j + k, 3 + 8 * j + k), 0x0F if k == 7 else 0xFF) for j in range(8) for k in range(8)],
    Type.IQ2_XS: [(slice(2, 66), 0xFF)],
    Type.IQ2_S: [(slice(2, 74), 0xFF)],
    Type.IQ3_XXS: [(slice(2, 66), 0xFF)] + [(slice(66 + k, 98, 4), 0x0F if k == 3 else 0xFF) for k in range(4)],
    Type.IQ3_S: [(slice(2, 106), 0xFF)],
}


@dataclass(frozen=True)
class Weights:
    """One matrix: its bytes, its float64 values, and for each value the offset in `value = scale * code + offset`.

    The offset is the value of code 0, which is all its bits 0. In the types with tables a code is what the table says, so there the offset is 0;
    IQ1 counts from its lowest value, which entry 0 of the grid has throughout: with the shift -1/8 in IQ1_M, where shifts belong to the codes.
    """

    type_id: Type
    data: np.ndarray  # uint8 [bytes]
    values: np.ndarray  # float64 [rows, cols]
    offsets: np.ndarray  # float64 [rows, cols]


def block_values(type_id: Type) -> int:
    return GGML_QUANT_SIZES[type_id][0]


def random_weights(type_id: Type, rows: int, cols: int, rng: np.random.Generator, *, extreme: bool = False) -> Weights:
    """Every bit of the codes random, scales of both signs. `extreme`: all code bits 0 in some blocks and 1 in the others."""
    if type_id in FLOAT_TYPES:
        data = _floats(type_id, rng.standard_normal((rows, cols), np.float32))
        values = _dequantize(data, type_id, rows, cols)
        return Weights(type_id, data.ravel(), values, np.zeros_like(values))
    values_per_block, bytes_per_block = GGML_QUANT_SIZES[type_id]
    blocks = rng.integers(0, 256, (rows * cols // values_per_block, bytes_per_block), np.uint8)
    if extreme:
        _put_codes(blocks, type_id, rng.choice(np.array([0, 0x80, 0xFF], np.uint8), (len(blocks), 1)))
    _put_scales(blocks, type_id, rng)
    return decoded(type_id, blocks.ravel(), rows, cols)


def decoded(type_id: Type, data: np.ndarray, rows: int, cols: int) -> Weights:
    """Weights of those bytes."""
    blocks = data.reshape(rows * cols // block_values(type_id), -1)
    return Weights(type_id, data, _dequantize(data, type_id, rows, cols), _offsets(blocks, type_id, rows, cols))


def _put_codes(blocks: np.ndarray, type_id: Type, bits: np.ndarray | int) -> None:
    for place, mask in _CODES[type_id]:
        blocks[:, place] = blocks[:, place] & (0xFF ^ mask) | bits & mask


def _put_scales(blocks: np.ndarray, type_id: Type, rng: np.random.Generator) -> None:
    for at, magnitude in _HALVES[type_id].items():
        blocks[:, at : at + 2] = _random_halves(magnitude, len(blocks), rng).view(np.uint8).reshape(-1, 2)
    if type_id is Type.MXFP4:
        blocks[:, 0] = rng.integers(124, 128, len(blocks))  # exponents
    if type_id is Type.IQ1_M:  # the four nibbles of the half are the highest of four words
        nibbles = _random_halves(1 / 7.5, len(blocks), rng).view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 15
        blocks[:, 49::2] = blocks[:, 49::2] & 0x0F | nibbles.astype(np.uint8) << 4


def _random_halves(magnitude: float, count: int, rng: np.random.Generator) -> np.ndarray:
    return (magnitude * rng.uniform(0.5, 1.5, count) * rng.choice([-1, 1], count)).astype(np.float16)


def _offsets(blocks: np.ndarray, type_id: Type, rows: int, cols: int) -> np.ndarray:
    if type_id in [*IQ_TYPES, Type.IQ4_NL, Type.MXFP4] and type_id not in (Type.IQ1_S, Type.IQ1_M):
        return np.zeros((rows, cols))
    bare = blocks.copy()
    _put_codes(bare, type_id, 0)
    if type_id is Type.IQ1_M:
        bare[:, 32:48] = 0x88  # the shifts
    return _dequantize(bare, type_id, rows, cols)


def _dequantize(data: np.ndarray, type_id: Type, rows: int, cols: int) -> np.ndarray:
    return quants.dequantize(data.reshape(rows, -1), type_id).reshape(rows, cols).astype(np.float64)


def _floats(type_id: Type, values: np.ndarray) -> np.ndarray:
    if type_id is Type.BF16:
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(np.float16 if type_id is Type.F16 else np.float32).view(np.uint8)


def int8_activations(x: np.ndarray) -> np.ndarray:
    """x as the kernels round it, in float64: 32 values share the scale max|x| / 127, in float32 arithmetic, ties to even."""
    groups = x.reshape(len(x), -1, 32)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    codes = np.rint(groups * (np.float32(127) / largest))
    return (codes.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)
