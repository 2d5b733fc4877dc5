"""Tiny random models of each family, as a GGUF file and as the transformers model with the very same weights.

    model = write_tiny(tmp_path / "m.gguf", "qwen3", quant=lambda name: Q4_K if "ffn" in name else F32, hidden=256, ffn=512)
    expected = model(torch.tensor([ids])).logits[0]  # float32, on the dequantised weights

Weights are drawn so that every part matters for the logits: projections keep the variance of what goes in, norms differ from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from server.engine.gguf.names import hf_to_gguf
from server.engine.gguf.quants import dequantize, quantize
from server.engine.gguf.writer import TensorData, write_gguf

FAMILIES: Mapping[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
Quant = Mapping[str, int] | Callable[[str], int]


def write_tiny(
    path: Path,
    family: str,
    *,
    quant: Quant | None = None,
    vocab: int = 96,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 96,
    tie: bool = False,
    rope_theta: float = 10_000.0,
    context: int = 512,
    seed: int = 0,
) -> PreTrainedModel:
    """Write a random model to `path` and return it in transformers, float32, with the weights that the file's blocks mean.

    quant: GGUF tensor name -> ggml type id, for tensors of two dimensions (a mapping may leave out what stays F32); norms are always F32.
    """
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=vocab,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=ffn,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    model = model_class(config).float().eval()
    tensors = _fill(model, family, config, _chooser(quant), np.random.default_rng(seed))
    write_gguf(path, _metadata(family, config, rope_theta), tensors)
    return model


def _chooser(quant: Quant | None) -> Callable[[str], int]:
    if quant is None:
        return lambda name: GGMLQuantizationType.F32
    if isinstance(quant, Mapping):
        return lambda name: quant.get(name, GGMLQuantizationType.F32)
    return quant


def _fill(model: PreTrainedModel, family: str, config: PreTrainedConfig, quant: Callable[[str], int], rng: np.random.Generator) -> list[TensorData]:
    """Draw every parameter, put what its blocks mean into the model, and return the blocks under their GGUF names."""
    tensors = []
    for name, parameter in model.named_parameters():  # a tied head is not among them
        values = _draw(name, tuple(parameter.shape), config, rng)
        gguf_name, _ = hf_to_gguf(family, name, values, config.num_attention_heads, config.num_key_value_heads)
        kind = quant(gguf_name) if values.ndim > 1 else GGMLQuantizationType.F32
        blocks = quantize(values, kind)
        # Rows keep their blocks when they move, so the model needs no inverse of the rope reordering.
        _, moved = hf_to_gguf(family, name, blocks, config.num_attention_heads, config.num_key_value_heads)
        tensors.append(TensorData.from_blocks(gguf_name, values.shape, kind, np.ascontiguousarray(moved).data))
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(dequantize(blocks, kind, values.shape).copy()))
    return tensors


def _draw(name: str, shape: tuple[int, ...], config: PreTrainedConfig, rng: np.random.Generator) -> NDArray[np.float32]:
    if len(shape) == 1:
        return (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32)
    std = 1 / math.sqrt(shape[-1])
    if "embed_tokens" in name:
        std = 2 * std if config.tie_word_embeddings else 1.0
    return (std * rng.standard_normal(shape)).astype(np.float32)


def _metadata(family: str, config: PreTrainedConfig, rope_theta: float) -> dict[str, object]:
    keys = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(rope_theta),
    }
    return {
        "general.architecture": family,
        "general.name": f"tiny {family}",
        **{f"{family}.{key}": value for key, value in keys.items()},
        "tokenizer.ggml.model": "none",
    }
