"""Weights on their way from the file: laid out in the file's order, and given back to the page cache as they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from gguf import GGMLQuantizationType as Type

from server.config import EngineConfig
from server.engine.gguf.reader import GGUFFile
from server.engine.loader import load_model
from server.engine.ops import Matrix, Ops
from tests.engine.rewrite import Change, rewrite
from tests.engine.test_layouts import all_three, prediction_block
from tests.engine.tiny_models import write_tiny


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_all_but_the_embedding_and_float_matrices_end_in_tile_order(family: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", family, quant=lambda _: Type.Q8_0)
    file = GGUFFile.open(tmp_path / "m.gguf")
    taken: list[Matrix] = []
    told: list[tuple[int, int]] = []

    class Watching:
        def __init__(self, ops: Ops) -> None:
            self._ops = ops

        def __getattr__(self, name: str) -> Any:
            return getattr(self._ops, name)

        def matrix(self, type_id: int, rows: int, cols: int, data: memoryview, count: int = 1) -> Matrix:
            taken.append(self._ops.matrix(type_id, rows, cols, data, count))
            return taken[-1]

    def wrap(ops: Ops) -> Ops:
        return cast(Ops, Watching(ops))

    load_model(file, EngineConfig(cpu_infer=1), wrap=wrap, progress=lambda *done: told.append(done)).engine.close()
    in_rows = [matrix for matrix in taken if not matrix.in_tiles]
    assert any(matrix.in_tiles for matrix in taken)
    assert [matrix.rows for matrix in in_rows if matrix.type_id == 8] == [file.tensors["token_embd.weight"].shape[0]]
    assert told == sorted(told)
    assert told[-1] == (told[-1][1], sum(info.nbytes for info in file.tensors.values()))


@pytest.mark.parametrize("change", [all_three, prediction_block])
def test_what_no_layer_takes_is_not_read(change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "m.gguf", "deepseek-v3")
    plain = GGUFFile.open(tmp_path / "m.gguf")
    file, data, page_in = rewrite(tmp_path / "m.gguf", change), GGUFFile.data, GGUFFile.page_in
    read: set[str] = set()
    told: list[int] = []

    def noted_data(file: GGUFFile, name: str) -> memoryview:
        read.add(name)
        return data(file, name)

    def noted_page_in(file: GGUFFile, name: str, begin: int, end: int) -> None:
        read.add(name)
        page_in(file, name, begin, end)

    monkeypatch.setattr(GGUFFile, "data", noted_data)
    monkeypatch.setattr(GGUFFile, "page_in", noted_page_in)
    load_model(file, EngineConfig(cpu_infer=1), progress=lambda _, total: told.append(total)).engine.close()
    assert set(file.tensors) > set(plain.tensors) == read
    assert told[-1] == sum(info.nbytes for info in plain.tensors.values())


def test_a_slice_is_given_back_before_the_next_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a file that fills the memory is never there twice."""
    held: dict[str, tuple[int, int]] = {}  # bytes of each tensor that are in the map
    most: dict[str, int] = {}

    def page_in(_: GGUFFile, name: str, begin: int, end: int) -> None:
        first, last = held.get(name, (begin, begin))
        assert last == begin
        held[name] = first, end
        most[name] = max(most.get(name, 0), end - first)

    def give_back(_: GGUFFile, name: str, begin: int, end: int) -> None:
        first, last = held.get(name, (begin, end))
        assert first == begin
        held[name] = min(end, last), last

    write_tiny(tmp_path / "m.gguf", "qwen3moe", quant=lambda _: Type.Q8_0, hidden=256, heads=8, kv_heads=2, head_dim=32)
    file = GGUFFile.open(tmp_path / "m.gguf")
    monkeypatch.setattr(GGUFFile, "page_in", page_in)
    monkeypatch.setattr(GGUFFile, "give_back", give_back)
    monkeypatch.setattr("server.engine.native.SLICE", 20_000)
    load_model(file, EngineConfig(cpu_infer=1)).engine.close()
    laid_out = {name for name, info in file.tensors.items() if info.type_id is Type.Q8_0 and name != "token_embd.weight"}
    assert len(laid_out) > 10
    for name in laid_out:
        nbytes = file.tensors[name].nbytes
        assert held[name] == (nbytes, nbytes), name  # all of it was read, and nothing kept
        assert most[name] <= max(20_000, 16 * 256 * 34 // 32), name
    assert max(file.tensors[name].nbytes for name in laid_out) > 60_000
