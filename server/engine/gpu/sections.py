"""Routed experts as they lie in RAM, to be copied from there as bytes: in tile order or as rows of floats; in one piece, or a slice on each node of memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor

from server.engine.gpu.matrix import STRIP_ROWS, DeviceMatrix
from server.engine.gpu.roads import LayerShape
from server.engine.kernels.formats import FORMATS

_FLOATS = {int(Type.F32): torch.float32, int(Type.F16): torch.float16, int(Type.BF16): torch.bfloat16}


@dataclass(frozen=True, slots=True)
class HostMatrix:
    """`count` matrices in RAM, one behind the other: whole experts, or the slice of them that one node of memory has."""

    type_id: int
    address: int
    nbytes: int
    rows: int
    cols: int
    count: int

    @property
    def each(self) -> int:
        """Bytes of one."""
        return self.nbytes // self.count

    def bytes_of(self, first: int, count: int) -> Tensor:
        """The bytes of some of them, borrowed."""
        memory = (ctypes.c_uint8 * (count * self.each)).from_address(self.address + first * self.each)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def on_device(self, data: Tensor, count: int) -> DeviceMatrix:
        """The first `count` of them, whose bytes `data` begins with."""
        data = data[: count * self.each]
        if dtype := _FLOATS.get(self.type_id):
            return DeviceMatrix(self.type_id, self.rows, self.cols, count, data.view(dtype).view(count, self.rows, self.cols))
        return DeviceMatrix(self.type_id, self.rows, self.cols, count, data.view(count, -(-self.rows // STRIP_ROWS), -1))


Section = tuple[HostMatrix, HostMatrix, HostMatrix]  # gate, up, down of all experts, or of a slice of each


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The routed experts of a layer: the native module's matrices, laid out."""

    gate: Any  # `count` of [ffn, hidden]
    up: Any
    down: Any  # `count` of [hidden, ffn]

    def unreadable(self) -> str:
        """ "", or why their bytes are of no use to the GPU."""
        for matrix in (self.gate, self.up, self.down):
            if matrix.type_id not in _FLOATS and matrix.type_id not in FORMATS:
                return f"experts of type {Type(matrix.type_id).name} stay in the file's order, which only the CPU reads"
            if matrix.strips_left:
                return "the experts are not laid out yet"
        return ""

    def sections(self) -> list[Section]:
        """One; where the experts are sliced over nodes of memory, one for each slice: what the experts give is then the sum of the sections'."""
        gate, up, down = (_parts(matrix) for matrix in (self.gate, self.up, self.down))
        if gate[0].rows == self.gate.rows:  # in one piece, or a copy on each node
            return [(gate[0], up[0], down[0])]
        return [section for section in zip(gate, up, down, strict=True) if section[0].nbytes]

    def ranges(self) -> list[tuple[int, int]]:
        """The (address, bytes) that page locks are for: memory of our own. Rows of floats lie in a map of the file, which drivers may refuse."""
        return [(matrix.address, matrix.nbytes) for section in self.sections() for matrix in section if matrix.type_id in FORMATS]

    def shape(self, top_k: int) -> LayerShape:
        nbytes = sum(matrix.each for section in self.sections() for matrix in section)
        return LayerShape(self.gate.count, top_k, nbytes, 3 * self.gate.rows * self.gate.cols, self.gate.cols)


def _parts(matrix: Any) -> list[HostMatrix]:
    parts = matrix.parts or [(matrix.address, matrix.nbytes, matrix.rows, matrix.cols)]
    return [HostMatrix(matrix.type_id, address, nbytes, rows, cols, matrix.count) for address, nbytes, rows, cols in parts]
