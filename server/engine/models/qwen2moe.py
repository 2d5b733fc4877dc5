"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671, 2.2.2): Qwen2's attention; the softmax over all experts weighs the chosen ones as it stands, and one
shared expert is weighed by a sigmoid of its own.
"""

from __future__ import annotations

from server.engine.models.block import feed_forward, grouped_query_attention, rotary
from server.engine.models.config import HParams
from server.engine.models.transformer import DecoderLayer, Transformer, assemble
from server.engine.ops import Ops
from server.engine.weights import Weights


def build(weights: Weights, hparams: HParams, vocab_size: int, ops: Ops) -> Transformer:
    """A Qwen2-MoE model over the file's tensors; `ffn_gate_inp_shexp` weighs the shared expert."""
    rope = rotary(hparams, ops, interleaved=False)
    return assemble(weights, hparams, vocab_size, ops, lambda block: DecoderLayer(grouped_query_attention(block, rope, biases=True), feed_forward(block)))
