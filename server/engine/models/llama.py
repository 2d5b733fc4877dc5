"""Llama 2 and 3 (Touvron et al. 2023, Dubey et al. 2024), and the many models of that shape: SmolLM2, Mistral, Yi; with experts, Mixtral (arXiv:2401.04088).

Pre-norm decoder, grouped-query attention, SwiGLU; in Mixtral each layer's is one of two that a router chooses of eight. GGUF permutes the rows
of q and k so that rotary pairs stand side by side.
"""

from __future__ import annotations

from server.engine.models.block import feed_forward, grouped_query_attention, rotary
from server.engine.models.config import HParams
from server.engine.models.transformer import DecoderLayer, Transformer, assemble
from server.engine.ops import Ops
from server.engine.weights import Weights


def build(weights: Weights, hparams: HParams, vocab_size: int, ops: Ops) -> Transformer:
    """A Llama or Mixtral model over the file's tensors; `rope_freqs.weight`, where there is one, holds Llama 3.1's frequency factors."""
    factors = weights.vector("rope_freqs.weight", hparams.rope_dim // 2) if weights.has("rope_freqs.weight") else None
    rope = rotary(hparams, ops, interleaved=True, factors=factors)
    return assemble(weights, hparams, vocab_size, ops, lambda block: DecoderLayer(grouped_query_attention(block, rope), feed_forward(block)))
