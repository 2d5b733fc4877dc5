"""Storage of the KV cache: pages for every layer, allocated once, where attention runs. Which sequence owns which page is the scheduler's matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.config import CacheType
from server.engine.models.config import HParams
from server.engine.ops import Cache, KVPages, LatentPages
from server.errors import ConfigError, DeviceError

PAGE_SIZE = 64  # tokens; a multiple of 16, the attention kernels' step over keys

CPU = torch.device("cpu")
_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True, slots=True)
class KVCache:
    """`layers[i]` is layer i's storage. Memory is touched, and so counted, only as tokens are written."""

    layers: tuple[Cache, ...]
    num_pages: int
    nbytes: int

    @staticmethod
    def allocate(hparams: HParams, tokens: int, cache_type: CacheType, device: torch.device = CPU) -> KVCache:
        """Room for `tokens` tokens, rounded up to whole pages. Raises DeviceError with the numbers when memory does not do."""
        num_pages = -(-tokens // PAGE_SIZE)
        try:
            layers = tuple(_layer(hparams, num_pages, _DTYPES[cache_type], device) for _ in range(hparams.layers))
        except RuntimeError as error:
            wanted = bytes_per_token(hparams, cache_type) * tokens / 1e9
            raise DeviceError(f"A KV cache of {tokens} tokens needs {wanted:.1f} GB, which the {_place(device)} does not give. Lower --cache_lens.") from error
        return KVCache(layers, num_pages, bytes_per_token(hparams, cache_type) * num_pages * PAGE_SIZE)


def resolve_cache_type(wanted: CacheType, on_gpu: bool) -> CacheType:
    """What "auto" means. Raises ConfigError for what the CPU's kernels do not read."""
    if wanted == "auto":
        return "bf16" if on_gpu else "f16"
    if wanted == "bf16" and not on_gpu:
        raise ConfigError("--cache_type bf16 is for GPUs; on the CPU it is f16 or f32. Leave it out for the best of them.")
    return wanted


def _place(device: torch.device) -> str:
    return "machine" if device.type == "cpu" else "GPU"


def bytes_per_token(hparams: HParams, cache_type: CacheType) -> int:
    """Bytes that one token takes in all layers."""
    latent = hparams.latent
    values = 2 * hparams.kv_heads * hparams.head_dim if latent is None else latent.kv_lora + latent.rope_dim
    return hparams.layers * values * _DTYPES[cache_type].itemsize


def _layer(hparams: HParams, num_pages: int, dtype: torch.dtype, device: torch.device) -> Cache:
    if hparams.latent is not None:
        return LatentPages(torch.empty(num_pages, PAGE_SIZE, hparams.latent.kv_lora + hparams.latent.rope_dim, dtype=dtype, device=device))
    return KVPages(
        k=torch.empty(num_pages, hparams.kv_heads, hparams.head_dim, PAGE_SIZE, dtype=dtype, device=device),
        v=torch.empty(num_pages, hparams.kv_heads, PAGE_SIZE, hparams.head_dim, dtype=dtype, device=device),
    )
