"""What a tiny model of each family is: its transformers classes, its shape where a test names none, and its GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

CONTEXT = 512
DENSE: Mapping[str, Any] = {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
# DeepSeek's own classes take an eps of 1e-6 for the norms of latents, whatever the config says; all its models have just that. Heads are those of
# the file, so that configs need no head_dim.
LATENT = {
    **{name: value for name, value in DENSE.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
}


@dataclass(frozen=True)
class Tiny:
    """A family: GGUF's architecture, transformers' classes, and a config's fields."""

    architecture: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    defaults: Mapping[str, Any] = field(default_factory=lambda: DENSE)


TINY: Mapping[str, Tiny] = {
    "llama": Tiny("llama", hf.LlamaConfig, hf.LlamaForCausalLM),
    "mixtral": Tiny("llama", hf.MixtralConfig, hf.MixtralForCausalLM, {**DENSE, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen2": Tiny("qwen2", hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "qwen3": Tiny("qwen3", hf.Qwen3Config, hf.Qwen3ForCausalLM),
    "qwen2moe": Tiny("qwen2moe", hf.Qwen2MoeConfig, hf.Qwen2MoeForCausalLM, {**DENSE, **EXPERTS, "shared_expert_intermediate_size": 80}),
    "qwen3moe": Tiny("qwen3moe", hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, {**DENSE, **EXPERTS, "norm_topk_prob": True}),
    "glm4moe": Tiny(
        "glm4moe",
        hf.Glm4MoeConfig,
        hf.Glm4MoeForCausalLM,
        {
            **DENSE,
            "num_hidden_layers": 3,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "deepseek-v2": Tiny(
        "deepseek2",
        hf.DeepseekV2Config,
        hf.DeepseekV2ForCausalLM,
        {**LATENT, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    ),
    "deepseek-v3": Tiny("deepseek2", hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM, {**LATENT, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
}


def metadata(arch: str, config: PreTrainedConfig, joined_kv_b: bool) -> dict[str, object]:
    """The keys that a converter writes; with the older layout of MLA also the older lengths of keys and values."""
    rope = config.rope_parameters
    keys: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        **(_latent(config, joined_kv_b) if arch == "deepseek2" else _grouped_query(config)),
        **_experts(arch, config),
        **(_yarn(arch, rope) if rope["rope_type"] == "yarn" else {}),
    }
    return {
        "general.architecture": arch,
        "general.name": f"tiny {arch}",
        **{f"{arch}.{key}": value for key, value in keys.items()},
        "tokenizer.ggml.model": "none",
    }


def _grouped_query(config: PreTrainedConfig) -> dict[str, object]:
    head_dim = config.head_dim
    return {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)),
    }


def _latent(config: PreTrainedConfig, joined_kv_b: bool) -> dict[str, object]:
    key, rope, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    heads, kv_lora = config.num_attention_heads, config.kv_lora_rank
    q_lora: dict[str, object] = {} if config.q_lora_rank is None else {"attention.q_lora_rank": config.q_lora_rank}
    shared: dict[str, object] = {"attention.kv_lora_rank": kv_lora, "rope.dimension_count": rope, **q_lora}
    if joined_kv_b:
        return {**shared, "attention.head_count_kv": heads, "attention.key_length": key, "attention.value_length": value}
    absorbed = {"attention.head_count_kv": 1, "attention.key_length": kv_lora + rope, "attention.value_length": kv_lora}
    return {**shared, **absorbed, "attention.key_length_mla": key, "attention.value_length_mla": value}


def _experts(arch: str, config: PreTrainedConfig) -> dict[str, object]:
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    count = next((getattr(config, name) for name in names if hasattr(config, name)), None)
    if count is None:
        return {}
    sigmoid = type(config) in (hf.DeepseekV3Config, hf.Glm4MoeConfig)
    keys: dict[str, object] = {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
    optional = {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "leading_dense_block_count": "first_k_dense_replace",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_weights_norm": "norm_topk_prob",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
    }
    keys |= {key: value for key, name in optional.items() if (value := getattr(config, name, None)) is not None}
    return keys | ({"expert_gating_func": 2 if sigmoid else 1} if arch in ("deepseek2", "glm4moe") else {})


def _yarn(arch: str, rope: Mapping[str, Any]) -> dict[str, object]:
    keys: dict[str, object] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }
    optional = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    keys |= {f"rope.scaling.{key}": float(rope[name]) for name, key in optional.items() if rope.get(name) is not None}
    if arch == "deepseek2" and "mscale_all_dim" in rope:
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return keys
