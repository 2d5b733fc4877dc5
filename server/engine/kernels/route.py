"""The choice of experts on the GPU: one program, of one warp, a token (server/engine/ops.py, Routing, is the definition).

Groups are the rows of a tile and their experts its columns, so that numbers that are no powers of two (160 experts, 384) are masked within each row.
The best of a row or of all is the largest key of (score, id); so ties go to the lower id, and damaged scores still choose experts that exist.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from server.engine.kernels.keys import GONE, index_of, key
from server.engine.ops import Routing


def route(logits: Tensor, routing: Routing, ids: Tensor, weights: Tensor) -> None:
    """ids [n, top_k] int32, best first, and weights [n, top_k] float32 of each token, from the router's logits [n, experts] float32."""
    n, experts = logits.shape
    size = experts // routing.groups
    limited = routing.groups > 1
    _route[(n,)](
        logits,
        routing.bias if routing.bias is not None else logits,
        ids,
        weights,
        experts,
        routing.scale,
        SIZE=size,
        GROUPS=routing.groups,
        GROUPS_USED=routing.groups_used if limited else 1,
        GROUP_TOP=routing.group_top,
        TOP_K=routing.top_k,
        SOFTMAX=routing.gating == "softmax",
        BIASED=routing.bias is not None,
        NORMALIZE=routing.normalize,
        ROWS=triton.next_power_of_2(routing.groups),
        COLS=triton.next_power_of_2(size),
        SLOTS=triton.next_power_of_2(routing.top_k),
        num_warps=1,
    )


@triton.jit
def _route(
    logits,
    bias,
    ids,
    weights,
    experts,
    scale,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_USED: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group, place = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (group < GROUPS) & (place < SIZE)
    expert = group * SIZE + place
    values = tl.load(logits + token * experts + expert, mask=inside, other=float("-inf"))
    top, total = _softmax_terms(values)
    biased = _scores(values, top, total, SOFTMAX)
    if BIASED:
        biased += tl.load(bias + expert, mask=inside, other=0.0)
    keys = tl.where(inside, key(biased, expert), GONE)
    if GROUPS > 1:
        used = _best_groups(biased, keys, GROUPS, GROUPS_USED, GROUP_TOP, ROWS)
        keys = tl.where(inside & ~used, key(tl.full([ROWS, COLS], float("-inf"), tl.float32), expert), keys)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros([SLOTS], tl.int32)
    for j in tl.static_range(TOP_K):
        best = tl.max(tl.max(keys, axis=1), axis=0)
        chosen = tl.where(slot == j, index_of(best), chosen)
        keys = tl.where(keys == best, GONE, keys)
    # Scored a second time, which takes less than to pick each score out of the tile
    scores = _scores(tl.load(logits + token * experts + chosen, mask=slot < TOP_K, other=float("-inf")), top, total, SOFTMAX)
    if NORMALIZE:
        scores /= tl.sum(scores, axis=0) + 1e-20  # DeepSeek's guard
    tl.store(ids + token * TOP_K + slot, chosen, mask=slot < TOP_K)
    tl.store(weights + token * TOP_K + slot, scores * scale, mask=slot < TOP_K)


@triton.jit
def _softmax_terms(logits):
    """The largest of a tile of logits, and the sum of exp(logit - largest); padding is -inf."""
    top = tl.max(tl.max(logits, axis=1), axis=0)
    return top, tl.sum(tl.sum(tl.exp(logits - top), axis=1), axis=0)


@triton.jit
def _scores(logits, top, total, SOFTMAX: tl.constexpr):
    """The gating's scores; 0 for padding."""
    if SOFTMAX:
        return tl.exp(logits - top) / total
    return 1.0 / (1.0 + tl.exp(-logits))


@triton.jit
def _best_groups(biased, keys, GROUPS: tl.constexpr, GROUPS_USED: tl.constexpr, GROUP_TOP: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, 1] whether a group stays: the best by the sum of its GROUP_TOP best biased scores."""
    worth = tl.zeros([ROWS], tl.float32)
    for _ in tl.static_range(GROUP_TOP):
        taken = keys == tl.max(keys, axis=1)[:, None]
        worth += tl.sum(tl.where(taken & (keys != GONE), biased, 0.0), axis=1)
        keys = tl.where(taken, GONE, keys)
    group = tl.arange(0, ROWS)
    left = tl.where(group < GROUPS, key(worth, group), GONE)
    for _ in tl.static_range(GROUPS_USED):
        left = tl.where(left == tl.max(left, axis=0), GONE, left)
    return ((left == GONE) & (group < GROUPS))[:, None]
