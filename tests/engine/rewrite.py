"""A tiny model's file with something changed: how tests make files that are damaged, old or odd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.engine.gguf.reader import GGUFFile
from server.engine.gguf.writer import TensorData, write_gguf
from tests.engine.tiny_models import write_tiny

Change = Callable[[dict[str, object], dict[str, TensorData]], None]


def rewritten(path: Path, change: Change, family: str = "llama", **fields: Any) -> GGUFFile:
    """A tiny file after `change` had its way with its metadata and tensors."""
    write_tiny(path, family, **fields)
    return rewrite(path, change)


def rewrite(path: Path, change: Change) -> GGUFFile:
    """Change the file at `path`."""
    file = GGUFFile.open(path)
    tensors = {name: TensorData.from_blocks(name, info.shape, info.type_id, memoryview(bytes(file.data(name)))) for name, info in file.tensors.items()}
    metadata = dict(file.metadata)
    change(metadata, tensors)
    write_gguf(path, metadata, tensors.values())
    return GGUFFile.open(path)


def renamed(tensor: TensorData, name: str, shape: tuple[int, ...] | None = None) -> TensorData:
    """The same bytes under another name, or in another shape."""
    return TensorData(name, shape or tensor.shape, tensor.type_id, tensor.chunks)
