"""`moespan bench experts`: its random experts and their truth, how tokens are spread, what is timed, and what is printed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from server.bench.experts import SAMPLED, Bench, Limits, Point, Times, layer_errors, relative_error, time_calls
from server.bench.random_experts import COLD_BYTES, Kinds, LayerSize, RandomExperts, Router, Routes
from server.bench.roofline import roofline
from server.cli import bench_experts, main
from server.cli.bench_experts import layer_size
from server.engine.gguf.quants import dequantize, row_bytes
from server.engine.layers.reference import ReferenceOps
from server.engine.models.shapes import SHAPES
from server.engine.native import open_ops
from server.errors import ConfigError
from tests.engine.gguf.test_synth import tiny

SIZE = LayerSize(experts=6, top_k=2, hidden=64, ffn=96)


def experts(kind: Type = Type.Q8_0, layers: int = 2) -> RandomExperts:
    return RandomExperts(SIZE, Kinds.of(kind, SIZE), layers)


# --- the experts and their truth ---------------------------------------------


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q5_1, Type.F32, Type.BF16], ids=lambda kind: kind.name)
def test_the_truth_is_that_of_the_reference(kind: Type) -> None:
    made, ops = experts(kind), ReferenceOps(torch.float64)
    x = np.random.default_rng(2).standard_normal((5, SIZE.hidden), np.float32)
    routes = [Router(SIZE, 2).draw(5), Router(SIZE, 2).draw(5)]
    for layer, route in enumerate(routes):
        matrices = [ops.matrix(m.kind, m.rows, m.cols, made.blocks(m, layer), SIZE.experts) for m in (made.gate, made.up, made.down)]
        out = torch.zeros(5, SIZE.hidden, dtype=torch.float64)
        ops.experts(*matrices, torch.from_numpy(x), torch.from_numpy(route.ids), torch.from_numpy(route.weights), out)
        np.testing.assert_allclose(made.exact(x, layer * SIZE.experts + route.ids, route.weights), out.numpy(), rtol=1e-10)


def test_every_expert_is_memory_of_its_own_with_the_first_one_s_rows() -> None:
    made = experts(Type.Q4_0)
    blocks = np.concatenate([np.frombuffer(made.blocks(made.gate, layer), np.uint8) for layer in range(2)])
    matrices = blocks.reshape(12, SIZE.ffn, row_bytes(Type.Q4_0, SIZE.hidden))
    assert len({matrix.tobytes() for matrix in matrices}) > 6
    assert len({tuple(sorted(row.tobytes() for row in matrix)) for matrix in matrices}) == 1
    assert 0.8 < dequantize(matrices[0].tobytes(), Type.Q4_0, (SIZE.ffn, SIZE.hidden)).std() * SIZE.hidden**0.5 < 1.2


def test_down_takes_another_type_where_the_rows_are_no_whole_blocks() -> None:
    """V2-Lite's 1408 is 5.5 x 256."""
    size = LayerSize(64, 6, 2048, 1408)
    kinds = Kinds.of(Type.Q4_K, size)
    assert (kinds.gate_up, kinds.down) == (Type.Q4_K, Type.Q5_0)
    assert kinds.expert_bytes(size) == 2 * 1408 * 2048 // 256 * 144 + 2048 * 1408 // 32 * 22
    assert (kinds.layers(size) - 1) * 64 * kinds.expert_bytes(size) < COLD_BYTES <= kinds.layers(size) * 64 * kinds.expert_bytes(size)


# --- routes ------------------------------------------------------------------


def test_tokens_have_different_experts_and_weights_that_sum_to_one() -> None:
    routes = Router(LayerSize(64, 8, 32, 32), 1).draw(200)
    assert all(len(set(ids)) == 8 for ids in routes.ids.tolist())
    np.testing.assert_allclose(routes.weights.sum(1), 1, rtol=1e-5)
    assert routes.ids.min() == 0
    assert routes.ids.max() == 63
    assert np.bincount(routes.ids.ravel()).max() < 1.8 * 25  # 25 is the mean
    assert routes.touched == 64


@pytest.mark.parametrize("q", [1, 3, 16])
def test_an_expert_rests_until_all_others_had_their_turn(q: int) -> None:
    router = Router(LayerSize(64, 6, 32, 32), 2)
    for layer in (0, 1) * 20:
        routes = router.draw(q)
        assert routes.layer == layer
        assert routes.touched == len(np.unique(routes.ids))
    turns = [np.unique(routes.ids) for routes in (router.draw(1) for _ in range(20)) if routes.layer == 0]
    assert len(np.unique(np.concatenate(turns))) == 60  # ten calls of six: none comes twice


def test_few_tokens_meet_on_experts_as_at_random() -> None:
    """Four tokens of eight among 64 touch 64 * (1 - (7/8)^4) = 26.5 experts in the mean, not 32."""
    router = Router(LayerSize(64, 8, 32, 32), 1)
    assert 25.5 < np.mean([router.draw(4).touched for _ in range(300)]) < 27.5


# --- what is timed -----------------------------------------------------------


class FakeLayers:
    """Gives the truth, off by a known share; counts what it is asked for."""

    def __init__(self, made: RandomExperts, off: float = 0.0) -> None:
        self.made, self.off, self.calls, self.xs = made, off, [], []

    def call(self, routes: Routes, number: int) -> None:
        self.calls.append((len(routes.ids), number))

    def result(self, routes: Routes, x: np.ndarray) -> np.ndarray:
        self.xs.append(x)
        return self.made.exact(x, routes.layer * SIZE.experts + routes.ids, routes.weights) * (1 + self.off)


def test_calls_are_warmed_up_and_each_has_tokens_of_its_own() -> None:
    layers = FakeLayers(experts())
    times = time_calls(layers, Router(SIZE, 2), 3, repeat=7)
    assert len(times.seconds) == len(times.touched) == 7
    assert len(layers.calls) > 7
    timed = [number for _, number in layers.calls[-7:]]
    assert timed == list(range(timed[0], timed[0] + 7))


@pytest.mark.parametrize("off", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("q", [1, 2, 30])
def test_the_error_is_relative_to_the_truth(q: int, off: float) -> None:
    made = experts()
    assert relative_error(made, FakeLayers(made, off), Router(SIZE, 2), q, 1) == pytest.approx(off, abs=1e-12)


@pytest.mark.parametrize("q", [1, 3, 30])
def test_errors_are_those_of_enough_tokens_without_and_with_outliers(q: int) -> None:
    made = RandomExperts(LayerSize(6, 2, 1024, 32), Kinds(Type.Q8_0, Type.Q8_0), 1)
    layers = FakeLayers(made, 0.5)
    assert layer_errors(made, layers, Router(made.size, 1), q) == (pytest.approx(0.5), pytest.approx(0.5))
    calls = len(layers.xs) // 2
    assert calls * q >= SAMPLED > (calls - 1) * q
    gaussian, outliers = (np.concatenate(layers.xs[part : part + calls]) for part in (0, calls))
    assert np.abs(gaussian).max() < 8
    large = (np.abs(layers.xs[calls]).max(0) > 8).sum()  # of a Gaussian times 8
    assert 1 <= large <= 5
    assert outliers.std() == pytest.approx((1 + 63 * 5 / 1024) ** 0.5, rel=0.1)


def test_what_a_point_counts() -> None:
    point = Point.of(SIZE, ("q8_0", "q8_0"), 1000.0, 4, Times((0.001, 0.004, 0.002), (4, 8, 6)), (0.01, 0.02))
    assert (point.error, point.outliers) == (0.01, 0.02)
    assert (point.ms, point.ms_min, point.ms_max, point.calls) == (2.0, 1.0, 4.0, 3)
    assert point.gbps == pytest.approx(0.003)  # medians of 4, 2 and 3 MB/s
    operations = 2 * 3 * 64 * 96 * 4 * 2
    assert point.tflops == pytest.approx(operations / 0.002 / 1e12)
    assert point.intensity == pytest.approx(operations / 6000)


@pytest.mark.parametrize(("kind", "bound"), [(Type.Q8_0, 0.02), (Type.F32, 1e-5)], ids=["q8_0", "f32"])
def test_the_native_layer_end_to_end(kind: Type, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.bench.random_experts.COLD_BYTES", 1 << 20)
    monkeypatch.setattr("server.bench.experts.WARM_S", 0.0)
    ops = open_ops(2)
    bench = Bench(ops, SIZE, (1, 5, 40), sweep_bytes=4 << 20, repeat=3)
    points = list(bench.run((kind,)))
    ops.close()
    assert [(point.format, point.q, point.calls) for point in points] == [(kind.name.lower(), q, 3) for q in (1, 5, 40)]
    assert all(0 < point.error < bound for point in points)
    assert all(0 < point.ms_min <= point.ms <= point.ms_max for point in points)
    assert bench.limits.gbps == max(bench.limits.sweeps) > 0
    assert len(bench.limits.sweeps) == 4  # two before and two after


def test_floats_are_held_against_the_peak_of_floats() -> None:
    limits = Limits(1 << 30, (10.0, 12.0), {"f32": 1e12, "int8": 4e12})
    assert (limits.peak(Type.Q4_K), limits.peak(Type.BF16), limits.gbps) == (4.0, 1.0, 12.0)


# --- the picture -------------------------------------------------------------


def some_points() -> list[Point]:
    return [Point(name, name, q, 5, q, q, q, 10.0 / q, 0.01 * q, 3.5 * q, 0.01, 0.02) for name in ("q4_k", "q<8>") for q in (1, 16, 512)]


def test_the_roofline_is_a_picture_that_names_everything() -> None:
    limits = Limits(1 << 30, (20.0,), {"f32": 0.2e12, "int8": 0.8e12})
    root = ElementTree.fromstring(roofline("a < b & c", "2 threads", limits, some_points()))
    svg = "{http://www.w3.org/2000/svg}"
    texts = ["".join(text.itertext()) for text in root.iter(f"{svg}text")]
    assert {"a < b & c", "2 threads", "q4_k", "q<8>", "memory, 20 GB/s", "int8 peak, 0.8 T", "f32 peak, 0.2 T", "512"} <= set(texts)
    titles = ["".join(title.itertext()) for circle in root.iter(f"{svg}circle") for title in circle]
    assert "q4_k, q=16: 16 ms, 0.625 GB/s, 0.16 TFLOPS" in titles
    assert len(titles) == 6
    places = [(float(circle.get("cx", 0)), float(circle.get("cy", 0))) for circle in root.iter(f"{svg}circle")]
    assert all(0 < x < 960 and 0 < y < 600 for x, y in places)


def test_points_right_are_more_intense_and_points_above_are_faster() -> None:
    limits = Limits(1 << 30, (20.0,), {"f32": 0.2e12, "int8": 0.8e12})
    root = ElementTree.fromstring(roofline("t", "s", limits, some_points()[:3]))
    places = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter("{http://www.w3.org/2000/svg}circle") if len(c)]
    assert places == sorted(places, key=lambda place: (place[0], -place[1]))
    assert places[0][1] > places[-1][1]
    assert places[1][0] - places[0][0] == pytest.approx((places[2][0] - places[1][0]) * np.log(16) / np.log(32), abs=0.2)


# --- the command -------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of megabytes, and a sweep of as many."""
    monkeypatch.setattr("server.bench.random_experts.COLD_BYTES", 1 << 20)
    monkeypatch.setattr("server.bench.experts.WARM_S", 0.0)
    monkeypatch.setattr(bench_experts, "FULL_SWEEP", 8 << 20)
    monkeypatch.setattr(bench_experts, "LEAST_SWEEP", 1 << 20)
    monkeypatch.setitem(SHAPES, "tiny", tiny("v2-lite"))


COMMAND = ["bench", "experts", "--shape", "tin", "--experts", "8", "--q", "1,3", "--repeat", "2", "--cpu_infer", "1"]


@pytest.mark.usefixtures("small")
def test_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "r.svg"
    assert main([*COMMAND, "--format", "q8_0,Q4_K", "--json", "--plot", str(plot)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {name: result[name] for name in ("threads", "shape", "experts", "top_k", "hidden", "ffn")} == {
        "threads": 1, "shape": "tiny", "experts": 8, "top_k": 4, "hidden": 256, "ffn": 96,
    }  # fmt: skip
    assert [(p["format"], p["q"], p["calls"]) for p in result["points"]] == [("q8_0", 1, 2), ("q8_0", 3, 2), ("q4_k", 1, 2), ("q4_k", 3, 2)]
    for point in result["points"]:
        assert 0 < point["error"] < 0.02
        assert 0 < point["outliers"] < 0.03
        assert point["of_sweep"] == pytest.approx(point["gbps"] / result["sweep"]["gbps"])
        assert point["of_peak"] == pytest.approx(point["tflops"] / max(result["peak_tflops"].values()))
    assert result["sweep"]["bytes"] == 8 << 20
    assert len(result["sweep"]["passes"]) == 6
    assert not result["sweep"]["void"]
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", ["shard", "replicate"])
def test_experts_over_pretended_nodes(mode: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = min(os.sched_getaffinity(0))
    monkeypatch.setenv("MOESPAN_NUMA_NODES", f"{cpu}:{cpu}")
    assert main([*COMMAND[:-1], "2", "--numa", mode, "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["numa"], result["threads"]) == (mode, 2)
    assert all(0 < point["error"] < 0.02 for point in result["points"])
    assert f"NUMA, {mode}" in printed.err


@pytest.mark.usefixtures("small")
def test_the_table_and_a_void_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--expect_gbs", "1e6"]) == 1
    printed = capsys.readouterr()
    assert "tiny: 8 experts of 256 x 96, 4 a token; 1 threads" in printed.out
    assert "q4_k: down is q5_0, since rows of 96 are no whole number of blocks." in printed.out
    assert re.search(r"The same threads read [\d.]+ GB/s \(best of 4 sweeps over 8\.4 MB\) and reach [\d.e-]+ T of f32", printed.out)
    assert re.search(r"q4_k +1 +[\d.]+ +[\d.]+ +[\d.]+ +2 +[\d.]+ +\d+% +[\d.e-]+ +\d+% +[01]\.\d+% +[0-2]\.\d+%", printed.out)
    assert re.search(r"void: the sweep read [\d.]+ GB/s, less than 90% of the 1e\+06 that were expected", printed.err)


@pytest.mark.usefixtures("small")
def test_a_machine_with_little_memory_sweeps_less_and_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_experts, "available_memory", lambda: (1 << 30) + (7 << 20))
    assert main(COMMAND) == 0
    assert re.search(r"4 sweeps over \d\.\d MB, not 8\.4 MB, for want of memory", capsys.readouterr().out)
    monkeypatch.setattr(bench_experts, "available_memory", lambda: 1 << 30)
    assert main(COMMAND) == 1
    assert "and 1.1 GB are free. Take fewer with --experts" in capsys.readouterr().err


def test_shapes_by_their_beginning() -> None:
    assert layer_size("v3", 64) == ("v3", LayerSize(64, 8, 7168, 2048))
    assert layer_size("v2-lite", 64) == ("v2-lite", LayerSize(64, 6, 2048, 1408))
    assert layer_size("qwen3-30b", 256) == ("qwen3-30b-a3b", LayerSize(256, 8, 2048, 768))
    with pytest.raises(ConfigError, match="--shape qwen3: there is more than one such model"):
        layer_size("qwen3", 64)


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["--shape", "llama-1b"], 2, "--shape llama-1b: there is no such model with experts; there is v2-lite,"),
        (["--experts", "7"], 2, "--experts 7: a token of v3 uses 8 of them."),
        (["--format", "q4_k,q9"], 2, "--format q9: there are no kernels for such a type; there are for f32,"),
        (["--format", "i8"], 2, "--format i8: there are no kernels"),
        (["--q", "1,x"], 2, "--q: invalid list of counts"),
        (["--plot", "nowhere/r.svg"], 2, "--plot nowhere/r.svg: there is no directory nowhere."),
        (["--gguf_path", "x"], 2, "`moespan bench experts` has no flag --gguf_path."),
    ],
)
def test_what_cannot_be_is_a_sentence(words: list[str], status: int, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "experts", *words]) == status
    assert sentence in capsys.readouterr().err
