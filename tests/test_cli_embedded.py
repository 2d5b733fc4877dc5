"""Which file a configuration means."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.cli.embedded import chosen_gguf
from server.config import ModelConfig
from server.errors import ModelNotFound


def test_the_directory_that_one_is_in_may_hold_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert chosen_gguf(ModelConfig(gguf_path=Path("."))) == Path("m.gguf")


@pytest.mark.parametrize("address", ["https://example.com/m.gguf", "http://example.com/m.gguf", "hf://name/m.gguf"])
def test_an_address_is_told_from_a_path(address: str) -> None:
    with pytest.raises(ModelNotFound, match="is an address, and nothing is downloaded here"):
        chosen_gguf(ModelConfig(gguf_path=Path(address)))
