"""What a model takes of the GPU's memory, from the real shapes: DeepSeek-R1 in Q4_K_M must fit where KTransformers fitted it, in 14 GB."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType as T

from server.config import EngineConfig
from server.engine.gguf.header import TensorInfo
from server.engine.gguf.mix import mix_named
from server.engine.gguf.quants import row_bytes
from server.engine.gguf.reader import GGUFFile
from server.engine.gguf.synth import plan, synthetic_metadata
from server.engine.gpu.engine import GpuEngine
from server.engine.gpu.memory import RING_BYTES, MemoryPlan, dense_bytes, scratch_bytes
from server.engine.gpu.ops import GpuOps
from server.engine.kv_cache import bytes_per_token
from server.engine.loader import load_model
from server.engine.models.config import HParams
from server.engine.models.shapes import shape_named
from server.engine.weights import Weights
from server.errors import DeviceError
from tests.engine.gpu.test_engine import open_engine
from tests.engine.test_models import wide
from tests.engine.tiny_models import write_tiny

GB = 10**9


def tensors_of(name: str, mix: str = "q4_k_m") -> dict[str, TensorInfo]:
    shaped = plan(shape_named(name), mix_named(mix))
    sizes = [row_bytes(t.type_id, t.shape[-1]) for t in shaped]
    rows = [t.shape[0] if len(t.shape) == 2 else t.shape[0] * t.shape[1] if len(t.shape) == 3 else 1 for t in shaped]
    return {t.name: TensorInfo(t.name, t.shape, t.type_id, 0, size * count) for t, size, count in zip(shaped, sizes, rows, strict=True)}


def memory_of(name: str, tokens: int, chunk: int) -> MemoryPlan:
    hparams = HParams.from_metadata(synthetic_metadata(name, shape_named(name), mix_named("q4_k_m")))
    hparams = replace(hparams, context=tokens)
    tensors = tensors_of(name)
    vocab = tensors["token_embd.weight"].shape[0]
    return MemoryPlan(dense_bytes(tensors, hparams), bytes_per_token(hparams, "bf16") * tokens, scratch_bytes(hparams, vocab, chunk), RING_BYTES)


@pytest.mark.parametrize("name", ["r1", "v3"])
def test_8k_of_context_take_less_than_14_gb(name: str) -> None:
    memory = memory_of(name, 8192, 2048)
    print(f"{name}: {memory}")
    assert 9 * GB < memory.weights < 12 * GB
    assert memory.cache == 61 * 576 * 2 * 8192
    assert memory.total < 14 * GB, str(memory)


def test_experts_and_the_embedding_stay_in_ram() -> None:
    tensors = tensors_of("v2-lite")
    hparams = HParams.from_metadata(synthetic_metadata("v2-lite", shape_named("v2-lite"), mix_named("q4_k_m")))
    on_gpu = dense_bytes(tensors, hparams)
    in_ram = sum(info.nbytes for name, info in tensors.items() if "_exps" in name or name == "token_embd.weight")
    assert on_gpu + in_ram == sum(info.nbytes for info in tensors.values())
    tied = {name: info for name, info in tensors.items() if name != "output.weight"}
    assert dense_bytes(tied, hparams) == on_gpu - tensors["output.weight"].nbytes + tensors["token_embd.weight"].nbytes


@pytest.mark.parametrize("name", ["blk.27.attn_norm.weight", "blk.27.nextn.eh_proj.weight", "blk.1.attn_kv_b.weight"])
def test_what_no_layer_takes_is_not_counted(name: str) -> None:
    """A block for multi-token prediction, and the joined expansion beside its two parts."""
    tensors = tensors_of("v2-lite")
    hparams = HParams.from_metadata(synthetic_metadata("v2-lite", shape_named("v2-lite"), mix_named("q4_k_m")))
    hparams = replace(hparams, mtp_layers=1)
    assert dense_bytes({**tensors, name: TensorInfo(name, (4096, 512), T.Q8_0, 0, 4096 * 544)}, hparams) == dense_bytes(tensors, hparams)


@pytest.mark.parametrize(
    ("name", "kind", "joined"),
    [
        ("llama", T.F16, False),
        ("llama", T.Q4_K, False),
        ("llama", T.IQ2_XXS, False),
        ("deepseek-v3", T.F32, True),
        ("deepseek-v3", T.Q8_0, True),
        ("deepseek-v3", T.IQ3_S, True),
    ],
    ids=str,
)
def test_the_plan_is_what_the_weights_take(name: str, kind: T, joined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types without a tile order are opened on the GPU, and take many times their bytes in the file."""
    kept: list[int] = []
    moved, vector = GpuOps._moved, Weights.vector

    def noted_matrix(ops: GpuOps, matrix: Any) -> Any:
        on_device = moved(ops, matrix)
        kept.append(on_device.data.nbytes)
        return on_device

    def noted_vector(weights: Weights, *where: Any) -> torch.Tensor:
        values = vector(weights, *where)
        kept.append(values.nbytes)
        return values

    monkeypatch.setattr(GpuOps, "_moved", noted_matrix)
    monkeypatch.setattr(Weights, "vector", noted_vector)
    write_tiny(tmp_path / "m.gguf", name, quant=lambda _: kind, joined_kv_b=joined, **wide(name))
    open_engine(tmp_path / "m.gguf").close()
    file = GGUFFile.open(tmp_path / "m.gguf")
    assert dense_bytes(file.tensors, HParams.from_metadata(file.metadata)) == sum(kept)


def test_a_tensor_of_an_odd_name_is_no_trouble_here() -> None:
    """Whether a file may hold it is said where the model is built."""
    odd = {name: TensorInfo(name, (4,), T.F32, 0, 16) for name in ("blk", "blk.", "blk.x.ffn_up.weight", "blk.99.ffn_up.weight")}
    hparams = HParams.from_metadata(synthetic_metadata("v2-lite", shape_named("v2-lite"), mix_named("q4_k_m")))
    assert dense_bytes(odd, hparams) == 4 * 16


def test_scratch_does_not_grow_with_the_context() -> None:
    assert memory_of("r1", 32768, 2048).scratch == memory_of("r1", 8192, 2048).scratch


def test_too_little_memory_is_a_sentence_with_the_numbers() -> None:
    memory = MemoryPlan(10 * GB, 2 * GB, GB, GB)
    memory.check(14 * GB)
    with pytest.raises(DeviceError, match=r"needs 14.0 GB \(10.0 GB of weights, 2.0 GB of KV cache, 2.0 GB to work in\).*but 13.9 GB are free.*--cache_lens"):
        memory.check(139 * GB // 10)


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of which 100 MB are free."""
    monkeypatch.setattr("server.engine.loader.find_gpu", lambda wanted: torch.device("cuda", 0) if wanted != "cpu" else None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100_000_000, 8 * GB))


@pytest.mark.usefixtures("small_gpu")
def test_a_gpu_without_room_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "deepseek-v3")
    with pytest.raises(DeviceError, match=r"needs \d\.\d GB .* but 0\.1 GB are free\. Lower --cache_lens or --prefill_chunk"):
        load_model(GGUFFile.open(tmp_path / "m.gguf"), EngineConfig(cpu_infer=1, cache_lens=64, device="cuda"))


@pytest.mark.usefixtures("small_gpu")
def test_with_auto_the_cpu_runs_what_a_gpu_has_no_room_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny(tmp_path / "m.gguf", "deepseek-v3")
    loaded = load_model(GGUFFile.open(tmp_path / "m.gguf"), EngineConfig(cpu_infer=1, cache_lens=64, device="auto"))
    assert loaded.device == "cpu"
    assert "0.1 GB are free" in caplog.text
    assert "Everything runs on the CPU." in caplog.text
    loaded.engine.close()


def test_memory_that_runs_out_while_weights_are_laid_out_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another program takes what was free when the plan was made."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    write_tiny(tmp_path / "m.gguf", "deepseek-v3")
    monkeypatch.setattr(GpuOps, "_moved", fail)
    with pytest.raises(DeviceError, match=r"no memory left for the weights \(CUDA out of memory.*Lower --cache_lens or --prefill_chunk"):
        open_engine(tmp_path / "m.gguf")


@pytest.mark.parametrize("where", ["_compile", "_hidden"])
def test_memory_that_runs_out_in_the_first_steps_is_a_sentence(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    write_tiny(tmp_path / "m.gguf", "deepseek-v3")
    monkeypatch.setattr(GpuEngine, where, fail)
    with pytest.raises(DeviceError, match=r"no memory left to work in \(CUDA out of memory\)\. Lower --cache_lens or --prefill_chunk"):
        open_engine(tmp_path / "m.gguf")
