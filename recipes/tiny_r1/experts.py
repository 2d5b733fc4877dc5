"""Three experts of a thousand tokens each are slow one by one: two ways to compute all of a layer's routed experts at once.

`dense` runs every token through every expert and keeps the chosen ones: four times the work of top-8 of 32, in two plain products. `grouped`
sorts the tokens by expert and computes only what was chosen, with torch's grouped product (CUDA, bfloat16). Both give the same sums.

x: [N, D]; gate_up: [E, 2F, D]; down: [E, D, F], all of one type; chosen: int64 [N, K]; weights: float32 [N, K]. Result: [N, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_ALIGN = 8  # rows of a group: 16 bytes of bfloat16, which the grouped product's operands must be aligned to


def dense(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Every expert for every token; those not chosen count 0 times."""
    experts, hidden, ffn = down.shape
    factors = torch.zeros(len(x), experts, dtype=weights.dtype, device=x.device).scatter(1, chosen, weights)
    gate, up = F.linear(x, gate_up.flatten(0, 1)).view(len(x), experts, 2 * ffn).chunk(2, -1)
    inner: Tensor = F.silu(gate) * up * factors[..., None].to(x.dtype)
    return inner.flatten(1) @ down.transpose(1, 2).reshape(experts * ffn, hidden)


class Plan(NamedTuple):
    """Where the chosen (token, expert) pairs lie once sorted by expert. Every group is filled up to a multiple of 8 rows; M rows in all."""

    ends: Tensor  # int32 [E]: where each expert's rows end
    rows: Tensor  # [N, K]: the row of each pair
    pairs: Tensor  # [M]: the pair of each row; N * K where a row is filling


def grouped(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Only the chosen experts, by torch's grouped product."""
    plan = _plan(chosen, len(down))
    tokens = plan.pairs // chosen.shape[1]
    gate, up = torch._grouped_mm(_to_rows(x, tokens, plan.rows), gate_up.transpose(1, 2), offs=plan.ends).chunk(2, -1)
    factors = torch.cat([weights.flatten(), weights.new_zeros(1)]).gather(0, plan.pairs)
    inner = F.silu(gate) * up * factors[:, None].to(x.dtype)
    return _to_tokens(torch._grouped_mm(inner, down.transpose(1, 2), offs=plan.ends), tokens, plan.rows)


EXPERTS: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {"dense": dense, "grouped": grouped}


def _plan(chosen: Tensor, experts: int) -> Plan:
    """No shape depends on the values, so that the plan needs no answer from the GPU."""
    ids = chosen.flatten()
    pairs, device = len(ids), ids.device
    counts = torch.zeros(experts, dtype=torch.int64, device=device).scatter_add(0, ids, torch.ones_like(ids))
    filled = (counts + _ALIGN - 1) // _ALIGN * _ALIGN
    ends = filled.cumsum(0)
    order = ids.argsort(stable=True)
    sorted_ids = ids[order]
    shift = (ends - filled) - (counts.cumsum(0) - counts)
    rows_sorted = torch.arange(pairs, device=device) + shift[sorted_ids]
    size = pairs + experts * _ALIGN
    rows = torch.empty_like(ids).scatter(0, order, rows_sorted).view_as(chosen)
    of_row = torch.full((size,), pairs, dtype=torch.int64, device=device).scatter(0, rows_sorted, order)
    # The last group takes in the filling at the very end, so that every row belongs to one.
    ends = torch.cat([ends[:-1], ends.new_full((1,), size)])
    return Plan(ends.int(), rows, of_row)


class _Spread(torch.autograd.Function):
    """Tokens [N, D] -> rows [M, D], zeros for filling. Its gradient is `_Collect`, without atomics and in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return _spread(x, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return _collect(grad, rows), None, None


class _Collect(torch.autograd.Function):
    """Rows [M, D] -> the sum over each token's rows [N, D]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return _collect(y, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        return _spread(grad, tokens), None, None


_to_rows: Callable[[Tensor, Tensor, Tensor], Tensor] = _Spread.apply
_to_tokens: Callable[[Tensor, Tensor, Tensor], Tensor] = _Collect.apply


def _spread(x: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[tokens]


def _collect(y: Tensor, rows: Tensor) -> Tensor:
    return y[rows].float().sum(1).to(y.dtype)
