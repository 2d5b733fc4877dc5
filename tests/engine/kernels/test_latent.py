"""Latent attention in Triton against its plain twin in float64: few tokens and chunks, in both forms. Tolerances as in test_attention."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from server.engine.gpu.matrix import DeviceMatrix
from server.engine.gpu.place import Place
from server.engine.kernels import attention_plan, latent, plain_attention
from server.engine.kernels.attention_plan import LatentShape, absorbs, latent_scratch_bytes
from server.engine.kv_cache import PAGE_SIZE
from server.engine.layers.rope import rotation
from server.engine.ops import LatentPages, Norm, Rotation
from tests.engine.kernels.attention_cases import F32, DenseHeads, How, Latent, distance

EXACT, ROUNDED = 1e-5, 4 * 2**-8
SMALL = Latent(5, 24, 8, 12, 20)
LAYERS = [SMALL, Latent(16, 32, 16, 32, 32)]
V3 = LatentShape(heads=128, kv_lora=512, rope=64, nope=128, v_dim=128)


def check(layer: Latent, cuts: Sequence[int], device: str, cache: torch.dtype, tolerance: float, captured: bool = False, filled: int = 0) -> None:
    got = layer.run(latent.attend_latent, How(cuts, torch.float32, cache, device, captured, filled))
    expected = layer.run(plain_attention.attend_latent, How(cuts, cache=torch.float64 if cache is torch.float32 else cache, filled=filled))
    assert distance(got, expected) < tolerance


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_chunks(device: str, layer: Latent) -> None:
    check(layer, (11, 30), device, torch.float32, EXACT)


@pytest.mark.parametrize("n", [9, 70])
def test_chunks_over_blocks_of_context_and_of_heads(device: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "CONTEXT_BLOCK", 64)
    monkeypatch.setattr(attention_plan, "EXPANDED_BYTES", 2 * 64 * (SMALL.nope + SMALL.v_dim) * 4)
    monkeypatch.setattr(attention_plan, "MOST_ABSORBED", 8)
    check(SMALL, (n,), device, torch.float32, EXACT, filled=130)


@pytest.mark.parametrize("filled", [0, 31, 62, 126, 300])
def test_few_tokens_at_page_borders(device: str, filled: int) -> None:
    check(SMALL, (1, 3), device, torch.float32, EXACT, captured=True, filled=filled)


def test_single_tokens_of_more_heads(device: str) -> None:
    check(LAYERS[1], (1,), device, torch.float32, EXACT, captured=True, filled=150)


def test_more_tokens_absorbed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "absorbs", lambda *_: True)
    check(SMALL, (9,), device, torch.float32, EXACT, filled=130)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 20])
def test_halves_in_the_cache(device: str, cache: torch.dtype, n: int) -> None:
    check(Latent(3, 32, 16, 16, 16), (n,), device, cache, ROUNDED, filled=70)


def test_few_tokens_over_a_long_context_are_absorbed_and_prompts_are_not() -> None:
    assert all(absorbs(V3, n, context) for n in (1, 8) for context in (n, 32768))
    assert absorbs(V3, 40, 8192)
    assert not any(absorbs(V3, n, context) for n, context in ((40, 40), (64, 100), (512, 32768), (4096, 4096)))


def test_scratch_is_bounded_in_the_context() -> None:
    assert latent_scratch_bytes(V3, 2048, 8192, 2) == latent_scratch_bytes(V3, 2048, 163840, 2) < 200e6
    assert latent_scratch_bytes(V3, 1, 163840, 2) < 50e6


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "filled"), [(1, 5000), (40, 5000), (512, 0), (512, 5000)])
def test_scratch_is_no_more_than_stated(n: int, filled: int) -> None:
    shape = LatentShape(heads=16, kv_lora=512, rope=64, nope=128, v_dim=128)
    pages = torch.arange(100, dtype=torch.int32, device="cuda")
    where = Place(torch.tensor([filled], dtype=torch.int32, device="cuda"), pages, n, filled + n)
    cache = LatentPages(torch.zeros(100, PAGE_SIZE, 576, dtype=torch.bfloat16, device="cuda"))
    norm, turns = Norm(torch.ones(512, device="cuda"), 1e-6), rotation(64, 100.0, 6400, interleaved=True)
    turns = Rotation(turns.table.cuda(), turns.interleaved)
    k_b, v_b = (DeviceMatrix(F32, rows, cols, 16, torch.zeros(16, rows, cols, device="cuda")) for rows, cols in ((512, 128), (128, 512)))
    q, new, out = (torch.zeros(n, *sizes, device="cuda") for sizes in ((16, 192), (576,), (16, 128)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    latent.attend_latent(q, new, norm, turns, cache, where, k_b, v_b, 0.1, out, DenseHeads())
    allocated = torch.cuda.max_memory_allocated() - before
    own = 2 * 16 * 512 * 128 * 4  # what DenseHeads takes for itself
    assert allocated <= latent_scratch_bytes(shape, n, filled + n, 2) + own + (1 << 20)
