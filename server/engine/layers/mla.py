"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1) over the paged cache of latents."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.engine.layers.linear import Linear
from server.engine.ops import LatentPages, Matrix, Norm, Ops, Rotation, Span


@dataclass(frozen=True, slots=True)
class MultiHeadLatentAttention:
    """x += output(attention of `heads` queries over what all heads share of a token: a latent of kv_lora + rope values)."""

    ops: Ops
    down: Linear  # of the normed hidden state: the queries [heads * (nope + rope), hidden], or with `q_up` q_a [q_lora, hidden]; kv_a [kv_lora + rope, hidden]
    q_up: Linear | None  # [heads * (nope + rope), q_lora], with q_a's norm; None where queries are projected at once (V2-Lite)
    kv_norm: Norm  # of the latent's first kv_lora values
    k_b: Matrix  # `heads` matrices [kv_lora, nope]
    v_b: Matrix  # `heads` matrices [v_dim, kv_lora]
    output: Linear  # [hidden, heads * v_dim]
    rotation: Rotation
    heads: int
    v_dim: int
    scale: float  # of the scores: 1 / sqrt(nope + rope), times the square of yarn's mscale

    def __call__(self, x: Tensor, cache: LatentPages, span: Span) -> None:
        """x [n, hidden] in place; the span's latents are written to the cache."""
        q, latent = self.down(x)
        if self.q_up is not None:
            (q,) = self.q_up(q)
        mixed = x.new_empty(span.n, self.heads, self.v_dim)
        self.ops.attend_latent(
            q.view(span.n, self.heads, -1), latent, self.kv_norm, self.rotation, cache, span, self.k_b, self.v_b, self.scale, mixed
        )  # fmt: skip
        self.output.add_to(x, mixed)
