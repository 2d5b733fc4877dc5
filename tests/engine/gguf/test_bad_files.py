"""Every way in which a file can be wrong has its sentence, and none costs time or memory."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from server.engine.gguf.reader import GGUFFile
from server.engine.gguf.writer import TensorData, write_gguf
from server.errors import GGUFError, ModelError, UnsupportedModel
from tests.engine.gguf import raw
from tests.engine.gguf.raw import ARCH, array, gguf, pair, string, tensor, u32, u64

ONE = tensor("w", (8,), 0, 0)
DATA = bytes(32)
HUGE = 1 << 60

HEADS = [
    (b"", "it is empty"),
    (bytes(100), "unfinished download"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "Git LFS pointer"),
    (b"PK\x03\x04rest of a zip", "PyTorch checkpoint"),
    (b"\x80\x02}q\x00.rest", "pickle"),
    (b"\n<!DOCTYPE html><html>", "web page"),
    (u64(90) + b'{"__metadata__":{}}', "safetensors"),
    (b'{"error": "not found"}', "JSON"),
    (b"tjgg\x03\0\0\0rest", "GGJT"),
    (b"\x1f\x8b\x08\0rest", "gzip"),
    (b"MZ\x90\0\x03\0\0\0", "first bytes are b'MZ"),
    (b"GGU", "first bytes are b'GGU'"),
]

DAMAGED = [
    (b"GGUF\x03", "the version needs 4 bytes"),
    (b"GGUF" + u32(3) + u64(0), "the metadata count needs 8 bytes"),
    (gguf([ARCH], [], counts=(0, HUGE)), f"claims {HUGE} metadata pairs"),
    (gguf([ARCH], [], counts=(HUGE, 1)), f"claims {HUGE} tensors"),
    (gguf([ARCH], [], counts=(0, 2)), "metadata key 1 at byte 69 is empty"),
    (gguf([u64(HUGE) + b"key"], []), f"metadata key 0 claims to be {HUGE} bytes long"),
    (gguf([pair("k", 8, u64(HUGE))], []), f"metadata 'k' claims to be {HUGE} bytes long"),
    (gguf([pair("k", 8, u64(5000))], []), "metadata 'k' needs 5000 bytes"),
    (gguf([pair("k", 9, array(8, HUGE, b""))], []), f"'k' claims {HUGE} items"),
    (gguf([pair("k", 9, array(4, HUGE, b""))], []), f"'k' claims {HUGE} items"),
    (gguf([pair("k", 9, array(8, 2, string("x") + u64(HUGE)))], []), "item 1 of metadata 'k' reaches beyond the end"),
    (gguf([pair("k", 9, array(8, 2, string("x" * 8)))], []).rstrip(b"\0") + b"\7", "item 1 of metadata 'k'"),
    (gguf([pair("k", 9, array(8, 1, u64(10) + b"x" * 9))], []).rstrip(b"\0"), "item 0 of metadata 'k' reaches beyond the end"),
    (gguf([pair("k", 9, array(4, 1 << 20, u32(1)))], []), "metadata 'k' needs 4194304 bytes"),
    (gguf([pair("k", 13, b"")], []), "value type 13, which GGUF does not define"),
    (gguf([pair("k", 9, array(77, 0, b""))], []), "value type 77"),
    (gguf([pair(b"\xff\xfe", 4, u32(1))], []), "metadata key 0 at byte 24 is not UTF-8"),
    (gguf([ARCH, ARCH], []), "'general.architecture' is there twice"),
    (gguf([pair("general.alignment", 4, u32(24))], []), "general.alignment is 24, not a power of two"),
    (gguf([pair("general.alignment", 8, string("32"))], []), "general.alignment is '32'"),
    (gguf([], [tensor("w", (), 0, 0)], bytes(64)), "tensor 'w' claims 0 dimensions"),
    (gguf([], [tensor("w", (1,) * 5, 0, 0)], DATA), "tensor 'w' claims 5 dimensions"),
    (gguf([], [tensor("w", (1 << 40, 1 << 40), 0, 0)], DATA), "tensor 'w' has the impossible shape"),
    (gguf([], [tensor("w", (8, 0), 0, 0)], DATA), "tensor 'w' has the impossible shape"),
    (gguf([], [tensor("w", (33,), 8, 0)], bytes(64)), "rows of 33 values, but Q8_0 comes in blocks of 32"),
    (gguf([], [tensor("w", (8,), 0, 8)], bytes(64)), "offset 8, not a multiple of the alignment 32"),
    (gguf([], [tensor("w", (8,), 0, HUGE)], DATA), "'w' is said to end at byte .*beyond the end of the file"),
    (gguf([], [ONE, ONE], bytes(64)), "tensor 'w' is there twice"),
    (gguf([], [ONE, tensor("v", (8,), 0, 0)], bytes(64)), "overlaps the one before it"),
    (gguf([], [tensor(b"\xff", (8,), 0, 0)], DATA), "is not UTF-8"),
    (gguf([], [ONE])[:-24], "needs 8 bytes at byte"),
]

UNSUPPORTED = [
    (gguf([ARCH], [], version=1), "version 1, in use for some weeks of 2023"),
    (gguf([ARCH], [], version=4), "version 4, which this program does not know"),
    (gguf([ARCH], [], version=3 << 24), "big-endian"),
    (gguf([], [tensor("w", (256,), 139, 0)], bytes(256)), r"tensor 'w' has type id 139, one of ik_llama\.cpp's own types"),
    (gguf([], [tensor("w", (256,), 31, 0)], bytes(256)), "tensor 'w' has type id 31, withdrawn, newer"),
    (gguf([pair("k", 9, array(9, 1, array(4, 1, u32(1))))], []), "'k' is an array of arrays"),
]


@pytest.mark.parametrize(("content", "message"), HEADS, ids=[message for _, message in HEADS])
def test_other_files_are_recognised(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(GGUFError, match=rf"m\.gguf is not a GGUF file.*{message}.*(Give|Download)"):
        GGUFFile.open(raw.save(tmp_path, content))


@pytest.mark.parametrize(("content", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(GGUFError, match=rf"m\.gguf: .*({message}).*damaged or incomplete: download or convert it again"):
        GGUFFile.open(raw.save(tmp_path, content))


@pytest.mark.parametrize(("content", "message"), UNSUPPORTED, ids=[message for _, message in UNSUPPORTED])
def test_what_is_not_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        GGUFFile.open(raw.save(tmp_path, content))


def test_truncated_data_says_both_sizes(tmp_path: Path) -> None:
    whole = gguf([ARCH], [ONE, tensor("v", (8,), 0, 32)], bytes(64))
    GGUFFile.open(raw.save(tmp_path, whole))
    for cut in (1, 32, 33, 64):
        with pytest.raises(GGUFError, match=rf"cut short: the file is {len(whole) - cut} bytes, its tensors need {len(whole)}\. Download it again"):
            GGUFFile.open(raw.save(tmp_path, whole[:-cut]))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    metadata = {"general.architecture": "llama", "general.alignment": 32, "n": 7, "tokens": ["a", "bb", "ccc"], "scores": [0.5] * 3, "on": True}
    rng = np.random.default_rng(0)
    write_gguf(path, metadata, [TensorData.from_array(f"blk.{i}.w", rng.normal(size=(2, 32)), i) for i in (0, 2, 8)])
    return path.read_bytes()


def _variants(sound: bytes) -> list[bytes]:
    """Every truncation up to the data, and every header byte set to some telling values."""
    header = sound.index(b"blk.8.w") + 40
    cuts = [sound[:size] for size in range(0, len(sound), 3)]
    flips = [sound[:at] + bytes([value]) + sound[at + 1 :] for at in range(header) for value in {0, 1, 0x7F, 0xFF, sound[at] ^ 0x10}]
    return cuts + flips


def test_fuzzed_files_give_only_our_errors_quickly_and_in_little_memory(tmp_path: Path, sound: bytes) -> None:
    variants = _variants(sound)
    refused = 0
    tracemalloc.start()
    start = time.perf_counter()
    for content in variants:
        try:
            file = GGUFFile.open(raw.save(tmp_path, content))
        except ModelError:
            refused += 1
        else:
            assert all(len(file.data(name)) == info.nbytes for name, info in file.tensors.items())
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(variants) > 1000
    assert refused > len(variants) / 3
    assert seconds / len(variants) < 0.02
    assert peak < 4 << 20
