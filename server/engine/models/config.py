"""A model's hyperparameters, read from GGUF metadata and checked. What files leave out is defaulted as the models that they hold need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from server.engine.models.keys import Keys
from server.errors import ModelError, UnsupportedModel


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The sizes of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, table 1)."""

    q_lora: int  # 0: queries are projected at once (V2-Lite)
    kv_lora: int
    nope_dim: int  # of a head's query and key, without position
    rope_dim: int  # of a head's query, and of the key part that all heads share
    v_dim: int


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """The routed experts of all layers but the first `leading_dense`."""

    experts: int
    top_k: int
    ffn: int  # width of one routed expert
    shared_ffn: int  # width of the shared experts together; 0: none
    leading_dense: int
    gating: Literal["softmax", "sigmoid"]
    normalize: bool
    scale: float
    groups: int
    groups_used: int
    group_top: int  # see ops.Routing


@dataclass(frozen=True, slots=True)
class Yarn:
    """Rope scaling of YaRN (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # times cos and sin
    score_factor: float = 1.0  # times the scores: DeepSeek's mscale, squared


@dataclass(frozen=True, slots=True)
class HParams:
    """The shape of a decoder-only transformer, in the terms of GGUF's `{architecture}.*` keys."""

    architecture: str
    layers: int  # that run; files count the `mtp_layers` in
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int  # of a query and its key
    context: int  # tokens that the model was trained for
    norm_eps: float
    rope_dim: int
    rope_base: float
    rope_scale: float  # positions are divided by it (linear scaling); 1: none
    yarn: Yarn | None = None
    latent: LatentAttention | None = None  # then all heads share one latent, and kv_heads is heads
    moe: MixtureOfExperts | None = None
    mtp_layers: int = 0  # blocks behind the last layer that predict further tokens; they do not run yet

    @property
    def attention_scale(self) -> float:
        """Factor of the scores before their softmax."""
        return (self.yarn.score_factor if self.yarn else 1.0) / math.sqrt(self.head_dim)

    @staticmethod
    def from_metadata(metadata: Mapping[str, object]) -> HParams:
        """Read the `{architecture}.*` keys; a missing or absurd one is a ModelError that names it."""
        keys = Keys(metadata)
        heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
        mtp_layers = keys.count("nextn_predict_layers", default=0, least=0)
        layers = keys.count("block_count") - mtp_layers
        latent = _latent_attention(keys) if keys.architecture == "deepseek2" else None
        head_dim = latent.nope_dim + latent.rope_dim if latent else _head_dim(keys, hidden // heads)
        ffn = keys.count("feed_forward_length")
        hparams = HParams(
            architecture=keys.architecture,
            layers=layers,
            hidden=hidden,
            ffn=ffn,
            heads=heads,
            kv_heads=heads if latent else keys.count("attention.head_count_kv", default=heads),
            head_dim=head_dim,
            context=keys.count("context_length"),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope_dim=keys.count("rope.dimension_count", default=head_dim),
            rope_base=keys.number("rope.freq_base", default=10000.0),
            rope_scale=_linear_scale(keys) if _rope_scaling(keys) == "linear" else 1.0,
            yarn=_yarn(keys) if _rope_scaling(keys) == "yarn" else None,
            latent=latent,
            moe=_mixture_of_experts(keys, layers, ffn),
            mtp_layers=mtp_layers,
        )
        return hparams.checked()

    def checked(self) -> HParams:
        """Itself, when its numbers fit together; otherwise a ModelError."""
        if self.layers < 1:
            raise ModelError(f"{self.architecture}: a file of {self.mtp_layers} prediction blocks and no layers cannot run. Choose the whole model's file.")
        if self.heads % self.kv_heads:
            raise ModelError(f"{self.architecture}: {self.heads} attention heads cannot share {self.kv_heads} key/value heads. The file's metadata is damaged.")
        if self.rope_dim > self.head_dim or self.rope_dim % 2:
            raise ModelError(f"{self.architecture}: a rotary dimension of {self.rope_dim} does not fit heads of {self.head_dim}. The metadata is damaged.")
        if self.moe:
            _check_experts(self.architecture, self.moe)
        return self


def _head_dim(keys: Keys, default: int) -> int:
    head_dim = keys.count("attention.key_length", default=default)
    if keys.count("attention.value_length", default=head_dim) != head_dim:
        raise UnsupportedModel(f"{keys.architecture}: keys and values of different lengths are not supported for this architecture.")
    return head_dim


def _latent_attention(keys: Keys) -> LatentAttention:
    """Files made for absorbed attention give the cached lengths as key_length and value_length, and those of a head with `_mla`; older ones a head's."""
    mla = "_mla" if keys.has("attention.key_length_mla") else ""
    key_dim, rope_dim = keys.count(f"attention.key_length{mla}"), keys.count("rope.dimension_count")
    if key_dim <= rope_dim:
        raise ModelError(f"{keys.architecture}: keys of {key_dim} values leave none beside {rope_dim} rotary ones. The file's metadata is damaged.")
    return LatentAttention(
        q_lora=keys.count("attention.q_lora_rank", default=0, least=0),
        kv_lora=keys.count("attention.kv_lora_rank"),
        nope_dim=key_dim - rope_dim,
        rope_dim=rope_dim,
        v_dim=keys.count(f"attention.value_length{mla}"),
    )


def _rope_scaling(keys: Keys) -> str:
    """What is not said is linear, as llama.cpp has it: files older than the key hold a factor alone."""
    kind = keys.word("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"{keys.architecture}: rope scaling {kind!r} is not supported yet; none, linear and yarn are.")
    return kind


def _linear_scale(keys: Keys) -> float:
    """The factor, in the first files under another name; without one, or with 0 in its place, positions are as they are."""
    name = "rope.scaling.factor" if keys.has("rope.scaling.factor") else "rope.scale_linear"
    return 1.0 if keys.is_zero(name) else keys.number(name, default=1.0)


def _yarn(keys: Keys) -> Yarn:
    """The paper scales cos and sin by the temperature. DeepSeek, with mscale_all_dim (0.1 times it is yarn_log_multiplier), scales all of the scores
    instead: all its public models have mscale = mscale_all_dim, which leaves cos and sin as they are."""
    factor = keys.number("rope.scaling.factor")
    attention_factor, score_factor = keys.number("rope.scaling.yarn_attn_factor", default=yarn_mscale(factor)), 1.0
    if keys.architecture == "deepseek2" and keys.has("rope.scaling.yarn_log_multiplier"):
        attention_factor, score_factor = 1.0, yarn_mscale(factor, 10 * keys.number("rope.scaling.yarn_log_multiplier")) ** 2
    return Yarn(
        factor=factor,
        original_context=keys.count("rope.scaling.original_context_length"),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", default=32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", default=1.0),
        attention_factor=attention_factor * keys.number("rope.scaling.attn_factor", default=1.0),
        score_factor=score_factor,
    )


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """The paper's attention temperature for a context `factor` times as long (equation 22), weighted as DeepSeek does."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


# What is not said in files, or was not at first:
_NORMALIZED = frozenset({"llama", "qwen3moe"})  # the weights of the chosen experts are made to sum to 1
_DEEPSEEK_GROUPS = {(256, "sigmoid"): (8, 4), (160, "softmax"): (8, 3)}  # experts and gating of V3 and R1, and of V2 -> groups and groups used
_GLM_FLASH_VOCAB = 154880  # GLM-4.7-Flash, a deepseek2 model with sigmoid gating, is known by it


def _mixture_of_experts(keys: Keys, layers: int, ffn: int) -> MixtureOfExperts | None:
    experts = keys.count("expert_count", default=0, least=0)
    if experts == 0:
        return None
    top_k, gating = keys.count("expert_used_count"), _gating(keys)
    width = keys.count("expert_feed_forward_length", default=ffn if keys.architecture == "llama" else ffn // top_k)
    groups, groups_used = _DEEPSEEK_GROUPS.get((experts, gating), (1, 1)) if keys.architecture == "deepseek2" else (1, 1)
    return MixtureOfExperts(
        experts=experts,
        top_k=top_k,
        ffn=width,
        shared_ffn=_shared_ffn(keys, width, ffn),
        leading_dense=min(layers, keys.count("leading_dense_block_count", default=0, least=0)),
        gating=gating,
        normalize=keys.architecture in _NORMALIZED or keys.flag("expert_weights_norm", default=False),
        scale=keys.number("expert_weights_scale", default=1.0),
        groups=keys.count("expert_group_count", default=groups),
        groups_used=keys.count("expert_group_used_count", default=groups_used),
        group_top=2 if gating == "sigmoid" else 1,
    )


def _gating(keys: Keys) -> Literal["softmax", "sigmoid"]:
    code = keys.count("expert_gating_func", default=0, least=0)
    if code > 2:
        raise UnsupportedModel(f"{keys.architecture}: expert gating function {code} is not supported; 1 (softmax) and 2 (sigmoid) are.")
    if code == 0:
        return "sigmoid" if keys.architecture == "glm4moe" or keys.vocab_size() == _GLM_FLASH_VOCAB else "softmax"
    return "softmax" if code == 1 else "sigmoid"


def _shared_ffn(keys: Keys, width: int, ffn: int) -> int:
    if keys.architecture == "qwen2moe":
        return keys.count("expert_shared_feed_forward_length", default=ffn)
    return width * keys.count("expert_shared_count", default=0, least=0)


def _check_experts(architecture: str, moe: MixtureOfExperts) -> None:
    groups = moe.groups
    if moe.experts % groups or not moe.groups_used <= groups or moe.top_k > moe.experts // groups * moe.groups_used:
        raise ModelError(
            f"{architecture}: {moe.top_k} of {moe.experts} experts cannot be chosen from {moe.groups_used} of {groups} groups. The file's metadata is damaged."
        )
    if groups > 1 and moe.group_top > moe.experts // groups:
        raise ModelError(f"{architecture}: groups of {moe.experts // groups} expert cannot be judged by their best {moe.group_top}. The metadata is damaged.")
