"""The comparison with kt-kernel, with a library in its place that computes the layer in float64."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from server.engine.gguf.quants import dequantize, row_bytes
from server.engine.models.shapes import SHAPES
from tests.engine.gguf.test_synth import tiny
from tests.peers import kt_experts
from tests.peers.kt_experts import main, table


def at(address: int, dtype: Any, *shape: int) -> NDArray[Any]:
    """The array at an address."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * count).from_address(address), dtype).reshape(shape)


class FakeLayer:
    """kt-kernel's layer classes: bf16 tokens in and out."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def load_weights_task(self) -> Any:
        c = self.config

        def load() -> None:
            def matrix(address: int, kind: Type, rows: int, cols: int) -> NDArray[np.float32]:
                data = at(address, np.uint8, c.experts * rows * row_bytes(kind, cols))
                return dequantize(data, kind, (c.experts, rows, cols)).copy()

            kinds = [Type(getattr(c, name, Type.BF16)) for name in ("gate_type", "up_type", "down_type")]
            self.gate, self.up = (matrix(a, k, c.ffn, c.hidden) for a, k in ((c.gate_proj, kinds[0]), (c.up_proj, kinds[1])))
            self.down = matrix(c.down_proj, kinds[2], c.hidden, c.ffn)

        return load

    def forward_task(self, batch: int, top_k: int, ids: int, weights: int, x: int, out: int, incremental: bool) -> Any:
        def forward() -> None:
            q = int(at(batch, np.int32, 1)[0])
            tokens = dequantize(at(x, np.uint8, q * self.config.hidden * 2), Type.BF16, (q, self.config.hidden))
            result = at(out, np.uint16, q, self.config.hidden)
            for t, (own, factors) in enumerate(zip(at(ids, np.int64, q, top_k), at(weights, np.float32, q, top_k), strict=True)):
                total = np.zeros(self.config.hidden)
                for e, factor in zip(own, factors, strict=True):
                    gate = self.gate[e] @ tokens[t]
                    total += factor * (self.down[e] @ (gate / (1 + np.exp(-gate)) * (self.up[e] @ tokens[t])))
                result[t] = total.astype(np.float32).view(np.uint32) >> 16
            assert incremental is False

        return forward


class FakeCpu:
    backend_ = "pool"

    def submit(self, task: Any) -> None:
        task()

    def sync(self) -> None:
        pass


@pytest.fixture(autouse=True)
def kt_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(experts: int, top_k: int, hidden: int, ffn: int, mask: int) -> SimpleNamespace:
        return SimpleNamespace(experts=experts, top_k=top_k, hidden=hidden, ffn=ffn)

    moe = SimpleNamespace(MOEConfig=config, AMXInt8_MOE=FakeLayer, AVX2BF16_MOE=FakeLayer, MOE=FakeLayer)
    monkeypatch.setitem(__import__("sys").modules, "kt_kernel", SimpleNamespace(kt_kernel_ext=SimpleNamespace(moe=moe)))
    monkeypatch.setattr(kt_experts, "open_cpu", lambda threads: FakeCpu())
    monkeypatch.setattr(kt_experts, "COLD_BYTES", 1)
    monkeypatch.setitem(SHAPES, "tiny", tiny("v2-lite"))
    monkeypatch.setattr("server.bench.experts.WARM_S", 0.0)


COMMAND = ["--shape", "tiny", "--experts", "8", "--q", "1,2", "--threads", "1", "--repeat", "2"]


def test_the_same_fields_as_our_own_bench_and_the_right_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--format", "int8,bf16,q8_0", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [(p["format"], p["q"]) for p in result["points"]] == [(f, q) for f in ("int8", "bf16", "q8_0") for q in (1, 2)]
    assert {"ms", "ms_min", "ms_max", "gbps", "tflops", "intensity", "error", "calls", "down_format"} < set(result["points"][0])
    assert (result["hidden"], result["ffn"], result["top_k"]) == (256, 96, 4)
    assert all(0 < point["error"] < 0.008 for point in result["points"])  # the fake's sums are cut to bf16, and nothing else
    int8, bf16 = (next(p for p in result["points"] if p["format"] == name) for name in ("int8", "bf16"))
    assert int8["intensity"] == pytest.approx(2 * bf16["intensity"])  # half of the bytes


def test_a_format_that_its_build_lacks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"no AMXInt4_MOE, and so no int4\."):
        main([*COMMAND, "--format", "int4"])


def test_one_table_of_both(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    point = {"format": "q4_k", "q": 1, "ms": 0.001, "gbps": 100.0, "tflops": 0.5, "error": 0.012}
    (tmp_path / "ours.json").write_text(json.dumps({"points": [point]}))
    assert main([*COMMAND, "--format", "bf16", "--beside", str(tmp_path / "ours.json")]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "| q4_k | 0.001 | 100.0 | 0.5 | 1.20% | " in lines[2]
    assert lines[3].startswith("| 2 | bf16 |")
    assert {line.count("|") for line in lines} == {13}
    assert table([{**point, "ms": 2.0}], [point]).splitlines()[2].endswith("| 2000.00 |")
