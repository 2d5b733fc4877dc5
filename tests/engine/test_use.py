"""What the engine tells of its own work: bytes of weights to the last one, the pool's time, and nothing once it is closed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from server.config import EngineConfig
from server.engine.engine import WARM_UP
from server.engine.gguf.reader import GGUFFile
from server.engine.loader import load_model
from server.engine.protocol import Step
from server.types import EngineUse
from tests.engine.tiny_models import write_tiny


@pytest.mark.parametrize("family", ["qwen3moe", "deepseek-v3", "llama"])
def test_a_token_reads_its_experts_and_the_dense_weights_once(tmp_path: Path, family: str) -> None:
    """F32 weights: what lies in memory is what lies in the file."""
    write_tiny(tmp_path / "m.gguf", family)
    file = GGUFFile.open(tmp_path / "m.gguf")
    loaded = load_model(file, EngineConfig(cpu_infer=2, cache_lens=64, device="cpu"))
    engine = loaded.engine
    engine.start()
    before = use_of(engine.use())
    engine.step(Step((7,), 0, (0,), engine.new_sampler(WARM_UP, (7,))))
    after = use_of(engine.use())
    sizes = {name: info.nbytes for name, info in file.tensors.items()}
    experts = [name for name in sizes if "_exps." in name]
    expected = sum(sizes[name] // file.tensors[name].shape[0] for name in experts) * loaded.experts_per_token
    assert after.expert_bytes - before.expert_bytes == expected
    dense = sum(size for name, size in sizes.items() if name not in experts and len(file.tensors[name].shape) > 1 and name != "token_embd.weight")
    head = 0 if "output.weight" in sizes else sizes["token_embd.weight"]
    assert after.dense_bytes - before.dense_bytes == dense + head
    assert after.pool_threads == 2
    assert 0 < after.pool_busy_s - before.pool_busy_s < 2
    engine.close()
    assert engine.use() is None


def use_of(use: EngineUse | None) -> EngineUse:
    assert use is not None
    return use


def test_an_idle_engine_does_nothing(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "qwen3")
    engine = load_model(GGUFFile.open(tmp_path / "m.gguf"), EngineConfig(cpu_infer=2, cache_lens=64, device="cpu")).engine
    engine.start()
    before = engine.use()
    time.sleep(0.02)
    assert engine.use() == before
    engine.close()
