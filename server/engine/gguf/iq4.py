"""Quantisers for IQ4_NL and IQ4_XS: 4 bits that stand for 16 values of unequal distance, in numpy over many blocks at once.

For each 32 values a few scales are tried, of either sign since the table reaches further down than up: each value goes to the nearest of the table,
the scale is refitted by least squares, and the one with the smallest squared error stays. The formats are spelled out at each packing.
"""

from __future__ import annotations

import gguf.quants
import numpy as np
from numpy.typing import NDArray

from server.engine.gguf.kquants import Bytes, Floats, round_signed_scales

_VALUES = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
_MIDDLES = (_VALUES[1:] + _VALUES[:-1]) / 2
_REACHES = np.linspace(100.0, 150.0, 11)  # what the largest magnitude of 32 becomes; more than the table has clips it
_TINY = np.float32(1e-30)  # below any scale that a half float can hold


def quantize_iq4_nl(blocks: Floats) -> Bytes:
    """float32 [n, 32] -> uint8 [n, 18]: d, then nibbles, low ones for the first 16 values; value = d * table[nibble]."""
    d = _fit(blocks).astype(np.float16)
    return np.concatenate([d.astype("<f2").view(np.uint8), _pack_nibbles(_nearest(blocks, d.astype(np.float32)))], axis=-1)


def quantize_iq4_xs(blocks: Floats) -> Bytes:
    """float32 [n, 256] -> uint8 [n, 136]: d, the high 2 bits and the low 4 of eight scales sc, nibbles; value = d * (sc - 32) * table[nibble]."""
    values = blocks.reshape(len(blocks), 8, 32)
    d, index = round_signed_scales(_fit(values)[..., 0], 32)
    q = _nearest(values, (d * index)[..., None])
    scales = (index + 32).astype(np.uint16)
    high = ((scales >> 4) << 2 * np.arange(8, dtype=np.uint16)).sum(-1, keepdims=True, dtype=np.uint16)
    low = (scales[:, ::2] & 15 | (scales[:, 1::2] & 15) << 4).astype(np.uint8)
    return np.concatenate([d.astype("<f2").view(np.uint8), high.astype("<u2").view(np.uint8), low, _pack_nibbles(q).reshape(len(blocks), 128)], axis=-1)


def _fit(values: Floats) -> Floats:
    """values [..., 32] ~ scale * table -> scale [..., 1]."""
    extreme = np.take_along_axis(values, np.abs(values).argmax(-1, keepdims=True), -1)
    best_error = np.full(extreme.shape, np.inf, np.float32)
    best_scale = np.zeros_like(extreme)
    for reach in np.concatenate([-_REACHES, _REACHES]).astype(np.float32):
        rounded = _VALUES[_nearest(values, extreme / reach)]
        scale = (rounded * values).sum(-1, keepdims=True) / np.square(rounded).sum(-1, keepdims=True)
        error = np.square(scale * rounded - values).sum(-1, keepdims=True)
        better = error < best_error
        best_error, best_scale = np.where(better, error, best_error), np.where(better, scale, best_scale)
    return best_scale


def _nearest(values: Floats, scale: Floats) -> NDArray[np.int64]:
    """The place in the table of each value / scale; a scale of 0 makes it that of 0."""
    return np.searchsorted(_MIDDLES, values / np.where(np.abs(scale) < _TINY, np.inf, scale))


def _pack_nibbles(q: NDArray[np.int64]) -> Bytes:
    """[..., 32] of 4 bits -> [..., 16]."""
    return (q[..., :16] | q[..., 16:] << 4).astype(np.uint8)
