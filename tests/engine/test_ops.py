"""The native operations against their plain twin, one by one: what a layer may ask for, on every instruction set of this machine.

Float32 weights, so that only the order of float32 sums differs: a product over k values errs by about sqrt(k) * 2^-24 of its norm, 1e-6 here,
and the twin computes in float64. 1e-5 leaves room for the three products of a feed-forward block and for exp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gguf.constants import GGMLQuantizationType as T
from torch import Tensor

from server import _native
from server.engine.kv_cache import PAGE_SIZE
from server.engine.layers.reference import ReferenceOps
from server.engine.layers.rope import Rope
from server.engine.native import NativeOps, open_ops
from server.engine.ops import KVPages, Norm, Ops, Span

HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 96, 160, 6, 2, 24
TOLERANCE = 1e-5
SIZES = (1, 3, 17, 70)


@pytest.fixture(params=_native.available_isas())
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeOps]:
    monkeypatch.setenv("MOESPAN_ISA", request.param)
    ops = open_ops(2)
    assert ops.isa == request.param
    yield ops
    ops.close()


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(native: NativeOps, run: Callable[[Ops], Tensor]) -> float:
    """How far the two are apart, as ||native - twin|| / ||twin||."""
    got, expected = run(native).double(), run(ReferenceOps()).double()
    return float((got - expected).norm() / expected.norm())


def matrix(ops: Ops, rows: int, cols: int, seed: int) -> object:
    weights = draw(rows, cols, seed=seed) / cols**0.5
    return ops.matrix(int(T.F32), rows, cols, memoryview(weights.numpy()).cast("B"))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_linear(native: NativeOps, n: int, accumulate: bool, normed: bool) -> None:
    norm = Norm(1 + 0.2 * draw(HIDDEN, seed=1), 1e-5) if normed else None

    def run(ops: Ops) -> Tensor:
        outs = [draw(n, rows, seed=9) for rows in (33, 48)]
        ops.linear([matrix(ops, 33, HIDDEN, 2), matrix(ops, 48, HIDDEN, 3)], 3 * draw(n, HIDDEN, seed=4), outs, accumulate, norm)
        return torch.cat(outs, 1)

    assert both(native, run) < TOLERANCE


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("in_place", [False, True])
def test_ffn(native: NativeOps, n: int, in_place: bool) -> None:
    norm = Norm(1 + 0.2 * draw(HIDDEN, seed=1), 1e-5) if in_place else None

    def run(ops: Ops) -> Tensor:
        x = 3 * draw(n, HIDDEN, seed=4)
        out = x if in_place else draw(n, HIDDEN, seed=9)
        parts = (matrix(ops, WIDTH, HIDDEN, 5), matrix(ops, WIDTH, HIDDEN, 6), matrix(ops, HIDDEN, WIDTH, 7))
        ops.ffn(*parts, x, out, accumulate=in_place, norm=norm)
        return out

    assert both(native, run) < TOLERANCE


@pytest.mark.parametrize("n", SIZES)
def test_rms_norm_over_heads(native: NativeOps, n: int) -> None:
    def run(ops: Ops) -> Tensor:
        x = 3 * draw(n, HEADS, HEAD_DIM, seed=1)
        ops.rms_norm(x, Norm(1 + 0.2 * draw(HEAD_DIM, seed=2), 1e-6))
        return x

    assert both(native, run) < TOLERANCE


def test_dequantize_rows(native: NativeOps) -> None:
    def run(ops: Ops) -> Tensor:
        out = torch.empty(4, HIDDEN)
        ops.dequantize_rows(matrix(ops, 50, HIDDEN, 1), torch.tensor([49, 0, 7, 7]), out)
        return out

    assert both(native, run) == 0


@pytest.mark.parametrize(("start", "n"), [(0, 1), (0, 70), (5, 3), (63, 2), (100, 17)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rot_dim", [HEAD_DIM, 16])
def test_attend(native: NativeOps, start: int, n: int, interleaved: bool, rot_dim: int) -> None:
    """Compared are the output, and the rotated and stored keys that later steps read."""
    rope = Rope(rot_dim, 100.0, interleaved=interleaved)
    pages = (2, 0, 1)

    def run(ops: Ops) -> Tensor:
        cache = KVPages(draw(3, KV_HEADS, HEAD_DIM, PAGE_SIZE, seed=1), draw(3, KV_HEADS, PAGE_SIZE, HEAD_DIM, seed=2))
        q, k, v = (draw(n, heads, HEAD_DIM, seed=seed) for heads, seed in ((HEADS, 3), (KV_HEADS, 4), (KV_HEADS, 5)))
        out = torch.empty_like(q)
        ops.attend(q, k, v, rope.rotation(start, n), cache, Span(start, n, pages), 0.2, out)
        return torch.cat([t.flatten() for t in (out, q, k, cache.k, cache.v)])

    assert both(native, run) < TOLERANCE
