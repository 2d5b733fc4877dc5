"""The twins of matvec and dequantize in plain torch, on any device: the definition of what these compute, and what runs where Triton cannot.

A strip is decoded as it is documented (docs/kernels.md), plane by plane: tensors are [count, strips, sub-blocks, ..., 16 rows], some strips at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from server.engine.gpu.matrix import STRIP_ROWS, DeviceMatrix
from server.engine.kernels.formats import FORMATS, LINE, SUB_BLOCK, VALUES, TileFormat

_SPAN = 8  # sub-blocks of a K-quant's block
_AT_ONCE = 1 << 25  # weights that are float32 at a time


def matvec(m: DeviceMatrix, x: Tensor, out: Tensor, accumulate: bool = False, bias: Tensor | None = None) -> None:
    """out [n, count, rows] (+)= m.data[c] @ x [n, count, cols] (+ bias [count, rows]), float32. With one matrix x is [n, cols] and out [n, rows]."""
    if m.count == 1 and x.dim() == 2:
        x, out = x.unsqueeze(1), out.unsqueeze(1)
    bias = None if bias is None else bias.view(m.count, m.rows)
    for first, rows in _chunks(m.count, m.rows, m.cols):
        part = slice(first, first + rows)
        y = torch.einsum("ncd,crd->ncr", x, _decoded(m, m.data, first, rows))
        if bias is not None:
            y += bias[:, part]
        if accumulate:
            y += out[..., part]
        out[..., part] = y


def dequantize(m: DeviceMatrix, out: Tensor, first_row: int = 0, matrices: Tensor | None = None) -> None:
    """out [count', rows', cols] (float32, float16 or bf16) = rows first_row .. of each matrix, or of those whose int32 ids are in `matrices`.

    first_row is a multiple of 16.
    """
    assert first_row % STRIP_ROWS == 0
    data = m.data if matrices is None else m.data.index_select(0, matrices)
    for first, rows in _chunks(*out.shape):
        out[:, first : first + rows] = _decoded(m, data, first_row + first, rows)


def _chunks(count: int, rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """The first row and the number of rows of each part, whole strips but for the last."""
    step = max(_AT_ONCE // (count * cols * STRIP_ROWS), 1) * STRIP_ROWS
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _decoded(m: DeviceMatrix, data: Tensor, first_row: int, rows: int) -> Tensor:
    """float32 [count', rows, cols] from row `first_row` on."""
    if not m.tiled:
        return data[:, first_row : first_row + rows].float()
    form, subs = FORMATS[m.type_id], m.cols // SUB_BLOCK
    strips = data[:, first_row // STRIP_ROWS : -(-(first_row + rows) // STRIP_ROWS)]
    code_bytes = subs * form.bits * LINE
    codes = _codes(strips[..., :code_bytes].unflatten(-1, (subs, form.bits, STRIP_ROWS, 4)), form.bits)
    scales, offsets = _SCALES[form.scales](strips[..., code_bytes:], subs)
    values = torch.unflatten(_values(codes, form), 3, (scales.shape[3], -1))  # [count', strips, sub-blocks, groups, columns, 16]
    weights: Tensor = values * scales.unsqueeze(-2) + offsets.unsqueeze(-2)
    return weights.flatten(2, 4).transpose(2, 3).flatten(1, 2)[:, :rows]


def _codes(lines: Tensor, bits: int) -> Tensor:
    """uint8 [.., sub-blocks, lines, 16, 4] -> [.., sub-blocks, 32, 16], uint8, or int8 for 8 bits."""
    if bits == 8:
        steps = lines.view(torch.int8)
    else:
        steps, place = torch.zeros_like(lines[..., :1, :, :]).repeat_interleave(8, -3), 0
        for width in (4, 2, 1):
            if bits & width:
                plane, lines = lines.split([width, lines.shape[-3] - width], -3)
                fields = torch.cat([plane >> shift & (1 << width) - 1 for shift in range(0, 8, width)], -3)
                steps, place = steps | fields << place, place + width
    return steps.transpose(-1, -2).flatten(-3, -2)


def _values(codes: Tensor, form: TileFormat) -> Tensor:
    """What a scale is multiplied with, float32."""
    if form.table is None:
        return codes.float() - form.zero
    return torch.tensor(VALUES[form.table], dtype=torch.float32, device=codes.device)[codes.long()]


def _by_sub(scales: Tensor, subs: int, nbytes: int) -> Tensor:
    """A sub-block's own bytes: [count, strips, sub-blocks, nbytes]."""
    return torch.unflatten(scales[..., : subs * nbytes], -1, (subs, nbytes))


def _by_span(scales: Tensor, subs: int, nbytes: int) -> Tensor:
    """A span's bytes, the last one's too where fewer than 8 sub-blocks are in it: [count, strips, spans, nbytes]."""
    spans = -(-subs // _SPAN)
    return torch.unflatten(scales[..., : spans * nbytes], -1, (spans, nbytes))


def _floats(halves: Tensor) -> Tensor:
    """Bytes [.., 32] -> [.., 1, 1, 16], which meets [.., sub-blocks, groups, 16]."""
    return halves.contiguous().view(torch.float16).float()[..., None, None, :]


def _spread(spans: Tensor, subs: int) -> Tensor:
    """[count, strips, spans, 8, groups, 16] -> [count, strips, sub-blocks, groups, 16]."""
    return spans.flatten(2, 3)[:, :, :subs]


def _half(scales: Tensor, subs: int) -> tuple[Tensor, Tensor]:
    d = _floats(_by_sub(scales, subs, 32)).squeeze(-2)
    return d, torch.zeros_like(d)


def _half_min(scales: Tensor, subs: int) -> tuple[Tensor, Tensor]:
    d, m = _by_sub(scales, subs, 64).split(32, -1)
    return _floats(d).squeeze(-2), _floats(m).squeeze(-2)


def _power(scales: Tensor, subs: int) -> tuple[Tensor, Tensor]:
    exponents = _by_sub(scales, subs, STRIP_ROWS).unsqueeze(-2).int()
    d = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents - 128)
    return d, torch.zeros_like(d)


def _k45(scales: Tensor, subs: int) -> tuple[Tensor, Tensor]:
    d, dmin, first, second = _by_span(scales, subs, 256).split([32, 32, 128, 64], -1)
    first, second = first.unflatten(-1, (_SPAN, 1, STRIP_ROWS)), second.unflatten(-1, (_SPAN // 2, 1, 1, STRIP_ROWS))
    nibbles = torch.cat([second & 15, second >> 4], -3).flatten(3, 4)
    mins = nibbles | first >> 6 << 4
    return _spread(_floats(d) * (first & 63), subs), _spread(-_floats(dmin) * mins, subs)


def _k2(scales: Tensor, subs: int) -> tuple[Tensor, Tensor]:
    d, dmin, packed = _by_span(scales, subs, 320).split([32, 32, 256], -1)
    packed = packed.unflatten(-1, (_SPAN, 2, STRIP_ROWS))
    return _spread(_floats(d) * (packed & 15), subs), _spread(-_floats(dmin) * (packed >> 4), subs)


def _k3(scales: Tensor, subs: int) -> tuple[Tensor, Tensor]:
    d, low, high = _by_span(scales, subs, 224).split([32, 128, 64], -1)
    low, high = low.unflatten(-1, (8, STRIP_ROWS)), high.unflatten(-1, (4, STRIP_ROWS))
    low = torch.cat([low & 15, low >> 4], -2)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], -2)
    d = _floats(d) * ((low | high << 4).unflatten(-2, (_SPAN, 2)).int() - 32)
    return _spread(d, subs), torch.zeros_like(_spread(d, subs))


def _k6(scales: Tensor, subs: int) -> tuple[Tensor, Tensor]:
    d, signed = _by_span(scales, subs, 288).split([32, 256], -1)
    d = _spread(_floats(d) * signed.contiguous().view(torch.int8).unflatten(-1, (_SPAN, 2, STRIP_ROWS)), subs)
    return d, torch.zeros_like(d)


def _iq4_xs(scales: Tensor, subs: int) -> tuple[Tensor, Tensor]:
    d, high, low = _by_span(scales, subs, 128).split([32, 32, 64], -1)
    words = high.contiguous().view(torch.int16).int().unsqueeze(-2)
    high = torch.cat([words >> 2 * j & 3 for j in range(_SPAN)], -2)
    low = low.unflatten(-1, (_SPAN // 2, 1, STRIP_ROWS))
    low = torch.cat([low & 15, low >> 4], -2).flatten(-3, -2)
    d = _spread(_floats(d) * ((low | high << 4) - 32).unsqueeze(-2), subs)
    return d, torch.zeros_like(d)


# By TileFormat.scales: a strip's bytes of scales and its number of sub-blocks -> scales and offsets [count, strips, sub-blocks, groups, 16].
_SCALES: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "half": _half,
    "half_min": _half_min,
    "power": _power,
    "k2": _k2,
    "k3": _k3,
    "k45": _k45,
    "k6": _k6,
    "iq4_xs": _iq4_xs,
}
