"""The model's tensors on their way from the file into layers: looked up by name, checked for shape, each used or reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray
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
        self._matrices: dict[str, Matrix] = {}  # what may be laid out, by tensor
        self._made: list[Matrix] = []
        self._left: set[str] = set()  # known, and not read

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All that the file holds."""
        return self._file.tensors

    def has(self, name: str) -> bool:
        return name in self._file.tensors

    def matrix(self, name: str, rows: int, cols: int, count: int | None = None) -> Matrix:
        """The weight matrix `name`, [rows, cols] in GGUF blocks, or with a count as many of them: [count, rows, cols], or [count * rows, cols].

        Raises ModelError when it is missing or has another shape, UnsupportedModel when its type does not run here.
        """
        info = self._take(name, (rows, cols)) if count is None else self._take(name, (count, rows, cols), (count * rows, cols))
        matrix = self._matrices[name] = self._matrix(name, info.type_id, rows, cols, self._file.data(name), count or 1)
        return matrix

    def table(self, name: str, rows: int, cols: int) -> Matrix:
        """The matrix `name` [rows, cols] whose rows are looked up: it stays as it lies in the file. Raises as `matrix` does."""
        info = self._take(name, (rows, cols))
        return self._matrix(name, info.type_id, rows, cols, self._file.data(name), 1)

    def made(self, name: str, type_id: int, rows: int, cols: int, blocks: memoryview, count: int) -> Matrix:
        """`count` matrices [rows, cols] from blocks that were made of the tensor `name`; the maker keeps the memory alive. Raises UnsupportedModel."""
        self._made.append(self._matrix(name, type_id, rows, cols, blocks, count))
        return self._made[-1]

    def _matrix(self, name: str, type_id: int, rows: int, cols: int, blocks: memoryview, count: int) -> Matrix:
        try:
            return self._ops.matrix(int(type_id), rows, cols, blocks, count)
        except ValueError as error:
            raise UnsupportedModel(f"{self._file.path}: tensor {name} cannot be used: {error}.") from None

    def lay_out(self, progress: Callable[[int, int], None]) -> None:
        """Read all tensors that are used, in the file's order, each matrix into the order that its maker is fastest with.

        `progress` is told the bytes done and those in all.

        What was laid out is given back to the page cache as it goes: at no time is much more than the model itself in memory.
        Raises GGUFError where the disk fails, DeviceError where memory does not suffice.
        """
        for matrix in self._made:
            for _ in self._ops.lay_out(matrix):
                pass
        sizes = {name: self._file.tensors[name].nbytes for name in sorted(self._used, key=self._file.place)}
        done, total = 0, sum(sizes.values())
        for name, nbytes in sizes.items():
            for read in self._lay_out_tensor(name):
                progress(done + read, total)
            done += nbytes
            progress(done, total)

    def _lay_out_tensor(self, name: str) -> Iterator[int]:
        """Yields the bytes read so far, now and then. What its maker does not lay out stays in the map."""
        begin = end = 0
        for first, last in self._ops.lay_out(self._matrices[name]) if name in self._matrices else ():
            self._file.give_back(name, begin, first)
            self._file.page_in(name, first, last)
            yield first
            begin, end = first, last
        self._file.give_back(name, begin, end)
        if end == 0:
            self._file.page_in(name, 0, self._file.tensors[name].nbytes)

    def rows(self, name: str, rows: int, cols: int) -> tuple[GGMLQuantizationType, NDArray[np.uint8]]:
        """The type and the blocks of the matrix `name` [rows, cols], a row of bytes each, for what is made of them at load."""
        info = self._take(name, (rows, cols))
        return info.type_id, np.frombuffer(self._file.data(name), np.uint8).reshape(rows, -1)

    def vector(self, name: str, length: int) -> Tensor:
        """The vector `name` as float32 [length], where the Ops maker's activations are."""
        info = self._take(name, (length,))
        return torch.from_numpy(np.array(dequantize(self._file.data(name), int(info.type_id), (length,)), dtype=np.float32)).to(self._ops.device)

    def leave(self, names: Iterable[str]) -> None:
        """These tensors are known and are not read: nothing is lost without them."""
        self._left |= set(names)

    def check_all_used(self) -> None:
        """Every tensor of the file was asked for, or left: to run without some would give wrong answers silently."""
        unused = sorted(set(self._file.tensors) - self._used - self._left)
        if unused:
            shown = ", ".join(unused[:4]) + (f" and {len(unused) - 4} more" if len(unused) > 4 else "")
            raise UnsupportedModel(
                f"{self._file.path}: it holds tensors that this version does not use ({shown}); running without them would give wrong answers."
            )

    def _take(self, name: str, *shapes: tuple[int, ...]) -> TensorInfo:
        """The tensor, which must have one of the shapes; axes of length 1 do not count, since converters drop some."""
        info = self._file.tensors.get(name)
        if info is None:
            raise ModelError(f"{self._file.path}: tensor {name} is missing. The file is incomplete: download or convert it again.")
        if _squeezed(info.shape) not in map(_squeezed, shapes):
            raise ModelError(
                f"{self._file.path}: tensor {name} has the shape {tuple(info.shape)}, but the metadata asks for {shapes[0]}. Convert the model again."
            )
        self._used.add(name)
        return info


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
