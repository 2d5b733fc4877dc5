"""DeepSeek-V3 in plain torch, for training: latent attention, routed experts, one multi-token prediction block. Formulas: arXiv:2412.19437.

Parameters are float32 and carry transformers' names; products are computed in the type of what comes in (`TinyR1.dtype`), the residual
stream, norms, routing and losses in float32. B: rows, T: tokens of a row, N = B * T, D: hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.tiny_r1.experts import EXPERTS
from recipes.tiny_r1.shape import Shape


@dataclass(slots=True)
class Cache:
    """Keys and values of one layer while a reply is generated: [B, heads, capacity, dim], `length` of them filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store what is new and return everything so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Positions(NamedTuple):
    """Where the tokens of a batch stand. Rope sees distances only, so rows packed from several texts need no restart."""

    cos: Tensor  # [T, rope_dim / 2]
    sin: Tensor
    mask: Tensor  # bool [B, 1, T, tokens so far]: what each token may attend to


class Load(NamedTuple):
    """What a MoE layer tells the trainer."""

    counts: Tensor  # float32 [experts]: tokens that chose each
    balance: Tensor  # V3's sequence-wise auxiliary loss (equations 17 to 20), without its factor


class Linear(nn.Linear):
    """A product in the type of its input; no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Computed in float32, given back in the input's type."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention (section 2.1.1), keys and values expanded."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_a_proj = Linear(shape.hidden, shape.q_lora)
        self.q_a_layernorm = RMSNorm(shape.q_lora, 1e-6)
        self.q_b_proj = Linear(shape.q_lora, shape.heads * shape.qk_dim)
        self.kv_a_proj_with_mqa = Linear(shape.hidden, shape.kv_lora + shape.rope_dim)
        self.kv_a_layernorm = RMSNorm(shape.kv_lora, 1e-6)
        self.kv_b_proj = Linear(shape.kv_lora, shape.heads * (shape.nope_dim + shape.v_dim))
        self.o_proj = Linear(shape.heads * shape.v_dim, shape.hidden)

    def forward(self, x: Tensor, at: Positions, cache: Cache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        shape, (rows, length, _) = self.shape, x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(rows, length, shape.heads, shape.qk_dim).transpose(1, 2)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([shape.kv_lora, shape.rope_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(rows, length, shape.heads, -1).transpose(1, 2)
        k_nope, v = kv.split([shape.nope_dim, shape.v_dim], -1)
        q_nope, q_rope = q.split([shape.nope_dim, shape.rope_dim], -1)
        q = torch.cat([q_nope, rotate(q_rope, at)], -1)
        k = torch.cat([k_nope, rotate(k_rope.unsqueeze(1), at).expand(-1, shape.heads, -1, -1)], -1)
        if cache is not None:
            k, v = cache.append(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=at.mask, scale=shape.attention_scale)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))
        return projected


def rotate(x: Tensor, at: Positions) -> Tensor:
    """Rope on neighbouring pairs, [..., T, rope_dim]; the result has the pairs' halves apart, alike for queries and keys."""
    first, second = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.cat([first * at.cos - second * at.sin, second * at.cos + first * at.sin], -1).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, ffn)
        self.up_proj = Linear(hidden, ffn)
        self.down_proj = Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Gate(nn.Module):
    """The router (equations 12 to 16): groups and experts are chosen by the corrected scores, weighted by the plain ones."""

    e_score_correction_bias: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.experts, shape.hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] -> scores [N, experts], chosen experts [N, top_k], their weights [N, top_k]; float32."""
        shape = self.shape
        scores = F.linear(x.float(), self.weight).sigmoid()
        with torch.no_grad():
            grouped = (scores + self.e_score_correction_bias).view(len(x), shape.groups, -1)
            best = grouped.topk(2, -1).values.sum(-1).topk(shape.groups_used, -1).indices
            allowed = torch.zeros_like(grouped[..., 0]).scatter(1, best, 1.0).bool()
            chosen = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1).topk(shape.top_k, -1).indices
        weights = scores.gather(1, chosen)
        return scores, chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * shape.routed_scale


class Experts(nn.Module):
    """The routed experts' weights, each kind in one tensor."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(shape.experts, 2 * shape.expert_ffn, shape.hidden))
        self.down_proj = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.expert_ffn))


class MoE(nn.Module):
    """Routed experts and the shared one (section 2.1.2)."""

    def __init__(self, shape: Shape, kernel: str) -> None:
        super().__init__()
        self.shape = shape
        self.gate = Gate(shape)
        self.experts = Experts(shape)
        self.shared_experts = MLP(shape.hidden, shape.expert_ffn)
        self.kernel = EXPERTS[kernel]

    def forward(self, x: Tensor) -> tuple[Tensor, Load]:
        """[B, T, D] -> [B, T, D]."""
        flat = x.flatten(0, 1)
        scores, chosen, weights = self.gate(flat)
        routed = self.kernel(flat, self.experts.gate_up_proj.to(x.dtype), self.experts.down_proj.to(x.dtype), chosen, weights)
        return self.shared_experts(x) + routed.view_as(x), self._load(scores, chosen, len(x))

    def _load(self, scores: Tensor, chosen: Tensor, rows: int) -> Load:
        shape = self.shape
        picked = torch.zeros_like(scores).scatter(1, chosen, 1.0).view(rows, -1, shape.experts)
        share = (scores / scores.sum(-1, keepdim=True)).view(rows, -1, shape.experts).mean(1)
        balance = (picked.mean(1) * (shape.experts / shape.top_k) * share).sum(-1).mean()
        return Load(picked.sum((0, 1)), balance)


class Block(nn.Module):
    """A pre-norm layer; dense or MoE."""

    def __init__(self, shape: Shape, dense: bool, kernel: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape.hidden, shape.ffn) if dense else MoE(shape, kernel)

    def forward(self, x: Tensor, at: Positions, dtype: torch.dtype, cache: Cache | None = None) -> tuple[Tensor, Load | None]:
        """x: the residual stream, float32 [B, T, D]; dtype: of the products."""
        x = x + self.self_attn(self.input_layernorm(x).to(dtype), at, cache)
        out = self.mlp(self.post_attention_layernorm(x).to(dtype))
        update, load = out if isinstance(out, tuple) else (out, None)
        return x + update, load


class MTP(nn.Module):
    """Predicts the token after the next (section 2.2), with the main model's embedding and head."""

    def __init__(self, shape: Shape, kernel: str) -> None:
        super().__init__()
        self.enorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.hnorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.eh_proj = Linear(2 * shape.hidden, shape.hidden)
        self.block = Block(shape, False, kernel)
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)

    def forward(self, hidden: Tensor, embedded: Tensor, at: Positions, dtype: torch.dtype) -> tuple[Tensor, Load | None]:
        """hidden: the main model's normed output; embedded: the next token's embedding; both float32 [B, T, D]."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1).to(dtype)).float()
        x, load = self.block(x, at, dtype)
        return self.norm(x), load


class TinyR1(nn.Module):
    """The whole model. `dtype` is what products are computed in, `kernel` a way to compute the experts (see experts.py)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, *, dtype: torch.dtype = torch.float32, kernel: str = "dense") -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape, layer < shape.leading_dense, kernel) for layer in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)
        self.lm_head = Linear(shape.hidden, shape.vocab)
        self.mtp = MTP(shape, kernel)
        angles = torch.arange(shape.context)[:, None] * torch.tensor(shape.inverse_frequencies())
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal with the fan-in's deviation; what writes to the residual stream starts small."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                continue
            std = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                std /= (2 * self.shape.layers) ** 0.5
            nn.init.normal_(parameter, std=std if "lm_head" not in name else 0.02)

    def forward(self, tokens: Tensor, mask: Tensor, caches: Sequence[Cache] = ()) -> tuple[Tensor, list[Load]]:
        """int64 [B, T] -> the normed hidden state, float32 [B, T, D], and the MoE layers' loads. `mask`: see Positions."""
        at = self.positions(tokens, mask, caches[0].length if caches else 0)
        x, loads = self.embed_tokens(tokens), []
        for index, layer in enumerate(self.layers):
            x, load = layer(x, at, self.dtype, caches[index] if caches else None)
            loads += [] if load is None else [load]
        return self.norm(x), loads

    def predict_further(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Load | None]:
        """`forward`'s hidden state -> that of the MTP block, which is to predict the token after the next. The last column is meaningless."""
        out: tuple[Tensor, Load | None] = self.mtp(hidden, self.embed_tokens(tokens.roll(-1, 1)), self.positions(tokens, mask, 0), self.dtype)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., vocab], of the model's dtype."""
        out: Tensor = self.lm_head(hidden.to(self.dtype))
        return out

    def positions(self, tokens: Tensor, mask: Tensor, start: int) -> Positions:
        """For `tokens` that follow `start` others."""
        end = start + tokens.shape[1]
        return Positions(self.cos[start:end], self.sin[start:end], mask)

    def gates(self) -> list[Gate]:
        """The routers, in the order of the loads that `forward` and `predict_further` give."""
        return [module for module in self.modules() if isinstance(module, Gate)]
