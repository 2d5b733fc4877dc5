"""A model's hyperparameters: read from GGUF metadata, checked, and overridden by a Hugging Face config.json where one is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from server.errors import ModelError, UnsupportedModel


@dataclass(frozen=True, slots=True)
class HParams:
    """The shape of a decoder-only transformer, in the terms of GGUF's `{architecture}.*` keys."""

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int  # tokens that the model was trained for
    norm_eps: float
    rope_dim: int
    rope_base: float
    rope_scale: float  # positions are divided by it (linear scaling); 1: none

    @staticmethod
    def from_metadata(metadata: Mapping[str, object]) -> HParams:
        """Read the `{architecture}.*` keys; a missing or absurd one is a ModelError that names it."""
        keys = _Keys(metadata)
        heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
        head_dim = keys.count("attention.key_length", default=hidden // heads)
        if keys.count("attention.value_length", default=head_dim) != head_dim:
            raise UnsupportedModel(f"{keys.architecture}: keys and values of different lengths are not supported for this architecture.")
        hparams = HParams(
            architecture=keys.architecture,
            layers=keys.count("block_count"),
            hidden=hidden,
            ffn=keys.count("feed_forward_length"),
            heads=heads,
            kv_heads=keys.count("attention.head_count_kv", default=heads),
            head_dim=head_dim,
            context=keys.count("context_length"),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope_dim=keys.count("rope.dimension_count", default=head_dim),
            rope_base=keys.number("rope.freq_base", default=10000.0),
            rope_scale=keys.rope_scale(),
        )
        return hparams.checked()

    def checked(self) -> HParams:
        """Itself, when its numbers fit together; otherwise a ModelError."""
        if self.heads % self.kv_heads:
            raise ModelError(f"{self.architecture}: {self.heads} attention heads cannot share {self.kv_heads} key/value heads. The file's metadata is damaged.")
        if self.rope_dim > self.head_dim or self.rope_dim % 2:
            raise ModelError(f"{self.architecture}: a rotary dimension of {self.rope_dim} does not fit heads of {self.head_dim}. The metadata is damaged.")
        return self

    def overridden_by(self, config: Mapping[str, Any]) -> HParams:
        """With the values of a Hugging Face config.json: its shapes must be the file's, its constants win.

        Raises ModelError when it is another model's config.
        """
        for key, field in _HF_SHAPES.items():
            mine, theirs = getattr(self, field), config.get(key)
            if theirs is not None and theirs != mine:
                raise ModelError(f"--model_path: its config.json has {key} = {theirs}, but the GGUF file has {mine}. It is the config of another model.")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise UnsupportedModel(f"--model_path: rope scaling {kind!r} in config.json is not supported yet. Leave the flag out to use the GGUF's own values.")
        base = config.get("rope_theta", rope.get("rope_theta"))
        constants: dict[str, Any] = {
            "context": config.get("max_position_embeddings"),
            "norm_eps": config.get("rms_norm_eps"),
            "rope_base": base,
            "rope_scale": rope.get("factor") if kind == "linear" else None,
        }
        return replace(self, **{field: value for field, value in constants.items() if value is not None}).checked()


_HF_SHAPES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
}


class _Keys:
    """Typed reading of `{architecture}.*` metadata."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelError("The GGUF file does not name its architecture (general.architecture). It is not a language model, or it is damaged.")
        self.architecture = architecture
        self._metadata = metadata

    def number(self, key: str, default: float | None = None) -> float:
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ModelError(f"The GGUF file's {self.architecture}.{key} is {value!r}; a positive number is needed. The file is damaged or incomplete.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int) or value > 1 << 31:
            raise ModelError(f"The GGUF file's {self.architecture}.{key} is {value!r}; a whole number of a sensible size is needed. The file is damaged.")
        return value

    def rope_scale(self) -> float:
        kind = self._metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind == "none":
            return 1.0
        if kind == "linear":
            return self.number("rope.scaling.factor")
        raise UnsupportedModel(f"{self.architecture}: rope scaling {kind!r} is not supported yet; none and linear are.")
