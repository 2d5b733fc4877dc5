"""Streamed experts with the plain twins, on the CPU: the same sums as the reference, whatever the routing, the ring and the types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from server.engine.gguf.quants import random_blocks
from server.engine.gpu.locked import CudaDriver, PageLocks
from server.engine.gpu.plan import cut, neighbours
from server.engine.gpu.ring import Layout, PlainLane, cut_slot
from server.engine.gpu.roads import Line, Load, Pace
from server.engine.gpu.stream import ExpertWeights, StreamedExperts
from server.engine.kernels import plain_grouped, plain_small, plain_tiles, triton_kernels
from server.engine.layers.reference import ReferenceOps
from server.engine.native import NativeOps, open_ops
from server.engine.numa import Node, nodes_here

TWINS = SimpleNamespace(
    dequantize=plain_tiles.dequantize, gated=plain_grouped.gated, grouped=plain_grouped.grouped, combine=plain_grouped.combine, receive=plain_small.receive
)
CPU = torch.device("cpu")
TOLERANCE = 1e-2  # of the sums' norm: weights, inputs and the gated products are each rounded to bfloat16, 2^-9 of each at most


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the engine runs: torch's second set of threads would fight the pool for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def native() -> Iterator[NativeOps]:
    ops = open_ops(1)
    yield ops
    ops.close()


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


# --- One layer after the other -----------------------------------------------


class CountedCopies:
    """How many bytes went into the ring."""

    def __init__(self, experts: StreamedExperts, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes = 0
        copy = experts._streamer._copy

        def counted(to: Tensor, source: Tensor, locked: bool) -> None:
            self.nbytes += source.numel()
            copy(to, source, locked)

        monkeypatch.setattr(experts._streamer, "_copy", counted)


@pytest.mark.parametrize("other", [Type.Q8_0, Type.Q4_0], ids=str)
@pytest.mark.parametrize("with_pool", [False, True])
def test_the_next_layer_is_fetched_ahead(native: NativeOps, monkeypatch: pytest.MonkeyPatch, other: Type, with_pool: bool) -> None:
    """Chunks through three layers, of equal layouts or not: from the second chunk on, a layer finds its first experts in the ring; no byte crosses twice."""
    layers = [make_layer(native, (Type.Q4_0, kind), count=40, seed=seed) for seed, kind in enumerate((Type.Q8_0, other, Type.Q8_0))]
    experts = StreamedExperts(TWINS, CPU, 1 << 24)
    copied = CountedCopies(experts, monkeypatch)
    each = [layer.weights.shape(4).expert_bytes for layer in layers]
    for turn in range(3):
        for i, layer in enumerate(layers):
            chunk = make_chunk(layer, 60 + turn, 4)
            wanted, before = layer.wanted(*chunk), chunk[3].clone()
            copied.nbytes = 0
            experts.run(layer.weights, *chunk, on_pool(native, layer, []) if with_pool else None)
            check(chunk[3], wanted, before)
            plan = experts.last
            assert plan is not None
            assert bool(plan.there) == (turn > 0 and i > 0)
            if not with_pool:
                assert sorted(plan.on_gpu) == list(range(40))
            ahead = copied.nbytes - len(plan.streamed) * each[i]
            assert (ahead > 0) == (i < 2 and (turn > 0))
    experts.close()


def test_what_was_fetched_ahead_is_given_up_by_a_layer_that_fails(native: NativeOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slots were filled with other experts before that; who took the same layer again would find them in the place of the first ones."""
    a, b = (make_layer(native, (Type.Q4_0, Type.Q8_0), count=40, seed=seed) for seed in range(2))
    experts = StreamedExperts(TWINS, CPU, 1 << 24)
    for _ in range(2):
        for layer in (a, b):
            experts.run(layer.weights, *make_chunk(layer, 90, 2))
    experts.run(a.weights, *make_chunk(a, 90, 2))
    left = iter(range(4))  # groups until the GPU has no memory

    def fails(*args: Any) -> None:
        if next(left, None) is None:
            raise torch.OutOfMemoryError
        plain_grouped.gated(*args)

    with monkeypatch.context() as patch:
        patch.setattr(TWINS, "gated", fails)
        with pytest.raises(torch.OutOfMemoryError):
            experts.run(b.weights, *make_chunk(b, 90, 2))
    chunk = make_chunk(b, 90, 2)
    wanted, before = b.wanted(*chunk), chunk[3].clone()
    experts.run(b.weights, *chunk)
    check(chunk[3], wanted, before)
    experts.close()


class StrictLane(PlainLane):
    """Copies as late as a stream of their own may make them: when somebody waits for the slot, or for all. A slot is filled, taken and released in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[int, list[Any]] = {}
        self.taken: set[int] = set()

    def fill(self, slot: int, copies: Any, copy: Any) -> None:
        assert slot not in self.waiting
        assert slot not in self.taken
        self.waiting[slot] = [(copy, each) for each in copies]

    def take(self, slot: int) -> None:
        for copy, each in self.waiting.pop(slot):
            copy(*each)
        self.taken.add(slot)

    def release(self, slot: int) -> None:
        self.taken.remove(slot)


def test_slots_are_filled_and_released_in_turn(native: NativeOps) -> None:
    layers = [make_layer(native, (Type.Q4_0, Type.Q8_0), count=40, seed=seed) for seed in range(2)]
    experts = StreamedExperts(TWINS, CPU, 1 << 24)
    experts._lane = experts._streamer.lane = StrictLane()
    for _ in range(3):
        for layer in layers:
            chunk = make_chunk(layer, 70, 4)
            wanted, before = layer.wanted(*chunk), chunk[3].clone()
            experts.run(layer.weights, *chunk)
            check(chunk[3], wanted, before)


def test_experts_that_were_fetched_in_vain(native: NativeOps) -> None:
    """Nobody chooses them after all, or so many that they do not fit as a group; or another layer comes."""
    a, b = (make_layer(native, (Type.Q4_0, Type.Q8_0), count=40, seed=seed) for seed in range(2))
    experts = StreamedExperts(TWINS, CPU, 1 << 24)

    def run(layer: Layer, n: int, chosen: list[int] | None = None) -> list[int]:
        chunk = make_chunk(layer, n, 2, chosen)
        wanted, before = layer.wanted(*chunk), chunk[3].clone()
        experts.run(layer.weights, *chunk)
        check(chunk[3], wanted, before)
        assert experts.last is not None
        return experts.last.there

    for _ in range(2):
        run(a, 90)
        there = run(b, 90)
    assert there
    run(a, 90)
    assert run(b, 5, [38, 39]) == there  # not one of those that are there
    run(a, 90)
    assert run(b, 600, there[:2]) == []  # 1,200 rows in one group
    run(a, 90)
    run(a, 90)
    assert run(b, 90) == there
    run(a, 3)  # few experts were chosen: the next layer's will not all be
    assert run(b, 90) == []
    experts.close()


# --- With the pool -----------------------------------------------------------


def on_pool(ops: NativeOps, layer: Layer, seen: list[Tensor]) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    def compute(y: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        seen.append(ids.clone())
        out.fill_(float("nan"))  # it holds anything
        ops.experts(layer.weights.gate, layer.weights.up, layer.weights.down, y, ids, weights, out, accumulate=False)

    return compute


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


# --- On a GPU ----------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("with_pool", [False, True])
def test_streams_and_kernels(native: NativeOps, locked: bool, with_pool: bool) -> None:
    """Layer after layer without waiting, as a prompt runs, through a ring that holds two experts a slot."""
    device = torch.device("cuda")
    layers = [make_layer(native, (Type.Q4_K, kind), count=40, ffn=256, hidden=512, seed=seed) for seed, kind in enumerate((Type.Q6_K, Type.Q4_K, Type.Q6_K))]
    locks = PageLocks(CudaDriver())
    if locked:
        assert locks.lock([layer.weights.ranges() for layer in layers], 60) == ""
    ring = 3 * Layout.needed_bytes(layers[0].weights.sections())
    experts = StreamedExperts(triton_kernels(), device, ring, locks=locks)
    for n in (300, 1, 77, 300):
        chunks = [make_chunk(layer, n, 4) for layer in layers]
        outs = []
        for layer, (y, ids, weights, out) in zip(layers, chunks, strict=True):
            outs.append(out.to(device))
            cpu = on_pool(native, layer, []) if with_pool else None
            experts.run(layer.weights, y.to(device), ids.to(device), weights.to(device), outs[-1], cpu)
        for layer, chunk, got in zip(layers, chunks, outs, strict=True):
            check(got.cpu(), layer.wanted(*chunk), chunk[3], 2e-2)  # the pool rounds activations to int8
    experts.close()
    locks.close()
