"""Streamed experts with the plain twins, on the CPU: the same sums as the reference, whatever the routing, the ring and the types."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from server.engine.gpu.plan import cut, neighbours
from server.engine.gpu.ring import Layout, cut_slot
from server.engine.gpu.roads import Line, Load, Pace
from server.engine.gpu.stream import ExpertWeights, StreamedExperts
from server.engine.native import NativeOps, open_ops
from server.engine.numa import Node, nodes_here
from tests.engine.gpu.expert_layers import CPU, TWINS, Layer, check, make_chunk, make_layer, on_pool, streamed


@pytest.mark.parametrize("types", [(Type.Q4_K, Type.Q6_K), (Type.Q5_K, Type.Q8_0), (Type.Q4_0, Type.Q5_0), (Type.IQ4_XS, Type.IQ4_NL)], ids=str)
def test_types_in_tile_order(native: NativeOps, types: tuple[Type, Type]) -> None:
    layer = make_layer(native, types, ffn=256, hidden=256)
    streamed(layer, make_chunk(layer, 9, 2))


def test_gate_and_up_of_two_types(native: NativeOps) -> None:
    layer, other = make_layer(native, (Type.Q4_0, Type.Q8_0)), make_layer(native, (Type.Q8_0, Type.Q8_0), seed=1)
    mixed = Layer(
        ExpertWeights(layer.weights.gate, other.weights.up, layer.weights.down), (layer.reference[0], other.reference[1], layer.reference[2]), 6, layer.hidden
    )
    streamed(mixed, make_chunk(mixed, 9, 2))


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=str)
def test_floats_are_streamed_out_of_the_file(native: NativeOps, kind: Type) -> None:
    layer = make_layer(native, (kind, kind))
    streamed(layer, make_chunk(layer, 9, 2))


@pytest.mark.parametrize("n", [1, 2, 7, 33])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_any_number_of_tokens(native: NativeOps, n: int, top_k: int) -> None:
    layer = make_layer(native, (Type.Q4_0, Type.Q8_0))
    streamed(layer, make_chunk(layer, n, top_k))


@pytest.mark.parametrize("experts", [[4], [0, 5], [1, 2, 4], [0, 1, 2, 3, 4, 5]], ids=str)
def test_experts_that_nobody_chose_are_left_out(native: NativeOps, experts: list[int]) -> None:
    layer = make_layer(native, (Type.Q4_0, Type.Q8_0))
    run = streamed(layer, make_chunk(layer, 11, len(experts), experts))
    assert run.last is not None
    assert run.last.streamed == experts
    assert all(count == 11 for count in run.last.counts if count)


def test_a_ring_for_one_expert_at_a_time(native: NativeOps) -> None:
    layer = make_layer(native, (Type.Q4_0, Type.Q8_0), count=9)
    smallest = Layout.needed_bytes(layer.weights.sections())
    layout = Layout.of(layer.weights.sections(), smallest, 4)
    assert layout is not None
    assert layout.experts == 1
    streamed(layer, make_chunk(layer, 17, 4), ring=smallest)
    reason = StreamedExperts(TWINS, CPU, smallest - 1).can_stream(layer.weights)
    assert "of the ring" in reason


def test_layouts_do_not_overlap(native: NativeOps) -> None:
    sections = make_layer(native, (Type.Q4_0, Type.Q8_0)).weights.sections()
    layout = Layout.of(sections, 1 << 20, 5)
    assert layout is not None
    assert layout.experts == 5
    ring = torch.arange(layout.scratch + (1 << 18), dtype=torch.int64).to(torch.uint8)
    edges = []
    for slot in range(3):
        cut = cut_slot(ring, layout, slot, sections[0], 5)
        places = [part.data_ptr() - ring.data_ptr() for part in cut.parts]
        edges += [(place, place + len(part)) for place, part in zip(places, cut.parts, strict=True)]
        assert [len(part) for part in cut.parts] == [5 * matrix.each for matrix in sections[0]]
        assert cut.opened.data_ptr() - ring.data_ptr() == layout.scratch
        assert (len(cut.gate_up), cut.gate_up[0][0].count) == (1, 10)  # both in one go
    assert all(end <= start for (_, end), (start, _) in pairwise(edges))
    assert all(start % 256 == 0 for start, _ in edges)
    assert edges[-1][1] <= layout.scratch


def test_the_same_bits_twice(native: NativeOps) -> None:
    layer = make_layer(native, (Type.Q4_0, Type.Q8_0))
    y, ids, weights, out = make_chunk(layer, 21, 3)
    again = out.clone()
    experts = StreamedExperts(TWINS, CPU, 1 << 24)
    experts.run(layer.weights, y, ids, weights, out)
    experts.run(layer.weights, y, ids, weights, again)
    assert torch.equal(out, again)


def test_groups_are_cut_by_experts_and_by_rows() -> None:
    assert list(cut([1, 1, 1, 1, 1], 2, 100)) == [(0, 2), (2, 4), (4, 5)]
    assert list(cut([3, 3, 90, 3, 3], 9, 8)) == [(0, 2), (2, 3), (3, 5)]
    assert list(cut([7], 1, 1)) == [(0, 1)]
    assert list(cut([], 1, 1)) == []


def test_neighbours_are_one_copy() -> None:
    assert list(neighbours([3])) == [(0, 3, 1)]
    assert list(neighbours([0, 1, 2, 7, 9, 10])) == [(0, 0, 3), (3, 7, 1), (4, 9, 2)]


def test_types_of_the_file_order_are_refused(native: NativeOps) -> None:
    layer = make_layer(native, (Type.IQ2_XXS, Type.IQ3_S), ffn=256, hidden=256)
    assert "IQ2_XXS" in StreamedExperts(TWINS, CPU, 1 << 24).can_stream(layer.weights)


# --- With the pool -----------------------------------------------------------


@pytest.mark.parametrize("stream_cost", [0.2, 1.0, 5.0, 1e3, 1e-3])
def test_split_gives_the_same_sums(native: NativeOps, stream_cost: float) -> None:
    layer = make_layer(native, (Type.F16, Type.F16), count=12)
    pace = Pace(Line(1e-9, 1e-12), Line(stream_cost * 1e-9, 0), Line(0, 0))
    seen: list[Tensor] = []
    run = streamed(layer, make_chunk(layer, 40, 3), pace=pace, cpu=on_pool(native, layer, seen))
    assert run.last is not None
    for ids in seen:
        left = set(ids.flatten().tolist()) - {-1}
        assert left == {e for e, count in enumerate(run.last.counts) if count} - set(run.last.streamed)
    assert bool(run.last.streamed) == (stream_cost < 1e3)
    assert bool(seen) == (stream_cost > 1e-3)


def test_split_in_inference_mode(native: NativeOps) -> None:
    """As the engine runs: what was made in that mode may only be written in it, and it is each thread's own."""
    layer = make_layer(native, (Type.F16, Type.F16), count=12)
    experts = StreamedExperts(TWINS, CPU, 1 << 24)
    with torch.inference_mode():
        chunk = make_chunk(layer, 40, 3)
        wanted, before = layer.wanted(*chunk), chunk[3].clone()
        experts.run(layer.weights, *chunk, on_pool(native, layer, []))
        check(chunk[3], wanted, before)
    experts.close()


def test_split_learns_what_each_side_took(native: NativeOps) -> None:
    layer = make_layer(native, (Type.F16, Type.F16), count=12)
    pace = Pace(Line(1e-9, 1e-12), Line(1e-9, 0), Line(0, 0))
    experts = StreamedExperts(TWINS, CPU, 1 << 24, pace=pace)
    before = [pace.seconds(side, Load(1e6, 1e6), beside=True) for side in ("cpu", "stream")]
    for _ in range(2):
        experts.run(layer.weights, *make_chunk(layer, 40, 3), on_pool(native, layer, []))
    assert all(pace.seconds(side, Load(1e6, 1e6), beside=True) != old for side, old in zip(("cpu", "stream"), before, strict=True))


def test_an_error_of_the_pool_is_raised_once_the_stream_is_issued(native: NativeOps) -> None:
    layer = make_layer(native, (Type.F16, Type.F16), count=12)
    experts = StreamedExperts(TWINS, CPU, 1 << 24)

    def fails(*_: Tensor) -> None:
        raise RuntimeError("worker")

    with pytest.raises(RuntimeError, match="worker"):
        experts.run(layer.weights, *make_chunk(layer, 40, 3), fails)
    chunk = make_chunk(layer, 5, 2)
    wanted, before = layer.wanted(*chunk), chunk[3].clone()
    experts.run(layer.weights, *chunk)
    check(chunk[3], wanted, before)


@pytest.mark.parametrize("mode", ["shard", "replicate"])
def test_experts_that_are_spread_over_nodes(mode: Any) -> None:
    """Slices of the intermediate dimension are streamed one after the other; of copies, one."""
    real = nodes_here()
    if not real:
        pytest.skip("the kernel shows no memory nodes")
    nodes = [Node(real[0].memory, real[0].cpus[:1], real[0].directory) for _ in range(2)]
    ops = open_ops(2, mode, nodes)
    try:
        layer = make_layer(ops, (Type.Q4_0, Type.Q8_0), ffn=96)
        assert len(layer.weights.sections()) == (2 if mode == "shard" else 1)
        streamed(layer, make_chunk(layer, 19, 3))
    finally:
        ops.close()
