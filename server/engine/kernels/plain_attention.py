"""Attention over the paged cache in plain torch, on any device: the twins of kernels/attention.py and kernels/latent.py.

The context is taken in blocks, whose softmaxes are merged, so that memory stays bounded; positions are compared on the device, so that nothing waits for it
and a captured step serves every position. Arithmetic is in the queries' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from server.engine.gpu.matrix import DeviceMatrix
from server.engine.gpu.place import Place
from server.engine.kernels.head_products import HeadKernels, apply_heads
from server.engine.ops import KVPages, LatentPages, Norm, Rotation

_BLOCK_PAGES = 16  # of the context at a time


def attend(q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: KVPages, place: Place, scale: float, out: Tensor) -> None:
    """Write rotated k and v to the pages and attend: out = softmax(rotated q K^T * scale) V over start + n tokens, causal.

    q and out are [n, heads, head_dim], k and v [n, kv_heads, head_dim]; q, k and v stay as they are.
    """
    positions = _positions(place)
    page, slot = _slots(positions, place, cache.v.shape[2])
    cache.k[page, :, :, slot] = _rotated(k, rotation, positions).to(cache.k.dtype)
    cache.v[page, :, slot] = v.to(cache.v.dtype)
    group = q.shape[1] // k.shape[1]

    def keys_and_values(pages: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = cache.k[pages].permute(1, 0, 3, 2).flatten(1, 2), cache.v[pages].transpose(0, 1).flatten(1, 2)
        return keys.to(q.dtype).repeat_interleave(group, 0), values.to(q.dtype).repeat_interleave(group, 0)

    _attention(_rotated(q, rotation, positions) * scale, keys_and_values, positions, place, cache.v.shape[2], out)


def attend_latent(
    q: Tensor,
    latent: Tensor,
    norm: Norm,
    rotation: Rotation,
    cache: LatentPages,
    place: Place,
    k_b: DeviceMatrix,
    v_b: DeviceMatrix,
    scale: float,
    out: Tensor,
    kernels: HeadKernels,
) -> None:
    """Multi-head latent attention as Ops.attend_latent defines it, absorbed: queries go to the latents' space, and what they find there to the values'."""
    positions = _positions(place)
    kv_lora, nope = norm.weight.numel(), k_b.cols
    page, slot = _slots(positions, place, cache.latent.shape[1])
    stored = torch.cat((_normed(latent[:, :kv_lora], norm), _rotated(latent[:, None, kv_lora:], rotation, positions)[:, 0]), -1)
    cache.latent[page, slot] = stored.to(cache.latent.dtype)
    absorbed = q.new_empty(*q.shape[:2], kv_lora)
    apply_heads(k_b, q[..., :nope], absorbed, q.dtype, kernels)
    queries = torch.cat((absorbed, _rotated(q[..., nope:], rotation, positions)), -1) * scale

    def keys_and_values(pages: Tensor) -> tuple[Tensor, Tensor]:
        seen = cache.latent[pages].flatten(0, 1).to(q.dtype)[None]
        return seen, seen[..., :kv_lora]

    mixed = torch.empty_like(absorbed)
    _attention(queries, keys_and_values, positions, place, cache.latent.shape[1], mixed)
    apply_heads(v_b, mixed, out, q.dtype, kernels)


def _positions(place: Place) -> Tensor:
    return place.start.long() + torch.arange(place.n, device=place.start.device)


def _slots(positions: Tensor, place: Place, page_size: int) -> tuple[Tensor, Tensor]:
    """Pages and places in them, int64 [n] each."""
    return place.pages.long()[positions // page_size], positions % page_size


def _rotated(x: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    """x [n, heads, dim] with the first values of each head turned in pairs (layers/rope.py)."""
    table = rotation.table[positions][:, None].to(x.dtype)
    half, cos, sin = table.shape[2], table[..., 0], table[..., 1]
    pairs, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if rotation.interleaved else (pairs[..., :half], pairs[..., half:])
    turned = (a * cos - b * sin, a * sin + b * cos)
    return torch.cat((torch.stack(turned, -1).flatten(-2) if rotation.interleaved else torch.cat(turned, -1), rest), -1)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight.to(x.dtype)


def _attention(
    queries: Tensor, keys_and_values: Callable[[Tensor], tuple[Tensor, Tensor]], positions: Tensor, place: Place, page_size: int, out: Tensor
) -> None:
    """out [n, heads, v_dim] = softmax(queries K^T) V, queries [n, heads, dim]; keys_and_values gives [heads or 1, tokens, dim] and [.., v_dim] of pages."""
    rows = queries.transpose(0, 1)
    top = rows.new_full(rows.shape[:2], -torch.inf)
    total, acc = torch.zeros_like(top), out.new_zeros(rows.shape[0], rows.shape[1], out.shape[2])
    length = place.start + place.n
    for first, pages in _blocks(place, page_size):
        keys, values = keys_and_values(pages)
        token = first + torch.arange(keys.shape[1], device=rows.device)
        scores = (rows @ keys.mT).masked_fill(token > positions[:, None], -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1))
        terms, shrink = (scores - new_top[..., None]).exp(), (top - new_top).exp()
        total, top = total * shrink + terms.sum(-1), new_top
        acc = acc * shrink[..., None] + terms @ values.masked_fill((token >= length)[:, None], 0)  # memory beyond may hold NaN
    out.copy_((acc / total[..., None]).transpose(0, 1))


def _blocks(place: Place, page_size: int) -> Iterator[tuple[int, Tensor]]:
    """The context up to place.end: each block's first position, and its pages (int64)."""
    pages = place.pages[: -(-place.end // page_size)].long()
    for index in range(0, len(pages), _BLOCK_PAGES):
        yield index * page_size, pages[index : index + _BLOCK_PAGES]
