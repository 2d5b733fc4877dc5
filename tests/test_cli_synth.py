"""`moespan synth` as a person meets it: what it writes and prints, and what it refuses before it writes anything."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.cli import main, synth
from server.cli.load import model_id
from server.config import ModelConfig
from server.engine.gguf.mix import mix_named
from server.engine.gguf.reader import GGUFFile
from server.engine.gguf.synth import write_synthetic
from server.engine.models.shapes import SHAPES
from tests.engine.gguf.test_synth import tiny
from tests.test_terminal import on_a_terminal


@pytest.fixture(autouse=True)
def shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", tiny("v2-lite", block_count=3))
    monkeypatch.setitem(SHAPES, "tiny-dense", tiny("qwen3-0.6b"))


def test_it_writes_a_model_and_tells_how_its_experts_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "Tiny.gguf"
    assert main(["synth", "tiny", str(out), "--cpu_infer", "1", "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    size = out.stat().st_size
    assert re.search(rf"Tiny\.gguf: {size / 1e6:.1f} MB, \d+ tensors \(Q4_K 57 %, .*written in \d+ s\.", printed)
    assert re.search(
        r"512 random tokens touches: of the 16 in a layer 16 at least, 16 in the median layer; the busiest expert has 1\.\d\d times the mean", printed
    )
    assert "Layer by layer, from layer 1 on: 16 16\n" in printed
    metadata = GGUFFile.open(out).metadata
    assert (metadata["general.name"], metadata["general.file_type"], metadata["tokenizer.ggml.model"]) == ("synthetic Tiny", 15, "none")


def test_a_dense_model_has_no_experts_to_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", "tiny-dense", str(tmp_path / "m.gguf"), "--quant", "Q8_0", "--layers", "1"]) == 0
    assert "xpert" not in capsys.readouterr().out
    file = GGUFFile.open(tmp_path / "m.gguf")
    assert {info.type_id.name for info in file.tensors.values()} == {"Q8_0", "F32"}
    assert file.metadata["qwen3.block_count"] == 1


def test_layers_and_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", "tiny", str(tmp_path / "m.gguf"), "--layers", "2", "--split", "3", "--cpu_infer", "1"]) == 0
    names = [f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    printed = capsys.readouterr().out
    assert "m-00001-of-00003.gguf and 2 more: " in printed
    assert "from layer 1 on: 16\n" in printed
    file = GGUFFile.open(tmp_path / names[2])
    assert file.metadata["deepseek2.block_count"] == 2
    assert model_id(ModelConfig(gguf_path=file.path), file) == "m"


def test_a_terminal_sees_how_far_it_is(tmp_path: Path) -> None:
    shown = on_a_terminal("synth", "qwen3-0.6b", tmp_path / "m.gguf", "--layers", 1, "--quant", "q4_0")
    assert re.search(r"Writing .*/1\d\d\.\d MB", shown)
    assert "written in" in shown


def test_inspect_sums_up_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = write_synthetic(tmp_path / "m.gguf", "m", SHAPES["tiny"], mix_named("q4_k_m"), parts=3)
    assert main(["inspect", str(parts[1]), "--tensors", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["path"], tree["files"], tree["nbytes"]) == (str(parts[0]), 3, sum(path.stat().st_size for path in parts))
    assert len(tree["tensors"]) == 44
    assert main(["inspect", "--gguf_path", str(tmp_path)]) == 0
    assert re.search(r"m-00001-of-00003\.gguf +2\.6 MB in 3 files, 44 tensors", capsys.readouterr().out)


def test_a_file_larger_than_memory_is_written_but_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "available_memory", lambda: 1000)
    assert main(["synth", "tiny", str(tmp_path / "m.gguf")]) == 0
    assert "was not counted: the file does not fit into the 1.0 kB of free memory" in capsys.readouterr().out
    assert (tmp_path / "m.gguf").is_file()


def test_a_disk_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("server.engine.gguf.writer._write_data", fails)
    assert main(["synth", "tiny", str(tmp_path / "m.gguf")]) == 1
    assert "m.gguf cannot be written: Input/output error. Check the directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


REFUSED = [
    (["r2", "m.gguf"], 2, "There is no shape 'r2'; there is v2-lite, v2, v3, r1,"),
    (["tiny", "m.gguf", "--quant", "q1_s"], 2, "--quant q1_s: there is no such mix; there is q4_k_m,"),
    (["v3", "m.gguf", "--layers", "3"], 2, "--layers 3: v3 can have 4 to 61 layers (3 of them dense, then those with experts)."),
    (["qwen3-0.6b", "m.gguf", "--layers", "29"], 2, "--layers 29: qwen3-0.6b can have 1 to 28 layers."),
    (["tiny", "m.gguf", "--layers", "0"], 2, "--layers: invalid count (1 or more) value: '0'"),
    (["tiny", "m.gguf", "--seed", "-1"], 2, "--seed"),
    (["tiny", "m.gguf", "--split", "1000"], 2, "--split 1000 is more than the model's 44 tensors."),
    (["tiny", "m.bin"], 2, "m.bin is no name for a GGUF file: let it end in .gguf."),
    (["tiny", "nowhere/m.gguf"], 1, "There is no directory nowhere to write m.gguf into."),
    (["tiny", "there.gguf"], 2, "there.gguf exists already, and might be worth keeping"),
    (["tiny", "there.gguf", "--split", "2"], 2, "there-00002-of-00002.gguf exists already"),
]


@pytest.mark.parametrize(("words", "status", "sentence"), REFUSED, ids=[sentence[:30] for *_, sentence in REFUSED])
def test_what_cannot_be_is_a_sentence_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], status: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there.gguf", "there-00002-of-00002.gguf"):
        Path(name).write_text("precious")
    assert main(["synth", *words]) == status
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there-00002-of-00002.gguf", "there.gguf"]


def test_a_full_disk_is_told_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_100_000_000))
    assert main(["synth", "v2-lite", str(tmp_path / "m.gguf")]) == 1
    assert re.search(r"m\.gguf will take 10\.4 GB, but its disk has only 3\.1 GB free\. Choose another disk, or fewer layers", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
