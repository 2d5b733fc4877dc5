"""--experts_per_token: a model with fewer experts a token is the file that says so, and whoever looks can see it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.cli.load import load_chat
from server.config import Config, EngineConfig, ModelConfig
from server.engine.gguf.reader import GGUFFile
from server.engine.loader import load_model
from server.engine.protocol import Step
from server.errors import ConfigError
from server.metrics import Metrics
from tests.api.live import MODEL, live
from tests.engine.rewrite import rewrite
from tests.engine.tiny_models import write_tiny

IDS = tuple(range(3, 40))
FAMILIES = ["mixtral", "qwen2moe", "qwen3moe", "glm4moe", "deepseek-v2", "deepseek-v3"]


def logits(file: GGUFFile, experts: int | None = None) -> Tensor:
    engine = load_model(file, EngineConfig(cpu_infer=1, experts_per_token=experts)).engine
    try:
        return engine.logits(Step(IDS, 0, (0,), None))
    finally:
        engine.close()


def says(experts: int) -> Callable[[dict[str, object], object], None]:
    def change(metadata: dict[str, object], tensors: object) -> None:
        metadata[f"{metadata['general.architecture']}.expert_used_count"] = experts

    return change


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_experts_are_the_file_that_says_so(family: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_tiny(path, family)
    file = GGUFFile.open(path)
    own = int(str(file.metadata[f"{file.architecture}.expert_used_count"]))
    whole, found = logits(file), [logits(file, experts) for experts in range(1, own + 1)]
    torch.testing.assert_close(found[-1], whole, rtol=0, atol=0)
    for experts, fewer in enumerate(found[:-1], 1):
        torch.testing.assert_close(fewer, logits(rewrite(path, says(experts))), rtol=0, atol=0)
        assert float((fewer - whole).norm() / whole.norm()) > 1e-2


def test_more_than_the_models_own_and_models_without_experts_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "v3.gguf", "deepseek-v3")
    write_tiny(tmp_path / "dense.gguf", "llama")
    with pytest.raises(ConfigError, match=r"--experts_per_token 4 is more than the 3 that the model was trained with\. Use 3 or fewer"):
        logits(GGUFFile.open(tmp_path / "v3.gguf"), 4)
    with pytest.raises(ConfigError, match=r"--experts_per_token 1: this model has no experts\. Leave the flag out"):
        logits(GGUFFile.open(tmp_path / "dense.gguf"), 1)


@pytest.mark.parametrize(("family", "wanted", "shown"), [("qwen3moe", 2, 2.0), ("qwen3moe", None, 3.0), ("llama", None, 0.0)])
def test_metrics_and_the_log_show_it(family: str, wanted: int | None, shown: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny(tmp_path / "m.gguf", family, vocab=300)
    config = Config(model=ModelConfig(gguf_path=tmp_path / "m.gguf"), engine=EngineConfig(cpu_infer=1, experts_per_token=wanted))
    metrics = Metrics()
    with caplog.at_level(logging.INFO, logger="server"):
        load_chat(config, GGUFFile.open(tmp_path / "m.gguf"), metrics).service.close()
    assert metrics.registry.get_sample_value("moespan_experts_per_token") == shown
    assert ("Each token uses 2 routed experts (--experts_per_token); the model's own are 3." in caplog.text) is (wanted is not None)


def test_the_models_entry_shows_it_when_it_was_asked_for() -> None:
    with live(engine_config=EngineConfig(experts_per_token=6)) as server:
        assert server.get("/v1/models").json()["data"][0]["experts_per_token"] == 6
        assert server.get(f"/v1/models/{MODEL}").json()["experts_per_token"] == 6
    with live() as server:
        assert "experts_per_token" not in server.get(f"/v1/models/{MODEL}").json()
