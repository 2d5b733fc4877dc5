"""Matrices in tile order for the tests, packed here in numpy from docs/kernels.md: a check of the order that owes nothing to the native packer."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Type

from server.engine.gpu.matrix import STRIP_ROWS, DeviceMatrix
from tests.native.blocks import FLOAT_TYPES, Weights, random_weights

_FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
TILE_TYPES = [
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS, Type.MXFP4,
]  # fmt: skip


def random_matrix(type_id: Type, rows: int, cols: int, rng: np.random.Generator, count: int = 1, device: str = "cpu") -> tuple[DeviceMatrix, np.ndarray]:
    """The matrix, and its weights as the gguf package dequantises them, float64 [count, rows, cols]."""
    weights = [random_weights(type_id, rows, cols, rng) for _ in range(count)]
    data = torch.stack([tile_order(one, rows, cols) for one in weights]).to(device)
    return DeviceMatrix(type_id, rows, cols, count, data), np.stack([one.values for one in weights])


def columns(type_id: Type, cols: int) -> int:
    """At least `cols` that the type can have."""
    values = GGML_QUANT_SIZES[type_id][0]
    return -(-cols // values) * values


def tile_order(weights: Weights, rows: int, cols: int) -> torch.Tensor:
    """uint8 [strips, strip_bytes]; for floats [rows, cols] of their dtype."""
    if weights.type_id in FLOAT_TYPES:
        return torch.from_numpy(weights.data.copy()).view(_FLOATS[weights.type_id]).reshape(rows, cols)
    values, nbytes = GGML_QUANT_SIZES[weights.type_id]
    blocks = weights.data.reshape(rows, cols // values, nbytes)
    return torch.from_numpy(np.stack([_strip(weights.type_id, blocks, row, values) for row in range(0, rows, STRIP_ROWS)]))


def _strip(type_id: Type, blocks: np.ndarray, row: int, values: int) -> np.ndarray:
    """One strip; rows that are not there repeat the last one."""
    own = blocks[np.minimum(np.arange(row, row + STRIP_ROWS), len(blocks) - 1)]
    codes, bits = _codes(type_id, own.reshape(-1, own.shape[-1]))
    steps = codes.reshape(STRIP_ROWS, -1, 8, 4).transpose(1, 2, 0, 3)  # [sub-blocks, steps, rows, 4]
    scales = [_scales(type_id, own[:, b]) for b in range(own.shape[1])]
    strip = np.concatenate([_lines(steps, bits).ravel(), *[part.ravel().view(np.uint8) for part in scales]])
    return np.pad(strip, (0, -len(strip) % 64))


def _lines(steps: np.ndarray, bits: int) -> np.ndarray:
    """Codes [sub-blocks, 8, 16, 4] -> bit planes [sub-blocks, bits, 16, 4]."""
    if bits == 8:
        return steps
    lines, place, first = np.zeros((len(steps), bits, STRIP_ROWS, 4), np.uint8), 0, 0
    for width in (4, 2, 1):
        if bits & width:
            for s in range(8):
                lines[:, first + s % width] |= (steps[:, s] >> place & (1 << width) - 1) << s // width * width
            place, first = place + width, first + width
    return lines


def _codes(type_id: Type, b: np.ndarray) -> tuple[np.ndarray, int]:
    """Blocks [n, bytes] -> codes uint8 [n, values], in the order of the columns, and their bits."""
    n = len(b)
    match type_id:
        case Type.Q8_0:
            return b[:, 2:], 8
        case Type.Q4_0 | Type.Q4_1 | Type.IQ4_NL | Type.MXFP4:
            return _nibbles(b[:, -16:]), 4
        case Type.Q5_0 | Type.Q5_1:
            return _nibbles(b[:, -16:]) | np.unpackbits(b[:, -20:-16], axis=1, bitorder="little") << 4, 5
        case Type.IQ4_XS:
            return _nibbles(b[:, 8:].reshape(n * 8, 16)).reshape(n, 256), 4
        case Type.Q4_K:
            return _fields(b[:, 16:], 4, 32), 4
        case Type.Q5_K:
            return _fields(b[:, 48:], 4, 32) | _fields(b[:, 16:48], 1, 32) << 4, 5
        case Type.Q6_K:
            return _fields(b[:, :128], 4, 64) | _fields(b[:, 128:192], 2, 32) << 4, 6
        case Type.Q2_K:
            return _fields(b[:, 16:80], 2, 32), 2
        case Type.Q3_K:
            return _fields(b[:, 32:96], 2, 32) | _fields(b[:, :32], 1, 32) << 2, 3
    raise ValueError(type_id)


def _nibbles(b: np.ndarray) -> np.ndarray:
    return np.concatenate([b & 15, b >> 4], axis=1)


def _fields(b: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Runs of bytes, whose lowest fields come first, all of them, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (b.reshape(len(b), -1, 1, run) >> shifts & (1 << bits) - 1).reshape(len(b), -1)


def _scales(type_id: Type, b: np.ndarray) -> np.ndarray:
    """The scales of 16 rows' blocks [16, bytes], a line a field."""
    match type_id:
        case Type.Q4_0 | Type.Q5_0 | Type.Q8_0 | Type.IQ4_NL:
            return _turned(b[:, :2])
        case Type.Q4_1 | Type.Q5_1:
            return _turned(b[:, :2], b[:, 2:4])
        case Type.MXFP4:
            return _turned(b[:, :1])
        case Type.Q4_K | Type.Q5_K:
            return _turned(b[:, :2], b[:, 2:4], *_six_bits(b[:, 4:16]))
        case Type.Q6_K:
            return _turned(b[:, 208:], *_each(b[:, 192:208]))
        case Type.Q2_K:
            return _turned(b[:, 80:82], b[:, 82:84], *_each(b[:, :16]))
        case Type.Q3_K:
            return _turned(b[:, 108:], *_each(b[:, 96:108]))
        case Type.IQ4_XS:
            return _turned(b[:, :2], b[:, 2:4], *_each(b[:, 4:8]))
    raise ValueError(type_id)


def _six_bits(packed: np.ndarray) -> list[np.ndarray]:
    """Q4_K's 12 bytes: for each sub-block the scale and the high bits of its minimum, then for each two the low bits of their minima."""
    scales, minima = quants.Q4_K.get_scale_min(packed)
    firsts = [scales[:, j : j + 1] | minima[:, j : j + 1] >> 4 << 6 for j in range(8)]
    return firsts + [minima[:, j : j + 1] & 15 | (minima[:, j + 1 : j + 2] & 15) << 4 for j in range(0, 8, 2)]


def _each(b: np.ndarray) -> list[np.ndarray]:
    return [b[:, i : i + 1] for i in range(b.shape[1])]


def _turned(*fields: np.ndarray) -> np.ndarray:
    """Fields [16, bytes], one behind the other with its rows side by side."""
    return np.concatenate([np.ascontiguousarray(field).ravel() for field in fields])
