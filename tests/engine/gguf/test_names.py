"""Names and the rope reordering, against gguf's map, and against transformers as another reader of the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from server.engine.gguf import names
from server.engine.gguf.names import block, gguf_name, interleave_rope_rows
from server.engine.gguf.quants import dequantize
from server.engine.gguf.reader import GGUFFile
from tests.engine.tiny_models import write_tiny

PARTS = {"llama": names.LLAMA_PARTS, "qwen3": names.QWEN3_PARTS}


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        ("model.embed_tokens.weight", names.TOKEN_EMBD),
        ("model.norm.weight", names.OUTPUT_NORM),
        ("lm_head.weight", names.OUTPUT),
        ("model.layers.17.self_attn.k_proj.weight", block(17, "attn_k")),
        ("model.layers.0.post_attention_layernorm.weight", block(0, "ffn_norm")),
    ],
)
def test_hf_names(hf: str, expected: str) -> None:
    assert gguf_name("llama", hf) == gguf_name("qwen3", hf) == expected


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no GGUF name for the tensor 'model\.layers\.0\.mamba\.weight'"):
        gguf_name("llama", "model.layers.0.mamba.weight")
    with pytest.raises(ValueError, match="no architecture 'lama'"):
        gguf_name("lama", "lm_head.weight")


def test_rope_rows_that_rotate_together_become_neighbours() -> None:
    heads, dim = 3, 8
    rows = np.arange(heads * dim).reshape(-1, 1)
    moved = interleave_rope_rows(rows, heads)[:, 0].reshape(heads, dim)
    for head in range(heads):
        assert moved[head].tolist() == [head * dim + i + half * dim // 2 for i in range(dim // 2) for half in (0, 1)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tie", [False, True])
def test_transformers_reads_the_same_model_from_the_file(tmp_path: Path, family: str, tie: bool) -> None:
    # transformers does not read qwen3's key_length and takes its default, 128, for the head
    model = write_tiny(tmp_path / "m.gguf", family, quant=lambda name: GGMLQuantizationType.Q8_0, tie=tie, head_dim=128 if family == "qwen3" else 16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 33, 2, 77, 9, 9]])
    with torch.no_grad():
        ours, theirs = model(ids).logits, again(ids).logits
    assert float((ours - theirs).norm() / ours.norm()) < 1e-5
    assert 0.3 < float(ours.std()) < 10


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_tiny_file_holds_the_names_that_the_engine_asks_for(tmp_path: Path, family: str) -> None:
    kinds = {block(1, "ffn_down"): GGMLQuantizationType.Q4_0}
    model = write_tiny(tmp_path / "m.gguf", family, quant=kinds, layers=2)
    file = GGUFFile.open(tmp_path / "m.gguf")
    expected = {names.TOKEN_EMBD, names.OUTPUT_NORM, names.OUTPUT} | {block(layer, part) for layer in (0, 1) for part in PARTS[family]}
    assert set(file.tensors) == expected
    info = file.tensors[block(1, "ffn_down")]
    assert info.type_id is GGMLQuantizationType.Q4_0
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight").detach().numpy()
    np.testing.assert_array_equal(dequantize(file.data(info.name), info.type_id, info.shape), weight)
