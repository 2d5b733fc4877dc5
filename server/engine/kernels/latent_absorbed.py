"""Latent attention for few tokens: all heads' queries, brought to the latents' space, against the paged latents, which are keys and values at once."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from server.engine.gpu.place import Place
from server.engine.kernels.flash import combine, new_parts, put_part, share, softmax_step
from server.engine.kernels.tuning import Limits
from server.engine.ops import LatentPages


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the kernel is cut and launched."""

    rows: int  # tokens x heads
    keys: int  # divides the page size
    warps: int
    stages: int
    splits: int
    least: int  # tiles of a split that has any: each split's part costs as much memory traffic as some tiles


def tiles(device: Limits, mixed: Tensor, cache: LatentPages, place: Place) -> Tiles:
    """For a result [n, heads, kv_lora]: rows as many as registers hold of sums, so that latents are read as seldom as can be."""
    n, heads, kv_lora = mixed.shape
    itemsize = cache.latent.element_size()
    width = itemsize * (triton.next_power_of_2(kv_lora) + triton.next_power_of_2(cache.latent.shape[2] - kv_lora))
    wanted = max(16, triton.next_power_of_2(n * heads))
    cuts = [(rows, keys) for rows in (64, 32, 16) for keys in (64, 32) if rows == 64 or keys == 32]
    rows, keys = next(((rows, keys) for rows, keys in cuts if rows <= wanted and device.stages(keys * width, rows * width) >= 2), (16, 32))
    splits = device.splits(triton.cdiv(n * heads, rows), triton.cdiv(place.end, keys))
    return Tiles(rows, keys, 8 if rows == 64 else 4, device.stages(keys * width, rows * width), splits, 2)


def attend_absorbed(queries: Tensor, cache: LatentPages, place: Place, mixed: Tensor, cut: Tiles) -> None:
    """mixed [n, heads, kv_lora] float32 = softmax(queries . latents) c, over pages that hold the new tokens already, c being the latents' first values.

    queries [n, heads, kv_lora + rope] as rotate.py prepares them.
    """
    n, heads, kv_lora = mixed.shape
    rope = queries.shape[2] - kv_lora
    parts, log_sums = new_parts(mixed, cut.splits)
    _attend_absorbed[triton.cdiv(n * heads, cut.rows), cut.splits](
        queries, cache.latent, place.start, place.pages, parts, log_sums, n, heads,
        ROPE=rope, R=max(16, triton.next_power_of_2(rope)), KV_LORA=kv_lora, C=max(16, triton.next_power_of_2(kv_lora)),
        PAGE=cache.latent.shape[1], ROWS=cut.rows, KEYS=cut.keys, SPLITS=cut.splits, LEAST=cut.least, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if cut.splits > 1:
        combine(parts.flatten(1, 2), log_sums.flatten(1), mixed.flatten(0, 1), place, cut.keys, cut.least)


@triton.jit
def _attend_absorbed(
    q, latents, start, pages, parts, log_sums, n, heads,
    ROPE: tl.constexpr, R: tl.constexpr, KV_LORA: tl.constexpr, C: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    split = tl.program_id(1)
    first = tl.load(start)
    row = block * ROWS + tl.arange(0, ROWS)  # token * heads + head
    token = row // heads
    column = tl.arange(0, C)
    part = KV_LORA + tl.arange(0, R)
    inside = (token < n)[:, None] & (column < KV_LORA)[None, :]
    q_row = q + row[:, None] * (KV_LORA + ROPE)
    queries = tl.load(q_row + column[None, :], mask=inside, other=0.0)
    rope_queries = tl.load(q_row + part[None, :], mask=(token < n)[:, None] & (part < KV_LORA + ROPE)[None, :], other=0.0)

    last_token = tl.minimum((block * ROWS + ROWS - 1) // heads, n - 1)
    begin, end = share(tl.cdiv(first + last_token + 1, KEYS), split, SPLITS, LEAST)
    seen_by_all = tl.minimum(tl.maximum((first + block * ROWS // heads + 1) // KEYS, begin), end)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, C], tl.float32)
    top, total, acc = _walk(
        queries, rope_queries, latents, pages, begin, seen_by_all, column, part, first + token, first + n, top, total, acc,
        ROPE, KV_LORA, PAGE, KEYS, False,
    )  # fmt: skip
    top, total, acc = _walk(
        queries, rope_queries, latents, pages, seen_by_all, end, column, part, first + token, first + n, top, total, acc,
        ROPE, KV_LORA, PAGE, KEYS, True,
    )  # fmt: skip
    put_part(parts, log_sums, split, n * heads, row.to(tl.int64), column, token < n, inside, top, total, acc, KV_LORA, SPLITS)


@triton.jit
def _walk(
    queries, rope_queries, latents, pages, begin, end, column, part, positions, length, top, total, acc,
    ROPE: tl.constexpr, KV_LORA: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Latents of tiles [begin, end), each loaded once. MASKED: some are later than some queries, or beyond `length`, where memory may hold NaN."""
    next_page = tl.load(pages + begin * KEYS // PAGE, mask=begin < end, other=0)
    for tile in range(begin, end):
        key = tile * KEYS + tl.arange(0, KEYS)
        page = next_page.to(tl.int64)
        next_page = tl.load(pages + (tile + 1) * KEYS // PAGE, mask=tile + 1 < end, other=0)  # ahead, so that latents need not wait for it
        row = latents + (page * PAGE + tile * KEYS % PAGE) * (KV_LORA + ROPE) + tl.arange(0, KEYS)[:, None] * (KV_LORA + ROPE)
        if MASKED:
            latent = tl.load(row + column[None, :], mask=(key < length)[:, None] & (column < KV_LORA)[None, :], other=0.0)
        else:
            latent = tl.load(row + column[None, :], mask=(column < KV_LORA)[None, :], other=0.0)
        rope_keys = tl.load(row + part[None, :], mask=(part < KV_LORA + ROPE)[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(rope_queries, tl.trans(rope_keys), scores, input_precision="ieee")
        if MASKED:
            scores = tl.where(key[None, :] <= positions[:, None], scores, float("-inf"))
        top, total, acc = softmax_step(scores, latent, top, total, acc, MASKED)
    return top, total, acc
