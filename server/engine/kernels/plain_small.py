"""Plain-torch twins of the small kernels (norm, swiglu, route, handoff, sample): same signatures, any device; what old GPUs run.

Nothing here synchronises with the host, so that a CUDA graph can hold these too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from server.engine.gpu import drawing
from server.engine.gpu.drawing import DrawBuffers, Way
from server.engine.ops import Routing
from server.engine.sampler import LARGEST, WEIGHT_OF_BEST


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out [n, dim] = x / sqrt(mean(x^2) + eps) * weight."""
    out.copy_(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight)


def swiglu(gate: Tensor, up: Tensor, out: Tensor, scales: Tensor | None = None) -> None:
    """out [n, ffn] = silu(gate) * up * scales[:, None]."""
    product = silu(gate.float()) * up.float()
    out.copy_(product if scales is None else product * scales[:, None])


def route(logits: Tensor, routing: Routing, ids: Tensor, weights: Tensor) -> None:
    """ids [n, top_k] int32, best first, and weights [n, top_k] float32 from logits [n, experts]."""
    scores = logits.softmax(-1) if routing.gating == "softmax" else logits.sigmoid()
    biased = scores if routing.bias is None else scores + routing.bias
    if routing.groups > 1:
        biased = _without_other_groups(biased, routing)
    chosen = _largest(biased, routing.top_k)
    chosen_scores = scores.gather(1, chosen)
    if routing.normalize:
        chosen_scores = chosen_scores / (chosen_scores.sum(-1, keepdim=True) + 1e-20)
    ids.copy_(chosen)
    weights.copy_(chosen_scores * routing.scale)


def send(y: Tensor, ids: Tensor, weights: Tensor, to_y: Tensor, to_ids: Tensor, to_weights: Tensor) -> None:
    """Copy what the experts need to pinned memory."""
    to_y.copy_(y, non_blocking=True)
    to_ids.copy_(ids, non_blocking=True)
    to_weights.copy_(weights, non_blocking=True)


def receive(out: Tensor, pinned: Tensor) -> None:
    """out += pinned."""
    out.add_(pinned.to(out.device, non_blocking=True))


def fetch(out: Tensor, pinned: Tensor) -> None:
    """out = pinned."""
    out.copy_(pinned, non_blocking=True)


def draw(logits: Tensor, b: DrawBuffers, way: Way) -> None:
    """From logits [vocab] and b.scalars to b.token, and to b.logprobs and b.leader_ids where asked for. Cutoffs come out of a sort here."""
    scalars = b.scalars.to(logits.device, non_blocking=True)
    values = _adjusted(logits, b, scalars) if way.adjust else logits
    best = values.max()
    token = _first(values == best) if way.greedy else _drawn(values, best, scalars, way)
    token = torch.where(best.isfinite(), token, drawing.NOT_FINITE)
    b.token.copy_(token, non_blocking=True)
    if way.adjust:
        b.history.index_add_(0, token.clamp(min=0)[None], torch.ones(1, dtype=torch.int32, device=logits.device))
    if way.leaders:
        logprobs = logits - logits.logsumexp(0)
        found, ids = (t[: drawing.MOST_LEADERS] for t in logprobs.sort(stable=True, descending=True))
        b.leader_ids[: len(ids)].copy_(ids, non_blocking=True)
        b.logprobs[: len(ids) + 1].copy_(torch.cat((logprobs.index_select(0, token.clamp(min=0)[None]), found)), non_blocking=True)


def _adjusted(logits: Tensor, b: DrawBuffers, scalars: Tensor) -> Tensor:
    """Logits after constraint, bias and penalties."""
    may = (b.allowed[:, None] >> torch.arange(drawing.WORD, device=logits.device)).bitwise_and(1).view(-1)[: len(logits)] != 0
    repetition, presence, frequency = scalars[drawing.REPETITION : drawing.FREQUENCY + 1].float()
    values = logits + b.bias
    penalised = torch.where(values > 0, values / repetition, values * repetition).clamp(max=LARGEST)
    values = torch.where(b.history != 0, penalised, values)
    count = b.history & (drawing.IN_PROMPT - 1)
    values = values - torch.where(count > 0, presence + frequency * count, 0.0)
    return torch.where(logits < torch.inf, torch.where(may, values, -torch.inf), logits)


def _drawn(values: Tensor, best: Tensor, scalars: Tensor, way: Way) -> Tensor:
    """The token that the step's uniform number means."""
    weights = ((values - best) / scalars[drawing.TEMPERATURE].float()).exp().mul(WEIGHT_OF_BEST).long()
    kept = weights >= scalars[drawing.LEAST_WEIGHT].long()
    if way.top_k or way.top_p:
        ranked, order = values.sort(stable=True, descending=True)
        cutoff = ranked.index_select(0, scalars[drawing.TOP_K].long()[None] - 1) if way.top_k else ranked[-1:]
        if way.top_p:
            whole = torch.where(values >= cutoff, weights, 0).sum()
            needed = (scalars[drawing.TOP_P] * whole).long().clamp(min=1)
            place = (weights[order].cumsum(0) < needed).sum().clamp(max=len(values) - 1)  # damaged logits may weigh nothing
            cutoff = ranked.index_select(0, place[None])
        kept &= values >= cutoff
    cumulative = torch.where(kept, weights, 0).cumsum(0)
    target = torch.minimum((scalars[drawing.UNIFORM] * cumulative[-1]).long(), cumulative[-1] - 1)
    return _first(cumulative > target)


def _first(found: Tensor) -> Tensor:
    """The lowest index that is true, the last one when none is."""
    ids = torch.arange(len(found), device=found.device)
    return torch.where(found, ids, len(found) - 1).min()


def _largest(values: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row stand, best first, ties to the lower index."""
    return values.sort(stable=True, dim=-1, descending=True).indices[:, :count]


def _without_other_groups(biased: Tensor, routing: Routing) -> Tensor:
    """biased [n, experts] with -inf in all groups but the best `groups_used` of each token."""
    groups = biased.view(biased.shape[0], routing.groups, -1)
    worth = groups.topk(routing.group_top, -1).values.sum(-1)
    used = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, _largest(worth, routing.groups_used), True)
    return groups.masked_fill(~used[..., None], -torch.inf).flatten(-2)
