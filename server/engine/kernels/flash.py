"""What all attention kernels share: the running softmax (Dao et al. 2022), and the combination of parts of the context (flash-decoding).

Scores are in units of log2 (rotate.py), so that exp2 gives the softmax's terms.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from server.engine.gpu.place import Place

_COLUMNS, _STEP = 128, 16  # of the parts that one program of `combine` takes at a time


@triton.jit
def softmax_step(scores, values, top, total, acc, MASKED: tl.constexpr):
    """One more tile of keys: scores [rows, keys] float32, values [keys, dim] -> the new (top, total, acc).

    top is each row's largest score so far, total the sum of exp2(score - top), acc [rows, dim] that of exp2(score - top) * value.
    MASKED: rows may have seen no key yet.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    reference = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    terms = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(top - reference)
    total = total * shrink + tl.sum(terms, 1)
    acc = tl.dot(terms.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def share(tiles, split, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """The tiles [first, end) of split `split` out of SPLITS, none or at least LEAST of them: short contexts use few splits."""
    each = tl.maximum(tl.cdiv(tiles, SPLITS), LEAST)
    first = tl.minimum(split * each, tiles)
    return first, tl.minimum(first + each, tiles)


@triton.jit
def put_part(
    parts, log_sums, split, rows, row, column, row_inside, inside, top, total, acc,
    DIM: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A single split's result is the end result; of several, each leaves its part, and nothing where it saw no key."""
    if SPLITS == 1:
        tl.store(parts + row[:, None] * DIM + column[None, :], acc / total[:, None], mask=inside)
    else:
        seen = total > 0
        total = tl.where(seen, total, 1.0)
        row += split.to(tl.int64) * rows
        tl.store(log_sums + row, top + tl.log2(total), mask=row_inside)  # top is -inf where nothing was seen
        tl.store(parts + row[:, None] * DIM + column[None, :], acc / total[:, None], mask=inside & seen[:, None])


def new_parts(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where the splits' results go: [splits, n, heads, dim] and [splits, n, heads]; a single one writes the end result."""
    if splits == 1:
        return out, out
    return out.new_empty(splits, *out.shape), out.new_empty(splits, *out.shape[:-1])


def combine(parts: Tensor, log_sums: Tensor, out: Tensor, place: Place, keys: int, least: int) -> None:
    """out [rows, dim] = the softmax over all splits, from parts [splits, rows, dim] and log_sums [splits, rows] (log2 of each part's sum, -inf for none).

    All float32. Parts whose sum is none are never read; keys and least as the splits were cut by (`share`).
    """
    splits, rows, dim = parts.shape
    block = min(_COLUMNS, triton.next_power_of_2(dim))
    _combine[rows, triton.cdiv(dim, block)](
        parts, log_sums, out, place.start, place.n, rows,
        DIM=dim, SPLITS=splits, SIZE=triton.next_power_of_2(splits), KEYS=keys, LEAST=least, BLOCK=block, STEP=_STEP,
    )  # fmt: skip


@triton.jit
def _combine(
    parts, log_sums, out, start, n, rows,
    DIM: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    every = tl.arange(0, SIZE)
    all_sums = tl.load(log_sums + every * rows + row, mask=every < SPLITS, other=float("-inf"))
    top = tl.max(all_sums, 0)
    total = tl.sum(tl.exp2(all_sums - top), 0)
    tiles = tl.cdiv(tl.load(start) + n, KEYS)
    used = tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, SPLITS), LEAST))
    mixed = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, used, STEP):
        split = begin + tl.arange(0, STEP)
        log_sum = tl.load(log_sums + split * rows + row, mask=split < used, other=float("-inf"))
        seen = (log_sum > float("-inf"))[:, None] & (column < DIM)[None, :]
        values = tl.load(parts + (split * rows + row)[:, None] * DIM + column[None, :], mask=seen, other=0.0)
        mixed += tl.sum(values * tl.exp2(log_sum - top)[:, None], 0)
    tl.store(out + row * DIM + column, mixed / total, mask=column < DIM)
