"""Storage of the KV cache: pages for every layer, allocated once. Which sequence owns which page is the scheduler's matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.config import CacheType
from server.engine.models.config import HParams
from server.engine.ops import Cache, KVPages, LatentPages
from server.errors import DeviceError

PAGE_SIZE = 64  # tokens; a multiple of 16, the attention kernels' step over keys

_DTYPES = {"f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True, slots=True)
class KVCache:
    """`layers[i]` is layer i's storage. Memory is touched, and so counted, only as tokens are written."""

    layers: tuple[Cache, ...]
    num_pages: int
    nbytes: int

    @staticmethod
    def allocate(hparams: HParams, tokens: int, cache_type: CacheType) -> KVCache:
        """Room for `tokens` tokens, rounded up to whole pages. Raises DeviceError with the numbers when memory does not do."""
        num_pages = -(-tokens // PAGE_SIZE)
        try:
            layers = tuple(_layer(hparams, num_pages, _DTYPES[cache_type]) for _ in range(hparams.layers))
        except RuntimeError as error:
            wanted = bytes_per_token(hparams, cache_type) * tokens / 1e9
            raise DeviceError(f"A KV cache of {tokens} tokens needs {wanted:.1f} GB, which this machine does not give. Lower --cache_lens.") from error
        return KVCache(layers, num_pages, bytes_per_token(hparams, cache_type) * num_pages * PAGE_SIZE)


def bytes_per_token(hparams: HParams, cache_type: CacheType) -> int:
    """Bytes that one token takes in all layers."""
    latent = hparams.latent
    values = 2 * hparams.kv_heads * hparams.head_dim if latent is None else latent.kv_lora + latent.rope_dim
    return hparams.layers * values * _DTYPES[cache_type].itemsize


def _layer(hparams: HParams, num_pages: int, dtype: torch.dtype) -> Cache:
    if hparams.latent is not None:
        return LatentPages(torch.empty(num_pages, PAGE_SIZE, hparams.latent.kv_lora + hparams.latent.rope_dim, dtype=dtype))
    return KVPages(
        k=torch.empty(num_pages, hparams.kv_heads, hparams.head_dim, PAGE_SIZE, dtype=dtype),
        v=torch.empty(num_pages, hparams.kv_heads, PAGE_SIZE, hparams.head_dim, dtype=dtype),
    )
