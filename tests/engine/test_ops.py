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
from server.engine.layers.rope import rotation
from server.engine.native import NativeOps, open_ops
from server.engine.ops import KVPages, LatentPages, Norm, Ops, Routing, Span

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


def matrix(ops: Ops, rows: int, cols: int, seed: int, count: int = 1) -> object:
    weights = draw(count * rows, cols, seed=seed) / cols**0.5
    return ops.matrix(int(T.F32), rows, cols, memoryview(weights.numpy()).cast("B"), count)


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


@pytest.mark.parametrize("n", [1, 20])
def test_linear_with_biases(native: NativeOps, n: int) -> None:
    def run(ops: Ops) -> Tensor:
        outs = [torch.full((n, 33), torch.nan), torch.full((n, 48), torch.nan)]
        biases = [draw(33, seed=5), draw(48, seed=6)]
        ops.linear([matrix(ops, 33, HIDDEN, 2), matrix(ops, 48, HIDDEN, 3)], 3 * draw(n, HIDDEN, seed=4), outs, biases=biases)
        return torch.cat(outs, 1)

    assert both(native, run) < TOLERANCE


def test_sigmoid(native: NativeOps) -> None:
    def run(ops: Ops) -> Tensor:
        x = torch.tensor([-200.0, -3.0, 0.0, 0.5, 200.0])
        ops.sigmoid(x)
        return x

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
@pytest.mark.parametrize("accumulate", [False, True])
def test_ffn_with_a_factor_for_each_token(native: NativeOps, n: int, accumulate: bool) -> None:
    def run(ops: Ops) -> Tensor:
        out = draw(n, HIDDEN, seed=9)
        parts = (matrix(ops, WIDTH, HIDDEN, 5), matrix(ops, WIDTH, HIDDEN, 6), matrix(ops, HIDDEN, WIDTH, 7))
        ops.ffn(*parts, 3 * draw(n, HIDDEN, seed=4), out, accumulate, scales=draw(n, seed=8).sigmoid())
        return out

    assert both(native, run) < TOLERANCE


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("count", "top_k", "width"), [(1, 1, WIDTH), (6, 5, 40), (64, 8, 24)])
def test_experts(native: NativeOps, n: int, count: int, top_k: int, width: int) -> None:
    ids = draw(n, count, seed=3).argsort(-1)[:, :top_k].to(torch.int32).contiguous()

    def run(ops: Ops) -> Tensor:
        out = draw(n, HIDDEN, seed=9)
        parts = (matrix(ops, width, HIDDEN, 5, count), matrix(ops, width, HIDDEN, 6, count), matrix(ops, HIDDEN, width, 7, count))
        ops.experts(*parts, 3 * draw(n, HIDDEN, seed=4), ids, draw(n, top_k, seed=8), out)
        return out

    assert both(native, run) < TOLERANCE


ROUTINGS = {
    "softmax": Routing(5, "softmax", normalize=False),
    "normalized": Routing(2, "softmax", normalize=True),
    "v2": Routing(6, "softmax", normalize=False, scale=16.0, groups=8, groups_used=3),
    "v3": Routing(8, "sigmoid", normalize=True, scale=2.5, groups=8, groups_used=4, group_top=2, bias=draw(48, seed=1)),
}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_route(native: NativeOps, n: int, name: str) -> None:
    """The same ids too: of 70 tokens' scores, the nearest two are 7e-5 of themselves apart, and rounding moves them by 1e-6."""
    routing = ROUTINGS[name]
    chosen: list[Tensor] = []

    def run(ops: Ops) -> Tensor:
        ids, weights = torch.empty(n, routing.top_k, dtype=torch.int32), torch.empty(n, routing.top_k)
        ops.route(matrix(ops, 48, HIDDEN, 2), routing, 3 * draw(n, HIDDEN, seed=4), ids, weights)
        chosen.append(ids)
        return weights

    assert both(native, run) < TOLERANCE
    assert torch.equal(*chosen)


@pytest.mark.parametrize("n", SIZES)
def test_rms_norm_elsewhere(native: NativeOps, n: int) -> None:
    def run(ops: Ops) -> Tensor:
        x, out = 3 * draw(n, HIDDEN, seed=1), torch.empty(n, HIDDEN)
        ops.rms_norm(x, Norm(1 + 0.2 * draw(HIDDEN, seed=2), 1e-6), out)
        return torch.cat([x, out])  # x as it was

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
    angles = rotation(rot_dim, 100.0, 128, interleaved=interleaved)
    pages = (2, 0, 1)

    def run(ops: Ops) -> Tensor:
        cache = KVPages(draw(3, KV_HEADS, HEAD_DIM, PAGE_SIZE, seed=1), draw(3, KV_HEADS, PAGE_SIZE, HEAD_DIM, seed=2))
        q, k, v = (draw(n, heads, HEAD_DIM, seed=seed) for heads, seed in ((HEADS, 3), (KV_HEADS, 4), (KV_HEADS, 5)))
        out = torch.empty_like(q)
        ops.attend(q, k, v, angles, cache, Span(start, n, pages), 0.2, out)
        return torch.cat([t.flatten() for t in (out, q, k, cache.k, cache.v)])

    assert both(native, run) < TOLERANCE


@pytest.mark.parametrize(("start", "n"), [(0, 1), (0, 70), (5, 3), (63, 2), (100, 17)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_lora", "rope_dim", "nope", "v_dim"), [(1, 24, 8, 12, 20), (5, 64, 16, 33, 48)])
def test_attend_latent(native: NativeOps, start: int, n: int, interleaved: bool, heads: int, kv_lora: int, rope_dim: int, nope: int, v_dim: int) -> None:
    """The twin expands keys and values. Compared are the output, and the latents that later steps read."""
    angles = rotation(rope_dim, 100.0, 128, interleaved=interleaved)
    norm = Norm(1 + 0.2 * draw(kv_lora, seed=7), 1e-6)

    def run(ops: Ops) -> Tensor:
        cache = LatentPages(draw(3, PAGE_SIZE, kv_lora + rope_dim, seed=1))
        q, latent = draw(n, heads, nope + rope_dim, seed=3), 3 * draw(n, kv_lora + rope_dim, seed=4)
        k_b, v_b = matrix(ops, kv_lora, nope, 5, heads), matrix(ops, v_dim, kv_lora, 6, heads)
        out = torch.empty(n, heads, v_dim)
        ops.attend_latent(q, latent, norm, angles, cache, Span(start, n, (2, 0, 1)), k_b, v_b, 0.2, out)
        return torch.cat([t.flatten() for t in (out, cache.latent)])

    assert both(native, run) < TOLERANCE
