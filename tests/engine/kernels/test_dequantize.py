"""dequantize, tile order to rows of floats, held to the gguf package bit by bit: every product in a weight is exact in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from server.engine.gpu.matrix import DeviceMatrix
from server.engine.kernels import plain_tiles
from server.engine.kernels.dequantize import dequantize
from tests.engine.kernels.packed import TILE_TYPES, columns, random_matrix, tile_order
from tests.native.blocks import FLOAT_TYPES, decoded, random_weights


@pytest.mark.parametrize("type_id", TILE_TYPES + FLOAT_TYPES, ids=lambda t: t.name)
def test_every_type(type_id: Type, device: str) -> None:
    m, weights = random_matrix(type_id, 5, columns(type_id, 96), np.random.default_rng(type_id), device=device)
    out = torch.full((1, 5, m.cols), torch.nan, device=device)
    dequantize(m, out)
    assert torch.equal(out.cpu(), torch.from_numpy(weights).float())


@pytest.mark.parametrize("type_id", [Type.Q4_0, Type.F16], ids=lambda t: t.name)
def test_picked_matrices_and_rows(type_id: Type, device: str) -> None:
    m, weights = random_matrix(type_id, 37, 32, np.random.default_rng(1), count=4, device=device)
    out = torch.full((3, 20, 32), torch.nan, device=device)
    dequantize(m, out[:, :18], first_row=16, matrices=torch.tensor([2, 0, 2], dtype=torch.int32, device=device))
    assert torch.equal(out[:, :18].cpu(), torch.from_numpy(weights[[2, 0, 2], 16:34]).float())
    assert out[:, 18:].isnan().all()  # nothing is written behind it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    m, weights = random_matrix(Type.Q8_0, 16, 608, np.random.default_rng(2), device=device)
    out = torch.empty(1, 16, 608, dtype=dtype, device=device)
    dequantize(m, out)
    want = torch.from_numpy(weights).float()
    if dtype is torch.bfloat16 and device == "cpu":  # Triton's interpreter cuts the bits off
        want = (want.view(torch.int32) & -65536).view(torch.float32)
    assert torch.equal(out.cpu(), want.to(dtype))


def test_every_exponent(device: str) -> None:
    """MXFP4's powers of two, down to those below float32's normal numbers."""
    blocks = random_weights(Type.MXFP4, 16, 512, np.random.default_rng(3)).data.reshape(256, 17)
    blocks[:, 0] = np.arange(256) % 252
    weights = decoded(Type.MXFP4, blocks.ravel(), 16, 512)
    m = DeviceMatrix(Type.MXFP4, 16, 512, 1, tile_order(weights, 16, 512)[None].to(device))
    out, twin = (torch.empty(1, 16, 512, device=device) for _ in range(2))
    dequantize(m, out)
    plain_tiles.dequantize(m, twin)
    assert torch.equal(out.cpu()[0], torch.from_numpy(weights.values).float())
    assert torch.equal(twin, out)


@pytest.mark.gpu
def test_large(device: str) -> None:
    """More than 2^31 weights."""
    m, weights = random_matrix(Type.Q2_K, 64, 4096, np.random.default_rng(0), device=device)
    ids = torch.zeros(8400, dtype=torch.int32, device=device)
    out = torch.empty(8400, 64, 4096, dtype=torch.float16, device=device)
    dequantize(m, out, matrices=ids)
    assert torch.equal(out[-1].cpu(), torch.from_numpy(weights[0]).half())
