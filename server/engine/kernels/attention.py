"""Grouped-query attention over the paged KV cache: one kernel for single tokens and for whole chunks.

All query heads of a KV head, for all tokens of a block, are the rows of one product, so that keys and values are read once for the group. Where that
leaves multiprocessors without work, the context is cut into splits (flash-decoding), whose parts a second kernel combines. Keys lie transposed in
their pages, as the product wants them.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from server.engine.gpu.place import Place
from server.engine.kernels.flash import combine, new_parts, put_part, share, softmax_step
from server.engine.kernels.rotate import store_keys_and_values
from server.engine.kernels.tuning import Limits, limits
from server.engine.ops import KVPages, Rotation


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the kernel is cut and launched."""

    rows: int  # tokens x heads of a group
    keys: int  # divides the page size
    warps: int
    stages: int
    splits: int


def attend(q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: KVPages, place: Place, scale: float, out: Tensor) -> None:
    """Write rotated k and v to the pages and attend: out = softmax(rotated q K^T * scale) V over start + n tokens, causal.

    q and out are [n, heads, head_dim], k and v [n, kv_heads, head_dim], float32; q, k and v stay as they are. Products are in the cache's dtype, sums in
    float32. The grid depends on place.n and place.end alone: a captured step serves every position.
    """
    queries = store_keys_and_values(q, k, v, rotation, cache, place, scale)
    run(queries, cache, place, out, tiles(limits(q.device), q, cache, place))


def tiles(device: Limits, q: Tensor, cache: KVPages, place: Place) -> Tiles:
    """64 rows of wide heads keep a multiprocessor's tensor cores as busy as 128 do, and waste less on what is masked; single tokens have fewer."""
    n, heads, head_dim = q.shape
    kv_heads, size, itemsize = cache.k.shape[1], max(16, triton.next_power_of_2(head_dim)), cache.k.element_size()
    all_rows = n * heads // kv_heads
    rows, keys = min(max(16, triton.next_power_of_2(all_rows)), 64), 64 if size * itemsize <= 256 else 32
    stages = device.stages(2 * keys * size * itemsize, rows * size * itemsize)
    splits = device.splits(triton.cdiv(all_rows, rows) * kv_heads, triton.cdiv(place.end, keys))
    return Tiles(rows, keys, warps=4, stages=stages, splits=splits)


def run(queries: Tensor, cache: KVPages, place: Place, out: Tensor, cut: Tiles) -> None:
    """Attend over pages that hold the new tokens already; queries [n, heads, head_dim] as rotate.py prepares them."""
    n, heads, head_dim = queries.shape
    kv_heads, group = cache.k.shape[1], heads // cache.k.shape[1]
    parts, log_sums = new_parts(out, cut.splits)
    _attend[triton.cdiv(n * group, cut.rows), kv_heads, cut.splits](
        queries, cache.k, cache.v, place.start, place.pages, parts, log_sums, n, kv_heads,
        GROUP=group, HEAD_DIM=head_dim, D=max(16, triton.next_power_of_2(head_dim)),
        PAGE=cache.v.shape[2], ROWS=cut.rows, KEYS=cut.keys, SPLITS=cut.splits, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if cut.splits > 1:
        combine(parts.flatten(1, 2), log_sums.flatten(1), out.flatten(0, 1), place, cut.keys, 1)


@triton.jit
def _attend(
    q, k_pages, v_pages, start, pages, parts, log_sums,
    n, kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tokens see most: they begin
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    first = tl.load(start)
    row = block * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    column = tl.arange(0, D)
    inside = (token < n)[:, None] & (column < HEAD_DIM)[None, :]
    head_row = token.to(tl.int64) * (kv_heads * GROUP) + kv_head * GROUP + row % GROUP
    queries = tl.load(q + head_row[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0.0)

    last_token = tl.minimum((block * ROWS + ROWS - 1) // GROUP, n - 1)
    begin, end = share(tl.cdiv(first + last_token + 1, KEYS), split, SPLITS, 1)
    seen_by_all = tl.minimum(tl.maximum((first + block * ROWS // GROUP + 1) // KEYS, begin), end)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    k_head = k_pages + kv_head * (HEAD_DIM * PAGE)
    v_head = v_pages + kv_head * (HEAD_DIM * PAGE)
    top, total, acc = _walk(
        queries, k_head, v_head, pages, kv_heads, begin, seen_by_all, first + token, first + n, top, total, acc, HEAD_DIM, D, PAGE, KEYS, False
    )  # fmt: skip
    top, total, acc = _walk(
        queries, k_head, v_head, pages, kv_heads, seen_by_all, end, first + token, first + n, top, total, acc, HEAD_DIM, D, PAGE, KEYS, True
    )  # fmt: skip
    put_part(parts, log_sums, split, n * kv_heads * GROUP, head_row, column, token < n, inside, top, total, acc, HEAD_DIM, SPLITS)


@triton.jit
def _walk(
    queries, k_head, v_head, pages, kv_heads, begin, end, positions, length, top, total, acc,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys and values of tiles [begin, end). MASKED: some keys are later than some queries, or beyond the context's `length`, where memory may hold NaN."""
    column = tl.arange(0, D)
    k_offset = column[:, None] * PAGE + tl.arange(0, KEYS)[None, :]
    v_offset = tl.arange(0, KEYS)[:, None] * HEAD_DIM + column[None, :]
    next_page = tl.load(pages + begin * KEYS // PAGE, mask=begin < end, other=0)
    for tile in range(begin, end):
        page = next_page.to(tl.int64) * (kv_heads * HEAD_DIM * PAGE)
        next_page = tl.load(pages + (tile + 1) * KEYS // PAGE, mask=tile + 1 < end, other=0)  # ahead, so that keys need not wait for it
        slot = tl.multiple_of(tile * KEYS % PAGE, KEYS)
        key = tile * KEYS + tl.arange(0, KEYS)
        if D == HEAD_DIM:
            k = tl.load(k_head + page + slot + k_offset)
        else:
            k = tl.load(k_head + page + slot + k_offset, mask=(column < HEAD_DIM)[:, None], other=0.0)
        scores = tl.dot(queries, k, input_precision="ieee")
        if MASKED:
            scores = tl.where(key[None, :] <= positions[:, None], scores, float("-inf"))
            v = tl.load(v_head + page + slot * HEAD_DIM + v_offset, mask=(key < length)[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
        elif D == HEAD_DIM:
            v = tl.load(v_head + page + slot * HEAD_DIM + v_offset)
        else:
            v = tl.load(v_head + page + slot * HEAD_DIM + v_offset, mask=(column < HEAD_DIM)[None, :], other=0.0)
        top, total, acc = softmax_step(scores, v, top, total, acc, MASKED)
    return top, total, acc
