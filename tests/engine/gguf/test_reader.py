"""The reader on sound files: against bytes made by hand, against gguf's own reader, and as a map that copies nothing."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from server.engine.gguf import reader
from server.engine.gguf.reader import GGUFFile, find_gguf
from server.engine.gguf.writer import TensorData, write_gguf
from server.errors import GGUFError, ModelError, ModelNotFound
from tests.engine.gguf import raw

SCALARS = [
    (0, "<B", 200),
    (1, "<b", -5),
    (2, "<H", 60_000),
    (3, "<h", -7),
    (4, "<I", 1 << 31),
    (5, "<i", -9),
    (6, "<f", 0.5),
    (7, "<?", True),
    (10, "<Q", 1 << 63),
]
SCALARS += [(11, "<q", -(1 << 62)), (12, "<d", 0.1)]


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type(tmp_path: Path, version: int) -> None:
    pairs = [raw.pair(f"scalar.{kind}", kind, struct.pack(form, value)) for kind, form, value in SCALARS]
    pairs += [raw.pair(f"array.{kind}", 9, raw.array(kind, 3, struct.pack(form, value) * 3)) for kind, form, value in SCALARS]
    pairs += [raw.pair("text", 8, raw.string("naïve 日本 🙂")), raw.pair("texts", 9, raw.array(8, 2, raw.string("") + raw.string("Ġa")))]
    metadata = GGUFFile.open(raw.save(tmp_path, raw.gguf(pairs, [], version=version))).metadata
    for kind, _, value in SCALARS:
        assert metadata[f"scalar.{kind}"] == value
        assert metadata[f"array.{kind}"] == [value] * 3
        assert type(metadata[f"scalar.{kind}"]) is type(value)
    assert metadata["text"] == "naïve 日本 🙂"
    assert metadata["texts"] == ["", "Ġa"]


def test_tensors_by_hand(tmp_path: Path) -> None:
    first, second = np.arange(6, dtype="<f4"), np.arange(34, dtype=np.uint8)
    data = first.tobytes().ljust(64, b"\0") + second.tobytes()
    align = raw.pair("general.alignment", 4, raw.u32(64))
    table = [raw.tensor("a", (3, 2), 0, 0), raw.tensor("b", (32,), 8, 64)]
    file = GGUFFile.open(raw.save(tmp_path, raw.gguf([raw.ARCH, align], table, data, alignment=64)))
    assert (file.architecture, file.alignment, list(file.tensors)) == ("llama", 64, ["a", "b"])
    assert file.tensors["a"].shape == (2, 3)
    assert file.tensors["b"].type_id is GGMLQuantizationType.Q8_0
    assert file.tensors["b"].offset % 64 == 0
    np.testing.assert_array_equal(np.frombuffer(file.data("a"), "<f4"), first)
    assert bytes(file.data("b")) == second.tobytes()


def test_agrees_with_gguf_reader(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    kinds = [GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_K]
    tensors = [TensorData.from_array(f"t{i}", rng.normal(size=(3, 5, 256)[i % 2 :]), kind) for i, kind in enumerate(kinds)]
    metadata = {"general.architecture": "llama", "n": -3, "f": 1.5, "on": False, "words": ["x", "yy", ""], "ids": [3, 2, 1], "scores": [0.5, -1.0]}
    write_gguf(tmp_path / "m.gguf", metadata, tensors)
    theirs, ours = GGUFReader(tmp_path / "m.gguf"), GGUFFile.open(tmp_path / "m.gguf")
    assert {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")} == ours.metadata
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (*reversed(tensor.shape.tolist()), tensor.tensor_type, tensor.n_bytes, tensor.data_offset) == (
            *info.shape,
            info.type_id,
            info.nbytes,
            info.offset,
        )
        assert tensor.data.tobytes() == bytes(ours.data(tensor.name))


def test_data_is_a_read_only_slice_of_the_map_and_outlives_the_file_object(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {}, [TensorData.from_array("a", np.ones(8, np.float32), 0)])
    file = GGUFFile.open(tmp_path / "m.gguf")
    data = file.data("a")
    assert data.readonly
    assert data.obj is file.maps[0]
    del file
    assert np.frombuffer(data, "<f4").sum() == 8


def test_half_a_million_strings_are_read_fast(tmp_path: Path) -> None:
    words = [f"token {i}" for i in range(130_000)]
    write_gguf(tmp_path / "m.gguf", {"tokens": words, "merges": words * 3}, [])
    start = time.perf_counter()
    assert GGUFFile.open(tmp_path / "m.gguf").metadata["tokens"] == words
    assert time.perf_counter() - start < 2.0  # 0.25 s on a quiet machine; gguf's reader takes 10 s


def test_broken_token_is_kept(tmp_path: Path) -> None:
    pairs = [raw.pair("tokens", 9, raw.array(8, 2, raw.string(b"\xff") + raw.string("ok")))]
    assert GGUFFile.open(raw.save(tmp_path, raw.gguf(pairs, []))).metadata["tokens"] == ["\N{REPLACEMENT CHARACTER}", "ok"]


@pytest.mark.parametrize("advice", [reader.MADV_POPULATE_READ, -1])  # -1: a kernel that does not know it
def test_page_in_maps_a_tensor_and_give_back_unmaps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advice: int) -> None:
    monkeypatch.setattr(reader, "MADV_POPULATE_READ", advice)
    monkeypatch.setattr(reader, "PREFETCH_CHUNK", 1 << 20)
    values = np.arange((5 << 18) + 7, dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", {}, [TensorData.from_array("a", values, 0), TensorData.from_array("b", values, 0)])
    file = GGUFFile.open(tmp_path / "m.gguf")
    before = _resident_file_bytes()
    file.page_in("b", 0, values.nbytes)
    assert 0.9 * values.nbytes < _resident_file_bytes() - before < 1.6 * values.nbytes
    file.give_back("b", 1 << 20, values.nbytes)
    assert _resident_file_bytes() - before < 0.5 * values.nbytes
    np.testing.assert_array_equal(np.frombuffer(file.data("b"), np.float32), values)  # what was given back can still be read


def _resident_file_bytes() -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith("RssFile"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssFile in /proc/self/status")


def test_find_takes_a_file_as_it_is_and_the_one_model_of_a_directory(tmp_path: Path) -> None:
    file = raw.save(tmp_path, raw.gguf([], []), "Model.GGUF")
    raw.save(tmp_path, b"", "README.md")
    assert find_gguf(file) == file
    assert find_gguf(tmp_path) == file


def test_find_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no file or directory .*nowhere"):
        find_gguf(tmp_path / "nowhere")
    with pytest.raises(ModelNotFound, match=r"holds no \.gguf file"):
        find_gguf(tmp_path)
    raw.save(tmp_path, b"", "a.gguf"), raw.save(tmp_path, b"", "b.gguf")
    with pytest.raises(ModelError, match=r"holds 2 models: a\.gguf, b\.gguf\. Give --gguf_path one"):
        find_gguf(tmp_path)
    with pytest.raises(ModelError, match="File name too long"):
        find_gguf(tmp_path / ("x" * 5000))


def test_open_says_what_is_wrong_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="There is no file"):
        GGUFFile.open(tmp_path / "nowhere.gguf")
    with pytest.raises(ModelError, match=r"cannot be opened|not a regular file"):
        GGUFFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelNotFound, match="not a regular file"):
        GGUFFile.open(tmp_path / "pipe.gguf")


def test_a_vocabulary_without_tensors_needs_no_padding(tmp_path: Path) -> None:
    content = raw.gguf([raw.ARCH], []).rstrip(b"\0")
    assert GGUFFile.open(raw.save(tmp_path, content)).architecture == "llama"


def test_missing_tensor_and_architecture_are_named(tmp_path: Path) -> None:
    file = GGUFFile.open(raw.save(tmp_path, raw.gguf([], [])))
    with pytest.raises(GGUFError, match=r"no tensor 'output_norm\.weight'"):
        file.data("output_norm.weight")
    with pytest.raises(GGUFError, match=r"general\.architecture"):
        _ = file.architecture
