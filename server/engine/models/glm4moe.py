"""GLM-4.5 and 4.6, and their Air (arXiv:2508.06471): grouped-query attention that rotates a part of each head, and DeepSeek-V3's experts.

The first layers are dense. GLM-4.5 norms its query and key heads, and Air does not; the feed-forward's norm goes by `post_attention_norm`.
"""

from __future__ import annotations

from server.engine.models.block import Block, feed_forward, grouped_query_attention, rotary
from server.engine.models.config import HParams
from server.engine.models.transformer import DecoderLayer, Transformer, assemble
from server.engine.ops import Ops
from server.engine.weights import Weights


def build(weights: Weights, hparams: HParams, vocab_size: int, ops: Ops) -> Transformer:
    """A GLM-4.5 model over the file's tensors."""
    rope = rotary(hparams, ops, interleaved=False)

    def layer(block: Block) -> DecoderLayer:
        head_norms, biases = block.has("attn_q_norm.weight"), block.has("attn_q.bias")
        return DecoderLayer(
            attention=grouped_query_attention(block, rope, head_norms=head_norms, biases=biases),
            ffn=feed_forward(block, norm="post_attention_norm"),
        )

    return assemble(weights, hparams, vocab_size, ops, layer)
