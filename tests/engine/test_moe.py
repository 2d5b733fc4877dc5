"""The mixture-of-experts block as a whole, natively, against `transformers`' own blocks with the same random weights.

Both compute in float32, so a token differs by the rounding of some sums, 1e-6; 1e-5 is allowed. The seeds keep the router away from near-ties.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gguf.constants import GGMLQuantizationType as T
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from server.engine.layers.moe import RoutedExperts, SharedExperts
from server.engine.layers.reference import ReferenceOps
from server.engine.native import NativeOps, open_ops
from server.engine.ops import Matrix, Norm, Ops, Routing

HIDDEN, WIDTH, EPS = 64, 24, 1e-6


@pytest.fixture(scope="module", params=["native", "reference"])
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    if request.param == "reference":
        yield ReferenceOps()
        return
    native: NativeOps = open_ops(2)
    yield native
    native.close()


def mixtral() -> tuple[nn.Module, Routing]:
    block = MixtralSparseMoeBlock(MixtralConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=8, num_experts_per_tok=2))
    return block, Routing(2, "softmax", normalize=True)


def qwen2moe() -> tuple[nn.Module, Routing]:
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, shared_expert_intermediate_size=40, num_experts=6, num_experts_per_tok=5, norm_topk_prob=False
    )
    return Qwen2MoeSparseMoeBlock(config), Routing(5, "softmax", normalize=False)


def qwen3moe() -> tuple[nn.Module, Routing]:
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=32, num_experts_per_tok=8, norm_topk_prob=True)
    return Qwen3MoeSparseMoeBlock(config), Routing(8, "softmax", normalize=True)


def deepseek_v2() -> tuple[nn.Module, Routing]:
    config = DeepseekV2Config(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=24, num_experts_per_tok=4, n_shared_experts=2,
        n_group=6, topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=16.0,
    )  # fmt: skip
    return DeepseekV2Moe(config), Routing(4, "softmax", normalize=False, scale=16.0, groups=6, groups_used=2)


def deepseek_v3() -> tuple[nn.Module, Routing]:
    config = DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=32, num_experts_per_tok=6, n_shared_experts=1,
        n_group=8, topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    block = DeepseekV3MoE(config)
    bias = block.gate.e_score_correction_bias.copy_(torch.randn(32) - 0.5)
    return block, Routing(6, "sigmoid", normalize=True, scale=2.5, groups=8, groups_used=4, group_top=2, bias=bias)


def to_matrix(ops: Ops, weight: Tensor) -> Matrix:
    """[rows, cols] or [count, rows, cols]."""
    count, rows, cols = weight.reshape(-1, *weight.shape[-2:]).shape
    return ops.matrix(int(T.F32), rows, cols, memoryview(weight.detach().contiguous().numpy()).cast("B"), count)


def shared_of(ops: Ops, block: nn.Module) -> SharedExperts | None:
    mlp = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    if mlp is None:
        return None
    weigh = getattr(block, "shared_expert_gate", None)
    gate, up, down = (to_matrix(ops, getattr(mlp, f"{name}_proj").weight) for name in ("gate", "up", "down"))
    return SharedExperts(gate, up, down, to_matrix(ops, weigh.weight) if weigh is not None else None)


def layer_of(ops: Ops, block: nn.Module, routing: Routing, norm: Norm) -> RoutedExperts:
    gate, up = (to_matrix(ops, half) for half in block.experts.gate_up_proj.chunk(2, 1))
    return RoutedExperts(
        ops=ops,
        norm=norm,
        router=to_matrix(ops, block.gate.weight),
        routing=routing,
        gate=gate,
        up=up,
        down=to_matrix(ops, block.experts.down_proj),
        shared=shared_of(ops, block),
    )


@pytest.mark.parametrize("n", [1, 2, 19, 130])
@pytest.mark.parametrize("make", [mixtral, qwen2moe, qwen3moe, deepseek_v2, deepseek_v3], ids=lambda make: make.__name__)
@torch.inference_mode()
def test_the_block_is_that_of_transformers(ops: Ops, make: object, n: int) -> None:
    assert callable(make)
    torch.manual_seed(n)
    block, routing = make()
    for parameter in block.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    x, norm = torch.randn(n, HIDDEN), Norm(1 + 0.2 * torch.randn(HIDDEN), EPS)
    expected = x + block(nn.functional.rms_norm(x, (HIDDEN,), norm.weight, EPS)[None])[0]
    layer_of(ops, block, routing, norm)(x)
    assert ((x - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5
