"""Split models: any part or the directory opens all of them, and whatever does not belong together has its sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from server.config import EngineConfig
from server.engine.gguf import reader
from server.engine.gguf.reader import GGUFFile, find_gguf
from server.engine.gguf.writer import TensorData, write_gguf, write_split_gguf
from server.engine.loader import load_model
from server.engine.protocol import Step
from server.errors import GGUFError, ModelError, ModelNotFound
from tests.engine.gguf import raw
from tests.engine.tiny_models import write_tiny

METADATA = {"general.architecture": "llama", "general.name": "R1", "llama.block_count": 7}


def tensor(name: str, length: int = 64) -> TensorData:
    return TensorData.from_array(name, np.full(length, sum(map(ord, name)), np.float32), 0)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """R1 in three parts: t0 t1 | t2 t3 t4 | t5 t6."""
    return write_split_gguf(tmp_path / "R1.gguf", METADATA, [tensor(f"t{i}") for i in range(7)], 3)


def test_any_part_and_the_directory_open_the_whole_model(parts: list[Path]) -> None:
    for path in (*parts, parts[0].parent):
        file = GGUFFile.open(find_gguf(path))
        assert file.paths == tuple(parts)
        assert (file.path, file.name, file.architecture) == (parts[0], "R1", "llama")
        assert file.nbytes == sum(part.stat().st_size for part in parts)
        assert list(file.tensors) == [f"t{i}" for i in range(7)]
        for name in file.tensors:
            assert bytes(file.data(name)) == np.full(64, sum(map(ord, name)), "<f4").tobytes()


def test_parts_are_what_other_readers_expect(parts: list[Path]) -> None:
    files = [GGUFReader(part) for part in parts]
    for part, file in enumerate(files):
        fields = {key: (field.contents(), field.types[0].name) for key, field in file.fields.items() if key.startswith("split.")}
        assert fields == {"split.no": (part, "UINT16"), "split.count": (3, "UINT16"), "split.tensors.count": (7, "INT32")}
    assert [len(file.tensors) for file in files] == [2, 3, 2]
    assert "llama.block_count" in files[0].fields
    assert "llama.block_count" not in files[1].fields


def test_a_first_part_may_hold_metadata_alone(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m-00001-of-00002.gguf", {**METADATA, **said(0, 2, 1)}, [])
    write_gguf(tmp_path / "m-00002-of-00002.gguf", said(1, 2, 1), [tensor("w")])
    assert list(GGUFFile.open(tmp_path / "m-00002-of-00002.gguf").tensors) == ["w"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_model_split_into_one_is_a_file_like_others(tmp_path: Path, count: int) -> None:
    for name in ("m-00001-of-00001.gguf", "m.gguf"):
        write_gguf(tmp_path / name, {**METADATA, **said(0, count, 1)}, [tensor("w")])
        assert list(GGUFFile.open(tmp_path / name).tensors) == ["w"]


def test_links_count_by_their_own_names(parts: list[Path], tmp_path: Path) -> None:
    """As in a Hugging Face cache: the snapshot's links have the names, the files are called by their hashes."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), snapshot.mkdir()
    for index, part in enumerate(parts):
        part.rename(blobs / f"{index}9af")
        (snapshot / part.name).symlink_to(blobs / f"{index}9af")
    assert len(GGUFFile.open(snapshot / parts[1].name).tensors) == 7
    assert len(GGUFFile.open(find_gguf(snapshot)).tensors) == 7
    (blobs / "19af").unlink()
    with pytest.raises(ModelNotFound, match=r"R1-00002-of-00003\.gguf is missing"):
        GGUFFile.open(snapshot / parts[0].name)


def test_page_in_reads_the_part_that_holds_the_tensor(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file, paged = GGUFFile.open(parts[0]), []
    monkeypatch.setattr(reader, "_populate", lambda mapped, start, length, path: paged.append(path))
    for name, info in file.tensors.items():
        file.page_in(name, 0, info.nbytes)
    assert sorted(file.tensors, key=file.place) == list(file.tensors)
    assert [file.paths[file.place(name)[0]] for name in file.tensors] == paged
    assert set(paged) == set(parts)


def test_the_engine_runs_a_split_model_as_the_whole_one(tmp_path: Path) -> None:
    write_tiny(tmp_path / "whole.gguf", "llama")
    whole = GGUFFile.open(tmp_path / "whole.gguf")
    tensors = [TensorData.from_blocks(name, info.shape, info.type_id, bytes(whole.data(name))) for name, info in whole.tensors.items()]
    split = GGUFFile.open(write_split_gguf(tmp_path / "split.gguf", whole.metadata, tensors, 3)[0])
    told: list[tuple[int, int]] = []
    loads = [load_model(file, EngineConfig(cpu_infer=1), progress=lambda *done: told.append(done)) for file in (whole, split)]
    np.testing.assert_array_equal(*(load.engine.logits(Step((3, 1, 4), 0, (0,), None)).numpy() for load in loads))
    nbytes = sum(info.nbytes for info in split.tensors.values())
    assert told[-1] == (nbytes, nbytes)
    for load in loads:
        load.engine.close()


# --- What does not belong together -------------------------------------------


def said(part: int, count: int, tensors: int) -> dict[str, object]:
    return {"split.no": part, "split.count": count, "split.tensors.count": tensors}


def rewrite(path: Path, metadata: dict[str, object], *names: str) -> None:
    write_gguf(path, metadata, [tensor(name) for name in names])


def test_missing_parts_are_all_named(parts: list[Path], tmp_path: Path) -> None:
    parts[0].unlink(), parts[2].unlink()
    for path in (parts[1], tmp_path):
        with pytest.raises(ModelNotFound, match=r"3 files of R1 in .*, R1-00001-of-00003\.gguf, R1-00003-of-00003\.gguf are missing\. Download them again"):
            GGUFFile.open(find_gguf(path))
    with pytest.raises(ModelNotFound, match=r"There is no file .*R2-00001-of-00003\.gguf"):
        GGUFFile.open(tmp_path / "R2-00001-of-00003.gguf")


def test_a_long_list_of_missing_parts_ends(tmp_path: Path) -> None:
    rewrite(tmp_path / "m-00001-of-00300.gguf", said(0, 300, 1), "w")
    with pytest.raises(ModelNotFound, match=r"m-00041-of-00300\.gguf and 259 more are missing") as error:
        GGUFFile.open(tmp_path / "m-00001-of-00300.gguf")
    assert len(str(error.value)) < 2000


MISFITS: list[tuple[Callable[[list[Path]], object], str]] = [
    (lambda parts: shutil.copy(parts[0], parts[1]), r"R1-00001-of-00003\.gguf and R1-00002-of-00003\.gguf both hold part 1 .*Download both again"),
    (lambda parts: rewrite(parts[1], said(4, 3, 7), "t2"), r"R1-00002-of-00003\.gguf holds part 5, not the one that its name says"),
    (lambda parts: rewrite(parts[1], said(1, 4, 7), "t2"), r"named as one of 3 parts, but says that it is one of 4: it is from another model"),
    (lambda parts: rewrite(parts[1], {}, "t2"), r"R1-00002-of-00003\.gguf is named as a part .*\(split\.no is missing\)"),
    (lambda parts: rewrite(parts[1], {**said(1, 3, 7), "split.no": "one"}, "t2"), r"split\.no is 'one', not a count.*download it again"),
    (lambda parts: rewrite(parts[1], said(1, 3, 9), "t2"), r"parts of different models \(split\.tensors\.count: 7 and 9\)"),
    (
        lambda parts: rewrite(parts[2], {**said(2, 3, 7), "general.name": "V3"}, "t5"),
        r"different models \(general\.name: 'R1' and 'V3'\).*directory of its own",
    ),
    (lambda parts: rewrite(parts[2], said(2, 3, 7), "t0", "t6"), r"Tensor 't0' is in both R1-00001-of-00003\.gguf and R1-00003-of-00003\.gguf"),
    (lambda parts: rewrite(parts[2], said(2, 3, 7), "t5"), r"hold 6 tensors, but the model has 7.*download all again"),
    (lambda parts: parts[1].write_bytes(parts[1].read_bytes()[:-300]), r"R1-00002-of-00003\.gguf is cut short"),
    (lambda parts: parts[2].write_bytes(b"PK\x03\x04"), r"R1-00003-of-00003\.gguf is not a GGUF file"),
]


@pytest.mark.parametrize(("spoil", "sentence"), MISFITS, ids=[sentence[:40] for _, sentence in MISFITS])
def test_parts_that_do_not_fit_are_named(parts: list[Path], spoil: Callable[[list[Path]], object], sentence: str) -> None:
    spoil(parts)
    with pytest.raises(GGUFError, match=sentence):
        GGUFFile.open(parts[0])


def test_a_renamed_part_is_told_its_name(parts: list[Path], tmp_path: Path) -> None:
    renamed = parts[1].rename(tmp_path / "weights.gguf")
    with pytest.raises(GGUFError, match=r"part 2 of 3 of a split model.*name it NAME-00002-of-00003\.gguf"):
        GGUFFile.open(renamed)


@pytest.mark.parametrize("number", ["00000", "00004"])
def test_a_number_outside_the_count_is_no_part(tmp_path: Path, number: str) -> None:
    rewrite(tmp_path / f"m-{number}-of-00003.gguf", METADATA, "w")
    assert len(GGUFFile.open(tmp_path / f"m-{number}-of-00003.gguf").paths) == 1


# --- Directories -------------------------------------------------------------


def test_two_models_in_a_directory_are_refused_by_their_first_parts(parts: list[Path], tmp_path: Path) -> None:
    write_split_gguf(tmp_path / "R1.gguf", METADATA, [tensor("a"), tensor("b")], 2)
    rewrite(tmp_path / "V3.gguf", METADATA, "w")
    with pytest.raises(ModelError, match=r"holds 3 models: R1-00001-of-00002\.gguf, R1-00001-of-00003\.gguf, V3\.gguf\. Give --gguf_path one"):
        find_gguf(tmp_path)


def test_what_stands_beside_a_model_is_not_taken_for_one(parts: list[Path], tmp_path: Path) -> None:
    rewrite(tmp_path / "mmproj-F16.gguf", {"general.architecture": "clip"}, "v")
    rewrite(tmp_path / "R1.imatrix.gguf", {"general.type": "imatrix"}, "v")
    raw.save(tmp_path, b"\0\5\x16\7", "._R1-00001-of-00003.gguf")  # macOS leaves such files on foreign disks
    assert find_gguf(tmp_path) == parts[0]
    raw.save(tmp_path, b"", "broken.gguf")
    with pytest.raises(ModelError, match=r"holds 2 models: R1-00001-of-00003\.gguf, broken\.gguf"):
        find_gguf(tmp_path)


def test_a_directory_without_the_model_itself(tmp_path: Path) -> None:
    rewrite(tmp_path / "mmproj-F16.gguf", {"general.type": "mmproj"}, "v")
    rewrite(tmp_path / "imatrix.gguf", {"general.type": "imatrix"}, "v")
    with pytest.raises(ModelNotFound, match=r"no language model, only what belongs beside one: imatrix\.gguf, mmproj-F16\.gguf"):
        find_gguf(tmp_path)


# --- Writing -----------------------------------------------------------------


def test_parts_take_about_the_same_bytes_and_none_is_lost(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 5000, 60)
    for parts in (1, 2, 7):
        paths = write_split_gguf(tmp_path / f"m{parts}.gguf", METADATA, [tensor(f"t{i}", int(n)) for i, n in enumerate(lengths)], parts)
        sizes = [sum(info.nbytes for info in reader._open_part(path).header.tensors.values()) for path in paths]
        assert len(GGUFFile.open(paths[0]).tensors) == 60
        assert max(sizes) - min(sizes) <= 2 * 4 * lengths.max()


def test_a_failed_part_leaves_nothing(tmp_path: Path) -> None:
    broken = TensorData.from_blocks("b", (64,), 0, b"too short")
    with pytest.raises(ValueError, match="'b' yielded 9 bytes"):
        write_split_gguf(tmp_path / "m.gguf", METADATA, [tensor("a"), broken], 2)
    assert list(tmp_path.iterdir()) == []
