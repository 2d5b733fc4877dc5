"""Which of a file's tensors its model takes. What a file may hold beside them is known here alone, and so neither read at load nor counted before."""

from __future__ import annotations

from collections.abc import Container, Mapping

from server.engine.gguf.header import TensorInfo
from server.engine.gguf.names import block, block_of
from server.engine.models.config import HParams


def used_tensors(tensors: Mapping[str, TensorInfo], hparams: HParams) -> dict[str, TensorInfo]:
    """All but those that nothing is lost without. One that is not known stays: where the model is built, it is an error."""
    return {name: info for name, info in tensors.items() if not predicts(name, hparams) and not _is_joined_twin(name, tensors, hparams)}


def predicts(name: str, hparams: HParams) -> bool:
    """Whether it is for multi-token prediction: blocks behind the last layer guess further tokens (DeepSeek-V3, 2.2), and answers do without."""
    return hparams.layers <= (block_of(name) or 0) < hparams.layers + hparams.mtp_layers


def _is_joined_twin(name: str, tensors: Container[str], hparams: HParams) -> bool:
    """Whether it is attn_kv_b beside the two tensors that came of it, as one fork writes all three."""
    layer = block_of(name)
    return hparams.latent is not None and layer is not None and name == block(layer, "attn_kv_b") and block(layer, "attn_k_b") in tensors
