"""The grouped products, against their twins in float64, over runs of every kind."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from server.engine.kernels import grouped as kernels
from server.engine.kernels import plain_grouped as twins
from server.engine.kernels.plain_grouped import Runs

RUNS = [[1], [16], [17, 0, 3], [0, 40, 1, 0], [130, 5], [0, 0, 7, 0, 0, 1]]  # tokens of each expert
SHAPES = [(32, 64), (48, 96), (80, 352)]  # ffn, hidden


def make_runs(counts: list[int], device: str, first: int = 0) -> Runs:
    starts = tuple(accumulate(counts, initial=first))
    return Runs(starts, torch.tensor(starts, dtype=torch.int32, device=device))


def random_bf16(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(device, torch.bfloat16)


@pytest.mark.parametrize("counts", RUNS, ids=str)
@pytest.mark.parametrize(("ffn", "hidden"), SHAPES)
def test_gated(device: str, counts: list[int], ffn: int, hidden: int) -> None:
    torch.manual_seed(sum(counts) + ffn)
    first, n = 3, 9
    runs = make_runs(counts, device, first)
    x = random_bf16(n, hidden, device=device)
    tokens = torch.randint(n, (first + runs.rows + 2,), dtype=torch.int32, device=device)
    gate, up = (random_bf16(len(counts), ffn, hidden, device=device, scale=hidden**-0.5) for _ in range(2))
    got = torch.full((runs.rows, ffn), float("nan"), dtype=torch.bfloat16, device=device)
    kernels.gated(x, tokens, gate, up, runs, got)
    wanted = torch.empty(runs.rows, ffn, dtype=torch.float64, device=device)
    twins.gated(x, tokens, gate, up, runs, wanted)
    # Rounded once to bf16: 2^-9 of the value, and the interpreter cuts off, 2^-8; twice that for sums of float32 and exp.
    torch.testing.assert_close(got.double(), wanted, rtol=2**-8 if device == "cuda" else 2**-7, atol=1e-4)


@pytest.mark.parametrize("counts", RUNS, ids=str)
@pytest.mark.parametrize(("cols", "rows"), SHAPES)
def test_grouped(device: str, counts: list[int], cols: int, rows: int) -> None:
    torch.manual_seed(sum(counts) + cols)
    runs = make_runs(counts, device, first=11)
    x = random_bf16(runs.rows, cols, device=device)
    weights = random_bf16(len(counts), rows, cols, device=device, scale=cols**-0.5)
    got = torch.full((runs.rows, rows), float("nan"), device=device)
    kernels.grouped(x, weights, runs, got)
    wanted = torch.empty(runs.rows, rows, device=device)
    twins.grouped(x, weights, runs, wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=cols * 2**-24 * 4)


@pytest.mark.parametrize("tile", [kernels.Tile(16, 32, 64, 4, 2), kernels.Tile(64, 16, 32, 4, 2), kernels.Tile(128, 64, 64, 8, 3)])
def test_every_tile_gives_the_same(device: str, tile: kernels.Tile) -> None:
    torch.manual_seed(0)
    runs = make_runs([70, 0, 129, 2], device)
    x, weights = random_bf16(runs.rows, 96, device=device), random_bf16(4, 40, 96, device=device)
    got, wanted = (torch.empty(runs.rows, 40, device=device) for _ in range(2))
    kernels.grouped(x, weights, runs, got, tile)
    twins.grouped(x, weights, runs, wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_a_tile_has_the_stages_that_fit() -> None:
    assert kernels.Tile(128, 128, 64, 8, 3).fitted(2, 227 << 10).stages == 3
    assert kernels.Tile(128, 128, 64, 8, 3).fitted(2, 99 << 10).stages == 2  # 48 KB each
    assert kernels.Tile(128, 128, 64, 8, 3).fitted(2, 1 << 10).stages == 1


@pytest.mark.parametrize("counts", RUNS, ids=str)
@pytest.mark.parametrize(("top_k", "hidden"), [(1, 32), (3, 96), (8, 1100)])
def test_combine(device: str, counts: list[int], top_k: int, hidden: int) -> None:
    torch.manual_seed(top_k)
    runs = make_runs(counts, device, first=5)
    n = 7
    slots = torch.randint(0, runs.starts[-1] + 5, (n, top_k), dtype=torch.int32, device=device)
    slots[2] = 0  # a token that has nothing to do with the group
    h, weights = torch.randn(runs.rows, hidden, device=device), torch.rand(n, top_k, device=device)
    got = torch.randn(n, hidden, device=device)
    wanted, before = got.double(), got[2].clone()
    kernels.combine(h, slots, weights, runs, got)
    twins.combine(h.double(), slots, weights.double(), runs, wanted)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[2], before)


def test_no_tokens_is_no_work(device: str) -> None:
    runs = make_runs([0, 0], device)
    out = torch.zeros(2, 32, device=device)
    empty = torch.empty(0, 32, device=device)
    slots = torch.zeros(2, 1, dtype=torch.int32, device=device)
    for module in (kernels, twins):
        module.grouped(empty.bfloat16(), random_bf16(2, 32, 32, device=device), runs, empty)
        module.combine(empty, slots, torch.ones(2, 1, device=device), runs, out)
    assert not out.any()
