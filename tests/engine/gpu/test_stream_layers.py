"""Layers of streamed experts one after the other: what is fetched ahead, and in which turn the ring's slots are used; on a GPU, with real copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from server.engine.gpu.locked import CudaDriver, PageLocks
from server.engine.gpu.ring import Layout, PlainLane
from server.engine.gpu.stream import StreamedExperts
from server.engine.kernels import plain_grouped, triton_kernels
from server.engine.native import NativeOps
from tests.engine.gpu.expert_layers import CPU, TWINS, Layer, check, make_chunk, make_layer, on_pool


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


class CountingLane(PlainLane):
    """Counts how often copies are held back behind all that was launched."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def wait(self) -> None:
        self.waits += 1


@pytest.mark.parametrize(("kinds", "waits"), [([Type.Q8_0], 1), ([Type.Q8_0, Type.Q8_0], 1), ([Type.Q8_0, Type.Q4_0, Type.Q8_0], 3)], ids=str)
def test_copies_wait_where_the_ring_is_cut_anew(native: NativeOps, kinds: list[Type], waits: int) -> None:
    """A slot of the new cut lies where slots of the old one are still read."""
    experts = StreamedExperts(TWINS, CPU, 1 << 24)
    experts._lane = experts._streamer.lane = lane = CountingLane()
    for kind in kinds:
        layer = make_layer(native, (Type.Q4_0, kind))
        experts.run(layer.weights, *make_chunk(layer, 9, 2))
    assert lane.waits == waits


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
