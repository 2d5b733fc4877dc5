"""Random layers of routed experts, chunks of tokens for them, and what streaming gives held to the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from server.engine.gguf.quants import random_blocks
from server.engine.gpu.roads import Pace
from server.engine.gpu.stream import ExpertWeights, StreamedExperts
from server.engine.kernels import plain_grouped, plain_small, plain_tiles
from server.engine.layers.reference import ReferenceOps
from server.engine.native import NativeOps

TWINS = SimpleNamespace(
    dequantize=plain_tiles.dequantize, gated=plain_grouped.gated, grouped=plain_grouped.grouped, combine=plain_grouped.combine, receive=plain_small.receive
)
CPU = torch.device("cpu")
TOLERANCE = 1e-2  # of the sums' norm: weights, inputs and the gated products are each rounded to bfloat16, 2^-9 of each at most


@dataclass
class Layer:
    """Experts in both makers' hands."""

    weights: ExpertWeights
    reference: tuple[Tensor, Tensor, Tensor]
    count: int
    hidden: int

    def wanted(self, y: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        sums = out.clone()
        ReferenceOps().experts(*self.reference, y, ids, weights, sums)
        return sums


def make_layer(ops: NativeOps, types: tuple[Type, Type], count: int = 6, ffn: int = 64, hidden: int = 96, seed: int = 0) -> Layer:
    rng = np.random.default_rng(seed)
    matrices: list[Any] = []
    held: list[Any] = []
    for type_id, rows, cols in ((types[0], ffn, hidden), (types[0], ffn, hidden), (types[1], hidden, ffn)):
        data = memoryview(np.ascontiguousarray(random_blocks(type_id, count * rows, cols, cols**-0.5, rng)).reshape(-1).view(np.uint8))
        matrices.append(ops.matrix(type_id, rows, cols, data, count))
        held.append(ReferenceOps().matrix(type_id, rows, cols, data, count).view(count, rows, cols))
    ops.spread_experts(*matrices)
    for matrix in matrices:
        for _ in ops.lay_out(matrix):
            pass
    return Layer(ExpertWeights(*matrices), (held[0], held[1], held[2]), count, hidden)


def make_chunk(layer: Layer, n: int, top_k: int, experts: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, ids (distinct in a row, out of `experts`), weights and out."""
    torch.manual_seed(n * 31 + top_k)
    among = torch.tensor(experts if experts is not None else range(layer.count))
    ids = torch.stack([among[torch.randperm(len(among))[:top_k]] for _ in range(n)]).int()
    return torch.randn(n, layer.hidden), ids.contiguous(), torch.rand(n, top_k), torch.randn(n, layer.hidden)


def check(got: Tensor, wanted: Tensor, before: Tensor, tolerance: float = TOLERANCE) -> None:
    assert (got - wanted).norm() <= tolerance * (wanted - before).norm()


def streamed(layer: Layer, chunk: tuple[Tensor, Tensor, Tensor, Tensor], ring: int = 1 << 24, pace: Pace | None = None, cpu: Any = None) -> StreamedExperts:
    """A run, held to the reference."""
    y, ids, weights, out = chunk
    wanted, before = layer.wanted(*chunk), out.clone()
    experts = StreamedExperts(TWINS, CPU, ring, pace=pace)
    assert experts.can_stream(layer.weights) == ""
    experts.run(layer.weights, y, ids, weights, out, cpu)
    check(out, wanted, before)
    experts.close()
    return experts


def on_pool(ops: NativeOps, layer: Layer, seen: list[Tensor]) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    def compute(y: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        seen.append(ids.clone())
        out.fill_(float("nan"))  # it holds anything
        ops.experts(layer.weights.gate, layer.weights.up, layer.weights.down, y, ids, weights, out, accumulate=False)

    return compute
