"""Random weight matrices in every GGUF type, with the `gguf` package's own dequantisation as the truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Type

FLOAT_TYPES = [Type.F32, Type.F16, Type.BF16]
QUANTISED_TYPES = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]
TYPES = FLOAT_TYPES + QUANTISED_TYPES

# Byte offset of each half-float scale in a block, with the magnitude that makes the values about 1; and where the codes lie.
_HALVES = {
    Type.Q4_0: {0: 1 / 4.6},
    Type.Q4_1: {0: 1 / 4.6, 2: 7.5 / 4.6},
    Type.Q5_0: {0: 1 / 9.2},
    Type.Q5_1: {0: 1 / 9.2, 2: 15.5 / 9.2},
    Type.Q8_0: {0: 1 / 64},
    Type.Q4_K: {0: 1 / 165, 2: 7.5 / 165},
    Type.Q5_K: {0: 1 / 330, 2: 15.5 / 330},
    Type.Q6_K: {208: 1 / 1200},
}
_CODES = {
    Type.Q4_0: slice(2, 18),
    Type.Q4_1: slice(4, 20),
    Type.Q5_0: slice(2, 22),
    Type.Q5_1: slice(4, 24),
    Type.Q8_0: slice(2, 34),
    Type.Q4_K: slice(16, 144),
    Type.Q5_K: slice(16, 176),
    Type.Q6_K: slice(0, 192),
}


@dataclass(frozen=True)
class Weights:
    """One matrix: its bytes, its float64 values, and for each value the offset in `value = scale * code + offset`."""

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
        blocks[:, _CODES[type_id]] = rng.choice([0, 0x80, 0xFF], (len(blocks), 1))
    for at, magnitude in _HALVES[type_id].items():
        scales = (magnitude * rng.uniform(0.5, 1.5, len(blocks)) * rng.choice([-1, 1], len(blocks))).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    bare = blocks.copy()
    bare[:, _CODES[type_id]] = 0
    return Weights(type_id, blocks.ravel(), _dequantize(blocks, type_id, rows, cols), _dequantize(bare, type_id, rows, cols))


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
