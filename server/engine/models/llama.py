"""Llama 2 and 3 (Touvron et al. 2023, Dubey et al. 2024), and the many models of that shape: SmolLM2, Mistral, Yi.

Pre-norm decoder, grouped-query attention, SwiGLU. GGUF permutes the rows of q and k so that rotary pairs stand side by side.
"""

from __future__ import annotations

from server.engine.layers.rope import Rope
from server.engine.models.config import HParams
from server.engine.models.transformer import DecoderLayer, Transformer, assemble, feed_forward, grouped_query_attention
from server.engine.ops import Ops
from server.engine.weights import Weights


def build(weights: Weights, hparams: HParams, vocab_size: int, ops: Ops) -> Transformer:
    """A Llama model over the file's tensors; `rope_freqs.weight`, where there is one, holds Llama 3.1's frequency factors."""
    h = hparams
    factors = weights.vector("rope_freqs.weight", h.rope_dim // 2) if weights.has("rope_freqs.weight") else None
    rope = Rope(h.rope_dim, h.rope_base, interleaved=True, scale=h.rope_scale, factors=factors)
    return assemble(weights, h, vocab_size, ops, [_layer(weights, h, ops, rope, f"blk.{i}.") for i in range(h.layers)])


def _layer(weights: Weights, h: HParams, ops: Ops, rope: Rope, block: str) -> DecoderLayer:
    return DecoderLayer(
        attention=grouped_query_attention(weights, h, ops, block, rope),
        ffn=feed_forward(weights, h, ops, block),
    )
