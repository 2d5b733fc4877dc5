"""Which architectures run: GGUF's `general.architecture` -> the family that builds it. A new family is one file and one line here."""

from __future__ import annotations

from server.engine.models import deepseek2, glm4moe, llama, qwen2, qwen2moe, qwen3, qwen3moe
from server.engine.models.transformer import Family
from server.errors import UnsupportedModel

FAMILIES: dict[str, Family] = {
    "deepseek2": deepseek2.build,
    "glm4moe": glm4moe.build,
    "llama": llama.build,
    "qwen2": qwen2.build,
    "qwen2moe": qwen2moe.build,
    "qwen3": qwen3.build,
    "qwen3moe": qwen3moe.build,
}


def family(architecture: str) -> Family:
    """The architecture's builder. Raises UnsupportedModel with the list of those that run."""
    try:
        return FAMILIES[architecture]
    except KeyError:
        raise UnsupportedModel(
            f"The architecture {architecture!r} is not supported. Supported are: {', '.join(sorted(FAMILIES))}. Choose a model of one of these."
        ) from None
