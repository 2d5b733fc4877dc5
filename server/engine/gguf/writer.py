"""The one writer of GGUF files: tests, recipes and synthetic models go through `write_gguf`, or `write_split_gguf` for a model in several files.

Tensors say their name, shape and type first and make their bytes when their turn comes, chunk by chunk, so that a file far larger than
memory can be written. (gguf's own writer wants each tensor whole, and leaves half a file behind where something fails.) The file appears
under its name only once it is complete. Layout: see header.py; GGUF version 3, little-endian.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from server.engine.gguf.header import MAX_DIMS, MIN_ALIGNMENT, SCALARS
from server.engine.gguf.quants import quantize, row_bytes
from server.engine.gguf.split import TENSORS, split_metadata, split_paths

Chunk = bytes | memoryview  # an array gives its own with `.data`


@dataclass(frozen=True, slots=True)
class Typed:
    """A metadata value whose GGUF type is forced; for a list, the type of its items."""

    value: object
    kind: GGUFValueType


@dataclass(frozen=True, slots=True)
class TensorData:
    """A tensor to write. `chunks` is called once, when the tensor's turn comes, and yields its bytes in order, in pieces of any size."""

    name: str
    shape: tuple[int, ...]  # numpy order
    type_id: GGMLQuantizationType
    chunks: Callable[[], Iterable[Chunk]]

    @classmethod
    def from_array(cls, name: str, array: NDArray[np.floating], type_id: int) -> TensorData:
        """A float array, quantised when it is written."""
        kind = GGMLQuantizationType(type_id)
        return cls(name, array.shape, kind, lambda: [quantize(array, kind).data])

    @classmethod
    def from_blocks(cls, name: str, shape: Sequence[int], type_id: int, blocks: Chunk) -> TensorData:
        """Bytes that are in the type's blocks already."""
        return cls(name, tuple(shape), GGMLQuantizationType(type_id), lambda: [blocks])

    @property
    def nbytes(self) -> int:
        """Bytes that `chunks` must yield."""
        return math.prod(self.shape[:-1]) * row_bytes(self.type_id, self.shape[-1])


def write_gguf(path: str | Path, metadata: Mapping[str, object], tensors: Iterable[TensorData], *, alignment: int = GGUF_DEFAULT_ALIGNMENT) -> None:
    """Write a GGUF v3 file, replacing one of that name.

    metadata: ints become u32 (i32, u64, i64 where they do not fit), floats f32, bools bool, strings string; lists hold one of these, ints as i32;
    `Typed` forces a type. alignment: a power of two from 8 on, in bytes; written as general.alignment unless it is the default, 32.
    Raises ValueError on a value without a GGUF type, a tensor named twice or one that yields another size than its shape says; leaves no file then.
    """
    path = Path(path)
    table = list(tensors)
    header = _header({**metadata, **_alignment_pair(alignment)}, table, alignment)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(header)
            for tensor in table:
                _pad(file, alignment)
                _write_data(file, tensor)
            _pad(file, alignment)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_split_gguf(path: str | Path, metadata: Mapping[str, object], tensors: Iterable[TensorData], parts: int) -> list[Path]:
    """Write one model as `parts` files beside each other, OUT.gguf becoming OUT-00001-of-0000N.gguf and so on; return their paths.

    Tensors stay in order, and each file takes about the same number of bytes; all of `metadata` goes to the first (see split.py). Raises as write_gguf.
    """
    table = list(tensors)
    _check_names(table)
    paths = split_paths(Path(path), parts)
    try:
        for part, group in enumerate(_even_groups(table, parts)):
            pairs = split_metadata(part, parts, len(table))
            typed = {key: Typed(value, GGUFValueType.INT32 if key == TENSORS else GGUFValueType.UINT16) for key, value in pairs.items()}
            write_gguf(paths[part], {**(metadata if part == 0 else {}), **typed}, group)
    except BaseException:
        for written in paths:
            written.unlink(missing_ok=True)
        raise
    return paths


def _even_groups(table: Sequence[TensorData], parts: int) -> list[list[TensorData]]:
    """Runs of the table, each about a `parts`-th of its bytes. A tensor belongs where its middle lies."""
    whole, done = sum(tensor.nbytes for tensor in table), 0
    groups: list[list[TensorData]] = [[] for _ in range(parts)]
    for tensor in table:
        groups[min((2 * done + tensor.nbytes) * parts // (2 * whole), parts - 1)].append(tensor)
        done += tensor.nbytes
    return groups


def _alignment_pair(alignment: int) -> dict[str, object]:
    if alignment < MIN_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment} is not a power of two from {MIN_ALIGNMENT} on")
    return {} if alignment == GGUF_DEFAULT_ALIGNMENT else {"general.alignment": alignment}


def _header(metadata: Mapping[str, object], tensors: Sequence[TensorData], alignment: int) -> bytes:
    _check_names(tensors)
    out = bytearray(b"GGUF" + _u32(3) + _u64(len(tensors)) + _u64(len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _value(key, value)
    offset = 0
    for tensor in tensors:
        out += _tensor_entry(tensor, offset)
        offset += -(-tensor.nbytes // alignment) * alignment
    return bytes(out)


def _check_names(tensors: Sequence[TensorData]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"two tensors are named {tensor.name!r}")
        if not 1 <= len(tensor.shape) <= MAX_DIMS:
            raise ValueError(f"tensor {tensor.name!r} has shape {tensor.shape}: 1 to {MAX_DIMS} dimensions can be written")
        seen.add(tensor.name)


def _tensor_entry(tensor: TensorData, offset: int) -> bytes:
    dims = b"".join(_u64(dim) for dim in reversed(tensor.shape))
    return _string(tensor.name) + _u32(len(tensor.shape)) + dims + _u32(tensor.type_id) + _u64(offset)


def _value(key: str, value: object) -> bytes:
    """Type and value of one metadata pair."""
    kind, value = (value.kind, value.value) if isinstance(value, Typed) else (None, value)
    if not isinstance(value, (list, tuple)):
        kind = _scalar_kind(key, value, GGUFValueType.UINT32) if kind is None else kind
        return _u32(kind) + _pack(kind, value)
    kind = _item_kind(key, value) if kind is None else kind
    items = b"".join(_pack(kind, item) for item in value)
    return _u32(GGUFValueType.ARRAY) + _u32(kind) + _u64(len(value)) + items


def _scalar_kind(key: str, value: object, smallest: GGUFValueType) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return _int_kind(value, value, smallest)
    if isinstance(value, float):
        return GGUFValueType.FLOAT32
    if isinstance(value, str):
        return GGUFValueType.STRING
    raise ValueError(f"metadata {key!r} is a {type(value).__name__}, which GGUF has no type for")


def _item_kind(key: str, items: Sequence[object]) -> GGUFValueType:
    """One type for all items: a list of ints is i32 by the custom of other writers, ints beside floats are floats."""
    if not items:
        raise ValueError(f"metadata {key!r} is an empty list: say its type with Typed")
    ints = [item for item in items if isinstance(item, int)]
    kinds = {_scalar_kind(key, item, GGUFValueType.INT32) for item in items}
    if GGUFValueType.BOOL not in kinds and len(ints) == len(items):
        return _int_kind(min(ints), max(ints), GGUFValueType.INT32)
    if kinds == {GGUFValueType.INT32, GGUFValueType.FLOAT32}:
        return GGUFValueType.FLOAT32
    if len(kinds) > 1:
        raise ValueError(f"metadata {key!r} is a list of mixed types")
    return kinds.pop()


def _int_kind(low: int, high: int, first: GGUFValueType) -> GGUFValueType:
    ranges = {
        GGUFValueType.UINT32: (0, (1 << 32) - 1),
        GGUFValueType.INT32: (-(1 << 31), (1 << 31) - 1),
        GGUFValueType.UINT64: (0, (1 << 64) - 1),
        GGUFValueType.INT64: (-(1 << 63), (1 << 63) - 1),
    }
    for kind in (first, *ranges):
        least, most = ranges[kind]
        if least <= low and high <= most:
            return kind
    raise ValueError(f"no GGUF type holds the integers {low} to {high}")


def _pack(kind: GGUFValueType, value: object) -> bytes:
    if kind is GGUFValueType.STRING:
        return _string(str(value))
    return SCALARS[kind].pack(value)


def _string(text: str) -> bytes:
    data = text.encode()
    return _u64(len(data)) + data


def _u32(value: int) -> bytes:
    return SCALARS[GGUFValueType.UINT32].pack(value)


def _u64(value: int) -> bytes:
    return SCALARS[GGUFValueType.UINT64].pack(value)


def _write_data(file: BinaryIO, tensor: TensorData) -> None:
    start = file.tell()
    for chunk in tensor.chunks():
        file.write(chunk)
    written = file.tell() - start
    if written != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name!r} yielded {written} bytes, its shape {tensor.shape} and type {tensor.type_id.name} need {tensor.nbytes}")


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))
