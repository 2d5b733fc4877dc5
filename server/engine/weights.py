"""The model's tensors on their way from the file into layers: looked up by name, checked for shape, each used or reported."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from server.engine.gguf.header import TensorInfo
from server.engine.gguf.quants import dequantize
from server.engine.gguf.reader import GGUFFile
from server.engine.ops import Matrix, Ops
from server.errors import ModelError, UnsupportedModel


class Weights:
    """Hands out a GGUF file's tensors as an Ops maker's matrices (borrowed from the map) or as small float32 vectors (copied)."""

    def __init__(self, file: GGUFFile, ops: Ops) -> None:
        self._file = file
        self._ops = ops
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._file.tensors

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """The weight matrix `name`, [rows, cols] in GGUF blocks. Raises ModelError when it is missing or has another shape, UnsupportedModel
        when its type does not run here."""
        info = self._take(name, (rows, cols))
        try:
            return self._ops.matrix(int(info.type_id), rows, cols, self._file.data(name))
        except ValueError as error:
            raise UnsupportedModel(f"{self._file.path}: tensor {name} cannot be used: {error}.") from None

    def vector(self, name: str, length: int) -> Tensor:
        """The vector `name` as float32 [length]."""
        info = self._take(name, (length,))
        return torch.from_numpy(np.array(dequantize(self._file.data(name), int(info.type_id), (length,)), dtype=np.float32))

    def check_all_used(self) -> None:
        """Every tensor of the file was asked for: to run without some would give wrong answers silently."""
        unused = sorted(set(self._file.tensors) - self._used)
        if unused:
            shown = ", ".join(unused[:4]) + (f" and {len(unused) - 4} more" if len(unused) > 4 else "")
            raise UnsupportedModel(
                f"{self._file.path}: it holds tensors that this version does not use ({shown}); running without them would give wrong answers."
            )

    def _take(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self._file.tensors.get(name)
        if info is None:
            raise ModelError(f"{self._file.path}: tensor {name} is missing. The file is incomplete: download or convert it again.")
        if tuple(info.shape) != shape:
            raise ModelError(f"{self._file.path}: tensor {name} has the shape {tuple(info.shape)}, but the metadata asks for {shape}. Convert the model again.")
        self._used.add(name)
        return info
