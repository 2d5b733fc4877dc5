"""GGUF bytes made by hand, so that files which no writer would write can be, and so that reader and writer do not vouch for each other."""

from __future__ import annotations

import struct
from pathlib import Path


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + u32(kind) + value


def array(item_kind: int, count: int, items: bytes) -> bytes:
    return u32(item_kind) + u64(count) + items


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """dims in GGUF order: the contiguous dimension first."""
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf(pairs: list[bytes], tensors: list[bytes], data: bytes = b"", *, version: int = 3, counts: tuple[int, int] | None = None, alignment: int = 32) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    head = b"GGUF" + u32(version) + u64(tensor_count) + u64(pair_count) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


def save(directory: Path, content: bytes, name: str = "m.gguf") -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


ARCH = pair("general.architecture", 8, string("llama"))
