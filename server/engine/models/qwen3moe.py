"""Qwen3 with experts, as 30B-A3B and 235B-A22B (Yang et al. 2025, arXiv:2505.09388): Qwen3's attention, 8 of 128 experts, no shared one."""

from __future__ import annotations

from server.engine.models.block import feed_forward, grouped_query_attention, rotary
from server.engine.models.config import HParams
from server.engine.models.transformer import DecoderLayer, Transformer, assemble
from server.engine.ops import Ops
from server.engine.weights import Weights


def build(weights: Weights, hparams: HParams, vocab_size: int, ops: Ops) -> Transformer:
    """A Qwen3-MoE model over the file's tensors."""
    rope = rotary(hparams, ops, interleaved=False)
    return assemble(weights, hparams, vocab_size, ops, lambda block: DecoderLayer(grouped_query_attention(block, rope, head_norms=True), feed_forward(block)))
