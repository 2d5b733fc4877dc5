"""What every kernel that reads tile order does: the scales and codes of a strip (docs/kernels.md; native/kernels/tiles*-inl.h write them).

`scales` and `codes` are pointers to bytes of a strip; `sub` (a sub-block of 32 columns) and `row` (0 .. 15) are integer tensors that broadcast, `mask`
fits sub. `half` is which 16 columns of the sub-block are meant, 0 or 1 (a tensor or a number): types with one scale for each 32 do not look at it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scales_of(scales, sub, half, row, mask, KIND: tl.constexpr, ZERO: tl.constexpr):
    """Scale and offset of the 16 columns, float32: a weight is scale * code + offset."""
    if KIND == "half_min":
        scale, offset = _half(scales, sub * 32 + row, mask), _half(scales, sub * 32 + 16 + row, mask)
    elif KIND == "k45":
        scale, offset = _scales_k45(scales, sub // 8 * 256, sub % 8, row, mask)
    elif KIND == "k2":
        scale, offset = _scales_k2(scales, sub // 8 * 320, sub % 8 * 2 + half, row, mask)
    else:
        if KIND == "half":
            scale = _half(scales, sub * 16 + row, mask)
        elif KIND == "power":
            scale = _power(scales, sub * 16 + row, mask)
        elif KIND == "iq4_xs":
            scale = _scale_iq4_xs(scales, sub // 8 * 128, sub % 8, row, mask)
        elif KIND == "k3":
            scale = _scale_k3(scales, sub // 8 * 224, sub % 8 * 2 + half, row, mask)
        else:
            tl.static_assert(KIND == "k6")
            scale = _scale_k6(scales, sub // 8 * 288, sub % 8 * 2 + half, row, mask)
        offset = scale * -ZERO
    return scale, offset


@triton.jit
def _power(scales, at, mask):
    """2^(exponent - 128): the lowest two are below the normal floats."""
    exponent = _byte(scales, at, mask)
    return tl.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scales_k2(scales, span, group, row, mask):
    packed = _byte(scales, span + 64 + group * 16 + row, mask)
    scale = _half(scales, span // 2 + row, mask) * (packed & 15).to(tl.float32)
    return scale, -_half(scales, span // 2 + 16 + row, mask) * (packed >> 4).to(tl.float32)


@triton.jit
def _scale_k6(scales, span, group, row, mask):
    signed = load(scales.to(tl.pointer_type(tl.int8)) + (span + 32 + group * 16 + row), mask)
    return _half(scales, span // 2 + row, mask) * signed.to(tl.float32)


@triton.jit
def _scales_k45(scales, span, j, row, mask):
    high = _byte(scales, span + 64 + j * 16 + row, mask)  # the scale, and above it the minimum's high 2 bits
    low = _byte(scales, span + 192 + j // 2 * 16 + row, mask) >> j % 2 * 4 & 15
    scale = _half(scales, span // 2 + row, mask) * (high & 63).to(tl.float32)
    return scale, -_half(scales, span // 2 + 16 + row, mask) * (low | high >> 2 & 48).to(tl.float32)


@triton.jit
def _scale_k3(scales, span, group, row, mask):
    low = _byte(scales, span + 32 + group % 8 * 16 + row, mask) >> group // 8 * 4 & 15
    high = _byte(scales, span + 160 + group % 4 * 16 + row, mask) >> group // 4 * 2 & 3
    return _half(scales, span // 2 + row, mask) * ((low | high << 4) - 32).to(tl.float32)


@triton.jit
def _scale_iq4_xs(scales, span, j, row, mask):
    high = load(scales.to(tl.pointer_type(tl.int16)) + (span // 2 + 16 + row), mask).to(tl.int32) >> j * 2 & 3
    low = _byte(scales, span + 64 + j // 2 * 16 + row, mask) >> j % 2 * 4 & 15
    return _half(scales, span // 2 + row, mask) * ((low | high << 4) - 32).to(tl.float32)


@triton.jit
def _half(scales, at, mask):
    """The half at that place, counted in halves: pointers are cast before they become tensors, or the compiler does not see what is contiguous."""
    return load(scales.to(tl.pointer_type(tl.float16)) + at, mask).to(tl.float32)


@triton.jit
def _byte(scales, at, mask):
    return load(scales + at, mask).to(tl.int32)


@triton.jit
def load(p, mask):
    """What is there, and 0 outside of the mask."""
    return tl.load(p, mask=mask, other=0)


@triton.jit
def table_value(code, AT: tl.constexpr, one, TABLE: tl.constexpr):
    """What the 4 bits from bit AT of code stand for in a table of 16 values, exactly, as float32. `one` has the bits of 1.0."""
    if TABLE == "iq4":
        # A polynomial of 1 + code / 16 comes closer to each of the whole numbers than 0.44 (least maximum, by linear programming); a large number rounds it.
        u = (shifted(code, 19 - AT) & 0x00780000 | one).to(tl.float32, bitcast=True)
        value = ((((103.9342 * u - 288.3861) * u - 109.6766) * u + 1055.5611) * u + (12582912.0 - 888.0)) - 12582912.0
    else:
        # A sign, 2 bits of exponent and 1 of mantissa are a float of 2^-127 times the value, below the normal ones with the exponent 0.
        tl.static_assert(TABLE == "mxfp4")
        bits = shifted(code, 28 - AT) & -0x80000000 | shifted(code, 22 - AT) & 0x01C00000
        value = bits.to(tl.float32, bitcast=True) * 1.7014118346046923e38
    return value


@triton.jit
def shifted(bits, LEFT: tl.constexpr):
    """Bits, moved to the left or, where LEFT is negative, to the right: others may move in on the left, to be masked away."""
    return bits << LEFT if LEFT >= 0 else bits >> -LEFT
