"""The cost model with made-up numbers: what it fits, how it divides a layer, which road it picks."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from server.engine.gpu.roads import LayerShape, Line, Load, Pace, Roads, Sample, divide, fit

V3 = LayerShape(experts=256, top_k=8, expert_bytes=25e6, expert_weights=3 * 2048 * 7168, hidden=7168)
LINK = Line(1 / 54e9, 0)
GPU = Line(1 / 1e12, 1 / 400e12)
CPU = Line(1 / 100e9, 1 / 12e12)


def pace(cpu: Line = CPU, link: Line = LINK, gpu: Line = GPU) -> Pace:
    return Pace(cpu, link, gpu)


def time_of(counts: list[int], streamed: list[int], shape: LayerShape, costs: Pace) -> float:
    rest = [e for e, count in enumerate(counts) if count and e not in streamed]
    stream = costs.seconds("stream", shape.load(len(streamed), sum(counts[e] for e in streamed)), True)
    return max(stream, costs.seconds("cpu", shape.load(len(rest), sum(counts[e] for e in rest)), True))


# --- fit ---------------------------------------------------------------------


def test_a_fit_finds_the_line_that_samples_lie_on() -> None:
    loads = [Load(1e9, 1e9), Load(6e9, 4e12), Load(6.4e9, 1e12)]
    line = fit([Sample(load, CPU(load)) for load in loads])
    assert line.byte == pytest.approx(CPU.byte)
    assert line.flop == pytest.approx(CPU.flop)


def test_no_cost_is_negative_whatever_the_samples() -> None:
    faster_with_more = [Sample(Load(1e9, 1e9), 2.0), Sample(Load(1e9, 8e9), 1.0)]
    line = fit(faster_with_more)
    assert line.byte >= 0
    assert line.flop >= 0
    assert line(Load(1e9, 4e9)) > 0


def test_one_sample_is_a_cost_for_bytes_or_operations() -> None:
    assert fit([Sample(Load(1e9, 0), 0.5)])(Load(2e9, 0)) == pytest.approx(1.0)
    assert fit([Sample(Load(1e9, 1e9), 0.5)])(Load(1e9, 1e9)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no sample"):
        fit([])


# --- divide ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_division_is_the_best_of_all(seed: int) -> None:
    """Small enough to try every subset."""
    rng = random.Random(seed)
    counts = [rng.choice([0, 1, 2, 5, 60, 400]) for _ in range(9)]
    shape = LayerShape(9, 2, 25e6, V3.expert_weights, 7168)
    costs = pace(Line(rng.uniform(0.2, 3) / 100e9, rng.uniform(0.1, 10) / 12e12), Line(rng.uniform(0.2, 3) / 54e9, 0))
    chosen = [e for e, count in enumerate(counts) if count]
    subsets = (list(s) for k in range(len(chosen) + 1) for s in itertools.combinations(chosen, k))
    best = min(time_of(counts, s, shape, costs) for s in subsets)
    got = divide(counts, shape, costs)
    assert got == sorted(got)
    assert set(got) <= set(chosen)
    assert time_of(counts, got, shape, costs) == pytest.approx(best)


def test_experts_with_the_most_tokens_are_streamed() -> None:
    counts = [1] * 200 + [300] * 56
    streamed = divide(counts, V3, pace())
    assert 56 < len(streamed) < 256
    assert streamed[-56:] == list(range(200, 256))


@pytest.mark.parametrize("slow", [1e-6, 1e6])
def test_all_goes_to_a_side_that_costs_next_to_nothing(slow: float) -> None:
    counts = [16] * 256
    streamed = divide(counts, V3, pace(cpu=Line(CPU.byte * slow, CPU.flop * slow)))
    assert len(streamed) == (256 if slow > 1 else 0)


def test_experts_that_are_there_need_no_copy() -> None:
    counts = [16] * 256
    there = list(range(30))
    more = divide(counts, V3, pace(), there=there)
    assert not set(more) & set(there)
    assert len(divide(counts, V3, pace())) < len(more) + len(there)
    assert divide([3, 0], LayerShape(2, 1, 1e6, 1, 1), pace(), there=[0, 1]) == []


def test_nothing_chosen_is_nothing_streamed() -> None:
    assert divide([0] * 256, V3, pace()) == []


def test_slower_copies_leave_more_to_the_pool() -> None:
    costs = pace()
    costs.unlocked_link = Line(1 / 10e9, 0)
    counts = [16] * 256
    assert len(divide(counts, V3, costs, locked=False)) < 0.5 * len(divide(counts, V3, costs, locked=True))


def test_both_sides_end_together_once_the_pace_has_learned() -> None:
    """The machine is not as measured: beside the copies the pool is slowed down, and PCIe is slower than was thought."""
    costs, counts = pace(), [64] * 256
    for _ in range(12):
        streamed = divide(counts, V3, costs)
        part, rest = V3.load(len(streamed), 64 * len(streamed)), V3.load(256 - len(streamed), 64 * (256 - len(streamed)))
        stream_s, cpu_s = LINK(part) * 1.2, CPU(rest) * 1.8
        costs.observe("stream", part, stream_s, beside=True)
        costs.observe("cpu", rest, cpu_s, beside=True)
    assert stream_s == pytest.approx(cpu_s, rel=0.05)


# --- Pace --------------------------------------------------------------------


def test_alone_and_beside_are_learned_apart() -> None:
    costs, load = pace(), Load(1e9, 1e12)
    costs.observe("cpu", load, 2 * CPU(load), beside=True)
    assert costs.seconds("cpu", load, beside=True) == pytest.approx(2 * CPU(load))
    assert costs.seconds("cpu", load) == pytest.approx(CPU(load))
    costs.observe("cpu", load, CPU(load), beside=True)
    assert CPU(load) < costs.seconds("cpu", load, beside=True) < 2 * CPU(load)


def test_a_disturbance_does_not_carry_the_pace_away() -> None:
    costs, load = pace(), Load(1e9, 0)
    costs.observe("stream", load, 1e6)
    assert costs.seconds("stream", load) <= 8 * LINK(load)
    costs.observe("stream", Load(0, 0), 1.0)
    assert math.isfinite(costs.seconds("stream", load))


def test_a_slow_gpu_is_what_the_stream_waits_for() -> None:
    costs = pace(gpu=Line(0, 1 / 1e12))
    assert costs.seconds("stream", Load(1e9, 1e12)) == pytest.approx(1.0)


# --- Roads -------------------------------------------------------------------


def test_what_is_asked_for_is_picked() -> None:
    for mode in ("cpu", "stream", "split"):
        assert Roads(mode, V3, pace()).pick(512) == mode


def test_auto_picks_the_shortest() -> None:
    roads = Roads("auto", V3, pace())
    assert roads.pick(1) == "cpu"
    assert roads.pick(2048) == "split"
    assert Roads("auto", V3, pace(cpu=Line(CPU.byte * 1e3, CPU.flop * 1e3))).pick(512) == "stream"
    assert Roads("auto", V3, pace(link=Line(1e-9, 0))).pick(9) == "cpu"


def test_estimates_of_a_layer() -> None:
    estimates = Roads("auto", V3, pace()).estimates(4096)  # all experts are chosen
    layer = V3.load(256, 4096 * 8)
    assert estimates["stream"] == pytest.approx(LINK(layer) + 2e-3)
    assert estimates["cpu"] == pytest.approx(CPU(layer) + LINK(Load(4096 * 7168 * 8, 0)) + 5e-4)
    assert estimates["split"] < min(estimates["stream"], estimates["cpu"])
    few = Roads("auto", V3, pace()).estimates(1)
    assert few["stream"] == pytest.approx(LINK(V3.load(8, 8)) + 2e-3)


def test_all_experts_for_every_token() -> None:
    """A share of 1 has no logarithm of what is left."""
    shape = LayerShape(4, 4, 1e6, 1 << 20, 64)
    assert Roads("auto", shape, pace()).estimates(3)["cpu"] > 0


def test_the_log_line_says_what_was_measured_and_where_roads_change() -> None:
    roads = Roads("auto", V3, pace())
    line = roads.describe(2048)
    assert "PCIe 54 GB/s" in line
    assert "256 experts" in line
    starts = {words.split(" from ")[0]: int(words.split(" from ")[1].split()[0]) for words in line.rsplit("; ", 1)[1].rstrip(".").split(", ")}
    assert starts["cpu"] == 1
    assert roads.pick(starts["split"]) == "split"
    assert roads.pick(starts["split"] - 1) == "cpu"
    assert "split from 1 token" in Roads("split", V3, pace()).describe(64)
