"""What the KV cache allocates: the shapes that the kernels expect, and the bytes that are promised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from server.config import CacheType
from server.engine.kv_cache import PAGE_SIZE, KVCache, bytes_per_token
from server.engine.models.config import HParams, LatentAttention
from server.engine.ops import KVPages, LatentPages

GROUPED = HParams(
    architecture="llama", layers=3, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, context=512, norm_eps=1e-5, rope_dim=16, rope_base=1e4, rope_scale=1.0
)
LATENT = replace(GROUPED, architecture="deepseek2", latent=LatentAttention(q_lora=0, kv_lora=24, nope_dim=12, rope_dim=8, v_dim=20))


@pytest.mark.parametrize(("cache_type", "dtype"), [("f16", torch.float16), ("f32", torch.float32)])
def test_grouped_query_pages(cache_type: CacheType, dtype: torch.dtype) -> None:
    cache = KVCache.allocate(GROUPED, PAGE_SIZE + 1, cache_type)
    assert cache.num_pages == 2
    for pages in cache.layers:
        assert isinstance(pages, KVPages)
        assert pages.k.dtype is pages.v.dtype is dtype
        assert pages.k.shape == (2, 2, 16, PAGE_SIZE)
        assert pages.v.shape == (2, 2, PAGE_SIZE, 16)


@pytest.mark.parametrize(("cache_type", "dtype"), [("f16", torch.float16), ("f32", torch.float32)])
def test_latent_pages_hold_one_latent_a_token(cache_type: CacheType, dtype: torch.dtype) -> None:
    cache = KVCache.allocate(LATENT, PAGE_SIZE + 1, cache_type)
    assert len(cache.layers) == 3
    for pages in cache.layers:
        assert isinstance(pages, LatentPages)
        assert pages.latent.dtype is dtype
        assert pages.latent.shape == (2, PAGE_SIZE, 24 + 8)


@pytest.mark.parametrize("hparams", [GROUPED, LATENT], ids=lambda h: h.architecture)
@pytest.mark.parametrize("cache_type", ["f16", "f32"])
def test_bytes_are_those_of_the_tensors(hparams: HParams, cache_type: CacheType) -> None:
    cache = KVCache.allocate(hparams, 3 * PAGE_SIZE, cache_type)
    held = sum(t.nbytes for pages in cache.layers for t in ((pages.latent,) if isinstance(pages, LatentPages) else (pages.k, pages.v)))
    assert cache.nbytes == held == 3 * PAGE_SIZE * bytes_per_token(hparams, cache_type)
