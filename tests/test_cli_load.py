"""What is said of the machine before a model is loaded."""

from __future__ import annotations

import logging

import pytest
import torch

from server.cli import load
from server.config import Device, EngineConfig

CUDA = "There is a GPU, but everything runs on the CPU: torch is built for CUDA 13.0"


@pytest.mark.parametrize(
    ("cuda", "usable", "visible", "device", "said"),
    [
        (None, False, None, "auto", "There is a GPU, but this torch cannot use it"),
        ("13.0", False, None, "auto", CUDA),
        ("13.0", False, "0", "auto", CUDA),
        ("13.0", True, None, "auto", ""),
        ("13.0", False, "", "auto", ""),
        ("13.0", False, "-1", "auto", ""),
        ("13.0", False, None, "cpu", ""),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_mentioned(
    cuda: str | None, usable: bool, visible: str | None, device: Device, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(load, "gpu_nodes", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with caplog.at_level(logging.INFO):
        load._mention_gpu(EngineConfig(device=device))
    assert caplog.text.count("There is a GPU") == bool(said)
    assert said in caplog.text


def test_a_machine_without_a_gpu_is_told_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(load, "gpu_nodes", lambda: 0)
    load._mention_gpu(EngineConfig())
    assert not caplog.messages
