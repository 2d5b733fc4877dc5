"""The shapes of published models, as their GGUF files state them: for synthetic files and for benchmarks of single layers.

Sources: each model's config.json on Hugging Face, in the keys that llama.cpp's converter makes of it. GLM-4.5-Air is without its multi-token
prediction block, and Llama 3.2 without its rope factors, neither of which changes the work of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from server.errors import ConfigError

Value = int | float | str | bool
Keys = dict[str, Value]
Groups = tuple[int, int]  # of the experts: how many there are, and how many a token may use

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's architecture and the values of its `{architecture}.*` keys, without that prefix."""

    architecture: str
    keys: Mapping[str, Value]
    tied: bool = False  # the head is the token embedding

    def __getitem__(self, key: str) -> int:
        """A size; 0 where the model has no such thing."""
        return int(self.keys.get(key, 0))

    @property
    def layers(self) -> int:
        return self["block_count"]

    @property
    def leading_dense(self) -> int:
        """Layers before the first one with experts; all of them in a dense model."""
        return self["leading_dense_block_count"] if self["expert_count"] else self.layers

    @property
    def head_dim(self) -> int:
        """Of queries and keys; key_length_mla where attention is latent."""
        return self["attention.key_length_mla"] or self["attention.key_length"] or self["embedding_length"] // self["attention.head_count"]

    @property
    def expert_ffn(self) -> int:
        """Width of one routed expert; Mixtral's is the feed-forward length."""
        return self["expert_feed_forward_length"] or self["feed_forward_length"]

    @property
    def shared_ffn(self) -> int:
        """Width of the shared experts together; 0 without."""
        return self["expert_shared_feed_forward_length"] or self["expert_shared_count"] * self.expert_ffn

    def cut(self, layers: int) -> Shape:
        """The first `layers` layers."""
        return replace(self, keys={**self.keys, "block_count": layers})

    def metadata(self) -> dict[str, object]:
        """The keys with their prefix."""
        return {f"{self.architecture}.{key}": value for key, value in self.keys.items()}


def _body(*, layers: int, hidden: int, ffn: int, vocab: int, context: int, eps: float, rope_base: float) -> Keys:
    return {
        "block_count": layers,
        "embedding_length": hidden,
        "feed_forward_length": ffn,
        "vocab_size": vocab,
        "context_length": context,
        "attention.layer_norm_rms_epsilon": eps,
        "rope.freq_base": rope_base,
    }


def _grouped(heads: int, kv_heads: int, head_dim: int, rope_dim: int | None = None) -> Keys:
    """Grouped-query attention."""
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": rope_dim or head_dim,
    }


def _latent(heads: int, q_lora: int | None) -> Keys:
    """Multi-head latent attention, with the sizes that all of DeepSeek-V2's descendants share."""
    lora: Keys = {} if q_lora is None else {"attention.q_lora_rank": q_lora}
    return {
        **lora,
        "attention.head_count": heads,
        "attention.head_count_kv": 1,  # one latent for all heads
        "attention.kv_lora_rank": 512,
        "attention.key_length": 576,  # what the cache holds of a token: the latent and 64 rotated values
        "attention.value_length": 512,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "rope.dimension_count": 64,
    }


def _yarn(factor: float, mscale_all_dim: float) -> Keys:
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_log_multiplier": 0.1 * mscale_all_dim,
    }


def _experts(count: int, used: int, ffn: int) -> Keys:
    return {"expert_count": count, "expert_used_count": used, "expert_feed_forward_length": ffn}


def _deepseek_experts(count: int, used: int, ffn: int, *, shared: int, dense: int, gating: int, norm: bool, scale: float, groups: Groups = (1, 1)) -> Keys:
    return {
        **_experts(count, used, ffn),
        "expert_shared_count": shared,
        "leading_dense_block_count": dense,
        "expert_gating_func": gating,
        "expert_weights_norm": norm,
        "expert_weights_scale": scale,
        "expert_group_count": groups[0],
        "expert_group_used_count": groups[1],
    }


_V3 = Shape(
    "deepseek2",
    {
        **_body(layers=61, hidden=7168, ffn=18432, vocab=129280, context=163840, eps=1e-6, rope_base=1e4),
        **_latent(128, q_lora=1536),
        **_yarn(40.0, 1.0),
        **_deepseek_experts(256, 8, 2048, shared=1, dense=3, gating=SIGMOID, norm=True, scale=2.5, groups=(8, 4)),
    },
)

SHAPES: dict[str, Shape] = {
    "v2-lite": Shape(
        "deepseek2",
        {
            **_body(layers=27, hidden=2048, ffn=10944, vocab=102400, context=163840, eps=1e-6, rope_base=1e4),
            **_latent(16, q_lora=None),
            **_yarn(40.0, 0.707),
            **_deepseek_experts(64, 6, 1408, shared=2, dense=1, gating=SOFTMAX, norm=False, scale=1.0),
        },
    ),
    "v2": Shape(
        "deepseek2",
        {
            **_body(layers=60, hidden=5120, ffn=12288, vocab=102400, context=163840, eps=1e-6, rope_base=1e4),
            **_latent(128, q_lora=1536),
            **_yarn(40.0, 0.707),
            **_deepseek_experts(160, 6, 1536, shared=2, dense=1, gating=SOFTMAX, norm=False, scale=16.0, groups=(8, 3)),
        },
    ),
    "v3": _V3,
    "r1": _V3,
    "moonlight": Shape(
        "deepseek2",
        {
            **_body(layers=27, hidden=2048, ffn=11264, vocab=163840, context=8192, eps=1e-5, rope_base=5e4),
            **_latent(16, q_lora=None),
            **_deepseek_experts(64, 6, 1408, shared=2, dense=1, gating=SIGMOID, norm=True, scale=2.446),
        },
    ),
    "kimi-k2": Shape(
        "deepseek2",
        {
            **_body(layers=61, hidden=7168, ffn=18432, vocab=163840, context=131072, eps=1e-6, rope_base=5e4),
            **_latent(64, q_lora=1536),
            **_yarn(32.0, 1.0),
            **_deepseek_experts(384, 8, 2048, shared=1, dense=1, gating=SIGMOID, norm=True, scale=2.827),
        },
    ),
    "qwen3-30b-a3b": Shape(
        "qwen3moe",
        {
            **_body(layers=48, hidden=2048, ffn=6144, vocab=151936, context=40960, eps=1e-6, rope_base=1e6),
            **_grouped(32, 4, 128),
            **_experts(128, 8, 768),
        },
    ),
    "qwen3-235b-a22b": Shape(
        "qwen3moe",
        {
            **_body(layers=94, hidden=4096, ffn=12288, vocab=151936, context=40960, eps=1e-6, rope_base=1e6),
            **_grouped(64, 4, 128),
            **_experts(128, 8, 1536),
        },
    ),
    "mixtral-8x7b": Shape(
        "llama",
        {
            **_body(layers=32, hidden=4096, ffn=14336, vocab=32000, context=32768, eps=1e-5, rope_base=1e6),
            **_grouped(32, 8, 128),
            "expert_count": 8,
            "expert_used_count": 2,
        },
    ),
    "glm-4.5-air": Shape(
        "glm4moe",
        {
            **_body(layers=46, hidden=4096, ffn=10944, vocab=151552, context=131072, eps=1e-5, rope_base=1e6),
            **_grouped(96, 8, 128, rope_dim=64),
            **_deepseek_experts(128, 8, 1408, shared=1, dense=1, gating=SIGMOID, norm=True, scale=1.0),
        },
    ),
    "qwen2-57b-a14b": Shape(
        "qwen2moe",
        {
            **_body(layers=28, hidden=3584, ffn=18944, vocab=151936, context=32768, eps=1e-6, rope_base=1e6),
            **_grouped(28, 4, 128),
            **_experts(64, 8, 2560),
            "expert_shared_feed_forward_length": 20480,
        },
    ),
    "llama-1b": Shape(
        "llama",
        {
            **_body(layers=16, hidden=2048, ffn=8192, vocab=128256, context=131072, eps=1e-5, rope_base=5e5),
            **_grouped(32, 8, 64),
        },
        tied=True,
    ),
    "qwen3-0.6b": Shape(
        "qwen3",
        {
            **_body(layers=28, hidden=1024, ffn=3072, vocab=151936, context=40960, eps=1e-6, rope_base=1e6),
            **_grouped(16, 8, 128),
        },
        tied=True,
    ),
}


def shape_named(name: str) -> Shape:
    """Raises ConfigError with the list of those there are."""
    if name not in SHAPES:
        raise ConfigError(f"There is no shape '{name}'; there is {', '.join(SHAPES)}.")
    return SHAPES[name]
