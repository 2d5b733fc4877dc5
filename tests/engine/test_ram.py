"""What a model takes of RAM is told before it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType as T

from server.config import EngineConfig
from server.engine import ram
from server.engine.gguf.reader import GGUFFile
from server.engine.gpu.ops import GpuOps
from server.engine.kernels import plain_kernels
from server.engine.loader import load_model
from server.engine.models.config import HParams
from server.engine.models.registry import family
from server.engine.native import open_ops
from server.engine.weights import Weights
from server.errors import DeviceError
from tests.engine.rewrite import Change, rewrite
from tests.engine.test_layouts import all_three, prediction_block
from tests.engine.test_models import wide
from tests.engine.tiny_models import write_tiny

GB = 10**9


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("llama", T.Q4_K), ("qwen3moe", T.Q8_0), ("qwen3moe", T.F16), ("deepseek-v3", T.IQ2_XXS)], ids=str)
def test_the_bytes_are_those_of_what_is_laid_out(name: str, kind: T, tie: bool, on_gpu: bool, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", name, quant=lambda _: kind, **wide(name), tie=tie)
    file, native = GGUFFile.open(tmp_path / "m.gguf"), open_ops(1)
    ops = GpuOps(native, torch.device("cpu"), plain_kernels(), 1) if on_gpu else native
    hparams, weights = HParams.from_metadata(file.metadata), Weights(file, ops)
    family(hparams.architecture)(weights, hparams, 96, ops)
    in_ram = [matrix.host for matrix in weights._matrices.values() if matrix.experts] if on_gpu else list(weights._matrices.values())
    expected = sum(matrix.nbytes for matrix in in_ram if matrix.strips_left)
    assert ram.laid_out_bytes(file.tensors, hparams, on_gpu=on_gpu) == expected
    native.close()


@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_K, T.IQ2_XXS], ids=lambda t: t.name)
def test_both_halves_of_a_joined_expansion_are_memory_of_our_own(kind: T, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "deepseek-v3", quant=lambda name: kind if "kv_b" in name else T.F32, joined_kv_b=True, **wide("deepseek-v3"))
    file, native = GGUFFile.open(tmp_path / "m.gguf"), open_ops(1)
    hparams, weights = HParams.from_metadata(file.metadata), Weights(file, native)
    family(hparams.architecture)(weights, hparams, 96, native)
    assert file.tensors["blk.0.attn_kv_b.weight"].type_id is kind
    assert ram.laid_out_bytes(file.tensors, hparams, on_gpu=False) == sum(matrix.nbytes for matrix in weights._made)
    assert ram.laid_out_bytes(file.tensors, hparams, on_gpu=True) == 0
    native.close()


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("change", [all_three, prediction_block])
def test_what_no_layer_takes_is_not_counted(change: Change, on_gpu: bool, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "deepseek-v3", quant=lambda _: T.Q8_0, **wide("deepseek-v3"))
    plain = GGUFFile.open(tmp_path / "m.gguf")
    needed = ram.laid_out_bytes(plain.tensors, HParams.from_metadata(plain.metadata), on_gpu=on_gpu)
    more = rewrite(tmp_path / "m.gguf", change)
    assert more.nbytes > plain.nbytes
    assert ram.laid_out_bytes(more.tensors, HParams.from_metadata(more.metadata), on_gpu=on_gpu) == needed


def test_a_model_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "m.gguf", "qwen3moe", quant=lambda _: T.Q8_0)
    file, read = GGUFFile.open(tmp_path / "m.gguf"), []
    needed = ram.laid_out_bytes(file.tensors, HParams.from_metadata(file.metadata), on_gpu=False)
    monkeypatch.setattr(ram, "available_memory", lambda: needed - 5)
    monkeypatch.setattr(ram, "free_swap", lambda: 4)
    with pytest.raises(DeviceError, match=r"weights take 0\.0 GB of memory, but 0\.0 GB are available, and 0\.0 GB of swap\. Close other programs"):
        load_model(file, EngineConfig(cpu_infer=1), progress=lambda done, _: read.append(done))
    assert not read
    monkeypatch.setattr(ram, "free_swap", lambda: 5)
    load_model(file, EngineConfig(cpu_infer=1)).engine.close()


def test_the_sentence_has_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "available_memory", lambda: 24 * GB)
    monkeypatch.setattr(ram, "free_swap", lambda: 0)
    ram.check_ram(24 * GB)
    with pytest.raises(DeviceError, match=r"take 377\.0 GB of memory, but 24\.0 GB are available\. Close other programs, or take a smaller model"):
        ram.check_ram(377 * GB)
