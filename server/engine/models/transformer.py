"""The decoder-only transformer that every family fills in: embedding, pre-norm layers, final norm, head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from server.engine.layers.attention import GroupedQueryAttention
from server.engine.layers.ffn import FeedForward
from server.engine.layers.linear import Embedding, Linear
from server.engine.layers.norm import HeadNorm
from server.engine.layers.rope import Rope
from server.engine.models.config import HParams
from server.engine.ops import KVPages, Norm, Ops, Span
from server.engine.weights import Weights


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """x += attention(norm(x)); x += feed_forward(norm(x)). Each part holds its norm."""

    attention: GroupedQueryAttention
    ffn: FeedForward

    def __call__(self, x: Tensor, cache: KVPages, span: Span) -> None:
        """x [n, hidden] float32, in place."""
        self.attention(x, cache, span)
        self.ffn(x)


@dataclass(frozen=True, slots=True)
class Transformer:
    """A whole model. `head` may share its matrix with `embedding` (tied)."""

    hparams: HParams
    vocab_size: int
    embedding: Embedding
    layers: Sequence[DecoderLayer]
    head: Linear  # with the final norm

    def forward(self, token_ids: Tensor, cache: Sequence[KVPages], span: Span) -> Tensor:
        """token_ids [n] int64 at the span's positions -> hidden states [n, hidden] before the final norm; fills the cache."""
        x = self.embedding(token_ids)
        for layer, pages in zip(self.layers, cache, strict=True):
            layer(x, pages, span)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> [n, vocab] float32."""
        return self.head(hidden)[0]


class Family(Protocol):
    """How one architecture's tensors become a Transformer; one file a family, named in registry.py."""

    def __call__(self, weights: Weights, hparams: HParams, vocab_size: int, ops: Ops) -> Transformer: ...


def assemble(weights: Weights, hparams: HParams, vocab_size: int, ops: Ops, layers: Sequence[DecoderLayer]) -> Transformer:
    """The layers between the embedding, final norm and head that all families share; without output.weight the head is tied."""
    embedding = weights.matrix("token_embd.weight", vocab_size, hparams.hidden)
    head = weights.matrix("output.weight", vocab_size, hparams.hidden) if weights.has("output.weight") else embedding
    return Transformer(
        hparams=hparams,
        vocab_size=vocab_size,
        embedding=Embedding(ops, embedding, hparams.hidden),
        layers=layers,
        head=Linear(ops, (head,), (vocab_size,), _norm(weights, "output_norm", hparams.hidden, hparams)),
    )


def grouped_query_attention(weights: Weights, hparams: HParams, ops: Ops, block: str, rope: Rope, *, head_norms: bool = False) -> GroupedQueryAttention:
    """Attention from the tensors `{block}attn_*`; head_norms: with Qwen3's norms over each query and key head."""
    h = hparams
    q_rows, kv_rows = h.heads * h.head_dim, h.kv_heads * h.head_dim
    rows = (q_rows, kv_rows, kv_rows)
    matrices = [weights.matrix(f"{block}attn_{name}.weight", count, h.hidden) for name, count in zip("qkv", rows, strict=True)]
    return GroupedQueryAttention(
        ops=ops,
        qkv=Linear(ops, matrices, rows, _norm(weights, f"{block}attn_norm", h.hidden, h)),
        output=Linear(ops, (weights.matrix(f"{block}attn_output.weight", h.hidden, q_rows),), (h.hidden,)),
        rope=rope,
        heads=h.heads,
        kv_heads=h.kv_heads,
        head_dim=h.head_dim,
        q_norm=HeadNorm(ops, _norm(weights, f"{block}attn_q_norm", h.head_dim, h)) if head_norms else None,
        k_norm=HeadNorm(ops, _norm(weights, f"{block}attn_k_norm", h.head_dim, h)) if head_norms else None,
    )


def feed_forward(weights: Weights, hparams: HParams, ops: Ops, block: str) -> FeedForward:
    """The dense SwiGLU block from the tensors `{block}ffn_*`."""
    gate, up = (weights.matrix(f"{block}ffn_{name}.weight", hparams.ffn, hparams.hidden) for name in ("gate", "up"))
    down = weights.matrix(f"{block}ffn_down.weight", hparams.hidden, hparams.ffn)
    return FeedForward(ops, _norm(weights, f"{block}ffn_norm", hparams.hidden, hparams), gate, up, down)


def _norm(weights: Weights, name: str, length: int, hparams: HParams) -> Norm:
    return Norm(weights.vector(f"{name}.weight", length), hparams.norm_eps)
