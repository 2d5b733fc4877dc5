"""A trained model as others read it: `python -m recipes.tiny_r1.export RUN OUT [--quant Q5_K Q4_0 ...]`.

OUT gets hf/ (safetensors in DeepSeek-V3's names, config, tokenizer: what `transformers` loads as DeepseekV3ForCausalLM) and for each mix of types
tiny-r1-MIX.gguf: BF16 and Q4_K_M where nothing else is asked for. GGUF keys and names are llama.cpp's for the architecture deepseek2.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from recipes.tiny_r1.mixes import MIXES, SHIPPED, Mix
from recipes.tiny_r1.shape import Shape
from recipes.tiny_r1.tokenizer import BOS_ID, CHAT_TEMPLATE, CONTROL, EOS_ID, PAD_ID, PRE, VISIBLE
from server.engine.gguf.writer import TensorData, write_gguf

State = Mapping[str, Tensor]
Array = NDArray[np.float32]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Export a trained tiny reasoning model.")
    parser.add_argument("run", type=Path, help="the directory that training wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--quant", nargs="+", choices=MIXES, default=SHIPPED, metavar="MIX", help=f"the GGUF files to write, of {', '.join(MIXES)}")
    options = parser.parse_args()
    state, shape, tokenizer = load_run(options.run)
    write_hf(state, shape, options.run, options.out / "hf")
    for quant in options.quant:
        path = options.out / f"tiny-r1-{quant}.gguf"
        write_tiny_r1(path, state, shape, tokenizer, quant)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def load_run(run: Path) -> tuple[State, Shape, Tokenizer]:
    """What training left in its directory."""
    shape = Shape(**json.loads((run / "shape.json").read_text(encoding="utf-8")))
    return load_file(run / "model.safetensors"), shape, Tokenizer.from_file(str(run / "tokenizer.json"))


def write_hf(state: State, shape: Shape, run: Path, out: Path) -> None:
    """A directory for `transformers`."""
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().clone() for name, value in hf_tensors(state, shape)}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(hf_config(shape), indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / name, out / name)


def hf_tensors(state: State, shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """The weights under DeepSeek-V3's names: each expert on its own, the MTP block as one more layer with copies of embedding and head."""
    last = f"model.layers.{shape.layers}"
    for name, value in state.items():
        name = re.sub(r"^mtp\.block\.", f"{last}.", name)
        name = re.sub(r"^mtp\.norm\.", f"{last}.shared_head.norm.", name)
        name = re.sub(r"^mtp\.", f"{last}.", name)
        name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
        yield from _hf_experts(name, value) if ".experts." in name else [(name, value)]
    yield f"{last}.embed_tokens.weight", state["embed_tokens.weight"]
    yield f"{last}.shared_head.head.weight", state["lm_head.weight"]


def _hf_experts(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    layer, _, kind = name.rpartition(".")
    for expert, weights in enumerate(value):
        parts = {"gate_proj": weights.chunk(2)[0], "up_proj": weights.chunk(2)[1]} if kind == "gate_up_proj" else {"down_proj": weights}
        yield from ((f"{layer}.{expert}.{part}.weight", rows) for part, rows in parts.items())


def hf_config(shape: Shape) -> dict[str, object]:
    """config.json in DeepSeek-V3's keys."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "moe_intermediate_size": shape.expert_ffn,
        "num_hidden_layers": shape.layers,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "n_shared_experts": 1,
        "n_routed_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "n_group": shape.groups,
        "topk_group": shape.groups_used,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": shape.routed_scale,
        "first_k_dense_replace": shape.leading_dense,
        "moe_layer_freq": 1,
        "q_lora_rank": shape.q_lora,
        "kv_lora_rank": shape.kv_lora,
        "qk_rope_head_dim": shape.rope_dim,
        "qk_nope_head_dim": shape.nope_dim,
        "v_head_dim": shape.v_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_base,
        "rope_scaling": {
            "type": "yarn",
            "factor": shape.yarn_factor,
            "original_max_position_embeddings": shape.yarn_original,
            "beta_fast": shape.yarn_fast,
            "beta_slow": shape.yarn_slow,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }


def write_tiny_r1(path: Path, state: State, shape: Shape, tokenizer: Tokenizer, quant: str) -> None:
    """A GGUF file; `quant`: one of MIXES."""
    mix = MIXES[quant]
    tensors = [TensorData.from_array(name, array, _type(name, array, mix)) for name, array in gguf_tensors(state, shape)]
    metadata = {**gguf_metadata(shape), **tokenizer_metadata(tokenizer), "general.file_type": int(mix.file_type), "general.quantization_version": 2}
    write_gguf(path, metadata, tensors)


def _type(name: str, array: Array, mix: Mix) -> Type:
    """Vectors, and the router, which chooses by small differences, are never rounded."""
    return Type.F32 if array.ndim == 1 or name.endswith("ffn_gate_inp.weight") else mix(name, array.shape[-1])


_GGUF_NAMES = {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_GGUF_TOP = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
_GGUF_MTP = {"enorm": "nextn.enorm", "hnorm": "nextn.hnorm", "eh_proj": "nextn.eh_proj", "norm": "nextn.shared_head_norm"}


def gguf_tensors(state: State, shape: Shape) -> Iterator[tuple[str, Array]]:
    """The weights under GGUF's names, float32. The MTP block is the last one; embedding and head, being the model's own, are not repeated."""
    for name, value in state.items():
        array: Array = value.float().numpy()
        if name in _GGUF_TOP:
            yield _GGUF_TOP[name], array
        elif name.startswith("mtp.") and not name.startswith("mtp.block."):
            yield f"blk.{shape.layers}.{_GGUF_MTP[name.split('.')[1]]}.weight", array
        else:
            _, layer, part = re.sub(r"^mtp\.block", f"layers.{shape.layers}", name).split(".", 2)
            yield from ((f"blk.{layer}.{target}", rows) for target, rows in _block_tensors(part, array, shape))


def _block_tensors(part: str, array: Array, shape: Shape) -> Iterator[tuple[str, Array]]:
    """One tensor of a block: most keep their form, fused ones come apart."""
    if part == "mlp.experts.gate_up_proj":
        yield "ffn_gate_exps.weight", array[:, : shape.expert_ffn]
        yield "ffn_up_exps.weight", array[:, shape.expert_ffn :]
    elif part == "mlp.experts.down_proj":
        yield "ffn_down_exps.weight", array
    elif part == "mlp.gate.e_score_correction_bias":
        yield "exp_probs_b.bias", array
    elif part == "self_attn.kv_b_proj.weight":
        heads = array.reshape(shape.heads, shape.nope_dim + shape.v_dim, shape.kv_lora)
        yield "attn_k_b.weight", heads[:, : shape.nope_dim].swapaxes(1, 2)  # absorbed into the query, so it is stored transposed
        yield "attn_v_b.weight", heads[:, shape.nope_dim :]
    else:
        yield f"{_GGUF_NAMES[part.removesuffix('.weight')]}.weight", array


def gguf_metadata(shape: Shape) -> dict[str, object]:
    """The deepseek2 keys; R1's 671B files have the same, and no MTP block."""
    keys = {
        "vocab_size": shape.vocab,
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "block_count": shape.layers + 1,
        "nextn_predict_layers": 1,
        "leading_dense_block_count": shape.leading_dense,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": 1,  # of the latent
        "attention.layer_norm_rms_epsilon": shape.norm_eps,
        "attention.q_lora_rank": shape.q_lora,
        "attention.kv_lora_rank": shape.kv_lora,
        "attention.key_length": shape.kv_lora + shape.rope_dim,
        "attention.value_length": shape.kv_lora,
        "attention.key_length_mla": shape.qk_dim,
        "attention.value_length_mla": shape.v_dim,
        "expert_count": shape.experts,
        "expert_used_count": shape.top_k,
        "expert_shared_count": 1,
        "expert_feed_forward_length": shape.expert_ffn,
        "expert_weights_scale": shape.routed_scale,
        "expert_weights_norm": True,
        "expert_gating_func": 2,  # sigmoid
        "expert_group_count": shape.groups,
        "expert_group_used_count": shape.groups_used,
        "rope.dimension_count": shape.rope_dim,
        "rope.freq_base": shape.rope_base,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": shape.yarn_factor,
        "rope.scaling.original_context_length": shape.yarn_original,
        "rope.scaling.yarn_log_multiplier": 0.1,  # 0.1 * mscale_all_dim
        "rope.scaling.yarn_beta_fast": shape.yarn_fast,
        "rope.scaling.yarn_beta_slow": shape.yarn_slow,
    }
    general = {"general.architecture": "deepseek2", "general.type": "model", "general.name": "Tiny R1", "general.license": "apache-2.0"}
    return {**general, **{f"deepseek2.{key}": value for key, value in keys.items()}}


def tokenizer_metadata(tokenizer: Tokenizer) -> dict[str, object]:
    """The vocabulary and the chat template."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRE,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_token_type(str(token)) for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": BOS_ID,
        "tokenizer.ggml.eos_token_id": EOS_ID,
        "tokenizer.ggml.padding_token_id": PAD_ID,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _token_type(token: str) -> int:
    """GGUF's token types: normal, control, matched as a whole but text, unused."""
    if token in CONTROL:
        return 3
    if token in VISIBLE:
        return 4
    return 5 if "place\u2581holder" in token else 1


if __name__ == "__main__":
    main()
