"""A Hugging Face config.json over a GGUF file's hyperparameters: its shapes must be the file's, its constants win."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from server.engine.models.config import HParams, MixtureOfExperts, Yarn, yarn_mscale
from server.errors import ModelError, UnsupportedModel

Config = Mapping[str, Any]

_SHAPES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
}
_GROUPED_QUERY_SHAPES = {"head_dim": "head_dim"}  # with latent attention configs call the rotary part so
_LATENT_SHAPES = {
    "q_lora_rank": "q_lora",
    "kv_lora_rank": "kv_lora",
    "qk_nope_head_dim": "nope_dim",
    "qk_rope_head_dim": "rope_dim",
    "v_head_dim": "v_dim",
}
_EXPERT_SHAPES = {
    "n_routed_experts": "experts",
    "num_experts": "experts",
    "num_local_experts": "experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "ffn",
    "shared_expert_intermediate_size": "shared_ffn",
    "first_k_dense_replace": "leading_dense",
}
_GROUP_TOPS = {"greedy": 1, "group_limited_greedy": 1, "noaux_tc": 2}  # DeepSeek's topk_method


def overridden(hparams: HParams, config: Config) -> HParams:
    """The file's hyperparameters with the config's constants: context, norm_eps, rope, and how experts are weighted and grouped.

    What it does not name stays the file's; rope scaling that is null is named, and none.
    Raises ModelError when it is another model's config, UnsupportedModel when it asks for what does not run here.
    """
    _check_shapes(hparams, _SHAPES, config)
    if hparams.latent:
        _check_shapes(hparams.latent, _LATENT_SHAPES, config)
    else:
        _check_shapes(hparams, _GROUPED_QUERY_SHAPES, config)
    if hparams.moe:
        _check_shapes(hparams.moe, _EXPERT_SHAPES, config)
    said = [config[key] for key in ("rope_parameters", "rope_scaling") if key in config]
    rope: Config = next(filter(None, said), {})
    constants: dict[str, Any] = {
        "context": _positive(config, "max_position_embeddings"),
        "norm_eps": _positive(config, "rms_norm_eps"),
        "rope_base": _positive(config, "rope_theta") or _positive(rope, "rope_theta"),
        "moe": _experts(hparams.moe, config) if hparams.moe else None,
    }
    given = {field: value for field, value in constants.items() if value is not None}
    return replace(hparams, **given, **(_rope_scaling(hparams, rope) if said else {})).checked()


def _check_shapes(shapes: object, names: Mapping[str, str], config: Config) -> None:
    for key, field in names.items():
        mine, theirs = getattr(shapes, field), config.get(key)
        if theirs is not None and theirs != mine:
            raise ModelError(f"--model_path: its config.json has {key} = {theirs}, but the GGUF file has {mine}. It is the config of another model.")


def _rope_scaling(hparams: HParams, rope: Config) -> dict[str, Any]:
    """Both of its fields, so that nothing of the file's own scaling stays: half of each would be neither model."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        return {"rope_scale": float(_needed(rope, kind, "factor")), "yarn": None}
    if kind == "yarn":
        return {"rope_scale": 1.0, "yarn": _yarn(hparams, rope)}
    if kind in ("default", "llama3"):  # llama3's factors are a tensor of the file
        return {"rope_scale": 1.0, "yarn": None}
    raise UnsupportedModel(f"--model_path: rope scaling {kind!r} in config.json is not supported yet. Leave the flag out to use the GGUF's own values.")


def _yarn(hparams: HParams, rope: Config) -> Yarn:
    """mscale and mscale_all_dim are DeepSeek's: cos and sin get the quotient of the two temperatures, the scores the square of the second."""
    factor, original = float(_needed(rope, "yarn", "factor")), int(_needed(rope, "yarn", "original_max_position_embeddings"))
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    quotient = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim) if mscale and mscale_all_dim else yarn_mscale(factor)
    return Yarn(
        factor=factor,
        original_context=original,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        attention_factor=rope.get("attention_factor") or quotient,
        score_factor=yarn_mscale(factor, mscale_all_dim) ** 2 if hparams.latent and mscale_all_dim else 1.0,
    )


def _needed(rope: Config, kind: str, key: str) -> float:
    value = _positive(rope, key)
    if value is None:
        raise ModelError(f"--model_path: {kind} in its config.json lacks {key}. Leave the flag out to use the GGUF's own values.")
    return value


def _positive(config: Config, key: str) -> float | None:
    """The config's number, None where it has none. Raises ModelError for what is no number above 0."""
    value = config.get(key)
    if value is not None and (not isinstance(value, int | float) or not value > 0):
        raise ModelError(f"--model_path: its config.json has {key} = {value!r}, no positive number. Leave the flag out to use the GGUF's own values.")
    return value


def _experts(moe: MixtureOfExperts, config: Config) -> MixtureOfExperts:
    method = _known(config, "topk_method", _GROUP_TOPS)
    constants: dict[str, Any] = {
        "normalize": config.get("norm_topk_prob"),
        "scale": _positive(config, "routed_scaling_factor"),
        "gating": _known(config, "scoring_func", ("softmax", "sigmoid")),
        "groups": 1 if method == "greedy" else _positive(config, "n_group"),
        "groups_used": 1 if method == "greedy" else _positive(config, "topk_group"),
        "group_top": _GROUP_TOPS.get(method or ""),
    }
    return replace(moe, **{field: value for field, value in constants.items() if value is not None})


def _known(config: Config, key: str, words: Collection[str]) -> str | None:
    """The config's word for `key`, None where it has none. Raises UnsupportedModel for another than these."""
    word = config.get(key)
    if word is not None and word not in words:
        raise UnsupportedModel(f"--model_path: {key} {word!r} in config.json is not supported. Leave the flag out to use the GGUF's own values.")
    return word
