"""DeepSeek V2, V3 and R1 (arXiv:2405.04434, arXiv:2412.19437), and what was built like them: V2-Lite, Moonlight, Kimi K2.

Attention goes through one small latent of each token, which all heads share and which alone is cached; after the first dense layers come many
small experts, of which the router chooses some, besides shared ones that are always used.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.engine.gguf.quants import dequantize, quantize
from server.engine.layers.linear import Linear
from server.engine.layers.mla import MultiHeadLatentAttention
from server.engine.models.block import Block, feed_forward, rotary
from server.engine.models.config import HParams, LatentAttention
from server.engine.models.transformer import DecoderLayer, Transformer, assemble
from server.engine.models.used import transposed_type
from server.engine.ops import Matrix, Norm, Ops, Rotation
from server.engine.weights import Weights


def build(weights: Weights, hparams: HParams, vocab_size: int, ops: Ops) -> Transformer:
    """A DeepSeek model over the file's tensors, of either layout of the latent's expansion (`_expansion`)."""
    rope = rotary(hparams, ops, interleaved=True)

    def layer(block: Block) -> DecoderLayer:
        assert hparams.latent is not None
        return DecoderLayer(_latent_attention(block, hparams.latent, rope), feed_forward(block))

    return assemble(weights, hparams, vocab_size, ops, layer)


def _latent_attention(block: Block, latent: LatentAttention, rope: Rotation) -> MultiHeadLatentAttention:
    h = block.hparams
    q_rows = h.heads * h.head_dim
    down, q_up = _queries(block, latent, q_rows, block.norm("attn_norm", h.hidden))
    k_b, v_b = _expansion(block, latent)
    return MultiHeadLatentAttention(
        ops=block.ops,
        down=down,
        q_up=q_up,
        kv_norm=block.norm("attn_kv_a_norm", latent.kv_lora),
        k_b=k_b,
        v_b=v_b,
        output=Linear(block.ops, (block.matrix("attn_output", h.hidden, h.heads * latent.v_dim),), (h.hidden,)),
        rotation=rope,
        heads=h.heads,
        v_dim=latent.v_dim,
        scale=h.attention_scale,
    )


def _queries(block: Block, latent: LatentAttention, q_rows: int, norm: Norm) -> tuple[Linear, Linear | None]:
    """The products that read the hidden state, for queries and latent, and where queries have a latent of their own the one that reads that."""
    hidden, kv_rows = block.hparams.hidden, latent.kv_lora + latent.rope_dim
    kv_a = block.matrix("attn_kv_a_mqa", kv_rows, hidden)
    if not latent.q_lora:
        return Linear(block.ops, (block.matrix("attn_q", q_rows, hidden), kv_a), (q_rows, kv_rows), norm), None
    down = Linear(block.ops, (block.matrix("attn_q_a", latent.q_lora, hidden), kv_a), (latent.q_lora, kv_rows), norm)
    return down, Linear(block.ops, (block.matrix("attn_q_b", q_rows, latent.q_lora),), (q_rows,), block.norm("attn_q_a_norm", latent.q_lora))


def _expansion(block: Block, latent: LatentAttention) -> tuple[Matrix, Matrix]:
    """k_b, `heads` of [kv_lora, nope], and v_b, `heads` of [v_dim, kv_lora]: two tensors, or in older files the rows of one, of which some hold all three."""
    heads = block.hparams.heads
    if block.has("attn_k_b.weight"):  # attn_kv_b beside it is left (models/used.py)
        k_b = block.matrix("attn_k_b", latent.kv_lora, latent.nope_dim, heads)
        return k_b, block.matrix("attn_v_b", latent.v_dim, latent.kv_lora, heads)
    return _split(block, heads, latent)


def _split(block: Block, heads: int, latent: LatentAttention) -> tuple[Matrix, Matrix]:
    """attn_kv_b [heads * (nope + v_dim), kv_lora], a head's rows of k and then of v: v's keep their blocks, k's are transposed, for which blocks have
    to be opened (models/used.py says what this takes)."""
    nope, v_dim, kv_lora = latent.nope_dim, latent.v_dim, latent.kv_lora
    name = block.name("attn_kv_b.weight")
    kind, rows = block.weights.rows(name, heads * (nope + v_dim), kv_lora)
    by_head = rows.reshape(heads, nope + v_dim, -1)
    v_b = block.weights.made(name, kind, v_dim, kv_lora, _bytes(by_head[:, nope:]), heads)  # first: it refuses a type that does not run
    k = dequantize(np.ascontiguousarray(by_head[:, :nope]), kind, (heads, nope, kv_lora))
    k_kind = transposed_type(kind)
    return block.weights.made(name, k_kind, kv_lora, nope, _bytes(quantize(k.swapaxes(1, 2), k_kind)), heads), v_b


def _bytes(array: NDArray[np.uint8]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")
