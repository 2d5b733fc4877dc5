"""What attention does with a step's new tokens first: turn queries and keys by position, bring queries into the type and order that products want them
in, already scaled, and write keys, values and latents to the sequence's pages."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from server.engine.gpu.place import Place
from server.engine.ops import KVPages, LatentPages, Norm, Rotation

LOG2_E = 1.4426950408889634  # scores are in units of log2, so that exp2 gives the softmax's terms

_TOKENS = 16  # of one program, where there are so many


def store_keys_and_values(q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: KVPages, place: Place, scale: float) -> Tensor:
    """Write rotated k and v, [n, kv_heads, head_dim] float32, to the pages; returns q [n, heads, head_dim] rotated and scaled, in the cache's dtype."""
    n, kv_heads, head_dim = k.shape
    queries = q.new_empty(q.shape, dtype=cache.k.dtype)
    block = min(_TOKENS, triton.next_power_of_2(n))
    _store_keys_and_values[triton.cdiv(n, block), kv_heads + q.shape[1]](
        q, k, v, queries, cache.k, cache.v, rotation.table, place.start, place.pages, n, q.shape[1], kv_heads, scale * LOG2_E,
        HEAD_DIM=head_dim, D=triton.next_power_of_2(head_dim), ROT=2 * rotation.table.shape[1], INTERLEAVED=rotation.interleaved,
        PAGE=cache.v.shape[2], BLOCK=block,
    )  # fmt: skip
    return queries


@dataclass(frozen=True, slots=True)
class NewLatents:
    """What goes into the cache of latents: latent [n, kv_lora + rope] float32, of which the first kv_lora values are yet to be normed."""

    latent: Tensor
    norm: Norm
    cache: LatentPages


def latent_queries(plain: Tensor, turning: Tensor, rotation: Rotation, place: Place, scale: float, queries: Tensor, new: NewLatents | None = None) -> None:
    """queries [n, heads, width + rope] = scaled plain [n, heads, width], then turning [n, heads, rope] rotated and scaled; both float32, the last
    dimension contiguous. By the way new latents are normed, rotated and written to their pages."""
    n, heads, width, rope = *plain.shape, turning.shape[2]
    block = min(_TOKENS, triton.next_power_of_2(n))
    latent, weight, eps, pages = (plain, plain, 0.0, queries) if new is None else (new.latent, new.norm.weight, new.norm.eps, new.cache.latent)
    kv_lora, page_size = (1, 1) if new is None else (new.norm.weight.numel(), new.cache.latent.shape[1])
    _latent_queries[triton.cdiv(n, block), heads if new is None else heads + 1](
        plain, plain.stride(0), plain.stride(1), turning, turning.stride(0), turning.stride(1), queries, rotation.table, place.start, n, heads, scale * LOG2_E,
        latent, weight, eps, pages, place.pages,
        WIDTH=width, W=triton.next_power_of_2(width), ROPE=rope, R=triton.next_power_of_2(rope), INTERLEAVED=rotation.interleaved, BLOCK=block,
        KV_LORA=kv_lora, C=triton.next_power_of_2(kv_lora), PAGE=page_size,
    )  # fmt: skip


@triton.jit
def _rotated(x, columns, inside, table, positions, ROT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The tile [rows, columns] float32 of x, pointers to each row's first value, of whose columns the first ROT are turned in pairs by the angles of the
    rows' positions; 0 where not `inside`. Each value's partner is loaded beside it: memory holds both as they came."""
    half: tl.constexpr = ROT // 2
    if INTERLEAVED:
        is_first = columns % 2 == 0
        pair = columns // 2
        partner = tl.where(is_first, columns + 1, columns - 1)
    else:
        is_first = columns < half
        pair = tl.where(is_first, columns, columns - half)
        partner = tl.where(is_first, columns + half, columns - half)
    turned = inside & (columns < ROT)[None, :]
    value = tl.load(x[:, None] + columns[None, :], mask=inside, other=0.0)
    other = tl.load(x[:, None] + partner[None, :], mask=turned, other=0.0)
    angle = table + positions.to(tl.int64)[:, None] * ROT + pair[None, :] * 2
    cos = tl.load(angle, mask=turned, other=1.0)
    sin = tl.load(angle + 1, mask=turned, other=0.0)
    return value * cos + tl.where(is_first[None, :], -other, other) * sin


@triton.jit
def _store_keys_and_values(
    q, k, v, queries, k_pages, v_pages, table, start, pages,
    n, heads, kv_heads, scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROT: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each KV head and each query head of a block of tokens."""
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    inside = (token < n)[:, None] & (column < HEAD_DIM)[None, :]
    position = tl.load(start) + token
    if head < kv_heads:
        page = tl.load(pages + position // PAGE, mask=token < n, other=0).to(tl.int64)
        slot = position % PAGE
        row = (token.to(tl.int64) * kv_heads + head) * HEAD_DIM
        storage = (page * kv_heads + head) * (HEAD_DIM * PAGE)
        turned = _rotated(k + row, column, inside, table, position, ROT, INTERLEAVED)
        tl.store(k_pages + storage[:, None] + column[None, :] * PAGE + slot[:, None], turned.to(k_pages.dtype.element_ty), mask=inside)
        values = tl.load(v + row[:, None] + column[None, :], mask=inside)
        tl.store(v_pages + storage[:, None] + slot[:, None] * HEAD_DIM + column[None, :], values.to(v_pages.dtype.element_ty), mask=inside)
    else:
        row = (token.to(tl.int64) * heads + head - kv_heads) * HEAD_DIM
        query = _rotated(q + row, column, inside, table, position, ROT, INTERLEAVED) * scale
        tl.store(queries + row[:, None] + column[None, :], query.to(queries.dtype.element_ty), mask=inside)


@triton.jit
def _latent_queries(
    plain, plain_token, plain_head, turning, turning_token, turning_head, queries, table, start, n, heads, scale, latent, weight, eps, latent_pages, pages,
    WIDTH: tl.constexpr, W: tl.constexpr, ROPE: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    KV_LORA: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One program for each head of a block of tokens, and a last one for their latents."""
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = token.to(tl.int64)
    position = tl.load(start) + token
    if head < heads:
        column = tl.arange(0, W)
        part = tl.arange(0, R)
        row = queries + (wide * heads + head) * (WIDTH + ROPE)
        inside = (token < n)[:, None] & (column < WIDTH)[None, :]
        value = tl.load(plain + (wide * plain_token + head * plain_head)[:, None] + column[None, :], mask=inside, other=0.0) * scale
        tl.store(row[:, None] + column[None, :], value.to(queries.dtype.element_ty), mask=inside)
        turned = (token < n)[:, None] & (part < ROPE)[None, :]
        value = _rotated(turning + wide * turning_token + head * turning_head, part, turned, table, position, ROPE, INTERLEAVED) * scale
        tl.store(row[:, None] + WIDTH + part[None, :], value.to(queries.dtype.element_ty), mask=turned)
    else:
        page = tl.load(pages + position // PAGE, mask=token < n, other=0).to(tl.int64)
        storage = latent_pages + (page * PAGE + position % PAGE) * (KV_LORA + ROPE)
        _store_latents(latent + wide * (KV_LORA + ROPE), weight, eps, storage, table, position, token < n, KV_LORA, C, ROPE, R, INTERLEAVED)


@triton.jit
def _store_latents(
    row, weight, eps, storage, table, position, inside, KV_LORA: tl.constexpr, C: tl.constexpr, ROPE: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """row and storage point to each token's first value, before and after."""
    column = tl.arange(0, C)
    part = tl.arange(0, R)
    normed = inside[:, None] & (column < KV_LORA)[None, :]
    x = tl.load(row[:, None] + column[None, :], mask=normed, other=0.0)
    x *= tl.rsqrt(tl.sum(x * x, 1) / KV_LORA + eps)[:, None] * tl.load(weight + column, mask=column < KV_LORA, other=0.0)[None, :]
    tl.store(storage[:, None] + column[None, :], x.to(storage.dtype.element_ty), mask=normed)
    turned = inside[:, None] & (part < ROPE)[None, :]
    value = _rotated(row + KV_LORA, part, turned, table, position, ROPE, INTERLEAVED)
    tl.store(storage[:, None] + KV_LORA + part[None, :], value.to(storage.dtype.element_ty), mask=turned)
