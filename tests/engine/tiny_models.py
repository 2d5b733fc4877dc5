"""Tiny random models of each family, as a GGUF file and as the transformers model with the very same weights.

    model = write_tiny(tmp_path / "m.gguf", "qwen3", quant=lambda name: Q4_K if "ffn" in name else F32, hidden=256, ffn=512)
    expected = model(torch.tensor([ids])).logits[0]  # float32, on the dequantised weights

Weights are drawn so that every part matters for the logits: projections keep the variance of what goes in, norms differ from 1, biases from 0,
and a router's scores are spread, with a bias that often changes which experts are the best.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel

from server.engine.gguf.names import hf_to_gguf
from server.engine.gguf.quants import dequantize, quantize, random_blocks
from server.engine.gguf.writer import TensorData, write_gguf
from tests.engine.tiny_families import TINY, metadata

Quant = Mapping[str, int] | Callable[[str], int]
Floats = NDArray[np.float32]


_SHORT = {
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "tie": "tie_word_embeddings",
    "context": "max_position_embeddings",
}


def write_tiny(
    path: Path, family: str, *, quant: Quant | None = None, seed: int = 0, joined_kv_b: bool = False, rope: Mapping[str, Any] | None = None, **config: Any
) -> PreTrainedModel:
    """Write a random model to `path` and return it in transformers, float32, with the weights that the file's blocks mean.

    family: a key of TINY. quant: GGUF tensor name -> ggml type id, for tensors of two dimensions or more (a mapping may leave out what stays F32);
    rows that its blocks do not fill become Q5_0 or F32; norms, biases and routers are always F32. joined_kv_b: MLA's older layout, attn_kv_b.
    rope: over the rope_parameters. config: other fields of the transformers config, by their names or the short ones, over the family's defaults.
    """
    tiny = TINY[family]
    fields = {**tiny.defaults, **{_SHORT.get(name, name): value for name, value in config.items()}}
    fields["rope_parameters"] = {**fields["rope_parameters"], **(rope or {})}
    settings = tiny.config(**fields, attn_implementation="eager", experts_implementation="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = tiny.model(settings).float().eval()
    tensors = list(_tensors(model, tiny.architecture, settings, _chooser(quant), np.random.default_rng(seed), joined_kv_b))
    write_gguf(path, metadata(tiny.architecture, settings, joined_kv_b), tensors)
    return model


def _chooser(quant: Quant | None) -> Callable[[str, int], GGMLQuantizationType]:
    """(GGUF name, row length) -> type."""

    def choose(name: str, cols: int) -> GGMLQuantizationType:
        if quant is None or "ffn_gate_inp" in name:
            return GGMLQuantizationType.F32
        wanted = quant.get(name, GGMLQuantizationType.F32) if isinstance(quant, Mapping) else quant(name)
        fitting = (kind for kind in (wanted, GGMLQuantizationType.Q5_0) if cols % GGML_QUANT_SIZES[GGMLQuantizationType(kind)][0] == 0)
        return GGMLQuantizationType(next(fitting, GGMLQuantizationType.F32))

    return choose


def _tensors(
    model: PreTrainedModel,
    arch: str,
    config: PreTrainedConfig,
    choose: Callable[[str, int], GGMLQuantizationType],
    rng: np.random.Generator,
    joined_kv_b: bool,
) -> Iterator[TensorData]:
    """Draw every parameter, put what its blocks mean into the model, and yield the blocks under their GGUF names."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    biases = [(name, buffer) for name, buffer in model.named_buffers() if "e_score_correction" in name]
    for name, parameter in [*model.named_parameters(), *biases]:  # a tied head is not among them
        if parameter.numel() == 0:  # no shared experts: of width 0 in transformers
            continue
        meant = []
        for part, values in _parts(name, _draw(name, tuple(parameter.shape), config, rng), config, joined_kv_b):
            gguf_name, _ = hf_to_gguf(arch, part, values, heads, kv_heads)
            kind = choose(gguf_name, values.shape[-1]) if values.ndim > 1 else GGMLQuantizationType.F32
            blocks = _blocks(values, kind, rng)
            # Rows keep their blocks when they move, so the model needs no inverse of the rope reordering.
            _, moved = hf_to_gguf(arch, part, blocks, heads, kv_heads)
            shape = values.shape if "shared_expert_gate" not in name else values.shape[1:]  # converters drop axes of length 1
            yield TensorData.from_blocks(gguf_name, shape, kind, np.ascontiguousarray(moved).data.cast("B"))
            meant.append(dequantize(blocks, kind, values.shape))
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(_whole(name, meant).copy()))


def _blocks(values: Floats, kind: GGMLQuantizationType, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The values quantised, or where there is no quantiser random blocks that spread as much."""
    try:
        return quantize(values, kind)
    except ValueError:
        rows = values.reshape(-1, values.shape[-1])
        return random_blocks(kind, *rows.shape, float(values.std()), rng).reshape(*values.shape[:-1], -1)


def _parts(name: str, values: Floats, config: PreTrainedConfig, joined_kv_b: bool) -> list[tuple[str, Floats]]:
    """The tensors that GGUF makes of one parameter: transformers joins what GGUF keeps apart, and k_b is transposed for absorbed attention."""
    if name.endswith("gate_up_proj"):
        gate, up = np.split(values, 2, axis=1)
        return [(name.replace("gate_up_proj", "gate_proj.weight"), gate), (name.replace("gate_up_proj", "up_proj.weight"), up)]
    if name.endswith("kv_b_proj.weight") and not joined_kv_b:
        by_head = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        k, v = np.split(by_head, [config.qk_nope_head_dim], axis=1)
        return [(name.replace("kv_b_proj", "k_b_proj"), k.swapaxes(1, 2)), (name.replace("kv_b_proj", "v_b_proj"), v)]
    if name.endswith("experts.down_proj"):
        name += ".weight"
    return [(name.replace("correction_bias", "correction.bias"), values)]


def _whole(name: str, parts: list[Floats]) -> Floats:
    """The inverse of `_parts`."""
    if name.endswith("gate_up_proj"):
        return np.concatenate(parts, axis=1)
    if len(parts) == 2:
        return np.concatenate((parts[0].swapaxes(1, 2), parts[1]), axis=1).reshape(-1, parts[1].shape[-1])
    return parts[0]


def _draw(name: str, shape: tuple[int, ...], config: PreTrainedConfig, rng: np.random.Generator) -> Floats:
    drawn = rng.standard_normal(shape).astype(np.float32)
    if "e_score_correction" in name:
        return 0.2 * drawn
    if len(shape) == 1:
        return 0.3 * drawn if name.endswith("bias") else 1 + 0.2 * drawn
    std = 1 / math.sqrt(shape[-1])
    if "embed_tokens" in name:
        std = 2 * std if config.tie_word_embeddings else 1.0
    return std * drawn
