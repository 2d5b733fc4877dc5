"""The front of a GGUF file, read without trusting it: magic, version, counts, metadata, tensor table.

Every length and count is checked against the bytes that are there before anything of that size is made, so a file that lies costs a
sentence, not memory. Layout (GGUF v2 and v3, little-endian):

    "GGUF" | u32 version | u64 tensors | u64 pairs | pairs: key, u32 type, value | tensors: name, u32 dims, u64[dims], u32 type, u64 offset
    | padding to general.alignment | tensor data, each tensor's offset counted from here and a multiple of the alignment

A string is a u64 length and UTF-8 bytes; an array is a u32 element type, a u64 count and the elements.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from server.engine.gguf.sniff import describe_bytes
from server.errors import GGUFError, UnsupportedModel

SCALARS: Mapping[GGUFValueType, struct.Struct] = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
    GGUFValueType.BOOL: struct.Struct("<?"),
}
_U32, _U64 = SCALARS[GGUFValueType.UINT32], SCALARS[GGUFValueType.UINT64]

MAX_STRING = 64 << 20  # bytes; chat templates, the longest strings there are, take some tens of kB
MAX_NAME = 65_535  # bytes; the format's own limit on keys
MAX_ITEMS = 1 << 22  # of one array; the largest vocabularies have about 2^18 tokens and 2^19 merges
MAX_DIMS = 4  # of a tensor, as in ggml
MIN_ALIGNMENT = 8  # bytes; the format asks for a multiple of it
MIN_PAIR, MIN_TENSOR = 13, 32  # the fewest bytes that a metadata pair and a tensor table entry take
FIRST_FORK_TYPE = 133  # type ids from here on are ik_llama.cpp's own


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    name: str
    shape: tuple[int, ...]  # numpy order: the contiguous dimension (GGUF's first) is last
    type_id: GGMLQuantizationType
    offset: int  # bytes from the start of its file
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """All of a file but the tensors' data."""

    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]
    alignment: int  # bytes


def parse_header(data: memoryview, path: Path) -> Header:
    """Read the header at the start of `data`, the whole file's bytes; `path` is for the messages. Raises GGUFError, UnsupportedModel."""
    cursor = _Cursor(data, path)
    tensor_count, pair_count = _preamble(cursor)
    metadata = _pairs(cursor, pair_count)
    alignment = _alignment(cursor, metadata)
    entries = [_tensor_entry(cursor) for _ in range(tensor_count)]
    data_start = -(-cursor.pos // alignment) * alignment
    tensors = _place(cursor, entries, data_start, alignment)
    return Header(metadata, tensors, alignment)


class _Cursor:
    """A read position that never leaves the file."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data, self.path, self.size, self.pos = data, path, len(data), 0

    def damaged(self, found: str) -> GGUFError:
        return GGUFError(f"{self.path}: {found}. The file is damaged or incomplete: download or convert it again.")

    def take(self, nbytes: int, what: str) -> int:
        """Step over nbytes and return where they start."""
        start = self.pos
        if nbytes > self.size - start:
            raise self.damaged(f"{what} needs {nbytes} bytes at byte {start}, but the file ends at byte {self.size}")
        self.pos = start + nbytes
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.take(8, what))[0]
        return value

    def string(self, what: str, limit: int = MAX_STRING, errors: str = "replace") -> str:
        """A length and its bytes. Values keep odd bytes as U+FFFD, since single broken tokens exist in sound files."""
        length = self.u64(f"the length of {what}")
        if length > limit:
            raise self.damaged(f"{what} claims to be {length} bytes long (at most {limit} make sense)")
        start = self.take(length, what)
        return str(self.data[start : self.pos], "utf-8", errors)

    def name(self, what: str) -> str:
        """A key or a tensor's name: not empty, short, and UTF-8 without exception."""
        start = self.pos
        try:
            name = self.string(what, MAX_NAME, "strict")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} at byte {start} is not UTF-8") from None
        if not name:
            raise self.damaged(f"{what} at byte {start} is empty")
        return name

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings: the one hot loop of loading (a vocabulary and its merges are half a million), so it is written flat."""
        data, size, pos, unpack = self.data, self.size, self.pos, _U64.unpack_from
        out: list[str] = []
        for _ in range(count):
            length = unpack(data, pos)[0] if pos + 8 <= size else size
            end = pos + 8 + length
            if end > size or length > MAX_STRING:
                self.pos = pos
                raise self.damaged(f"item {len(out)} of {what} reaches beyond the end of the file ({size} bytes)")
            out.append(str(data[pos + 8 : end], "utf-8", "replace"))
            pos = end
        self.pos = pos
        return out


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """Magic, version and the two counts -> (tensors, pairs)."""
    head = bytes(cursor.data[:512])
    if not head.startswith(b"GGUF"):
        raise GGUFError(f"{cursor.path} is not a GGUF file: {describe_bytes(head)}. Give --gguf_path a .gguf file.")
    cursor.pos = 4
    _check_version(cursor.path, cursor.u32("the version"))
    tensors, pairs = cursor.u64("the tensor count"), cursor.u64("the metadata count")
    for count, least, what in ((pairs, MIN_PAIR, "metadata pairs"), (tensors, MIN_TENSOR, "tensors")):
        if count * least > cursor.size:
            raise cursor.damaged(f"it claims {count} {what}, more than its {cursor.size} bytes can hold")
    return tensors, pairs


def _check_version(path: Path, version: int) -> None:
    if version in (2, 3):
        return
    if version & 0xFFFF == 0 and version:
        raise UnsupportedModel(f"{path} is a big-endian GGUF, made for other processors: get the little-endian file of this model.")
    if version == 1:
        raise UnsupportedModel(f"{path} is GGUF version 1, in use for some weeks of 2023: get a newer conversion of this model (versions 2 and 3 are read).")
    raise UnsupportedModel(f"{path} is GGUF version {version}, which this program does not know (it reads 2 and 3): a newer program may, or it is damaged.")


def _pairs(cursor: _Cursor, count: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for index in range(count):
        key = cursor.name(f"metadata key {index}")
        if key in metadata:
            raise cursor.damaged(f"metadata key {key!r} is there twice")
        metadata[key] = _value(cursor, key)
    return metadata


def _value(cursor: _Cursor, key: str) -> object:
    what = f"metadata {key!r}"
    kind = _value_type(cursor, what)
    if kind is GGUFValueType.STRING:
        return cursor.string(what)
    if kind is GGUFValueType.ARRAY:
        return _array(cursor, what)
    unpacker = SCALARS[kind]
    value: object = unpacker.unpack_from(cursor.data, cursor.take(unpacker.size, what))[0]
    return value


def _value_type(cursor: _Cursor, what: str) -> GGUFValueType:
    number = cursor.u32(f"the type of {what}")
    try:
        return GGUFValueType(number)
    except ValueError:
        raise cursor.damaged(f"{what} has value type {number}, which GGUF does not define") from None


def _array(cursor: _Cursor, what: str) -> list[object]:
    kind = _value_type(cursor, f"each item of {what}")
    count = cursor.u64(f"the length of {what}")
    if kind is GGUFValueType.ARRAY:
        raise UnsupportedModel(f"{cursor.path}: {what} is an array of arrays, which no model that this version runs has: get another conversion.")
    if count > MAX_ITEMS:
        raise cursor.damaged(f"{what} claims {count} items (at most {MAX_ITEMS} make sense)")
    if kind is GGUFValueType.STRING:
        return list(cursor.strings(count, what))
    start = cursor.take(count * SCALARS[kind].size, what)
    items: list[object] = np.frombuffer(cursor.data, np.dtype(SCALARS[kind].format), count, start).tolist()
    return items


def _alignment(cursor: _Cursor, metadata: Mapping[str, object]) -> int:
    value = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or value < MIN_ALIGNMENT or value & (value - 1):
        raise cursor.damaged(f"general.alignment is {value!r}, not a power of two from {MIN_ALIGNMENT} on")
    return value


def _tensor_entry(cursor: _Cursor) -> TensorInfo:
    """One row of the tensor table; its offset still counts from the start of the data."""
    name = cursor.name("the name of a tensor")
    what = f"tensor {name!r}"
    dims = cursor.u32(f"the dimension count of {what}")
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.damaged(f"{what} claims {dims} dimensions (1 to {MAX_DIMS} exist)")
    shape = tuple(cursor.u64(f"the shape of {what}") for _ in range(dims))[::-1]
    type_id = _tensor_type(cursor, name)
    offset = cursor.u64(f"the offset of {what}")
    return TensorInfo(name, shape, type_id, offset, _nbytes(cursor, name, shape, type_id))


def _tensor_type(cursor: _Cursor, name: str) -> GGMLQuantizationType:
    number = cursor.u32(f"the type of tensor {name!r}")
    try:
        return GGMLQuantizationType(number)
    except ValueError:
        origin = "one of ik_llama.cpp's own types (133 and above)" if number >= FIRST_FORK_TYPE else "withdrawn, newer than this program, or damage"
        raise UnsupportedModel(
            f"{cursor.path}: tensor {name!r} has type id {number}, {origin}: get the model in another quantisation, Q4_K_M for one."
        ) from None


def _nbytes(cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[type_id]
    elements = math.prod(shape)
    if not 0 < elements < 1 << 63:
        raise cursor.damaged(f"tensor {name!r} has the impossible shape {list(shape)}")
    if shape[-1] % block:
        raise cursor.damaged(f"tensor {name!r} has rows of {shape[-1]} values, but {type_id.name} comes in blocks of {block}")
    return elements // block * block_bytes


def _place(cursor: _Cursor, entries: list[TensorInfo], data_start: int, alignment: int) -> dict[str, TensorInfo]:
    """Check the offsets, and count them from the start of the file."""
    placed: dict[str, TensorInfo] = {}
    for entry in entries:
        if entry.name in placed:
            raise cursor.damaged(f"tensor {entry.name!r} is there twice")
        if entry.offset % alignment:
            raise cursor.damaged(f"tensor {entry.name!r} lies at offset {entry.offset}, not a multiple of the alignment {alignment}")
        placed[entry.name] = TensorInfo(entry.name, entry.shape, entry.type_id, data_start + entry.offset, entry.nbytes)
    _check_extents(cursor, list(placed.values()), data_start, alignment)
    return placed


def _check_extents(cursor: _Cursor, tensors: list[TensorInfo], data_start: int, alignment: int) -> None:
    """Tensors lie inside the file and side by side. A tensor beyond what all of them add up to has a false offset; else the file was cut short."""
    needed = data_start + sum(-(-info.nbytes // alignment) * alignment for info in tensors)
    end = data_start
    for info in sorted(tensors, key=lambda info: info.offset):
        if info.offset < end:
            raise cursor.damaged(f"tensor {info.name!r} overlaps the one before it")
        end = info.offset + info.nbytes
        if end > max(needed, cursor.size):
            raise cursor.damaged(f"tensor {info.name!r} is said to end at byte {end}, beyond the end of the file ({cursor.size} bytes)")
    if tensors and end > cursor.size:
        raise GGUFError(f"{cursor.path} is cut short: the file is {cursor.size} bytes, its tensors need {end}. Download it again.")
