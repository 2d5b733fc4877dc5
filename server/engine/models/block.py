"""One layer's tensors, `blk.N.*`, and the parts that families make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from server.engine.layers.attention import GroupedQueryAttention
from server.engine.layers.ffn import FeedForward
from server.engine.layers.linear import Linear
from server.engine.layers.moe import RoutedExperts, SharedExperts
from server.engine.layers.norm import HeadNorm
from server.engine.layers.rope import rotation
from server.engine.models.config import HParams, MixtureOfExperts
from server.engine.ops import Matrix, Norm, Ops, Rotation, Routing
from server.engine.weights import Weights
from server.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Block:
    """Layer `index` of a file. Names of tensors are given without `blk.N.`, those of weights without `.weight`."""

    weights: Weights
    hparams: HParams
    ops: Ops
    index: int

    def has(self, name: str) -> bool:
        return self.weights.has(self.name(name))

    def name(self, name: str) -> str:
        return f"blk.{self.index}.{name}"

    def matrix(self, name: str, rows: int, cols: int, count: int | None = None) -> Matrix:
        """[rows, cols], or `count` of them behind each other."""
        return self.weights.matrix(self.name(f"{name}.weight"), rows, cols, count)

    def norm(self, name: str, length: int) -> Norm:
        return Norm(self.weights.vector(self.name(f"{name}.weight"), length), self.hparams.norm_eps)

    def bias(self, name: str, length: int) -> Tensor:
        return self.weights.vector(self.name(f"{name}.bias"), length)


def rotary(hparams: HParams, ops: Ops, *, interleaved: bool, factors: Tensor | None = None) -> Rotation:
    """The model's rotary angles, which all layers share."""
    h = hparams
    angles = rotation(h.rope_dim, h.rope_base, h.context, interleaved=interleaved, scale=h.rope_scale, factors=factors, yarn=h.yarn)
    return replace(angles, table=angles.table.to(ops.device))


def grouped_query_attention(block: Block, rope: Rotation, *, head_norms: bool = False, biases: bool = False) -> GroupedQueryAttention:
    """Attention from `attn_*`; head_norms: with norms over each query and key head (Qwen3); biases: q, k and v have them (Qwen2)."""
    h = block.hparams
    q_rows, kv_rows = h.heads * h.head_dim, h.kv_heads * h.head_dim
    rows = {"attn_q": q_rows, "attn_k": kv_rows, "attn_v": kv_rows}
    return GroupedQueryAttention(
        ops=block.ops,
        qkv=Linear(
            block.ops,
            [block.matrix(name, count, h.hidden) for name, count in rows.items()],
            list(rows.values()),
            block.norm("attn_norm", h.hidden),
            [block.bias(name, count) for name, count in rows.items()] if biases else (),
        ),
        output=Linear(block.ops, (block.matrix("attn_output", h.hidden, q_rows),), (h.hidden,)),
        rotation=rope,
        heads=h.heads,
        kv_heads=h.kv_heads,
        head_dim=h.head_dim,
        q_norm=HeadNorm(block.ops, block.norm("attn_q_norm", h.head_dim)) if head_norms else None,
        k_norm=HeadNorm(block.ops, block.norm("attn_k_norm", h.head_dim)) if head_norms else None,
    )


def feed_forward(block: Block, *, norm: str = "ffn_norm") -> FeedForward | RoutedExperts:
    """The block's SwiGLU: dense in the first layers and in models without experts, else of experts."""
    h = block.hparams
    if h.moe and block.index >= h.moe.leading_dense:
        return _routed_experts(block, h.moe, block.norm(norm, h.hidden))
    return FeedForward(block.ops, block.norm(norm, h.hidden), *_swiglu(block, "", h.ffn))


def _routed_experts(block: Block, moe: MixtureOfExperts, norm: Norm) -> RoutedExperts:
    _refuse_other_layouts(block)
    gate, up, down = _swiglu(block, "_exps", moe.ffn, moe.experts)
    block.ops.spread_experts(gate, up, down)
    return RoutedExperts(
        ops=block.ops,
        norm=norm,
        router=block.matrix("ffn_gate_inp", moe.experts, block.hparams.hidden),
        routing=_routing(block, moe),
        gate=gate,
        up=up,
        down=down,
        shared=_shared_experts(block, moe.shared_ffn) if moe.shared_ffn else None,
    )


def _refuse_other_layouts(block: Block) -> None:
    """Layouts of the experts that other converters made or make, which would read as missing tensors."""
    for name, what in (("ffn_gate.0.weight", "one tensor for each expert"), ("ffn_gate_up_exps.weight", "gate and up in one tensor")):
        if block.has(name):
            raise UnsupportedModel(f"The file holds its experts as {what} ({block.name(name)}), which is not supported. Convert the model again without that.")


def _routing(block: Block, moe: MixtureOfExperts) -> Routing:
    """The bias, of models that balance their experts by it (DeepSeek-V3), goes by two names."""
    bias = next((block.name(name) for name in ("exp_probs_b.bias", "exp_probs_b") if block.has(name)), None)
    return Routing(
        top_k=moe.top_k,
        gating=moe.gating,
        normalize=moe.normalize,
        scale=moe.scale,
        groups=moe.groups,
        groups_used=moe.groups_used,
        group_top=moe.group_top,
        bias=block.weights.vector(bias, moe.experts) if bias else None,
    )


def _shared_experts(block: Block, ffn: int) -> SharedExperts:
    gate, up, down = _swiglu(block, "_shexp", ffn)
    weighed = block.has("ffn_gate_inp_shexp.weight")
    return SharedExperts(gate, up, down, block.matrix("ffn_gate_inp_shexp", 1, block.hparams.hidden) if weighed else None)


def _swiglu(block: Block, suffix: str, ffn: int, count: int | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """The tensors ffn_gate, ffn_up and ffn_down with a suffix."""
    hidden = block.hparams.hidden
    return (
        block.matrix(f"ffn_gate{suffix}", ffn, hidden, count),
        block.matrix(f"ffn_up{suffix}", ffn, hidden, count),
        block.matrix(f"ffn_down{suffix}", hidden, ffn, count),
    )
