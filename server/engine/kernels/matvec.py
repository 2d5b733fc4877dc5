"""Products of few tokens with a weight matrix: decode. The matrix is read once, at the speed of the GPU's memory.

A program is one strip of tile order, 16 rows side by side; its threads share the columns out by sub-blocks of 32. A thread has 4 rows of a sub-block: it
loads their codes as words of 4 columns, one line of 64 bytes after the other, opens them to floats, and meets each token's activations, which are pairs of
floats in one load. Scales are applied to the sums of a group. Sums over the sub-blocks come last, in a fixed order: the same bits from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from server.engine.gpu.matrix import STRIP_ROWS, DeviceMatrix
from server.engine.kernels.formats import FORMATS, ONE, SUB_BLOCK
from server.engine.kernels.tiles import load, scales_of, shifted, table_value
from server.engine.kernels.tuning import limits

MAX_TOKENS = 8
_SUBS_PER_WARP = 8  # 4 rows and one sub-block a thread
_MIN_WARPS, _MAX_WARPS = 2, 16
_WARPS_PER_SM = 24  # of all programs together, if they were there at once
_MAX_AT_ONCE = 4  # tokens of a program, or registers run short


def matvec(m: DeviceMatrix, x: Tensor, out: Tensor, accumulate: bool = False, bias: Tensor | None = None) -> None:
    """out [n, count, rows] (+)= m.data[c] @ x [n, count, cols] (+ bias [count, rows]), float32; n is at most 8.

    With one matrix x is [n, cols] and out [n, rows]. x and out may be strided in all dimensions but the last, x by even numbers of floats.
    """
    x, out = _by_matrix(x, m), _by_matrix(out, m)
    n = x.shape[0]
    assert 0 < n <= MAX_TOKENS
    assert x.shape == (n, m.count, m.cols)
    assert out.shape == (n, m.count, m.rows)
    if m.tiled:
        _matvec_tiles(m, x, out, accumulate, bias)
    else:
        _matvec_floats(m, x, out, accumulate, bias)


def _by_matrix(t: Tensor, m: DeviceMatrix) -> Tensor:
    """[n, count, dim]."""
    return t.unsqueeze(1) if m.count == 1 and t.dim() == 2 else t


def _matvec_tiles(m: DeviceMatrix, x: Tensor, out: Tensor, accumulate: bool, bias: Tensor | None) -> None:
    assert x.data_ptr() % 8 == 0  # pairs of floats are loaded as one number
    form = FORMATS[m.type_id]
    subs = m.cols // SUB_BLOCK
    warps = _warps(m, subs)
    block = warps * _SUBS_PER_WARP
    programs, tokens = _share_tokens(x.shape[0])
    _tiles[(programs, triton.cdiv(m.rows, STRIP_ROWS), m.count)](
        m.data, x, out, bias, ONE, x.shape[0], m.rows, subs, m.data.stride(0), m.data.stride(1),
        *x.stride()[:2], *out.stride()[:2],
        N=tokens, BITS=form.bits, KIND=form.scales, ZERO=form.zero, TABLE=form.table, GROUP=form.group,
        BLOCK=block, EVEN=subs % block == 0, ACCUMULATE=accumulate, num_warps=warps,
    )  # fmt: skip


def _matvec_floats(m: DeviceMatrix, x: Tensor, out: Tensor, accumulate: bool, bias: Tensor | None) -> None:
    rows, block, warps = _floats_cut(m)
    programs, tokens = _share_tokens(x.shape[0])
    _floats[(programs, triton.cdiv(m.rows, rows), m.count)](
        m.data, x, out, bias, x.shape[0], m.rows, m.cols, m.data.stride(0), m.data.stride(1), *x.stride()[:2], *out.stride()[:2],
        N=tokens, ROWS=rows, BLOCK=block, EVEN=m.cols % block == 0, ACCUMULATE=accumulate, num_warps=warps,
    )  # fmt: skip


def _warps(m: DeviceMatrix, subs: int) -> int:
    """Of a program: more where there are few strips, and no more than there are columns for; a power of two."""
    strips = m.count * m.data.shape[1]
    wanted = limits(m.data.device).sms * _WARPS_PER_SM // strips
    useful: int = triton.cdiv(triton.next_power_of_2(subs), _SUBS_PER_WARP)
    return min(max(1 << wanted.bit_length() >> 1, _MIN_WARPS), _MAX_WARPS, useful)


def _share_tokens(n: int) -> tuple[int, int]:
    """Programs for the same rows, and tokens of each. They run side by side, so that the weights come from memory once."""
    programs = triton.cdiv(n, _MAX_AT_ONCE)
    return programs, triton.cdiv(n, programs)


def _floats_cut(m: DeviceMatrix) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps: 16 bytes of a row a thread."""
    vector = 16 // m.data.element_size()
    rows, most = (4, 4) if m.rows * m.count >= 4096 else (1, 8)
    warps = min(max(triton.next_power_of_2(m.cols) // (32 * vector), 1), most)
    return rows, 32 * vector * warps, warps


@triton.jit
def _tiles(
    data, x, out, bias, one, n, rows, subs, matrix_bytes, strip_bytes, x_token, x_matrix, out_token, out_matrix,
    N: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    strip = data + matrix * matrix_bytes + tl.program_id(1).to(tl.int64) * strip_bytes
    scales = strip + subs * (BITS * 64)
    UNIT: tl.constexpr = 0 if BITS == 8 or TABLE is not None else 1 << BITS
    row = tl.arange(0, 16)[None, :]
    token = tl.program_id(0) * N
    pairs = _tokens((x + matrix * x_matrix).to(tl.pointer_type(tl.int64)), x_token // 2, token, n, N)
    totals = _zeros(N, BLOCK)
    lines, low_scale, low_offset, high_scale, high_offset = _load(strip, scales, tl.arange(0, BLOCK), row, subs, KIND, ZERO, UNIT, GROUP, BITS, EVEN)
    for first in range(0, subs, BLOCK):
        sub = first + tl.arange(0, BLOCK)
        inside = (sub < subs) | EVEN  # where that is always true, the compiler drops the mask
        ahead = _load(strip, scales, sub + BLOCK, row, subs, KIND, ZERO, UNIT, GROUP, BITS, False)  # the loads of a round wait together, not one by one
        totals = _add_half(totals, lines, one, pairs, sub * 16, inside, low_scale, low_offset, 0, N, BITS, TABLE, UNIT > 0, BLOCK)
        totals = _add_half(totals, lines, one, pairs, sub * 16 + 8, inside, high_scale, high_offset, 4, N, BITS, TABLE, UNIT > 0, BLOCK)
        lines, low_scale, low_offset, high_scale, high_offset = ahead
    _store(totals, 0, out, bias, tl.program_id(1) * 16 + tl.arange(0, 16), token, n, rows, matrix, out_token, out_matrix, N, ACCUMULATE)


@triton.jit
def _load(
    strip, scales, sub, row, subs, KIND: tl.constexpr, ZERO: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """The lines of sub-blocks, then scale and offset of their first 16 columns, and of the others."""
    inside = ((sub < subs) | EVEN)[:, None]
    lines = _load_lines(strip, sub[:, None], row, inside, BITS)
    low_scale, low_offset = _scales(scales, sub[:, None], 0, row, inside, KIND, ZERO, UNIT)
    if GROUP == 16:
        high_scale, high_offset = _scales(scales, sub[:, None], 1, row, inside, KIND, ZERO, UNIT)
    else:
        high_scale, high_offset = low_scale, low_offset
    return lines, low_scale, low_offset, high_scale, high_offset


@triton.jit
def _tokens(x, x_token, token, n, N: tl.constexpr):
    """Pointers to N tokens from `token` on; the last one again in the place of those that are not there."""
    tokens: tl.tuple = ()
    for t in tl.static_range(N):
        tokens += (x + tl.minimum(token + t, n - 1) * x_token,)
    return tokens


@triton.jit
def _scales(scales, sub, half, row, mask, KIND: tl.constexpr, ZERO: tl.constexpr, UNIT: tl.constexpr):
    """Scale and offset for codes as `_code` gives them."""
    scale, offset = scales_of(scales, sub, half, row, mask, KIND, ZERO)
    if UNIT > 0:
        scale *= UNIT
        offset -= scale
    return scale, offset


@triton.jit
def _zeros(N: tl.constexpr, BLOCK: tl.constexpr):
    zeros: tl.tuple = ()
    for _ in tl.static_range(N):
        zeros += (tl.zeros([BLOCK, 16], tl.float32),)
    return zeros


@triton.jit
def _load_lines(strip, sub, row, mask, BITS: tl.constexpr):
    """The words of each line of the sub-blocks."""
    words = strip.to(tl.pointer_type(tl.int32)) + sub * (BITS * 16) + row
    lines: tl.tuple = ()
    for line in tl.static_range(BITS):
        lines += (load(words + line * 16, mask),)
    return lines


@triton.jit
def _add_half(
    totals, lines, one, pairs, at, mask, scale, offset,
    FIRST: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr, OFFSETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The products of 16 columns, steps FIRST .. FIRST + 3, added to each token's totals."""
    dots, sums = _zeros(N, BLOCK), _zeros_of_sums(N, BLOCK)
    for step in tl.static_range(4):
        word = _open(lines, FIRST + step, BITS)
        for pair in tl.static_range(2):
            first, second = _code(word, one, 2 * pair, BITS, TABLE), _code(word, one, 2 * pair + 1, BITS, TABLE)
            dots, sums = _meet(dots, sums, first, second, pairs, at + step * 2 + pair, mask, N, OFFSETS)
    new: tl.tuple = ()
    for t in tl.static_range(N):
        total = totals[t] + scale * dots[t]
        if OFFSETS:
            total += offset * sums[t][:, None]
        new += (total,)
    return new


@triton.jit
def _zeros_of_sums(N: tl.constexpr, BLOCK: tl.constexpr):
    zeros: tl.tuple = ()
    for _ in tl.static_range(N):
        zeros += (tl.zeros([BLOCK], tl.float32),)
    return zeros


@triton.jit
def _open(lines, STEP: tl.constexpr, BITS: tl.constexpr):
    """The 4 codes of a step in the bytes of a word, from the planes of their bits."""
    FOUR: tl.constexpr = BITS & 4
    TWO: tl.constexpr = BITS & 2
    if BITS == 8:
        word = lines[STEP]
    elif FOUR:
        word = lines[STEP % 4] >> 4 * (STEP // 4) & 0x0F0F0F0F
    else:
        word = lines[STEP % 2] >> 2 * (STEP // 2) & 0x03030303
    if FOUR and TWO:
        word |= (lines[4 + STEP % 2] >> 2 * (STEP // 2) & 0x03030303) << 4
    if BITS & 1:
        word |= (lines[BITS - 1] >> STEP & 0x01010101) << BITS - 1
    return word


@triton.jit
def _code(word, one, BYTE: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr):
    """One of a word's codes, as floats. A number of less than 8 bits becomes the mantissa of 1 + code / 2^BITS: a shift, and a mask with the exponent."""
    MASK: tl.constexpr = ((1 << BITS) - 1) << 23 - BITS
    if BITS == 8:
        code = (word << 24 - 8 * BYTE >> 24).to(tl.float32)
    elif TABLE is not None:
        code = table_value(word, 8 * BYTE, one, TABLE)
    else:
        code = (shifted(word, 23 - BITS - 8 * BYTE) & MASK | one).to(tl.float32, bitcast=True)
    return code


@triton.jit
def _meet(dots, sums, first, second, pairs, at, mask, N: tl.constexpr, OFFSETS: tl.constexpr):
    """Two columns' codes and each token's two activations, which are loaded as one number of 64 bits."""
    new_dots: tl.tuple = ()
    new_sums: tl.tuple = ()
    for t in tl.static_range(N):
        both = load(pairs[t] + at, mask)
        even, odd = both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        new_dots += (dots[t] + first * even[:, None] + second * odd[:, None],)
        new_sums += (sums[t] + (even + odd) if OFFSETS else sums[t],)
    return new_dots, new_sums


@triton.jit
def _floats(
    data, x, out, bias, n, rows, cols, matrix_stride, row_stride, x_token, x_matrix, out_token, out_matrix,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    line = data + matrix * matrix_stride + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * row_stride
    token = tl.program_id(0) * N
    activations = _tokens(x + matrix * x_matrix, x_token, token, n, N)
    totals: tl.tuple = ()
    for _ in tl.static_range(N):
        totals += (tl.zeros([ROWS, BLOCK], tl.float32),)
    for first in range(0, cols, BLOCK):
        col = first + tl.arange(0, BLOCK)
        inside = (col < cols) | EVEN
        weights = load(line + col[None, :], inside[None, :]).to(tl.float32)
        new: tl.tuple = ()
        for t in tl.static_range(N):
            new += (totals[t] + weights * load(activations[t] + col, inside)[None, :],)
        totals = new
    _store(totals, 1, out, bias, row, token, n, rows, matrix, out_token, out_matrix, N, ACCUMULATE)


@triton.jit
def _store(totals, AXIS: tl.constexpr, out, bias, row, token, n, rows, matrix, out_token, out_matrix, N: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Sums over the columns, and what else goes into a result."""
    out += matrix * out_matrix + token * out_token
    for t in tl.static_range(N):
        inside = (row < rows) & (token + t < n)
        result = tl.sum(totals[t], axis=AXIS)
        if bias is not None:
            result += tl.load(bias + matrix * rows + row, mask=inside, other=0.0)
        if ACCUMULATE:
            result += tl.load(out + t * out_token + row, mask=inside, other=0.0)
        tl.store(out + t * out_token + row, result, mask=inside)
