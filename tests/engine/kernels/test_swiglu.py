"""SwiGLU's kernel against its twin in float64."""

from __future__ import annotations

import pytest
import torch

from server.engine.kernels import plain_small, swiglu

ROUNDING = 2.0**-21  # relative: exp of a value up to 20 with its argument rounded (20 * 2^-24), then five operations


@pytest.mark.parametrize(("n", "ffn"), [(1, 1), (1, 18), (3, 1023), (2, 1024), (2, 1025), (5, 2048)])
@pytest.mark.parametrize("scaled", [False, True])
def test_kernel_is_the_formula(device: str, n: int, ffn: int, scaled: bool) -> None:
    gate, up = torch.randn(2, n, ffn, device=device).mul(4).unbind()
    scales = torch.rand(n, device=device) if scaled else None
    out, exact = torch.empty(n, ffn, device=device), torch.empty(n, ffn, device=device, dtype=torch.float64)
    swiglu.swiglu(gate, up, out, scales)
    product = torch.nn.functional.silu(gate.double()) * up.double()
    exact.copy_(product if scales is None else product * scales.double()[:, None])
    assert ((out - exact).abs() <= 8 * ROUNDING * exact.abs()).all()
    plain_small.swiglu(gate, up, out, scales)
    assert ((out - exact).abs() <= 8 * ROUNDING * exact.abs()).all()


def test_parts_of_wider_rows_and_in_place(device: str) -> None:
    wide, wider = torch.randn(3, 200, device=device), torch.randn(3, 300, device=device)
    gate, up, expected = wide[:, :100], wider[:, 100:200], torch.empty(3, 100, device=device)
    plain_small.swiglu(gate, up, expected)
    swiglu.swiglu(gate, up, gate)
    torch.testing.assert_close(gate, expected, rtol=16 * ROUNDING, atol=1e-30)


def test_bf16_in_and_out(device: str) -> None:
    gate, up = torch.randn(2, 2, 70, device=device).bfloat16().unbind()
    out, exact = torch.empty(2, 70, device=device, dtype=torch.bfloat16), torch.empty(2, 70, device=device)
    swiglu.swiglu(gate, up, out)
    swiglu.swiglu(gate, up, exact)
    torch.testing.assert_close(out.float(), exact, rtol=2.0**-7, atol=0)  # the GPU rounds to nearest, the interpreter cuts off


def test_far_values_neither_overflow_nor_vanish(device: str) -> None:
    gate, up, out = torch.tensor([[-200.0, 200.0, 0.0]], device=device), torch.ones(1, 3, device=device), torch.empty(1, 3, device=device)
    swiglu.swiglu(gate, up, out)
    assert out.tolist() == [[0.0, 200.0, 0.0]]
