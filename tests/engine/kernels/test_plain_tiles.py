"""The twins in plain torch, held to the gguf package, and the order that they read to the native packer's."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from server.engine.kernels import plain_tiles
from server.engine.native import open_ops
from tests.engine.kernels.packed import TILE_TYPES, columns, random_matrix, tile_order
from tests.native.blocks import FLOAT_TYPES, random_weights


@pytest.mark.parametrize("type_id", TILE_TYPES, ids=lambda t: t.name)
def test_native_order(type_id: Type) -> None:
    """The native pool packs what tests pack by themselves, byte for byte."""
    rows, cols = 37, columns(type_id, 96)
    weights = random_weights(type_id, rows, cols, np.random.default_rng(type_id))
    ops = open_ops(1)
    try:
        matrix = ops.matrix(type_id, rows, cols, memoryview(weights.data))
        list(ops.lay_out(matrix))
        packed = ctypes.string_at(matrix.address, matrix.nbytes)
    finally:
        ops.close()
    assert packed == tile_order(weights, rows, cols).numpy().tobytes()


@pytest.mark.parametrize("type_id", TILE_TYPES + FLOAT_TYPES, ids=lambda t: t.name)
def test_dequantize(type_id: Type) -> None:
    m, weights = random_matrix(type_id, 53, columns(type_id, 96), np.random.default_rng(type_id), count=3)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(2, 20, m.cols, dtype=dtype)
        plain_tiles.dequantize(m, out, 16, torch.tensor([2, 0], dtype=torch.int32))
        assert torch.equal(out, torch.from_numpy(weights[[2, 0], 16:36]).float().to(dtype))


@pytest.mark.parametrize("at_once", [1 << 25, 1])
def test_matvec(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, and strip by strip."""
    monkeypatch.setattr(plain_tiles, "_AT_ONCE", at_once)
    m, weights = random_matrix(Type.Q5_1, 53, 96, np.random.default_rng(0), count=3)
    x, bias, out = torch.randn(2, 3, 96), torch.randn(3, 53), torch.ones(2, 3, 53)
    plain_tiles.matvec(m, x, out, accumulate=True, bias=bias)
    want = torch.einsum("ncd,crd->ncr", x.double(), torch.from_numpy(weights)) + bias + 1
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-4)
