"""Quantisers for the K-quants, in numpy over many blocks at once.

All fit each sub-block on its own: a few grids of slightly different width are laid over it, the values are rounded to each, the scale
(and the minimum) is refitted to the rounded integers by least squares, and the grid with the smallest squared error stays. Then the
sub-blocks' scales are themselves rounded to the block's integers and the values are rounded once more, to what a reader will see.
Formats: the K-quants section of ggml's quantised blocks, spelled out at each packing below. Sizes in values: 256 a block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_Q2_K_WIDTHS = np.linspace(2.6, 4.4, 19)  # steps across the range of 16 values; more than 3 clips its extremes
_Q3_K_WIDTHS = np.linspace(3.2, 5.0, 19)  # steps from 0 to the largest magnitude of 16; more than 4 clips it
_Q4_K_WIDTHS = np.linspace(14.0, 18.0, 17)  # steps across a sub-block's range; more than 15 clips its extremes
_Q5_K_WIDTHS = np.linspace(29.0, 34.0, 16)  # likewise; more than 31 clips
_Q6_K_WIDTHS = np.linspace(30.0, 40.0, 21)  # steps from 0 to the largest magnitude; more than 32 clips it
_TINY = np.float32(1e-30)  # below any scale that a half float can hold


def quantize_q2_k(blocks: Floats) -> Bytes:
    """float32 [n, 256] -> uint8 [n, 84]: value = d * sc * q - dmin * m, with q of 2 bits, sc and m of 4 bits for each 16 values."""
    d, dmin, scale_index, min_index, q = _round_affine(blocks.reshape(len(blocks), 16, 16), 3, 15, _Q2_K_WIDTHS)
    return np.concatenate([scale_index | min_index << 4, _pack_pairs(q), _half(d), _half(dmin)], axis=-1)


def quantize_q3_k(blocks: Floats) -> Bytes:
    """float32 [n, 256] -> uint8 [n, 110]: value = d * sc * q, with q of 3 bits (-4 .. 3) and sc of 6 bits (-32 .. 31) for each 16 values."""
    d, scale_index, q = _round_symmetric(blocks, 4, 32, _Q3_K_WIDTHS)
    return np.concatenate([_pack_bit(q, 2), _pack_pairs(q), _pack_16_scales(scale_index + 32), _half(d)], axis=-1)


def quantize_q4_k(blocks: Floats) -> Bytes:
    """float32 [n, 256] -> uint8 [n, 144]: value = d * sc * q - dmin * m, with q of 4 bits, sc and m of 6 bits for each 32 values."""
    d, dmin, scale_index, min_index, q = _round_affine(blocks.reshape(len(blocks), 8, 32), 15, 63, _Q4_K_WIDTHS)
    return np.concatenate([_half(d), _half(dmin), _pack_6_bits(scale_index, min_index), _pack_nibbles(q)], axis=-1)


def quantize_q5_k(blocks: Floats) -> Bytes:
    """float32 [n, 256] -> uint8 [n, 176]: as Q4_K with q of 5 bits, whose high bits come before the nibbles."""
    d, dmin, scale_index, min_index, q = _round_affine(blocks.reshape(len(blocks), 8, 32), 31, 63, _Q5_K_WIDTHS)
    scales = _pack_6_bits(scale_index, min_index)
    return np.concatenate([_half(d), _half(dmin), scales, _pack_bit(q, 4), _pack_nibbles(q)], axis=-1)


def quantize_q6_k(blocks: Floats) -> Bytes:
    """float32 [n, 256] -> uint8 [n, 210]: value = d * sc * q, with q of 6 bits (-32 .. 31) and a signed byte sc for each 16 values."""
    d, scale_index, q = _round_symmetric(blocks, 32, 128, _Q6_K_WIDTHS)
    low, high = _pack_6_bit_values(q.reshape(-1, 2, 4, 32))
    return np.concatenate([low, high, scale_index.astype(np.int8).view(np.uint8), _half(d)], axis=-1)


def _round_affine(values: Floats, most: int, most_scale: int, widths: NDArray[np.float64]) -> tuple[Floats, Floats, Bytes, Bytes, Bytes]:
    """[n, groups, k] ~ d * sc * q - dmin * m, q in 0 .. most, sc and m in 0 .. most_scale -> (d, dmin [n, 1], sc, m [n, groups], q [n, groups, k])."""
    scale, minimum = _fit_affine(values, most, widths)
    d, scale_index = _round_scales(scale, most_scale)
    dmin, min_index = _round_scales(minimum, most_scale)
    step = (d * scale_index)[..., None]
    q = np.rint((values + (dmin * min_index)[..., None]) / np.where(step > 0, step, np.inf)).clip(0, most).astype(np.uint8)
    return d, dmin, scale_index, min_index, q


def _round_symmetric(blocks: Floats, most: int, most_scale: int, widths: NDArray[np.float64]) -> tuple[Floats, NDArray[np.int16], Bytes]:
    """[n, 256] ~ d * sc * (q - most) for each 16 values, q in 0 .. 2 most - 1 -> (d [n, 1], sc [n, 16] in -most_scale .. most_scale - 1, q [n, 16, 16])."""
    values = blocks.reshape(len(blocks), 16, 16)
    d, scale_index = round_signed_scales(_fit_symmetric(values, most, widths), most_scale)
    step = (d * scale_index)[..., None]
    q = np.rint(values / np.where(step == 0, np.inf, step)).clip(-most, most - 1) + most
    return d, scale_index, q.astype(np.uint8)


def _fit_affine(values: Floats, most: int, widths: NDArray[np.float64]) -> tuple[Floats, Floats]:
    """values [..., k] ~ scale * q - minimum, q in 0 .. most, minimum >= 0 -> (scale, minimum) [...]."""
    low = np.minimum(values.min(-1, keepdims=True), 0)
    span = np.maximum(values.max(-1, keepdims=True) - low, _TINY)
    best_error = np.full(low.shape, np.inf, np.float32)
    best_scale, best_low = np.zeros_like(low), low
    for width in widths.astype(np.float32):
        # Centre the grid: what is clipped is clipped at both ends alike, unless the lower end is 0 already.
        start = np.where(low < 0, low + span * (width - most) / (2 * width), low)
        q = np.rint((values - start) * (width / span)).clip(0, most)
        scale, offset = _least_squares(values, q)
        error = np.square(scale * q + offset - values).sum(-1, keepdims=True)
        better = error < best_error
        best_error, best_scale, best_low = (np.where(better, new, old) for new, old in ((error, best_error), (scale, best_scale), (offset, best_low)))
    return best_scale[..., 0], -best_low[..., 0]


def _least_squares(values: Floats, q: Floats) -> tuple[Floats, Floats]:
    """The scale and the offset <= 0 that bring scale * q + offset closest to the values, over the last axis."""
    mean_q, mean_x = q.mean(-1, keepdims=True), values.mean(-1, keepdims=True)
    spread = np.square(q - mean_q).sum(-1, keepdims=True)
    scale = ((q - mean_q) * (values - mean_x)).sum(-1, keepdims=True) / np.maximum(spread, _TINY)
    offset = mean_x - scale * mean_q
    through_zero = (q * values).sum(-1, keepdims=True) / np.maximum(np.square(q).sum(-1, keepdims=True), _TINY)
    scale = np.where(offset > 0, through_zero, scale)  # the format cannot add, so the line goes through 0
    return np.maximum(scale, 0), np.minimum(offset, 0)


def _fit_symmetric(values: Floats, most: int, widths: NDArray[np.float64]) -> Floats:
    """values [..., k] ~ scale * q, q in -most .. most - 1 -> scale [...], negative where the largest magnitude is positive (it takes -most)."""
    extreme = np.take_along_axis(values, np.abs(values).argmax(-1, keepdims=True), -1)
    extreme = np.where(np.abs(extreme) < _TINY, _TINY, extreme)
    best_error = np.full(extreme.shape, np.inf, np.float32)
    best_scale = np.zeros_like(extreme)
    for width in widths.astype(np.float32):
        q = np.rint(values * (-width / extreme)).clip(-most, most - 1)
        scale = (q * values).sum(-1, keepdims=True) / np.maximum(np.square(q).sum(-1, keepdims=True), _TINY)
        error = np.square(scale * q - values).sum(-1, keepdims=True)
        better = error < best_error
        best_error, best_scale = np.where(better, error, best_error), np.where(better, scale, best_scale)
    return best_scale[..., 0]


def _round_scales(scales: Floats, most: int) -> tuple[Floats, Bytes]:
    """Non-negative scales [n, k] -> (their common unit [n, 1] as a half float holds it, integers 0 .. most [n, k])."""
    unit = (scales.max(-1, keepdims=True) / most).astype(np.float16).astype(np.float32)
    index = np.rint(scales / np.where(unit > 0, unit, np.inf)).clip(0, most).astype(np.uint8)
    return unit, index


def round_signed_scales(scales: Floats, most: int) -> tuple[Floats, NDArray[np.int16]]:
    """Scales [n, k] -> (their common unit [n, 1] as a half float holds it, integers -most .. most - 1); the largest magnitude is -most exactly."""
    largest = np.take_along_axis(scales, np.abs(scales).argmax(-1, keepdims=True), -1)
    unit = (largest / -most).astype(np.float16).astype(np.float32)
    return unit, np.rint(scales / np.where(unit == 0, np.inf, unit)).clip(-most, most - 1).astype(np.int16)


def _pack_6_bits(scales: Bytes, minima: Bytes) -> Bytes:
    """Two [n, 8] of 6 bits -> [n, 12]: 0-3 the first four of each scale (top bits: the high bits of the last four), 4-7 minima likewise, 8-11 low nibbles."""
    first = [group[:, :4] | (group[:, 4:] & 0x30) << 2 for group in (scales, minima)]
    return np.concatenate([*first, (scales[:, 4:] & 0x0F) | (minima[:, 4:] & 0x0F) << 4], axis=-1)


def _pack_16_scales(scales: NDArray[np.int16]) -> Bytes:
    """[n, 16] of 6 bits -> [n, 12]: eight bytes of low nibbles (i and i + 8), then four of the high pairs of bits (i, i + 4, i + 8, i + 12)."""
    high = (scales >> 4).reshape(-1, 4, 4)
    pairs = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    return np.concatenate([(scales[:, :8] & 0x0F) | (scales[:, 8:] & 0x0F) << 4, pairs], axis=-1).astype(np.uint8)


def _pack_bit(q: Bytes, bit: int) -> Bytes:
    """One bit of 256 values each -> [n, 32]: bit j of byte l is value l of sub-block j."""
    return np.packbits(q.reshape(-1, 8, 32) >> bit & 1, axis=1, bitorder="little").reshape(-1, 32)


def _pack_pairs(q: Bytes) -> Bytes:
    """The low 2 bits of 256 values each -> [n, 64]: four sub-blocks share 32 bytes, the first lowest."""
    low = q.reshape(-1, 2, 4, 32) & 3
    return (low[:, :, 0] | low[:, :, 1] << 2 | low[:, :, 2] << 4 | low[:, :, 3] << 6).reshape(-1, 64).astype(np.uint8)


def _pack_nibbles(q: Bytes) -> Bytes:
    """The low 4 bits of [n, 8, 32] -> [n, 128]: two sub-blocks share 32 bytes, low and high nibbles."""
    pairs = q.reshape(-1, 4, 2, 32) & 0x0F
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128).astype(np.uint8)


def _pack_6_bit_values(q: Bytes) -> tuple[Bytes, Bytes]:
    """[n, 2, 4, 32] of 6 bits -> low nibbles [n, 128] and high pairs of bits [n, 64]; each half of 128 values is packed on its own."""
    low = q & 0x0F
    nibbles = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=-1)
    high = q >> 4
    pairs = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return nibbles.reshape(-1, 128).astype(np.uint8), pairs.reshape(-1, 64).astype(np.uint8)


def _half(values: Floats) -> Bytes:
    return values.astype("<f2").view(np.uint8)
