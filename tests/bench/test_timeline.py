"""The picture of a decode step: shares, what is drawn where, and what is said where there are no turns to show; on a GPU, a real one."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from server.bench import timeline
from server.bench.timeline import Timeline
from server.config import EngineConfig
from server.engine.gguf.reader import GGUFFile
from server.engine.gpu.profile import Span
from server.engine.loader import load_model
from server.errors import ConfigError
from tests.engine.gpu.test_engine import on_gpu, open_engine
from tests.engine.tiny_models import write_tiny

STEP = Timeline(
    kernels=(
        Span("_rms_norm", 10, 20),
        Span("_send", 20, 30),
        Span("_tiles", 32, 50),
        Span("_receive", 100, 110),
        Span("_send", 140, 150),
        Span("_receive", 200, 210),
    ),
    turns=(Span("routed experts", 30, 98), Span("routed experts", 152, 198)),
)


def test_shares_are_of_the_time_that_counts() -> None:
    assert STEP.end == 210
    assert STEP.pool_share == pytest.approx((68 + 46) / 168)
    assert STEP.gpu_share == pytest.approx(68 / 210)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_tiles", "products"),
        ("_attend_absorbed", "attention"),
        ("_send", "hand-over"),
        ("_route", "norm, SwiGLU, router"),
        ("_peaks", "sampling and the rest"),
    ],
)
def test_kernels_have_kinds(name: str, kind: str) -> None:
    assert timeline.kind_of(name) == kind


def test_both_views_hold_what_lies_in_them() -> None:
    root = ET.fromstring(timeline.draw("a <model>", STEP))
    bars = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert bars[0] == "a <model>"
    assert bars.count("routed experts: 68.0 us") == 2  # its end is seen in the second view too
    assert bars.count("rms_norm: 10.0 us") == 1
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "0.21 ms; from the first layer of experts to the last the pool works 68% of the time; the GPU 32%" in texts


def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "deepseek-v3")
    engine = load_model(GGUFFile.open(tmp_path / "m.gguf"), EngineConfig(cpu_infer=1, cache_lens=64, device="cpu")).engine
    with pytest.raises(ConfigError, match="needs a GPU"):
        timeline.takes_turns(engine)
    engine.close()


@on_gpu
@pytest.mark.gpu
def test_a_real_step(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "deepseek-v3")
    engine = open_engine(tmp_path / "m.gguf")
    step = timeline.measure(timeline.takes_turns(engine), 5)
    names = {kernel.name for kernel in step.kernels}
    assert {"_send", "_receive", "_tiles"} & names
    assert len(step.turns) == sum(kernel.name == "_send" for kernel in step.kernels)
    assert all(kernel.begin >= 0 for kernel in step.kernels)
    ET.fromstring(timeline.draw("tiny", step))
    engine.close()
