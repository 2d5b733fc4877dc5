"""What rounding activations costs: a whole layer of experts against float64 on the dequantised weights, at a shape where the figures stand still.

Tokens are Gaussian, or have 0.5 % of their channels 8 times larger, as those of models do. A scale for each 32 values keeps an outlier's harm within its
block. One token's error spreads by a tenth of itself, so each figure is that of two dozen. (Scalar rounds as AVX2 does, and takes long.)
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gguf.constants import GGMLQuantizationType as Type

from server.bench.experts import OUTLIER, NativeLayers, relative_error
from server.bench.random_experts import Kinds, LayerSize, RandomExperts, Router
from server.engine.native import NativeOps
from server.engine.ops import Matrix
from tests.native.isas import BF16_ISAS, ISAS, open_pool

SIZE = LayerSize(experts=4, top_k=2, hidden=2048, ffn=1536)
TOKENS = 24
FORMATS = [Type.Q4_K, Type.Q6_K, Type.Q8_0, Type.Q5_0, Type.Q2_K, Type.IQ4_XS]

DECODE, PREFILL = (1, 4), (64,)  # tokens a call
BOUNDS = {"int8": (0.013, 0.016), "bf16": (0.005, 0.005)}  # by what activations are rounded to: of Gaussian tokens, of those with outliers


@pytest.fixture(params=[*ISAS[1:], *BF16_ISAS], scope="module")
def ops(request: pytest.FixtureRequest) -> Iterator[NativeOps]:
    with open_pool(request.param) as pool:
        yield NativeOps(pool)


def check(ops: NativeOps, kind: Type, counts: tuple[int, ...], activations: str) -> None:
    experts = RandomExperts(SIZE, Kinds.of(kind, SIZE), 1)

    def lay_out(matrix: Matrix) -> None:
        for _ in ops.lay_out(matrix):
            pass

    layers, router = NativeLayers(ops, experts, max(counts), lay_out), Router(SIZE, 1)
    for q in counts:
        errors = [relative_error(experts, layers, router, q, outlier, TOKENS) for outlier in (1, OUTLIER)]
        assert all(0.0 < error <= bound for error, bound in zip(errors, BOUNDS[activations], strict=True)), (q, errors)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_few_tokens(ops: NativeOps, kind: Type) -> None:
    if ops.isa == "amx_emulated":
        pytest.skip("these are the kernels of scalar")
    check(ops, kind, DECODE, "int8")


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_many_tokens(ops: NativeOps, kind: Type) -> None:
    check(ops, kind, PREFILL, "bf16" if ops.isa in ("amx_emulated", "avx512_bf16", "amx") else "int8")
