"""Synthetic models: the files that real ones would be, in names, types and sizes, with weights of the wanted spread and routers that spread tokens."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

from server.config import EngineConfig
from server.engine.expert_load import expert_loads
from server.engine.gguf.mix import MIXES, Model, TypeChooser, mix_named
from server.engine.gguf.quants import dequantize
from server.engine.gguf.reader import GGUFFile
from server.engine.gguf.synth import CHUNK, TO_RESIDUAL, plan, synthetic_metadata, weights, write_synthetic
from server.engine.loader import load_model
from server.engine.models.registry import FAMILIES
from server.engine.models.shapes import SHAPES, Shape, shape_named
from server.engine.protocol import Step
from server.errors import ConfigError

Q4 = mix_named("q4_k_m")


def tiny(name: str, **sizes: int) -> Shape:
    """The shape with all of its features, and sizes that are written and run in no time."""
    shape = shape_named(name)
    small = {
        "block_count": 2,
        "leading_dense_block_count": 1,
        "embedding_length": 256,
        "feed_forward_length": 352,
        "vocab_size": 300,
        "attention.head_count": 4,
        "attention.head_count_kv": 1 if shape["attention.kv_lora_rank"] else 2,
        "attention.q_lora_rank": 96,
        "attention.kv_lora_rank": 128,
        "attention.key_length": 160 if shape["attention.kv_lora_rank"] else 64,
        "attention.value_length": 128 if shape["attention.kv_lora_rank"] else 64,
        "attention.key_length_mla": 96,
        "attention.value_length_mla": 64,
        "rope.dimension_count": 64 if shape["rope.dimension_count"] == shape["attention.key_length"] else 32,
        "expert_count": 16,
        "expert_used_count": 4,
        "expert_feed_forward_length": 96,
        "expert_shared_feed_forward_length": 160,
        **sizes,
    }
    return Shape(shape.architecture, {key: small.get(key, value) for key, value in shape.keys.items()}, shape.tied)


# --- What is in the file -----------------------------------------------------

V2_LITE = {  # layers 0-2, 23-26 and every third from 5 on have more bits; rows of 1408 and 10944 are no multiple of 256
    "token_embd.weight": "Q4_K",
    "output.weight": "Q6_K",
    "output_norm.weight": "F32",
    "blk.0.ffn_down.weight": "Q8_0",
    "blk.0.ffn_gate.weight": "Q4_K",
    "blk.3.attn_q.weight": "Q4_K",
    "blk.3.attn_kv_a_mqa.weight": "Q4_K",
    "blk.3.attn_kv_a_norm.weight": "F32",
    "blk.3.attn_k_b.weight": "Q8_0",
    "blk.3.attn_v_b.weight": "Q4_K",
    "blk.3.attn_output.weight": "Q4_K",
    "blk.3.ffn_gate_inp.weight": "F32",
    "blk.3.ffn_gate_exps.weight": "Q4_K",
    "blk.3.ffn_down_exps.weight": "Q5_0",
    "blk.5.ffn_down_exps.weight": "Q8_0",
    "blk.23.ffn_down_exps.weight": "Q8_0",
    "blk.22.ffn_down_exps.weight": "Q5_0",
    "blk.3.ffn_down_shexp.weight": "Q4_K",
    "blk.5.ffn_down_shexp.weight": "Q6_K",
}
MIXTRAL = {  # of eight experts: values and keys are worth Q8_0
    "blk.9.attn_v.weight": "Q8_0",
    "blk.9.attn_k.weight": "Q8_0",
    "blk.9.attn_q.weight": "Q4_K",
    "blk.9.attn_output.weight": "Q5_K",
    "blk.9.ffn_down_exps.weight": "Q6_K",
    "blk.10.ffn_down_exps.weight": "Q4_K",
}
QWEN3 = {"blk.0.attn_v.weight": "Q6_K", "blk.6.attn_v.weight": "Q4_K", "blk.8.attn_v.weight": "Q6_K", "blk.8.attn_k.weight": "Q4_K"}
TIED = {"token_embd.weight": "Q6_K"}


@pytest.mark.parametrize(("name", "wanted"), [("v2-lite", V2_LITE), ("mixtral-8x7b", MIXTRAL), ("qwen3-30b-a3b", QWEN3), ("llama-1b", TIED)])
def test_the_types_are_those_of_llama_quantize(name: str, wanted: dict[str, str]) -> None:
    types = {tensor.name: tensor.type_id.name for tensor in plan(shape_named(name), Q4)}
    assert {tensor: types[tensor] for tensor in wanted} == wanted


OTHERS = [
    ("q5_k_m", "blk.1.ffn_down_exps.weight", 1408, "Q8_0"),
    ("q5_k_m", "blk.3.ffn_down_exps.weight", 1408, "Q5_1"),
    ("q5_k_m", "blk.3.attn_q.weight", 2048, "Q5_K"),
    ("q6_k", "blk.3.ffn_down_exps.weight", 1408, "Q8_0"),
    ("q8_0", "output.weight", 2048, "Q8_0"),
    ("q8_0", "blk.3.ffn_gate_inp.weight", 2048, "F32"),
    ("q4_0", "output.weight", 2048, "Q6_K"),
    ("q4_0", "output.weight", 1056, "Q8_0"),
    ("q4_0", "blk.3.attn_k_b.weight", 128, "Q4_0"),
    ("q5_0", "blk.3.ffn_up.weight", 40, "F16"),
    ("q2_k", "blk.3.ffn_down_exps.weight", 1408, "Q4_0"),
    ("iq1_s", "blk.3.ffn_down_exps.weight", 1408, "IQ4_NL"),
    ("iq1_s", "blk.3.attn_k_b.weight", 128, "Q8_0"),
    ("iq4_xs", "output.weight", 1056, "Q8_0"),
    ("bf16", "output.weight", 2048, "BF16"),
    ("f16", "blk.3.attn_norm.weight", 2048, "F32"),
]


@pytest.mark.parametrize(("mix", "name", "cols", "wanted"), OTHERS)
def test_other_mixes(mix: str, name: str, cols: int, wanted: str) -> None:
    kind_of = TypeChooser(mix_named(mix), Model(layers=27, experts=64, tied=False, queries_per_value=16))
    shape = (cols,) if name.endswith("norm.weight") else (8, cols)
    assert kind_of(name, shape).name == wanted


TYPES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down", "ffn_up")
# Of the first, a middle and the last layer of 32: in a dense model where 2 heads share a value, in one of 64 experts where 8 do, and with 8 experts.
BLOCKS = {
    "q2_k": [["Q2_K Q2_K Q3_K Q3_K Q3_K Q2_K"] * 3, ["Q2_K Q2_K Q4_K Q3_K Q3_K Q2_K"] * 3, ["Q2_K Q8_0 Q8_0 Q5_K Q3_K Q2_K"] * 3],
    "q3_k_m": [
        ["Q3_K Q3_K Q5_K Q4_K Q5_K Q3_K", *["Q3_K Q3_K Q4_K Q4_K Q4_K Q3_K"] * 2],
        ["Q3_K Q3_K Q5_K Q4_K Q5_K Q3_K", *["Q3_K Q3_K Q4_K Q4_K Q4_K Q3_K"] * 2],
        ["Q3_K Q8_0 Q8_0 Q5_K Q5_K Q3_K", *["Q3_K Q8_0 Q8_0 Q5_K Q4_K Q3_K"] * 2],
    ],
    "iq1_s": [
        ["IQ1_S IQ1_S Q2_K IQ2_XXS Q2_K IQ1_S", *["IQ1_S IQ1_S Q2_K IQ2_XXS IQ1_S IQ1_S"] * 2],
        ["IQ1_S IQ1_S Q4_K IQ2_XXS Q2_K IQ1_S", *["IQ1_S IQ1_S Q4_K IQ2_XXS IQ1_S IQ1_S"] * 2],
        ["IQ1_S Q4_K Q4_K Q5_K Q2_K IQ1_S", *["IQ1_S Q4_K Q4_K Q5_K IQ1_S IQ1_S"] * 2],
    ],
    "iq2_xxs": [
        ["IQ2_XXS IQ2_XXS Q2_K IQ2_XXS Q2_K IQ2_XXS", *["IQ2_XXS IQ2_XXS Q2_K IQ2_XXS IQ2_XXS IQ2_XXS"] * 2],
        ["IQ2_XXS IQ2_XXS Q4_K IQ2_XXS Q2_K IQ2_XXS", *["IQ2_XXS IQ2_XXS Q4_K IQ2_XXS IQ2_XXS IQ2_XXS"] * 2],
        ["IQ2_XXS Q4_K Q4_K Q5_K Q2_K IQ2_XXS", *["IQ2_XXS Q4_K Q4_K Q5_K IQ2_XXS IQ2_XXS"] * 2],
    ],
    "iq3_xxs": [
        ["IQ2_S IQ2_S IQ3_XXS IQ3_S IQ3_XXS IQ3_XXS"] * 3,
        ["IQ2_S IQ2_S Q4_K IQ3_S IQ3_XXS IQ3_XXS"] * 3,
        ["IQ2_S Q8_0 Q8_0 Q5_K IQ3_XXS IQ3_XXS"] * 3,
    ],
    "iq4_xs": [
        ["IQ4_XS IQ4_XS IQ4_XS IQ4_XS IQ4_XS IQ4_XS"] * 3,
        ["IQ4_XS IQ4_XS Q5_K IQ4_XS IQ4_XS IQ4_XS"] * 3,
        ["IQ4_XS Q8_0 Q8_0 Q5_K IQ4_XS IQ4_XS"] * 3,
    ],
    "mxfp4": [["Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0"] * 3, ["Q8_0 Q8_0 Q8_0 Q8_0 MXFP4 MXFP4"] * 3, ["Q8_0 Q8_0 Q8_0 Q8_0 MXFP4 MXFP4"] * 3],
}


@pytest.mark.parametrize(("experts", "queries_per_value"), [(0, 2), (64, 8), (8, 4)], ids=["dense", "experts", "8 experts"])
@pytest.mark.parametrize("mix", BLOCKS)
def test_the_blocks_of_the_smaller_mixes(mix: str, experts: int, queries_per_value: int) -> None:
    kind_of = TypeChooser(mix_named(mix), Model(32, experts, tied=False, queries_per_value=queries_per_value))

    def kind(layer: int, part: str) -> str:
        stacked = part.startswith("ffn") and experts
        return kind_of(f"blk.{layer}.{part}{'_exps' if stacked else ''}.weight", (experts, 8, 512) if stacked else (8, 512)).name

    got = [" ".join(kind(layer, part) for part in TYPES) for layer in (0, 14, 31)]
    assert got == BLOCKS[mix][(0, 64, 8).index(experts)]


@pytest.mark.parametrize(
    ("mix", "embedding", "head"),
    [
        ("q2_k", "Q2_K", "Q6_K"), ("q3_k_m", "Q3_K", "Q6_K"), ("iq1_s", "Q2_K", "Q5_K"), ("iq2_xxs", "Q2_K", "Q5_K"), ("iq3_xxs", "IQ3_S", "Q5_K"),
        ("iq4_xs", "IQ4_XS", "Q6_K"), ("mxfp4", "Q8_0", "Q8_0"),
    ],
)  # fmt: skip
def test_embedding_and_head_of_the_smaller_mixes(mix: str, embedding: str, head: str) -> None:
    for tied in (False, True):
        kind_of = TypeChooser(mix_named(mix), Model(32, 0, tied, 1))
        assert kind_of("output.weight", (8, 512)).name == head
        assert kind_of("token_embd.weight", (8, 512)).name == (head if tied else embedding)


def test_r1_weighs_what_the_published_file_does() -> None:
    """The Q4_K_M of DeepSeek-R1 with split kv_b: 1086 tensors, 377 GiB."""
    tensors = plan(shape_named("r1"), Q4)
    assert Counter(tensor.type_id.name for tensor in tensors) == {"Q4_K": 606, "F32": 361, "Q8_0": 61, "Q6_K": 58}
    assert len(tensors) == 1086
    assert sum(tensor.nbytes for tensor in tensors) / 2**30 == pytest.approx(377, abs=0.5)


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_has_a_name_that_its_architecture_knows(name: str) -> None:
    shape = shape_named(name)
    arch = next(MODEL_ARCH(member) for member, arch_name in MODEL_ARCH_NAMES.items() if arch_name == shape.architecture)
    known = {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[arch]}
    names = {re.sub(r"blk\.\d+", "blk.{bid}", weight.name).rpartition(".")[0] for weight in weights(shape)}
    assert len(names) >= 11
    assert names <= known


@pytest.mark.parametrize("name", SHAPES)
def test_cut_shapes_keep_the_leading_dense_layers(name: str) -> None:
    shape = shape_named(name)
    cut = shape.cut(shape.leading_dense + 1 if shape["expert_count"] else 2)
    layers = {int(weight.name.split(".")[1]) for weight in weights(cut) if weight.name.startswith("blk.")}
    dense = {int(weight.name.split(".")[1]) for weight in weights(cut) if weight.name.endswith("ffn_up.weight")}
    assert layers == set(range(cut.layers))
    assert dense == set(range(cut.leading_dense))


def test_llama_cpp_is_told_that_a_cut_lite_model_has_no_query_lora() -> None:
    lite, v3 = shape_named("v2-lite"), shape_named("v3")
    key = "deepseek2.attention.q_lora_rank"
    assert key not in synthetic_metadata("x", lite, Q4)
    assert synthetic_metadata("x", lite.cut(4), Q4)[key] == 0
    assert synthetic_metadata("x", v3.cut(4), Q4)[key] == 1536


def test_unknown_names_meet_the_list() -> None:
    with pytest.raises(ConfigError, match=r"no shape 'r2'; there is v2-lite, .*qwen3-0\.6b"):
        shape_named("r2")
    with pytest.raises(ConfigError, match=r"--quant q1_s: .*there is q4_k_m, .*f16"):
        mix_named("q1_s")


# --- What the weights are ----------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ["v2-lite", "qwen2-57b-a14b"])
def test_values_have_the_wanted_spread(tmp_path: Path, name: str, mix: str) -> None:
    shape = tiny(name)
    path = write_synthetic(tmp_path / "m.gguf", name, shape, mix_named(mix))[0]
    file = GGUFFile.open(path)
    for weight in weights(shape):
        info = file.tensors[weight.name]
        values = dequantize(file.data(weight.name), info.type_id, info.shape).astype(np.float64)
        assert np.isfinite(values).all()
        # Half-float scales are coarse at 0.0005, a small tensor's own mean and deviation are uncertain, and all blocks of a row share a scale.
        sigmas = 6 * weight.std / math.sqrt(values.size)
        assert abs(values.mean() - weight.mean) < sigmas, weight.name
        assert values.std() == pytest.approx(weight.std, rel=0.1 + 6 / math.sqrt(values.size)), weight.name


def test_what_writes_to_the_residual_stream_is_small(tmp_path: Path) -> None:
    for name in SHAPES:
        for weight in weights(tiny(name)):
            writes = weight.name.split(".")[-2].startswith(("attn_output", "ffn_down"))
            assert (weight.std == TO_RESIDUAL) == writes
            assert weight.std == 1 if weight.name == "token_embd.weight" else weight.std < 0.2


def test_experts_differ_and_a_seed_gives_the_same_file(tmp_path: Path) -> None:
    shape = tiny("v2-lite")
    paths = [write_synthetic(tmp_path / f"{i}.gguf", "x", shape, Q4, seed=seed)[0] for i, seed in enumerate((1, 1, 2))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != paths[2].read_bytes()
    file = GGUFFile.open(paths[0])
    experts = np.frombuffer(file.data("blk.1.ffn_up_exps.weight"), np.uint8).reshape(16, -1)
    assert len({expert.tobytes() for expert in experts}) == 16
    assert file.data("blk.1.ffn_up_exps.weight") != file.data("blk.1.ffn_gate_exps.weight")


def test_large_tensors_come_in_chunks() -> None:
    """Memory stays at some chunks, however large a tensor is, and the chunks do not repeat."""
    tensor = next(tensor for tensor in plan(shape_named("v2-lite"), Q4) if tensor.name == "blk.1.ffn_gate_exps.weight")
    chunks = [bytes(chunk) for chunk, _ in zip(tensor.chunks(), range(6), strict=False)]
    assert all(0.9 * CHUNK < len(chunk) <= CHUNK for chunk in chunks)
    assert len(set(chunks)) == 6


# --- What the engine makes of it ---------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_runs(tmp_path: Path, name: str) -> None:
    shape = tiny(name)
    assert shape.architecture in FAMILIES
    file = GGUFFile.open(write_synthetic(tmp_path / "m.gguf", name, shape, Q4, parts=2)[1])
    loaded = load_model(file, EngineConfig(cpu_infer=1, cache_lens=64))
    logits = loaded.engine.logits(Step((1, 2, 299), 0, (0,), None))
    loaded.engine.close()
    assert logits.shape == (3, 300)
    assert bool(logits.isfinite().all())
    if not shape.tied:  # a tied head multiplies by embeddings of deviation 1
        assert 0.5 < float(logits.std()) < 2


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_runs(tmp_path: Path, mix: str) -> None:
    shape = tiny("qwen3-30b-a3b", expert_feed_forward_length=256)
    loaded = load_model(GGUFFile.open(write_synthetic(tmp_path / "m.gguf", "x", shape, mix_named(mix))[0]), EngineConfig(cpu_infer=1, cache_lens=64))
    logits = loaded.engine.logits(Step((1, 2, 299), 0, (0,), None))
    loaded.engine.close()
    assert bool(logits.isfinite().all())
    assert 0.5 < float(logits.std()) < 2


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape["expert_count"] and name != "r1"])
def test_a_prompt_touches_nearly_all_experts(tmp_path: Path, name: str) -> None:
    """The tiny model has 16 experts, 4 for a token: 512 tokens leave none out, and the busiest stays near the mean of 128."""
    shape = tiny(name, block_count=4, expert_count=16)
    file = GGUFFile.open(write_synthetic(tmp_path / "m.gguf", name, shape, Q4)[0])
    loads = expert_loads(file, EngineConfig(cpu_infer=1))
    assert [load.layer for load in loads] == list(range(shape.leading_dense, 4))
    assert all(load.experts == load.touched == 16 for load in loads)
    assert max(load.busiest for load in loads) < 2
    assert min(load.busiest for load in loads) > 1


def test_without_care_they_crowd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the layers write as much as the embeddings hold, later layers see nearly the same state for all tokens: the count must show it."""
    monkeypatch.setattr("server.engine.gguf.synth.TO_RESIDUAL", 3.0)
    file = GGUFFile.open(write_synthetic(tmp_path / "m.gguf", "x", tiny("v2-lite", block_count=6), Q4)[0])
    loads = expert_loads(file, EngineConfig(cpu_infer=1))
    assert loads[-1].busiest > 1.5
