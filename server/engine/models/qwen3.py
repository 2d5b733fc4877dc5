"""Qwen3, dense (Yang et al. 2025): Llama's shape with a norm over each query and key head and rotary halves (NeoX order)."""

from __future__ import annotations

from server.engine.layers.rope import Rope
from server.engine.models.config import HParams
from server.engine.models.transformer import DecoderLayer, Transformer, assemble, feed_forward, grouped_query_attention
from server.engine.ops import Ops
from server.engine.weights import Weights


def build(weights: Weights, hparams: HParams, vocab_size: int, ops: Ops) -> Transformer:
    """A dense Qwen3 model over the file's tensors."""
    h = hparams
    rope = Rope(h.rope_dim, h.rope_base, interleaved=False, scale=h.rope_scale)
    return assemble(weights, h, vocab_size, ops, [_layer(weights, h, ops, rope, f"blk.{i}.") for i in range(h.layers)])


def _layer(weights: Weights, h: HParams, ops: Ops, rope: Rope, block: str) -> DecoderLayer:
    return DecoderLayer(
        attention=grouped_query_attention(weights, h, ops, block, rope, head_norms=True),
        ffn=feed_forward(weights, h, ops, block),
    )
