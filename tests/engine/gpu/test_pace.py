"""A pace that is measured on a tiny layer: every cost is there, and what it says is of the size of what was seen."""

from __future__ import annotations

from bisect import bisect_left
from types import SimpleNamespace

import torch
from gguf import GGMLQuantizationType as Type

from server.engine.gpu.pace import measure_pace, warm_up
from server.engine.gpu.roads import Load, Roads
from server.engine.gpu.stream import StreamedExperts
from server.engine.kernels.plain_grouped import TILE_MEANS, Runs
from server.engine.native import open_ops
from tests.engine.gpu.expert_layers import CPU, TWINS, make_layer


def test_a_pace_is_measured() -> None:
    ops = open_ops(1)
    layer = make_layer(ops, (Type.Q8_0, Type.Q8_0), count=8).weights
    calls: list[tuple[int, bool]] = []

    def cpu(y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        calls.append((len(y), bool((ids < 0).any())))
        ops.experts(layer.gate, layer.up, layer.down, y, ids, weights, out, accumulate=False)

    streamed = StreamedExperts(TWINS, CPU, 1 << 24)
    pace = measure_pace(streamed, layer, cpu, 2, 40, CPU)
    ops.close()
    assert streamed.pace is pace
    assert {n for n, beside in calls if not beside} >= {16, 40}
    load = Load(1e6, 1e9)
    assert all(0 < pace.seconds(side, load) < 1e3 for side in ("cpu", "stream"))
    assert pace.link.byte > 0
    roads = Roads("auto", layer.shape(2), pace)
    assert roads.pick(40) in ("cpu", "stream", "split")
    assert "Prefill" in roads.describe(40)


def test_every_tile_of_the_kernels_is_warmed_up() -> None:
    ops = open_ops(1)
    layers = [make_layer(ops, types, count=8).weights for types in ((Type.Q8_0, Type.Q8_0), (Type.Q8_0, Type.Q4_0), (Type.Q8_0, Type.Q8_0))]
    means: list[int] = []

    def gated(x: torch.Tensor, tokens: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, runs: Runs, out: torch.Tensor) -> None:
        means.append(bisect_left(TILE_MEANS, runs.rows / sum(count > 0 for count in runs.counts())))

    streamed = StreamedExperts(SimpleNamespace(**vars(TWINS) | {"gated": gated}), CPU, 1 << 24)
    warm_up(streamed, layers, 1, 96, CPU)
    ops.close()
    assert set(means) == set(range(len(TILE_MEANS) + 1))
