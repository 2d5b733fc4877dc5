"""matvec, few tokens by a matrix, held to products in float64 with the weights as the gguf package reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from server.engine.gpu.matrix import DeviceMatrix
from server.engine.kernels.matvec import matvec
from tests.engine.kernels.packed import TILE_TYPES, columns, random_matrix
from tests.native.blocks import FLOAT_TYPES

# Codes are the mantissas of numbers from 1 to 2, so a product's terms are up to 4 ranges of a weight, 8 times the largest, in size; each passes through about
# 16 additions in its group, some of groups and 10 between threads.
_BOUND = 8 * 32 * 2.0**-24


def _check(m: DeviceMatrix, weights: np.ndarray, x: torch.Tensor, out: torch.Tensor, before: torch.Tensor | float = 0.0) -> None:
    """out [n, count, rows] = before + the products, as precise as float32 sums are."""
    exact = torch.einsum("ncd,crd->ncr", x.double().cpu(), torch.from_numpy(weights))
    size = x.abs().double().cpu().sum(-1, keepdim=True) * np.abs(weights).max()
    assert ((out.double().cpu() - before - exact).abs() <= _BOUND * size + 1e-6).all()


@pytest.mark.parametrize("type_id", TILE_TYPES + FLOAT_TYPES, ids=lambda t: t.name)
def test_product(type_id: Type, device: str) -> None:
    rng = np.random.default_rng(type_id)
    m, weights = random_matrix(type_id, 5, columns(type_id, 96), rng, count=2, device=device)
    x = torch.randn(1, 2, m.cols, generator=torch.Generator().manual_seed(1)).to(device)
    bias = torch.arange(10.0).reshape(2, 5)
    out = torch.full((1, 2, 5), 5.0, device=device)
    matvec(m, x, out, accumulate=True, bias=bias.to(device))
    _check(m, weights, x, out, bias.double() + 5)


@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize("type_id", [Type.Q5_0, Type.F16], ids=lambda t: t.name)
def test_remainders_of_rows(type_id: Type, rows: int, device: str) -> None:
    m, weights = random_matrix(type_id, rows, 64, np.random.default_rng(rows), device=device)
    x = torch.randn(1, 64).to(device)
    out = torch.full((2, rows), torch.nan, device=device)
    matvec(m, x, out[:1])
    _check(m, weights, x[:, None], out[:1, None])
    assert out[1].isnan().all()  # nothing is written behind it


@pytest.mark.parametrize(("type_id", "cols"), [(Type.Q8_0, 32), (Type.Q8_0, 288), (Type.Q6_K, 768), (Type.Q5_K, 2304), (Type.BF16, 40), (Type.F32, 1032)])
def test_remainders_of_columns(type_id: Type, cols: int, device: str) -> None:
    m, weights = random_matrix(type_id, 16, cols, np.random.default_rng(cols), device=device)
    x = torch.randn(1, cols).to(device)
    out = torch.empty(1, 16, device=device)
    matvec(m, x, out)
    _check(m, weights, x[:, None], out[:, None])


@pytest.mark.parametrize("n", [2, 4, 7])
def test_tokens(n: int, device: str) -> None:
    """Tokens are shared out to programs; activations and results are views of something wider, as the latents of MLA are."""
    m, weights = random_matrix(Type.Q4_0, 16, 64, np.random.default_rng(n), device=device)
    wide, results = torch.randn(n, 1, 100).to(device), torch.zeros(n, 1, 20, device=device)
    matvec(m, wide[..., 20:84], results[..., 4:])
    _check(m, weights, wide[..., 20:84], results[..., 4:])
    assert not results[..., :4].any()
    matvec(m, wide[..., 20:84], results[..., 4:], accumulate=True)
    _check(m, 2 * weights, wide[..., 20:84], results[..., 4:])


@pytest.mark.gpu
@pytest.mark.parametrize("type_id", [Type.Q4_K, Type.Q8_0, Type.F16], ids=lambda t: t.name)
def test_same_bits_in_a_graph(type_id: Type, device: str) -> None:
    m, _ = random_matrix(type_id, 500, 2048, np.random.default_rng(0), device=device)
    x, out = torch.randn(2, 2048, device=device), torch.empty(2, 500, device=device)
    matvec(m, x, out)
    want, graph = out.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matvec(m, x, out)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.gpu
def test_large(device: str) -> None:
    """More than 2^31 weights and bytes."""
    m, weights = random_matrix(Type.Q8_0, 32, 4096, np.random.default_rng(0), device=device)
    many = DeviceMatrix(m.type_id, m.rows, m.cols, 17000, m.data.expand(17000, -1, -1).contiguous())
    x, out = torch.randn(1, 17000, 4096, device=device), torch.empty(1, 17000, 32, device=device)
    matvec(many, x, out)
    _check(m, weights, x[:, -1:], out[:, -1:])
