"""Typed reading of a GGUF file's `{architecture}.*` metadata; a missing or absurd value is a ModelError that names its key."""

from __future__ import annotations

from collections.abc import Mapping

from server.errors import ModelError

_MOST = 1 << 31  # no count in a model's shape is larger; a damaged file's may be


class Keys:
    """The keys of one architecture, named without their prefix: keys.count("block_count")."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelError("The GGUF file does not name its architecture (general.architecture). It is not a language model, or it is damaged.")
        self.architecture = architecture
        self._metadata = metadata

    def has(self, key: str) -> bool:
        return self._name(key) in self._metadata

    def is_zero(self, key: str) -> bool:
        return self._metadata.get(self._name(key)) == 0

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._metadata.get(self._name(key), default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ModelError(f"The GGUF file's {self._name(key)} is {value!r}; a positive number is needed. The file is damaged or incomplete.")
        return value

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of `least` or more."""
        value = self._metadata.get(self._name(key), default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
            raise ModelError(f"The GGUF file's {self._name(key)} is {value!r}; a whole number of a sensible size is needed. The file is damaged or incomplete.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._metadata.get(self._name(key), default))

    def word(self, key: str, default: str) -> str:
        return str(self._metadata.get(self._name(key), default))

    def vocab_size(self) -> int:
        """Tokens, as far as the metadata tells; 0 where it does not."""
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        return self.count("vocab_size", default=len(tokens) if isinstance(tokens, list | tuple) else 0, least=0)

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"
