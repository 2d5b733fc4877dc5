"""The writer: what it writes the reader reads back, types are chosen sensibly, and failure leaves nothing behind."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from server.engine.gguf.header import SCALARS
from server.engine.gguf.reader import GGUFFile
from server.engine.gguf.writer import TensorData, Typed, write_gguf

FORCED = [
    *[(kind, 1) for kind in SCALARS if kind.name.endswith(("INT8", "INT16", "INT32", "INT64"))],
    (GGUFValueType.FLOAT32, 0.25),
    (GGUFValueType.FLOAT64, 0.1),
    (GGUFValueType.BOOL, True),
    (GGUFValueType.STRING, "é"),
]


def read(path: Path, metadata: dict[str, object]) -> GGUFFile:
    write_gguf(path, metadata, [])
    return GGUFFile.open(path)


@pytest.mark.parametrize(("kind", "value"), FORCED)
def test_every_type_can_be_forced_and_comes_back(tmp_path: Path, kind: GGUFValueType, value: object) -> None:
    file = read(tmp_path / "m.gguf", {"one": Typed(value, kind), "many": Typed([value, value], kind), "none": Typed([], kind)})
    assert dict(file.metadata) == {"one": value, "many": [value, value], "none": []}
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert (fields["one"].types, fields["many"].types) == ([kind], [GGUFValueType.ARRAY, kind])


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, "UINT32"), (-3, "INT32"), (1 << 40, "UINT64"), (-(1 << 40), "INT64"), (0.5, "FLOAT32"), (False, "BOOL"), ("x", "STRING"), ("", "STRING"),
        ([3, -3], "INT32"), ([1 << 31], "UINT32"), ([1 << 31, -1], "INT64"), ([0.5, 1.0], "FLOAT32"), ([1, 0.5], "FLOAT32"), ([True], "BOOL"),
        (["a"], "STRING"),
    ],
)  # fmt: skip
def test_types_are_chosen_by_the_value(tmp_path: Path, value: object, kind: str) -> None:
    file = read(tmp_path / "m.gguf", {"k": value})
    assert file.metadata["k"] == value
    assert GGUFReader(tmp_path / "m.gguf").fields["k"].types[-1].name == kind


@pytest.mark.parametrize("value", [None, {}, [], [1, "a"], [True, 2], 1 << 64, -(1 << 64), object()])
def test_values_without_a_type_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match=r"metadata 'k'|no GGUF type"):
        write_gguf(tmp_path / "m.gguf", {"k": value}, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tensors_come_back_at_aligned_offsets(tmp_path: Path, alignment: int) -> None:
    arrays = {f"t{n}": np.arange(n, dtype=np.float32) for n in (1, 3, 8, 33)}
    arrays["matrix"] = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    write_gguf(tmp_path / "m.gguf", {}, [TensorData.from_array(name, array, 0) for name, array in arrays.items()], alignment=alignment)
    file = GGUFFile.open(tmp_path / "m.gguf")
    assert file.alignment == alignment
    for name, array in arrays.items():
        assert file.tensors[name].offset % alignment == 0
        np.testing.assert_array_equal(np.frombuffer(file.data(name), "<f4").reshape(file.tensors[name].shape), array)
    assert [tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors] == list(arrays)


def test_large_tensors_are_streamed(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        for i in range(64):
            yield bytes([i]) * (1 << 20)

    big = TensorData("big", (16, 1 << 20), GGMLQuantizationType.F32, chunks)
    tracemalloc.start()
    write_gguf(tmp_path / "m.gguf", {}, [big])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    data = GGUFFile.open(tmp_path / "m.gguf").data("big")
    assert [data[i << 20] for i in range(64)] == list(range(64))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_tensor_of_another_size_leaves_the_old_file_as_it_was(tmp_path: Path, size: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=rf"'w' yielded {size} bytes.*need 32"):
        write_gguf(path, {}, [TensorData.from_blocks("w", (8,), 0, bytes(size))])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_the_source_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield bytes(16)
        raise OSError("the source broke")

    with pytest.raises(OSError, match="the source broke"):
        write_gguf(tmp_path / "m.gguf", {}, [TensorData("w", (8,), GGMLQuantizationType.F32, chunks)])
    assert list(tmp_path.iterdir()) == []


def test_tensor_table_mistakes_are_refused(tmp_path: Path) -> None:
    one = TensorData.from_blocks("w", (8,), 0, bytes(32))
    for tensors, message in [
        ([one, one], "two tensors are named 'w'"),
        ([TensorData.from_blocks("w", (1,) * 5, 0, bytes(4))], "1 to 4 dimensions"),
        ([TensorData.from_blocks("w", (33,), 8, bytes(34))], "not a whole number of Q8_0 blocks"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_gguf(tmp_path / "m.gguf", {}, tensors)
    with pytest.raises(ValueError, match="alignment 12 is not a power of two"):
        write_gguf(tmp_path / "m.gguf", {}, [], alignment=12)
    assert list(tmp_path.iterdir()) == []
