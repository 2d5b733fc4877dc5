"""Qwen2 and Qwen2.5, dense (Yang et al. 2024, arXiv:2407.10671): Llama's shape with biases on q, k and v and rotary halves (NeoX order)."""

from __future__ import annotations

from server.engine.models.block import feed_forward, grouped_query_attention, rotary
from server.engine.models.config import HParams
from server.engine.models.transformer import DecoderLayer, Transformer, assemble
from server.engine.ops import Ops
from server.engine.weights import Weights


def build(weights: Weights, hparams: HParams, vocab_size: int, ops: Ops) -> Transformer:
    """A dense Qwen2 model over the file's tensors."""
    rope = rotary(hparams, ops, interleaved=False)
    return assemble(weights, hparams, vocab_size, ops, lambda block: DecoderLayer(grouped_query_attention(block, rope, biases=True), feed_forward(block)))
