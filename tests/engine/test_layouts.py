"""Files of the same model in the layouts that converters have used, and the layouts that are refused by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as T

from server.engine.gguf.writer import TensorData
from server.engine.native import NativeOps, open_ops
from server.errors import ModelError, UnsupportedModel
from tests.engine.oracle import ForcedOps, Runner, ask, relative
from tests.engine.rewrite import Change, renamed, rewrite, rewritten
from tests.engine.tiny_models import write_tiny

Metadata = dict[str, object]
Tensors = dict[str, TensorData]


@pytest.fixture(scope="module")
def ops() -> Iterator[NativeOps]:
    ops = open_ops(2)
    yield ops
    ops.close()


@pytest.mark.parametrize("kind", [T.F32, T.BF16, T.F16, T.Q8_0, T.Q4_K], ids=lambda t: t.name)
def test_both_layouts_of_the_latents_expansion_agree(kind: T, ops: NativeOps, tmp_path: Path) -> None:
    """Each against transformers on its own blocks, since rows of k and columns of k are not quantised alike; as floats, against each other."""
    quant = {f"blk.{i}.attn_{part}.weight": kind for i in range(3) for part in ("kv_b", "k_b", "v_b")}
    logits = []
    for joined in (True, False):
        answer = ask(write_tiny(tmp_path / "m.gguf", "deepseek-v3", quant=quant, joined_kv_b=joined, kv_lora_rank=256, qk_nope_head_dim=32))
        logits.append(Runner(tmp_path / "m.gguf", ForcedOps(ops, answer)).run())
        # Half floats of what was in quantised blocks keep 11 bits.
        assert relative(logits[-1], answer.logits) < (1e-4 if kind in (T.F32, T.BF16, T.F16) else 1e-2)
    if kind in (T.F32, T.BF16, T.F16):
        assert relative(logits[0], logits[1]) < 1e-5


def flat_and_all_three(metadata: Metadata, tensors: Tensors) -> None:
    """As one fork writes them: k_b and v_b in two dimensions, and kv_b beside, which nobody needs then."""
    for name, tensor in list(tensors.items()):
        if name.endswith(("attn_k_b.weight", "attn_v_b.weight")):
            tensors[name] = renamed(tensor, name, (tensor.shape[0] * tensor.shape[1], tensor.shape[2]))
    all_three(metadata, tensors)


def all_three(metadata: Metadata, tensors: Tensors) -> None:
    """kv_b beside k_b and v_b, in every layer."""
    for i in range(sum(name.endswith(".attn_k_b.weight") for name in tensors)):
        tensors[f"blk.{i}.attn_kv_b.weight"] = TensorData.from_array(f"blk.{i}.attn_kv_b.weight", np.zeros((176, 32), np.float32), T.Q8_0)


def bias_without_suffix(metadata: Metadata, tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("exp_probs_b.bias")]:
        tensors[name] = renamed(tensors[name], name.removesuffix(".bias"))


def two_axes_for_one_row(metadata: Metadata, tensors: Tensors) -> None:
    for name in [name for name in tensors if "gate_inp_shexp" in name]:
        tensors[name] = renamed(tensors[name], name, (1, *tensors[name].shape))


def prediction_block(metadata: Metadata, tensors: Tensors) -> None:
    """A multi-token prediction block behind the last layer: counted in block_count, with a layer's tensors and its own."""
    arch = metadata["general.architecture"]
    metadata[f"{arch}.block_count"] = 4
    metadata[f"{arch}.nextn_predict_layers"] = 1
    for name in [name for name in tensors if name.startswith("blk.2.")]:
        tensors[name.replace("blk.2.", "blk.3.")] = renamed(tensors[name], name.replace("blk.2.", "blk.3."))
    for part in ("eh_proj", "enorm", "hnorm"):
        tensors[part] = TensorData.from_array(f"blk.3.nextn.{part}.weight", np.zeros((64, 128), np.float32), T.F32)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("deepseek-v3", flat_and_all_three),
        ("deepseek-v3", bias_without_suffix),
        ("deepseek-v3", prediction_block),
        ("glm4moe", prediction_block),
        ("qwen2moe", two_axes_for_one_row),
    ],
)
def test_another_layout_is_the_same_model(family: str, change: Change, ops: NativeOps, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer = ask(write_tiny(tmp_path / "m.gguf", family))
    with caplog.at_level(logging.INFO):
        rewrite(tmp_path / "m.gguf", change)
        runner = Runner(tmp_path / "m.gguf", ForcedOps(ops, answer))
    assert relative(runner.run(), answer.logits) < 1e-4
    assert ("multi-token prediction" in caplog.text) == (change is prediction_block)


def experts_one_by_one(metadata: Metadata, tensors: Tensors) -> None:
    tensors["blk.0.ffn_gate.0.weight"] = renamed(tensors.pop("blk.0.ffn_gate_exps.weight"), "blk.0.ffn_gate.0.weight", (96 * 6, 64))


def gate_and_up_fused(metadata: Metadata, tensors: Tensors) -> None:
    tensors["fused"] = renamed(tensors.pop("blk.0.ffn_gate_exps.weight"), "blk.0.ffn_gate_up_exps.weight")


def narrow_experts(metadata: Metadata, tensors: Tensors) -> None:
    tensors["blk.1.ffn_up_exps.weight"] = TensorData.from_array("blk.1.ffn_up_exps.weight", np.zeros((6, 95, 64), np.float32), T.F32)


def prediction_block_unsaid(metadata: Metadata, tensors: Tensors) -> None:
    prediction_block(metadata, tensors)
    metadata["deepseek2.block_count"] = 3
    del metadata["deepseek2.nextn_predict_layers"]


def without(name: str) -> Change:
    return lambda metadata, tensors: tensors.__delitem__(name)


def keyed(key: str, value: Any) -> Change:
    return lambda metadata, tensors: metadata.update({key: value})


@pytest.mark.parametrize(
    ("family", "change", "kind", "sentence"),
    [
        ("mixtral", experts_one_by_one, UnsupportedModel, r"one tensor for each expert \(blk\.0\.ffn_gate\.0\.weight\).* Convert the model again"),
        ("mixtral", gate_and_up_fused, UnsupportedModel, r"gate and up in one tensor \(blk\.0\.ffn_gate_up_exps\.weight\)"),
        ("mixtral", narrow_experts, ModelError, r"blk\.1\.ffn_up_exps\.weight has the shape \(6, 95, 64\), but the metadata asks for \(6, 96, 64\)"),
        ("qwen2", without("blk.1.attn_k.bias"), ModelError, r"blk\.1\.attn_k\.bias is missing"),
        ("qwen3moe", without("blk.1.ffn_gate_inp.weight"), ModelError, r"blk\.1\.ffn_gate_inp\.weight is missing"),
        ("deepseek-v3", without("blk.1.attn_v_b.weight"), ModelError, r"blk\.1\.attn_v_b\.weight is missing"),
        ("deepseek-v3", prediction_block_unsaid, UnsupportedModel, r"does not use \(blk\.3\.attn_k_b\.weight"),
        ("deepseek-v3", keyed("deepseek2.attention.key_length_mla", 16), ModelError, "keys of 16 values leave none beside 16 rotary ones"),
        ("deepseek-v3", keyed("deepseek2.attention.kv_lora_rank", 48), ModelError, r"blk\.0\.attn_kv_a_mqa\.weight has the shape \(48, 64\).*\(64, 64\)"),
        ("deepseek-v3", keyed("deepseek2.expert_group_count", 3), ModelError, "3 of 8 experts cannot be chosen from 2 of 3 groups"),
        ("deepseek-v3", keyed("deepseek2.expert_used_count", 5), ModelError, "5 of 8 experts cannot be chosen from 2 of 4 groups"),
        ("deepseek-v3", keyed("deepseek2.expert_gating_func", 3), UnsupportedModel, r"gating function 3 is not supported; 1 \(softmax\) and 2 \(sigmoid\) are"),
        ("deepseek-v3", keyed("deepseek2.nextn_predict_layers", 3), ModelError, "3 prediction blocks and no layers"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(family: str, change: Change, kind: type[Exception], sentence: str, ops: NativeOps, tmp_path: Path) -> None:
    rewritten(tmp_path / "m.gguf", change, family)
    with pytest.raises(kind, match=sentence):
        Runner(tmp_path / "m.gguf", ops)


def test_a_long_decode_does_not_drift(ops: NativeOps, tmp_path: Path) -> None:
    """4,000 tokens, each drawn from the logits before it, give the logits of a fresh prefill of the same text: float32 rounding, no more.

    One layer of experts and one dense, whose choices of experts are our own: no near-tie happens to fall inside the rounding here.
    """
    length = 4000
    pages = tuple(range(-(-length // 64)))
    write_tiny(tmp_path / "m.gguf", "deepseek-v3", layers=2, context=4096, rope={"rope_type": "yarn", "factor": 128.0, "original_max_position_embeddings": 32})
    runner, generator = Runner(tmp_path / "m.gguf", ops, tokens=length), torch.Generator().manual_seed(3)
    tokens, decoded = [5], []
    while len(decoded) < length:
        decoded.append(runner.step(tokens[-1:], len(decoded), pages)[0])
        tokens.append(int(torch.multinomial(decoded[-1].softmax(-1), 1, generator=generator)))
    for part in runner.cache.layers:
        part.latent.fill_(torch.nan)  # type: ignore[union-attr]
    chunks = [runner.step(tokens[i : min(i + 500, length)], i, pages) for i in range(0, length, 500)]
    assert len(set(tokens)) > 60
    assert relative(torch.stack(decoded), torch.cat(chunks)) < 1e-5
