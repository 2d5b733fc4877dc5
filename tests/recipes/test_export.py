"""The exported model: transformers computes the same logits, our reader finds the right keys, and pieces join to what they were cut from."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from gguf.constants import GGMLQuantizationType as Type
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from recipes.tiny_r1 import pieces
from recipes.tiny_r1.export import load_run, write_hf, write_tiny_r1
from recipes.tiny_r1.mixes import MIXES
from recipes.tiny_r1.model import TinyR1
from recipes.tiny_r1.plot import draw
from recipes.tiny_r1.shape import Shape
from recipes.tiny_r1.tokenizer import save_tokenizer
from recipes.tiny_r1.train import text_mask
from server.engine.gguf.quants import dequantize
from server.engine.gguf.reader import GGUFFile
from tests.recipes.conftest import SMALL

# V3's own heads, and rows that K-quants take.
SHAPE = replace(SMALL, hidden=256, q_lora=256, kv_lora=512, rope_dim=64, nope_dim=128, v_dim=128, ffn=256, expert_ffn=256, context=4096, yarn_original=1024)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """What training leaves, with random weights, norms and biases that matter."""
    path = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = TinyR1(SHAPE)
    for name, value in model.state_dict().items():
        if "norm" in name:
            value.copy_(1 + 0.2 * torch.randn(value.shape))
        elif "bias" in name:
            value.copy_(0.1 * torch.randn(value.shape))
    save_file(model.state_dict(), path / "model.safetensors")
    (path / "shape.json").write_text(json.dumps(asdict(SHAPE)))
    save_tokenizer(tokenizer, path)
    return path


def test_transformers_computes_the_same_logits(run: Path, tmp_path: Path) -> None:
    state, shape, _ = load_run(run)
    model = TinyR1(shape).eval()
    model.load_state_dict(state)
    write_hf(state, shape, run, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    assert isinstance(theirs, DeepseekV3ForCausalLM)
    tokens = torch.randint(7, shape.vocab, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = theirs(tokens).logits, model.logits(model(tokens, text_mask(tokens))[0])
    assert (expected - got).norm() <= 1e-4 * expected.norm()


def test_the_gguf_has_the_keys_and_tensors_of_deepseek2(run: Path, tmp_path: Path) -> None:
    state, shape, tokenizer = load_run(run)
    write_tiny_r1(tmp_path / "m.gguf", state, shape, tokenizer, "BF16")
    file = GGUFFile.open(tmp_path / "m.gguf")
    keys = file.metadata
    assert keys["deepseek2.block_count"] == shape.layers + 1
    assert keys["deepseek2.nextn_predict_layers"] == 1
    assert keys["deepseek2.attention.key_length_mla"] == shape.qk_dim
    assert keys["tokenizer.ggml.pre"] == "deepseek-v3"
    assert set(_block_parts(file, 0)) == {*ATTENTION, "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"}
    assert set(_block_parts(file, 1)) == {*ATTENTION, *MOE}
    assert set(_block_parts(file, 2)) == {*ATTENTION, *MOE, "nextn.enorm.weight", "nextn.hnorm.weight", "nextn.eh_proj.weight", "nextn.shared_head_norm.weight"}


ATTENTION = [
    f"{part}.weight"
    for part in (
        "attn_norm", "attn_q_a", "attn_q_a_norm", "attn_q_b", "attn_kv_a_mqa", "attn_kv_a_norm", "attn_k_b", "attn_v_b", "attn_output", "ffn_norm",
    )
]  # fmt: skip
MOE = ["exp_probs_b.bias"] + [
    f"ffn_{part}.weight" for part in ("gate_inp", "gate_exps", "up_exps", "down_exps", "gate_shexp", "up_shexp", "down_shexp")
]  # fmt: skip


def _block_parts(file: GGUFFile, block: int) -> list[str]:
    prefix = f"blk.{block}."
    return [name.removeprefix(prefix) for name in file.tensors if name.startswith(prefix)]


@pytest.mark.parametrize("label", ["BF16", "Q4_K_M"])
def test_blocks_mean_the_weights(run: Path, tmp_path: Path, label: str) -> None:
    """The absorbed key matrix is the transposed upper part of each head; Q4_K keeps a weight within a few per cent of the largest."""
    state, shape, tokenizer = load_run(run)
    write_tiny_r1(tmp_path / "m.gguf", state, shape, tokenizer, label)
    file = GGUFFile.open(tmp_path / "m.gguf")
    heads = state["layers.0.self_attn.kv_b_proj.weight"].view(shape.heads, shape.nope_dim + shape.v_dim, shape.kv_lora).numpy()
    fused = state["mtp.block.mlp.experts.gate_up_proj"].numpy()
    expected = {
        "blk.0.attn_k_b.weight": (heads[:, : shape.nope_dim].swapaxes(1, 2), Type.BF16 if label == "BF16" else Type.Q8_0),
        "blk.0.attn_v_b.weight": (heads[:, shape.nope_dim :], Type.BF16 if label == "BF16" else Type.Q6_K),
        "blk.2.ffn_up_exps.weight": (fused[:, shape.expert_ffn :], Type.BF16 if label == "BF16" else Type.Q4_K),
    }
    for name, (values, kind) in expected.items():
        tensor = file.tensors[name]
        assert (tensor.shape, tensor.type_id) == (values.shape, kind)
        got = dequantize(file.data(name), tensor.type_id, tensor.shape)
        assert np.linalg.norm(got - values) <= (0.004 if label == "BF16" else 0.1) * np.linalg.norm(values)


@pytest.mark.parametrize("quant", MIXES)
def test_every_mix_has_its_type_wherever_that_fits(run: Path, tmp_path: Path, quant: str) -> None:
    state, shape, tokenizer = load_run(run)
    write_tiny_r1(tmp_path / "m.gguf", state, shape, tokenizer, quant)
    file = GGUFFile.open(tmp_path / "m.gguf")
    base = Type[quant.removesuffix("_M")]
    finer = Type.Q6_K if quant.endswith("_M") else base
    types = {name.removeprefix("blk.1."): tensor.type_id for name, tensor in file.tensors.items()}
    assert {types[name] for name in ("token_embd.weight", "attn_output.weight", "ffn_gate_exps.weight", "ffn_down_exps.weight")} == {base}
    assert {types[name] for name in ("output.weight", "attn_v_b.weight", "ffn_down_shexp.weight")} == {finer}
    assert types["attn_k_b.weight"] == (Type.Q8_0 if GGML_QUANT_SIZES[base][0] == 256 else base)  # rows of 128
    assert {types[name] for name in ("ffn_gate_inp.weight", "attn_norm.weight", "exp_probs_b.bias")} == {Type.F32}
    assert LlamaFileType(file.metadata["general.file_type"]).name.startswith(("MOSTLY_" if base is not Type.F32 else "ALL_") + quant)


def test_the_shipped_shape_fits() -> None:
    """Bytes of the Q4_K_M file without its metadata, from the parameters alone: at most 24 MB."""
    with torch.device("meta"):
        parameters = sum(value.numel() for value in TinyR1(Shape()).parameters())
    assert parameters * 4.9 / 8 < 23.5e6


def test_pieces_join_again(run: Path, tmp_path: Path) -> None:
    cut = pieces.split(run, tmp_path / "cut", 1)
    assert len(cut) > 2
    assert all(piece.stat().st_size <= 1 << 20 for piece in cut)
    pieces.join(tmp_path / "cut", tmp_path / "joined")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "joined" / name).read_bytes() == (run / name).read_bytes()
    cut[1].unlink()
    with pytest.raises(ValueError, match="not whole"):
        pieces.join(tmp_path / "cut", tmp_path / "again")


def test_the_loss_curve_is_a_picture() -> None:
    picture = ElementTree.fromstring(draw([{"step": step, "loss": 8 / step, "mtp_loss": 9 / step} for step in range(1, 50)]))
    assert [len(line.attrib["points"].split()) for line in picture.iter("{http://www.w3.org/2000/svg}polyline")] == [49, 49]
