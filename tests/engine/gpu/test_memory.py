"""What a model takes of the GPU's memory, from the real shapes: DeepSeek-R1 in Q4_K_M must fit where KTransformers fitted it, in 14 GB."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.engine.gguf.header import TensorInfo
from server.engine.gguf.mix import mix_named
from server.engine.gguf.quants import row_bytes
from server.engine.gguf.synth import plan, synthetic_metadata
from server.engine.gpu.memory import RING_BYTES, MemoryPlan, dense_bytes, scratch_bytes
from server.engine.kv_cache import bytes_per_token
from server.engine.models.config import HParams
from server.engine.models.shapes import shape_named
from server.errors import DeviceError

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


def test_r1_with_8k_of_context_takes_less_than_14_gb() -> None:
    memory = memory_of("r1", 8192, 2048)
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
    beyond = replace(tensors["blk.1.attn_norm.weight"], name="blk.27.attn_norm.weight")  # a block for multi-token prediction
    assert dense_bytes({**tensors, beyond.name: beyond}, hparams) == on_gpu


def test_scratch_does_not_grow_with_the_context() -> None:
    assert memory_of("r1", 32768, 2048).scratch == memory_of("r1", 8192, 2048).scratch


def test_too_little_memory_is_a_sentence_with_the_numbers() -> None:
    memory = MemoryPlan(10 * GB, 2 * GB, GB, GB)
    memory.check(14 * GB)
    with pytest.raises(DeviceError, match=r"needs 14.0 GB \(10.0 GB of weights, 2.0 GB of KV cache, 2.0 GB to work in\).*but 13.9 GB are free.*--cache_lens"):
        memory.check(139 * GB // 10)
