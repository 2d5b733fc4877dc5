"""Tile order back to rows of floats, for prefill: cuBLAS multiplies what comes out.

A program turns columns of one strip. Its tile is [16 rows, groups of 16 columns, 16 columns] in the order of the result, so that rows are written in runs of
whole lines; the codes are gathered byte by byte, 4 columns to a load, from lines that are in the cache by then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.gpu.matrix import STRIP_ROWS, DeviceMatrix
from server.engine.kernels.formats import FORMATS, ONE
from server.engine.kernels.tiles import load, scales_of, table_value

_GROUP = 16
_TILE_GROUPS = 8  # 128 columns
_TILES = 8  # of a program, at most


def dequantize(m: DeviceMatrix, out: Tensor, first_row: int = 0, matrices: Tensor | None = None) -> None:
    """out [count', rows', cols] (float32, float16 or bf16) = rows first_row .. of each matrix, or of those whose int32 ids are in `matrices`.

    first_row is a multiple of 16; out may be strided in its first two dimensions.
    """
    count, rows, cols = out.shape
    assert cols == m.cols
    assert first_row % STRIP_ROWS == 0
    assert first_row + rows <= m.rows
    if not m.tiled:
        _copy_floats(m, out, first_row, matrices)
        return
    form = FORMATS[m.type_id]
    groups = cols // _GROUP
    tiles = min(_TILES, triton.cdiv(groups, _TILE_GROUPS))
    grid = (triton.cdiv(groups, _TILE_GROUPS * tiles), triton.cdiv(rows, STRIP_ROWS), count)
    _tiles[grid](
        m.data, out, matrices, ONE, first_row // STRIP_ROWS, rows, groups, tiles, m.data.stride(0), m.data.stride(1),
        out.stride(0), out.stride(1),
        BITS=form.bits, KIND=form.scales, ZERO=form.zero, TABLE=form.table, GROUPS=_TILE_GROUPS, num_warps=4,
    )  # fmt: skip


def _copy_floats(m: DeviceMatrix, out: Tensor, first_row: int, matrices: Tensor | None) -> None:
    data = m.data if matrices is None else torch.index_select(m.data, 0, matrices)
    out.copy_(data[:, first_row : first_row + out.shape[1]])


@triton.jit
def _tiles(
    data, out, matrices, one, first_strip, rows, groups, tiles, matrix_bytes, strip_bytes, out_matrix, out_row,
    BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    to = tl.program_id(2).to(tl.int64)
    matrix = to if matrices is None else tl.load(matrices + to).to(tl.int64)
    strip = data + matrix * matrix_bytes + (first_strip + tl.program_id(1)).to(tl.int64) * strip_bytes
    scales = strip + groups // 2 * (BITS * 64)
    out += to * out_matrix + tl.program_id(1).to(tl.int64) * 16 * out_row
    row = tl.arange(0, 16)
    inside_rows = tl.program_id(1) * 16 + row < rows
    for tile in range(tiles):
        group = (tl.program_id(0) * tiles + tile) * GROUPS + tl.arange(0, GROUPS)
        inside = inside_rows[:, None] & (group < groups)[None, :]
        scale, offset = scales_of(scales, group[None, :] // 2, group[None, :] % 2, row[:, None], inside, KIND, ZERO)
        codes = _codes(strip, one, group[None, :, None], row[:, None, None], tl.arange(0, 16)[None, None, :], inside[:, :, None], BITS, TABLE)
        values = scale[:, :, None] * codes + offset[:, :, None]
        at = row[:, None, None] * out_row + group[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
        tl.store(out + at, values.to(out.dtype.element_ty), mask=inside[:, :, None])


@triton.jit
def _codes(strip, one, group, row, col, mask, BITS: tl.constexpr, TABLE: tl.constexpr):
    """The codes as floats, from the planes of their bits: of 4, of 2 and of 1, or of all 8."""
    FOUR: tl.constexpr = BITS & 4
    TWO: tl.constexpr = BITS & 2
    half, step = group % 2, col // 4
    lines = strip + group // 2 * (BITS * 64) + row * 4 + col % 4
    if BITS == 8:
        code = load(lines.to(tl.pointer_type(tl.int8)) + (half * 4 + step) * 64, mask).to(tl.int32)
    elif FOUR:
        code = load(lines + step * 64, mask).to(tl.int32) >> half * 4 & 15
    else:
        code = load(lines + step % 2 * 64, mask).to(tl.int32) >> half * 4 + step // 2 * 2 & 3
    if FOUR and TWO:
        code |= (load(lines + (4 + step % 2) * 64, mask).to(tl.int32) >> half * 4 + step // 2 * 2 & 3) << 4
    if BITS & 1:
        code |= (load(lines + (BITS - 1) * 64, mask).to(tl.int32) >> half * 4 + step & 1) << BITS - 1
    return code.to(tl.float32) if TABLE is None else table_value(code, 0, one, TABLE)
