"""What the loader refuses, and with which sentence; and what --model_path's config.json overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as T

from server.config import EngineConfig
from server.engine.gguf.reader import GGUFFile
from server.engine.gguf.writer import TensorData
from server.engine.loader import LoadedModel, load_model
from server.engine.protocol import Step
from server.errors import ConfigError, ModelError, ModelNotFound, UnsupportedModel
from tests.engine.rewrite import Change, rewritten
from tests.engine.tiny_models import write_tiny


def load(file: GGUFFile, **engine: Any) -> LoadedModel:
    return load_model(file, EngineConfig(cpu_infer=1, **engine))


def extra(metadata: dict[str, object], tensors: dict[str, TensorData]) -> None:
    tensors["blk.0.attn_q.bias"] = TensorData.from_array("blk.0.attn_q.bias", np.zeros(64, np.float32), T.F32)


def wrong_shape(metadata: dict[str, object], tensors: dict[str, TensorData]) -> None:
    tensors["blk.1.ffn_up.weight"] = TensorData.from_array("blk.1.ffn_up.weight", np.zeros((95, 64), np.float32), T.F32)


def unknown_block(metadata: dict[str, object], tensors: dict[str, TensorData]) -> None:
    tensors["blk.0.attn_q.weight"] = TensorData.from_blocks("blk.0.attn_q.weight", (64, 64), T.I8, memoryview(bytes(64 * 64)))


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        (lambda metadata, tensors: tensors.pop("blk.1.ffn_up.weight"), ModelError, r"tensor blk\.1\.ffn_up\.weight is missing.*download or convert it again"),
        (lambda metadata, tensors: tensors.pop("token_embd.weight"), ModelError, r"token_embd\.weight is missing"),
        (wrong_shape, ModelError, r"blk\.1\.ffn_up\.weight has the shape \(95, 64\), but the metadata asks for \(96, 64\)"),
        (extra, UnsupportedModel, r"does not use \(blk\.0\.attn_q\.bias\); running without them would give wrong answers"),
        (unknown_block, UnsupportedModel, r"blk\.0\.attn_q\.weight cannot be used: .*type id 24 is not supported"),
        (
            lambda metadata, tensors: metadata.update({"general.architecture": "bloom"}),
            UnsupportedModel,
            r"m\.gguf: .*'bloom' is not supported.*: deepseek2, glm4moe, llama, qwen2, qwen2moe, qwen3, qwen3moe\.",
        ),
        (lambda metadata, tensors: metadata.pop("llama.embedding_length"), ModelError, r"m\.gguf: .*llama\.embedding_length is None"),
        (lambda metadata, tensors: metadata.update({"llama.attention.head_count_kv": 3}), ModelError, "4 attention heads cannot share 3"),
        (lambda metadata, tensors: metadata.update({"llama.rope.dimension_count": 18}), ModelError, "rotary dimension of 18 does not fit heads of 16"),
        (lambda metadata, tensors: metadata.update({"llama.block_count": 4_000_000_000}), ModelError, r"block_count is 4000000000"),
        (lambda metadata, tensors: metadata.update({"llama.rope.scaling.type": "longrope"}), UnsupportedModel, "rope scaling 'longrope' is not supported yet"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(change: Change, kind: type[Exception], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=sentence):
        load(rewritten(tmp_path / "m.gguf", change))


def test_cache_lens_is_the_smaller_of_8192_and_the_context_and_never_beyond_it(tmp_path: Path) -> None:
    write_tiny(tmp_path / "short.gguf", "llama", context=512)
    write_tiny(tmp_path / "long.gguf", "llama", context=32768)
    for name, wanted, expected in (("short", None, 512), ("long", None, 8192), ("long", 20000, 20000)):
        loaded = load(GGUFFile.open(tmp_path / f"{name}.gguf"), cache_lens=wanted)
        assert loaded.cache_lens == expected
        loaded.engine.close()
    with pytest.raises(ConfigError, match=r"--cache_lens 513 is more than the 512 tokens.*--cache_lens 512 or less"):
        load(GGUFFile.open(tmp_path / "short.gguf"), cache_lens=513)


def test_the_last_page_is_of_use_to_its_end(tmp_path: Path) -> None:
    """Pages are whole, and evaluation and warm-up use them so, whatever --cache_lens is."""
    write_tiny(tmp_path / "m.gguf", "llama")
    loaded = load(GGUFFile.open(tmp_path / "m.gguf"), cache_lens=100)
    assert (loaded.cache_lens, loaded.engine.num_pages) == (100, 2)
    assert loaded.cache_bytes == 2 * 64 * (2 * 2 * 2 * 16) * 2  # pages, tokens, (layers, k and v, heads, values), half floats
    assert loaded.engine.logits(Step(tuple(i % 96 for i in range(128)), 0, (1, 0), None)).isfinite().all()
    loaded.engine.close()


def test_progress_ends_with_all_of_the_tensors(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "llama")
    seen: list[tuple[int, int]] = []
    load_model(GGUFFile.open(tmp_path / "m.gguf"), EngineConfig(cpu_infer=1), progress=lambda done, total: seen.append((done, total))).engine.close()
    nbytes = sum(info.nbytes for info in GGUFFile.open(tmp_path / "m.gguf").tensors.values())
    assert seen[-1] == (nbytes, nbytes)


def test_model_path_overrides_constants_and_refuses_another_models_shapes(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m.gguf", "llama")
    write_tiny(tmp_path / "other.gguf", "llama", rope={"rope_theta": 500.0})
    config = {"hidden_size": 64, "num_hidden_layers": 2, "rope_theta": 10_000.0, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(GGUFFile.open(tmp_path / "other.gguf"), EngineConfig(cpu_infer=1, cache_type="f32"), hf_directory=tmp_path)
    ids = tuple(range(3, 60))
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    got = loaded.engine.logits(Step(ids, 0, (0,), None))
    loaded.engine.close()
    assert loaded.cache_lens == 128
    assert float((got - expected).norm() / expected.norm()) < 1e-4
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    with pytest.raises(ModelError, match=r"hidden_size = 128, but the GGUF file has 64\. It is the config of another model"):
        load_model(GGUFFile.open(tmp_path / "m.gguf"), EngineConfig(cpu_infer=1), hf_directory=tmp_path)


@pytest.mark.parametrize(
    ("content", "kind", "sentence"),
    [(None, ModelNotFound, "it has no config.json"), ("{", ModelError, "is not valid JSON"), ("[]", ModelError, "holds no JSON object")],
)
def test_model_path_without_a_sound_config(content: str | None, kind: type[Exception], sentence: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "llama")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(kind, match=sentence):
        load_model(GGUFFile.open(tmp_path / "m.gguf"), EngineConfig(cpu_infer=1), hf_directory=tmp_path)
