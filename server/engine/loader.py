"""From a GGUF file to a running engine: check, build, page in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from server.config import EngineConfig
from server.engine.engine import LocalEngine
from server.engine.gguf.reader import GGUFFile, prefetch
from server.engine.kv_cache import KVCache
from server.engine.models.config import HParams
from server.engine.models.registry import family
from server.engine.native import NativeOps, open_ops
from server.engine.weights import Weights
from server.errors import ConfigError, ModelError, ModelNotFound

DEFAULT_CACHE_LENS = 8192  # KV tokens, where the model was trained for as many

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the composition root gets: the engine, and what the rest of the server wants to know of the model."""

    engine: LocalEngine
    name: str
    cache_lens: int  # KV tokens that a sequence can use
    cache_bytes: int
    threads: int
    isa: str


def load_model(file: GGUFFile, config: EngineConfig, *, hf_directory: Path | None = None, progress: Progress | None = None) -> LoadedModel:
    """Build the engine for an open GGUF file. Raises ModelError, ConfigError or DeviceError with a sentence.

    `hf_directory` is --model_path: its config.json overrides the file's constants.
    """
    torch.set_num_threads(1)  # what is heavy goes through the pool; a second set of threads would fight it for the cores
    hparams = _hparams(file, hf_directory)
    cache_lens = resolve_cache_lens(config.cache_lens, hparams.context)
    ops = open_ops(config.cpu_infer)
    try:
        engine, cache = _build(file, hparams, ops, config, cache_lens)
        _page_in(file, progress)  # last: a file that cannot be used is refused before its gigabytes are read
    except BaseException:
        ops.close()
        raise
    name = str(file.metadata.get("general.name") or file.path.stem)
    return LoadedModel(engine, name, cache_lens, cache.nbytes, ops.threads, ops.isa)


def _page_in(file: GGUFFile, progress: Progress | None) -> None:
    """Read the weights into the page cache in order, which is many times faster than the first step's page faults."""
    total = sum(len(part) for part in file.maps)
    prefetch(file, None if progress is None else lambda done: progress(done, total))


def resolve_cache_lens(wanted: int | None, context: int) -> int:
    """KV tokens: what was asked for, else the smaller of 8192 and the model's context. Longer than the context is a ConfigError."""
    if wanted is None:
        return min(DEFAULT_CACHE_LENS, context)
    if wanted > context:
        raise ConfigError(f"--cache_lens {wanted} is more than the {context} tokens that the model was trained for. Use --cache_lens {context} or less.")
    return wanted


def _build(file: GGUFFile, hparams: HParams, ops: NativeOps, config: EngineConfig, cache_lens: int) -> tuple[LocalEngine, KVCache]:
    build = family(hparams.architecture)
    weights = Weights(file, ops)
    model = build(weights, hparams, _vocab_size(file, hparams), ops)
    weights.check_all_used()
    cache = KVCache.allocate(hparams, cache_lens, config.cache_type)
    return LocalEngine(model, cache, ops, config.prefill_chunk), cache


def _hparams(file: GGUFFile, hf_directory: Path | None) -> HParams:
    try:
        family(file.architecture)  # an unknown architecture is a better error than a key of it that is missing
        hparams = HParams.from_metadata(file.metadata)
    except ModelError as error:
        raise type(error)(f"{file.path}: {error}") from None
    if hf_directory is None:
        return hparams
    path = hf_directory / "config.json"
    try:
        return hparams.overridden_by(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ModelNotFound(f"--model_path {hf_directory}: it has no config.json. Name a local Hugging Face model directory, or leave the flag out.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Download it again, or leave --model_path out.") from None


def _vocab_size(file: GGUFFile, hparams: HParams) -> int:
    """Rows of the token embedding: files differ in whether they name the vocabulary's size."""
    info = file.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2 or info.shape[1] != hparams.hidden:
        raise ModelError(f"{file.path}: token_embd.weight is missing or does not fit an embedding length of {hparams.hidden}. Convert the model again.")
    return int(info.shape[0])
