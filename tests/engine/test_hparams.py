"""Hyperparameters of the public models as their files give them, new and old; and what a config.json may change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from server.engine.models.config import HParams, LatentAttention, MixtureOfExperts
from server.engine.models.hf_config import overridden
from server.errors import ModelError, UnsupportedModel

R1 = {
    "block_count": 61, "context_length": 163840, "embedding_length": 7168, "feed_forward_length": 18432, "leading_dense_block_count": 3,
    "attention.head_count": 128, "attention.head_count_kv": 128, "attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512,
    "attention.key_length": 192, "attention.value_length": 128, "attention.layer_norm_rms_epsilon": 1e-6,
    "expert_count": 256, "expert_used_count": 8, "expert_shared_count": 1, "expert_feed_forward_length": 2048,
    "expert_weights_scale": 2.5, "expert_weights_norm": True, "expert_gating_func": 2, "rope.dimension_count": 64, "rope.freq_base": 10000.0,
    "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 4096, "rope.scaling.yarn_log_multiplier": 0.1,
}  # fmt: skip
V2 = {
    **R1, "block_count": 60, "embedding_length": 5120, "feed_forward_length": 12288, "leading_dense_block_count": 1,
    "expert_count": 160, "expert_used_count": 6, "expert_shared_count": 2, "expert_feed_forward_length": 1536,
    "expert_weights_scale": 16.0, "expert_weights_norm": False, "rope.scaling.yarn_log_multiplier": 0.0707,
}  # fmt: skip
del V2["expert_gating_func"]


def read(keys: dict[str, Any], arch: str = "deepseek2", **changes: Any) -> HParams:
    """changes: keys with `__` for a dot; None takes one out."""
    changed = {**keys, **{key.replace("__", "."): value for key, value in changes.items()}}
    return HParams.from_metadata({"general.architecture": arch, **{f"{arch}.{key}": value for key, value in changed.items() if value is not None}})


def test_r1_of_an_old_file_has_its_groups_and_scale() -> None:
    h = read(R1)
    assert h.latent == LatentAttention(q_lora=1536, kv_lora=512, nope_dim=128, rope_dim=64, v_dim=128)
    assert h.moe == MixtureOfExperts(
        experts=256, top_k=8, ffn=2048, shared_ffn=2048, leading_dense=3, gating="sigmoid", normalize=True, scale=2.5, groups=8, groups_used=4, group_top=2
    )  # fmt: skip
    assert h.yarn is not None
    assert h.yarn.attention_factor == 1
    assert h.attention_scale == pytest.approx(0.1352337788)  # (0.1 ln 40 + 1)^2 / sqrt(192), by DeepSeek's own code
    assert (h.layers, h.head_dim, h.kv_heads, h.mtp_layers) == (61, 192, 128, 0)


def test_a_newer_file_says_the_same() -> None:
    absorbed = {"attention__head_count_kv": 1, "attention__key_length": 576, "attention__value_length": 512}
    heads = {"attention__key_length_mla": 192, "attention__value_length_mla": 128}
    new = read(R1, **absorbed, **heads, block_count=62, nextn_predict_layers=1, expert_group_count=8, expert_group_used_count=4)
    assert dataclasses.replace(new, mtp_layers=0) == read(R1)


def test_v2_takes_three_of_eight_groups_by_their_maximum() -> None:
    moe = read(V2).moe
    assert moe is not None
    assert (moe.gating, moe.normalize, moe.scale, moe.groups, moe.groups_used, moe.group_top) == ("softmax", False, 16, 8, 3, 1)


def test_v2_lite_and_kimi_have_no_groups() -> None:
    lite = read(V2, attention__q_lora_rank=None, expert_count=64, block_count=27)
    kimi = read(R1, expert_count=384, expert_group_count=1, expert_group_used_count=1)
    assert lite.latent is not None
    assert lite.latent.q_lora == 0
    for h in (lite, kimi):
        assert h.moe is not None
        assert (h.moe.groups, h.moe.groups_used) == (1, 1)


@pytest.mark.parametrize(("vocab", "gating"), [(102400, "softmax"), (154880, "sigmoid")])
def test_a_gating_that_is_not_said_is_softmax_but_for_glm_flash(vocab: int, gating: str) -> None:
    moe = read(V2, vocab_size=vocab, expert_count=64, expert_used_count=4).moe
    assert moe is not None
    assert moe.gating == gating


QWEN = {
    "block_count": 48, "context_length": 40960, "embedding_length": 2048, "feed_forward_length": 6144, "attention.head_count": 32,
    "attention.head_count_kv": 4, "attention.key_length": 128, "attention.value_length": 128, "attention.layer_norm_rms_epsilon": 1e-6,
    "expert_count": 128, "expert_used_count": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "width", "shared", "gating", "normalize"),
    [
        ("llama", 6144, 0, "softmax", True),
        ("qwen3moe", 768, 0, "softmax", True),
        ("qwen2moe", 768, 6144, "softmax", False),
        ("glm4moe", 768, 0, "sigmoid", False),
    ],
)
def test_what_absent_keys_mean(arch: str, width: int, shared: int, gating: str, normalize: bool) -> None:
    moe = read(QWEN, arch).moe
    assert moe is not None
    assert (moe.ffn, moe.shared_ffn, moe.gating, moe.normalize, moe.scale) == (width, shared, gating, normalize, 1)


def test_without_experts_a_model_is_dense() -> None:
    assert read(QWEN, "llama", expert_count=None).moe is None
    assert read(R1, expert_count=0).moe is None


def test_yarn_of_the_others_scales_cos_and_sin_alone() -> None:
    scaled = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32768}
    yarn = read(QWEN, "qwen3moe", **scaled).yarn
    assert yarn is not None
    assert (yarn.attention_factor, yarn.score_factor, yarn.beta_fast, yarn.beta_slow) == (pytest.approx(1.138629436), 1, 32, 1)  # 0.1 ln 4 + 1
    told = read(QWEN, "qwen3moe", **scaled, rope__scaling__yarn_attn_factor=1.5).yarn
    assert told is not None
    assert told.attention_factor == 1.5
    with pytest.raises(ModelError, match=r"qwen3moe\.rope\.scaling\.original_context_length is None"):
        read(QWEN, "qwen3moe", rope__scaling__type="yarn", rope__scaling__factor=4.0)


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({}, 1),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, 1),
        ({"rope__scaling__type": "linear"}, 1),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, 4),
        ({"rope__scaling__factor": 4.0}, 4),  # files that are older than the type
        ({"rope__scale_linear": 4.0}, 4),  # or than this name of the factor
        ({"rope__scaling__factor": 4.0, "rope__scale_linear": 2.0}, 4),
        ({"rope__scaling__factor": 0.0}, 1),  # llama.cpp's word for none
        ({"rope__scale_linear": 0.0}, 1),
    ],
    ids=str,
)
def test_positions_are_divided_by_a_linear_factor(keys: dict[str, Any], scale: float) -> None:
    h = read(QWEN, "llama", **keys)
    assert (h.rope_scale, h.yarn) == (scale, None)


@pytest.mark.parametrize(
    "key", ["attention.kv_lora_rank", "attention.key_length", "attention.value_length", "rope.dimension_count", "expert_used_count", "block_count"]
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ModelError, match=f"deepseek2.{key} is None"):
        read(R1, **{key: None})


# DeepSeek-V3's own config.json, in what matters here.
CONFIG = {
    "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "head_dim": 64,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip


def test_r1s_own_config_changes_nothing() -> None:
    assert overridden(read(R1), CONFIG) == read(R1)


def test_a_configs_constants_win() -> None:
    rope = {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 2048, "mscale": 0.707, "mscale_all_dim": 0.707, "rope_theta": 5e4}
    config = {**CONFIG, "rope_theta": None, "rope_parameters": rope, "topk_group": 3, "topk_method": "group_limited_greedy", "scoring_func": "softmax"}
    h = overridden(read(R1), {**{k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}, "routed_scaling_factor": 16.0})
    assert h.yarn is not None
    assert h.moe is not None
    assert (h.rope_base, h.yarn.factor, h.yarn.original_context, h.yarn.attention_factor) == (5e4, 8, 2048, 1)
    assert h.attention_scale == pytest.approx((0.0707 * 2.0794415417 + 1) ** 2 / 192**0.5)
    assert (h.moe.groups_used, h.moe.group_top, h.moe.gating, h.moe.scale) == (3, 1, "softmax", 16)


LINEAR = {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}
YARN = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 10240}


@pytest.mark.parametrize("file", [{}, LINEAR, YARN], ids=["none", "linear", "yarn"])
@pytest.mark.parametrize(
    ("config", "scale", "yarn"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 8}}, 8, None),
        ({"rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 5120}}, 1, 8),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 8}}, 8, None),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, 1, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1, None),
        ({"rope_scaling": None}, 1, None),
    ],
    ids=str,
)
def test_a_config_that_speaks_of_rope_scaling_wins_whole(file: dict[str, Any], config: dict[str, Any], scale: float, yarn: float | None) -> None:
    h = overridden(read(QWEN, "qwen3moe", **file), config)
    assert (h.rope_scale, h.yarn and h.yarn.factor) == (scale, yarn)


@pytest.mark.parametrize("file", [{}, LINEAR, YARN], ids=["none", "linear", "yarn"])
def test_a_config_that_does_not_keeps_the_files(file: dict[str, Any]) -> None:
    h = read(QWEN, "qwen3moe", **file)
    assert overridden(h, {"rope_theta": h.rope_base}) == h


@pytest.mark.parametrize("key", ["kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_a_config_of_other_shapes_is_another_models(key: str) -> None:
    with pytest.raises(ModelError, match=rf"{key} = 7, but the GGUF file has {CONFIG[key]}\. It is the config of another model"):
        overridden(read(R1), {**CONFIG, key: 7})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"topk_method": "dice"}, "topk_method 'dice'"),
        ({"scoring_func": "sqrtsoftplus"}, "scoring_func 'sqrtsoftplus'"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope scaling 'dynamic'"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{sentence} in config.json is not supported"):
        overridden(read(R1), {**CONFIG, **change})


@pytest.mark.parametrize(
    ("rope", "sentence"),
    [
        ({"type": "linear"}, "linear in its config.json lacks factor."),
        ({"type": "linear", "factor": -2}, "its config.json has factor = -2, no positive number."),
        ({"type": "yarn", "factor": 4}, "yarn in its config.json lacks original_max_position_embeddings."),
        ({"type": "yarn", "factor": "four", "original_max_position_embeddings": 4096}, "its config.json has factor = 'four', no positive number."),
    ],
)
def test_a_config_whose_rope_lacks_a_number_is_told_which(rope: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=f"{sentence} Leave the flag out"):
        overridden(read(R1), {**CONFIG, "rope_scaling": rope})


@pytest.mark.parametrize("key", ["max_position_embeddings", "rms_norm_eps", "rope_theta", "routed_scaling_factor", "n_group", "topk_group"])
@pytest.mark.parametrize("value", [0, -1, "8"])
def test_a_config_whose_numbers_are_none_is_told_which(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"its config.json has {key} = {value!r}, no positive number. Leave the flag out"):
        overridden(read(R1), {**CONFIG, key: value})
