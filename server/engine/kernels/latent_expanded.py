"""Latent attention for chunks of tokens: keys and values of a block of the context are expanded by large products, then attended to at 192 and 128
values a head instead of 576 and 512. The softmax goes on from block to block, so that the memory for them is one block's, for some heads at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.gpu.matrix import DeviceMatrix
from server.engine.gpu.place import Place
from server.engine.kernels import attention_plan
from server.engine.kernels.attention_plan import LatentShape, heads_at_once
from server.engine.kernels.flash import softmax_step
from server.engine.kernels.head_products import HeadKernels, open_heads
from server.engine.kernels.rotate import NewLatents, latent_queries
from server.engine.kernels.tuning import Limits, limits
from server.engine.ops import LatentPages, Rotation


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the kernel is cut and launched."""

    rows: int  # tokens of one head
    keys: int
    warps: int
    stages: int


def tiles(device: Limits, n: int, shape: LatentShape, itemsize: int) -> Tiles:
    """As many rows as registers and shared memory hold."""
    key_dim, value_dim = triton.next_power_of_2(shape.nope) + triton.next_power_of_2(shape.rope), triton.next_power_of_2(shape.v_dim)
    roomy = device.shared_bytes > 128 * 1024 and itemsize == 2
    rows, keys = min(max(16, triton.next_power_of_2(n)), 128 if roomy else 64), 64 if roomy else 32
    return Tiles(rows, keys, 8 if rows == 128 else 4, device.stages(keys * (key_dim + value_dim) * itemsize, rows * key_dim * itemsize))


def attend_expanded(
    q: Tensor,
    new: NewLatents,
    rotation: Rotation,
    place: Place,
    shape: LatentShape,
    k_b: DeviceMatrix,
    v_b: DeviceMatrix,
    scale: float,
    out: Tensor,
    kernels: HeadKernels,
) -> None:
    """Ops.attend_latent's formula. place.end is exact; q [n, heads, nope + rope], out [n, heads, v_dim], float32.

    What one turn allocates is gone before the next: `attention_plan` counts on it.
    """
    step = heads_at_once(shape, place.end, new.cache.latent.element_size())
    for first in range(0, shape.heads, step):
        some = slice(first, min(first + step, shape.heads))
        _attend_heads(some, q, None if first else new, new.cache, rotation, place, shape, k_b, v_b, scale, out[:, some], kernels)


def _attend_heads(
    some: slice,
    q: Tensor,
    new: NewLatents | None,
    cache: LatentPages,
    rotation: Rotation,
    place: Place,
    shape: LatentShape,
    k_b: DeviceMatrix,
    v_b: DeviceMatrix,
    scale: float,
    out: Tensor,
    kernels: HeadKernels,
) -> None:
    """The heads `some`, over the whole context; out is theirs alone."""
    dtype = cache.latent.dtype
    k_weights, v_weights = (open_heads(m, some, dtype, kernels) for m in (k_b, v_b))
    queries, log_sums = q.new_empty(place.n, len(k_weights), q.shape[2], dtype=dtype), q.new_empty(len(k_weights), place.n)
    latent_queries(q[:, some, : shape.nope], q[:, some, shape.nope :], rotation, place, scale, queries, new)
    cut = tiles(limits(q.device), place.n, shape, dtype.itemsize)
    for begin in range(0, place.end, attention_plan.CONTEXT_BLOCK):
        latents = _gathered(cache, place, begin)
        compressed = latents[:, : shape.kv_lora].expand(len(k_weights), -1, -1)
        attend_block(queries, place, latents, torch.bmm(compressed, k_weights), torch.bmm(compressed, v_weights.mT), begin, log_sums, out, cut)


def _gathered(cache: LatentPages, place: Place, begin: int) -> Tensor:
    """The latents of the context's block that begins there, [tokens, kv_lora + rope]."""
    page_size = cache.latent.shape[1]
    end = min(begin + attention_plan.CONTEXT_BLOCK, place.end)
    pages = place.pages[begin // page_size : -(-end // page_size)]
    return cache.latent.index_select(0, pages).flatten(0, 1)[: end - begin]


def attend_block(queries: Tensor, place: Place, latents: Tensor, keys: Tensor, values: Tensor, begin: int, log_sums: Tensor, out: Tensor, cut: Tiles) -> None:
    """Let out go on over the block of the context that starts at `begin`.

    queries [n, heads, nope + rope] as rotate.py prepares them; keys [heads, tokens, nope], values [heads, tokens, v_dim]; latents' last values are the keys'
    rotated part, which heads share. log_sums [heads, n] is log2 of the softmax's sum so far; it and out [n, heads, v_dim] are new if begin is 0.
    """
    n, heads, nope = *queries.shape[:2], keys.shape[2]
    rope, v_dim = queries.shape[2] - nope, values.shape[2]
    _attend_block[triton.cdiv(n, cut.rows), heads](
        queries, latents, keys, values, place.start, log_sums, out, out.stride(0), n, heads, begin, latents.shape[0],
        NOPE=nope, N=max(16, triton.next_power_of_2(nope)), ROPE=rope, R=max(16, triton.next_power_of_2(rope)), KV_LORA=latents.shape[1] - rope,
        V_DIM=v_dim, V=max(16, triton.next_power_of_2(v_dim)), ROWS=cut.rows, KEYS=cut.keys, FIRST=begin == 0, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


@triton.jit
def _attend_block(
    q, latents, keys, values, start, log_sums, out, out_token,
    n, heads, begin, tokens,
    NOPE: tl.constexpr, N: tl.constexpr, ROPE: tl.constexpr, R: tl.constexpr, KV_LORA: tl.constexpr, V_DIM: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tokens see most: they begin
    head = tl.program_id(1)
    first = tl.load(start)
    token = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, N)
    part = tl.arange(0, R)
    v_column = tl.arange(0, V)
    in_n = token < n
    q_row = q + (token.to(tl.int64) * heads + head)[:, None] * (NOPE + ROPE)
    queries = tl.load(q_row + column[None, :], mask=in_n[:, None] & (column < NOPE)[None, :], other=0.0)
    rope_queries = tl.load(q_row + NOPE + part[None, :], mask=in_n[:, None] & (part < ROPE)[None, :], other=0.0)

    position = first + token - begin  # in the block
    end = tl.cdiv(tl.minimum(first + tl.minimum(block * ROWS + ROWS, n) - begin, tokens), KEYS)
    seen_by_all = tl.minimum(tl.maximum(first + block * ROWS + 1 - begin, 0), tokens) // KEYS
    out_row = out + (token.to(tl.int64) * out_token)[:, None] + head * V_DIM + v_column[None, :]
    out_inside = in_n[:, None] & (v_column < V_DIM)[None, :]
    log_row = log_sums + head.to(tl.int64) * n + token
    if FIRST:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, V], tl.float32)
    else:  # what was seen so far counts as one key
        top = tl.load(log_row, mask=in_n, other=0.0)
        total = tl.full([ROWS], 1.0, tl.float32)
        acc = tl.load(out_row, mask=out_inside, other=0.0)
    head_keys = keys + head.to(tl.int64) * tokens * NOPE
    head_values = values + head.to(tl.int64) * tokens * V_DIM
    top, total, acc = _walk(
        queries, rope_queries, latents, head_keys, head_values, 0, seen_by_all, position, tokens, top, total, acc,
        NOPE, N, ROPE, R, KV_LORA, V_DIM, V, KEYS, False,
    )  # fmt: skip
    top, total, acc = _walk(
        queries, rope_queries, latents, head_keys, head_values, seen_by_all, end, position, tokens, top, total, acc,
        NOPE, N, ROPE, R, KV_LORA, V_DIM, V, KEYS, True,
    )  # fmt: skip
    tl.store(log_row, top + tl.log2(total), mask=in_n)
    tl.store(out_row, acc / total[:, None], mask=out_inside)


@triton.jit
def _walk(
    queries, rope_queries, latents, keys, values, begin, end, positions, tokens, top, total, acc,
    NOPE: tl.constexpr, N: tl.constexpr, ROPE: tl.constexpr, R: tl.constexpr, KV_LORA: tl.constexpr, V_DIM: tl.constexpr, V: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, end) of the block. MASKED: some keys are later than some queries, or beyond its `tokens`."""
    column = tl.arange(0, N)
    part = tl.arange(0, R)
    v_column = tl.arange(0, V)
    for tile in range(begin, end):
        key = tile * KEYS + tl.arange(0, KEYS)
        if MASKED:
            k = tl.load(keys + key[None, :] * NOPE + column[:, None], mask=(key < tokens)[None, :] & (column < NOPE)[:, None], other=0.0)
            k_rope = tl.load(
                latents + key[None, :] * (KV_LORA + ROPE) + KV_LORA + part[:, None], mask=(key < tokens)[None, :] & (part < ROPE)[:, None], other=0.0
            )  # fmt: skip
            v = tl.load(values + key[:, None] * V_DIM + v_column[None, :], mask=(key < tokens)[:, None] & (v_column < V_DIM)[None, :], other=0.0)
        else:
            k = tl.load(keys + key[None, :] * NOPE + column[:, None], mask=(column < NOPE)[:, None], other=0.0)
            k_rope = tl.load(latents + key[None, :] * (KV_LORA + ROPE) + KV_LORA + part[:, None], mask=(part < ROPE)[:, None], other=0.0)
            v = tl.load(values + key[:, None] * V_DIM + v_column[None, :], mask=(v_column < V_DIM)[None, :], other=0.0)
        scores = tl.dot(queries, k, input_precision="ieee")
        scores = tl.dot(rope_queries, k_rope, scores, input_precision="ieee")
        if MASKED:
            scores = tl.where(key[None, :] <= positions[:, None], scores, float("-inf"))
        top, total, acc = softmax_step(scores, v, top, total, acc, MASKED)
    return top, total, acc
