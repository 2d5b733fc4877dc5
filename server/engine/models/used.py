"""Which of a file's tensors its model takes, and what becomes of attn_kv_b.

What a file may hold beside them is known here alone, and so neither read at load nor counted before.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import replace

from gguf.constants import GGMLQuantizationType

from server.engine.gguf.header import TensorInfo
from server.engine.gguf.names import block, block_of
from server.engine.models.config import HParams, LatentAttention


def used_tensors(tensors: Mapping[str, TensorInfo], hparams: HParams) -> dict[str, TensorInfo]:
    """All but those that nothing is lost without. One that is not known stays: where the model is built, it is an error."""
    return {name: info for name, info in tensors.items() if not predicts(name, hparams) and not _is_joined_twin(name, tensors, hparams)}


def joined_halves(info: TensorInfo, latent: LatentAttention) -> tuple[TensorInfo, TensorInfo]:
    """attn_kv_b [heads * (nope + v_dim), kv_lora] as its heads' keys, transposed, and values, which keep their type: what deepseek2.py makes of it."""
    heads, kind = math.prod(info.shape) // (latent.kv_lora * (latent.nope_dim + latent.v_dim)), transposed_type(info.type_id)
    keys = heads * latent.kv_lora * latent.nope_dim
    nbytes = keys * (4 if kind is GGMLQuantizationType.F32 else 2)
    values = info.nbytes * latent.v_dim // (latent.nope_dim + latent.v_dim)
    return (
        TensorInfo(info.name, (heads * latent.kv_lora, latent.nope_dim), kind, info.offset, nbytes),
        replace(info, shape=(heads * latent.v_dim, latent.kv_lora), nbytes=values),
    )


def is_joined(name: str, hparams: HParams) -> bool:
    """Whether it is latent attention's expansion of keys and values in one."""
    return hparams.latent is not None and name.endswith(".attn_kv_b.weight")


def transposed_type(kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """What a matrix becomes whose blocks must be opened to transpose it: half floats hold what was in them to 11 bits."""
    return kind if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16) else GGMLQuantizationType.F16


def predicts(name: str, hparams: HParams) -> bool:
    """Whether it is for multi-token prediction: blocks behind the last layer guess further tokens (DeepSeek-V3, 2.2), and answers do without."""
    return hparams.layers <= (block_of(name) or 0) < hparams.layers + hparams.mtp_layers


def _is_joined_twin(name: str, tensors: Container[str], hparams: HParams) -> bool:
    """Whether it is attn_kv_b beside the two tensors that came of it, as one fork writes all three."""
    layer = block_of(name)
    return is_joined(name, hparams) and layer is not None and block(layer, "attn_k_b") in tensors
