"""A whole layer of multi-head latent attention: on the native pool as in plain torch, and the same however its tokens are cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gguf.constants import GGMLQuantizationType as T
from torch import Tensor

from server.engine.kv_cache import PAGE_SIZE
from server.engine.layers.linear import Linear
from server.engine.layers.mla import MultiHeadLatentAttention
from server.engine.layers.reference import ReferenceOps
from server.engine.layers.rope import rotation
from server.engine.native import NativeOps, open_ops
from server.engine.ops import LatentPages, Matrix, Norm, Ops, Span

HIDDEN, HEADS, KV_LORA, ROPE, NOPE, V_DIM, Q_LORA = 48, 5, 24, 8, 12, 20, 40
TOKENS = 150
TOLERANCE = 1e-5  # of the output's norm: as in test_ops


@pytest.fixture(scope="module")
def native() -> Iterator[NativeOps]:
    ops = open_ops(2)
    yield ops
    ops.close()


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(ops: Ops, q_lora: int) -> MultiHeadLatentAttention:
    """A layer with random float32 weights; with q_lora, queries are projected by way of it."""

    def matrix(rows: int, cols: int, seed: int, count: int = 1) -> Matrix:
        weights = draw(count * rows, cols, seed=seed) / cols**0.5
        return ops.matrix(int(T.F32), rows, cols, memoryview(weights.numpy()).cast("B"), count)

    def norm(length: int, seed: int) -> Norm:
        return Norm(1 + 0.2 * draw(length, seed=seed), 1e-6)

    q_rows = HEADS * (NOPE + ROPE)
    rows = (q_lora or q_rows, KV_LORA + ROPE)
    return MultiHeadLatentAttention(
        ops=ops,
        down=Linear(ops, [matrix(count, HIDDEN, seed) for seed, count in enumerate(rows)], rows, norm(HIDDEN, 2)),
        q_up=Linear(ops, (matrix(q_rows, q_lora, 3),), (q_rows,), norm(q_lora, 4)) if q_lora else None,
        kv_norm=norm(KV_LORA, 5),
        k_b=matrix(KV_LORA, NOPE, 6, HEADS),
        v_b=matrix(V_DIM, KV_LORA, 7, HEADS),
        output=Linear(ops, (matrix(HIDDEN, HEADS * V_DIM, 8),), (HIDDEN,)),
        rotation=rotation(ROPE, 100.0, TOKENS, interleaved=True),
        heads=HEADS,
        v_dim=V_DIM,
        scale=0.3,
    )


def run(ops: Ops, q_lora: int, chunk: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """TOKENS tokens through the layer, `chunk` at a time."""
    layer, x, pages = build(ops, q_lora), draw(TOKENS, HIDDEN, seed=9), (2, 0, 1)
    cache = LatentPages(torch.full((3, PAGE_SIZE, KV_LORA + ROPE), torch.nan, dtype=dtype))
    for start in range(0, TOKENS, chunk):
        part = x[start : start + chunk]
        held = pages[: -(-(start + len(part)) // PAGE_SIZE)]
        layer(part, cache, Span(start, len(part), held))
    return x


@pytest.mark.parametrize("q_lora", [0, Q_LORA])
def test_native_is_as_plain_torch(native: NativeOps, q_lora: int) -> None:
    got, expected = run(native, q_lora, TOKENS), run(ReferenceOps(), q_lora, TOKENS).double()
    assert (got - expected).norm() < TOLERANCE * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_and_single_tokens_are_as_prefill(native: NativeOps, chunk: int, dtype: torch.dtype) -> None:
    whole, parts = run(native, Q_LORA, TOKENS, dtype), run(native, Q_LORA, chunk, dtype)
    # A latent that lies between two halves may fall to either: 2^-11 of one value in thousands.
    tolerance = TOLERANCE if dtype is torch.float32 else 2e-4
    assert (whole - parts).norm() < tolerance * whole.norm()
