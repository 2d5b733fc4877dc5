"""The norm kernel against its twin in float64, and the twin against ReferenceOps."""

from __future__ import annotations

import pytest
import torch

from server.engine.kernels import norm, plain_small
from server.engine.layers.reference import ReferenceOps
from server.engine.ops import Norm

EPS = 1e-6


def bound(dim: int) -> float:
    """Relative: a sum of dim squares in any order, then four roundings and an approximate root of 2 ulp."""
    return (dim / 2 + 6) * 2.0**-23


@pytest.mark.parametrize(("n", "dim"), [(1, 7), (1, 7168), (2, 1024), (3, 1536), (5, 100), (17, 64), (33, 128), (2, 3000)])
def test_kernel_is_the_formula(device: str, n: int, dim: int) -> None:
    x = torch.randn(n, dim, device=device) * 3
    weight, out, exact = torch.randn(dim, device=device), torch.empty(n, dim, device=device), torch.empty(n, dim, dtype=torch.float64, device=device)
    norm.rms_norm(x, weight, EPS, out)
    plain_small.rms_norm(x.double(), weight.double(), EPS, exact)
    assert ((out - exact).abs() <= bound(dim) * exact.abs()).all()


def test_in_place_and_rows_apart(device: str) -> None:
    wide = torch.randn(6, 576, device=device)
    weight, expected = torch.rand(512, device=device), wide.clone()
    plain_small.rms_norm(wide[:, :512], weight, EPS, expected[:, :512])
    norm.rms_norm(wide[:, :512], weight, EPS, wide[:, :512])
    torch.testing.assert_close(wide, expected, rtol=bound(512), atol=0)


def test_bf16_out(device: str) -> None:
    x, weight = torch.randn(3, 200, device=device), torch.randn(200, device=device)
    exact, out = torch.empty(3, 200, device=device), torch.empty(3, 200, dtype=torch.bfloat16, device=device)
    norm.rms_norm(x, weight, EPS, exact)
    norm.rms_norm(x, weight, EPS, out)
    torch.testing.assert_close(out.float(), exact, rtol=2.0**-7, atol=0)  # the GPU rounds to nearest, the interpreter cuts off


def test_zeros_stay_zeros(device: str) -> None:
    out = torch.ones(1, 40, device=device)
    norm.rms_norm(torch.zeros(1, 40, device=device), torch.ones(40, device=device), EPS, out)
    assert not out.any()


def test_plain_is_the_reference() -> None:
    x, weight, out, expected = torch.randn(4, 96), torch.randn(96), torch.empty(4, 96), torch.empty(4, 96)
    plain_small.rms_norm(x, weight, EPS, out)
    ReferenceOps().rms_norm(x, Norm(weight, EPS), expected)
    torch.testing.assert_close(out, expected, rtol=bound(96), atol=0)
