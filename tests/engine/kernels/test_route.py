"""The router's kernel against its twin, and the twin against ReferenceOps, over the routings of the models that we run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from server.engine.kernels import plain_small, route
from server.engine.layers.reference import ReferenceOps
from server.engine.ops import Routing

ROUTINGS = {
    "mixtral": (8, Routing(2, "softmax", True)),
    "v2-lite": (64, Routing(6, "softmax", False)),
    "v2": (160, Routing(6, "softmax", False, 16.0, 8, 3, 1)),
    "v3": (256, Routing(8, "sigmoid", True, 2.5, 8, 4, 2)),
    "glm": (160, Routing(8, "sigmoid", True, 2.5)),
    "kimi": (384, Routing(8, "sigmoid", True, 2.827)),
    "odd": (30, Routing(16, "sigmoid", False, 1.0, 3, 2, 4)),
    "all": (12, Routing(12, "softmax", False)),
    "one": (10, Routing(1, "softmax", True, 1.0, 5, 1, 1)),
    "beyond its groups": (16, Routing(6, "softmax", False, 1.0, 8, 2, 2)),
}
ROUNDING = 32 * 2.0**-23  # relative: exp of logits up to 10, a sum of up to 384 pairwise, a division, a normalisation


def routed(function: Callable[..., None], logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(logits), routing.top_k), -7, dtype=torch.int32, device=logits.device)
    weights = torch.full(ids.shape, torch.nan, device=logits.device)
    function(logits, routing, ids, weights)
    return ids, weights


def with_bias(routing: Routing, bias: torch.Tensor) -> Routing:
    names = ("top_k", "gating", "normalize", "scale", "groups", "groups_used", "group_top")
    return Routing(*(getattr(routing, name) for name in names), bias)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ROUTINGS)
def test_kernel_is_its_twin_and_the_reference(device: str, name: str, biased: bool) -> None:
    experts, routing = ROUTINGS[name]
    logits = torch.randn(3, experts, device=device) * 2
    if biased:
        routing = with_bias(routing, torch.randn(experts, device=device) * 0.3)
    ids, weights = routed(route.route, logits, routing)
    twin_ids, twin_weights = routed(plain_small.route, logits, routing)
    assert torch.equal(ids, twin_ids)
    torch.testing.assert_close(weights, twin_weights, rtol=ROUNDING, atol=0)
    exact_ids, exact_weights = torch.empty_like(ids, device="cpu"), torch.empty_like(weights, device="cpu")
    on_cpu = routing if routing.bias is None else with_bias(routing, routing.bias.cpu())
    ReferenceOps().route(torch.eye(experts, dtype=torch.float64), on_cpu, logits.cpu(), exact_ids, exact_weights)
    assert torch.equal(twin_ids.cpu(), exact_ids)
    torch.testing.assert_close(twin_weights.cpu(), exact_weights, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
def test_ties_go_to_the_lower_id(device: str, name: str, gating: str) -> None:
    experts, routing = ROUTINGS[name]
    routing = with_bias(routing, torch.zeros(experts, device=device))
    logits = torch.cat((torch.zeros(1, experts), torch.randint(-1, 2, (3, experts)).float())).to(device)
    ids, weights = routed(route.route, logits, routing)
    twin_ids, twin_weights = routed(plain_small.route, logits, routing)
    assert torch.equal(ids, twin_ids)
    torch.testing.assert_close(weights, twin_weights, rtol=ROUNDING, atol=0)
    if routing.groups == 1:
        assert ids[0].tolist() == list(range(routing.top_k))


def test_bias_is_for_the_choice_only(device: str) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device)
    bias = torch.tensor([-9.0, 0.0, 0.0, 9.0], device=device)
    ids, weights = routed(route.route, logits, Routing(2, "sigmoid", False, 3.0, bias=bias))
    assert ids.tolist() == [[3, 1]]
    torch.testing.assert_close(weights.cpu(), 3 * torch.tensor([[-1.0, 1.0]]).sigmoid(), rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("name", ["mixtral", "v2", "v3", "odd"])
def test_damaged_logits_still_choose_experts_that_exist(device: str, name: str) -> None:
    experts, routing = ROUTINGS[name]
    ids, _ = routed(route.route, torch.full((1, experts), torch.nan, device=device), routing)
    chosen = ids[0].tolist()
    assert len(set(chosen)) == len(chosen)
    assert all(0 <= expert < experts for expert in chosen)


def test_many_tokens(device: str) -> None:
    experts, routing = ROUTINGS["v3"]
    logits = torch.randn(12, experts, device=device)
    assert torch.equal(routed(route.route, logits, routing)[0], routed(plain_small.route, logits, routing)[0])
