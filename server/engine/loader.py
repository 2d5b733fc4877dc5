"""From a GGUF file to a running engine: check, build, read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from server.config import EngineConfig
from server.engine.engine import LocalEngine
from server.engine.gguf.reader import GGUFFile
from server.engine.kv_cache import PAGE_SIZE, KVCache
from server.engine.models.config import HParams
from server.engine.models.hf_config import overridden
from server.engine.models.registry import family
from server.engine.models.transformer import Transformer
from server.engine.native import open_ops
from server.engine.ops import Ops
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
    experts_per_token: int  # routed experts that a token uses; 0: a model without experts


def load_model(
    file: GGUFFile, config: EngineConfig, *, hf_directory: Path | None = None, progress: Progress | None = None, wrap: Callable[[Ops], Ops] | None = None
) -> LoadedModel:
    """Build the engine for an open GGUF file. Raises ModelError, ConfigError or DeviceError with a sentence.

    `hf_directory` is --model_path: its config.json overrides the file's constants. `wrap` may put another Ops maker around the model's own, to watch it.
    """
    torch.set_num_threads(1)  # what is heavy goes through the pool; a second set of threads would fight it for the cores
    hparams = with_experts_per_token(_hparams(file, hf_directory), config.experts_per_token)
    cache_lens = resolve_cache_lens(config.cache_lens, hparams.context)
    hparams = replace(hparams, context=-(-cache_lens // PAGE_SIZE) * PAGE_SIZE)  # positions that a step can have
    ops = open_ops(config.cpu_infer, config.numa, precision=config.prefill_precision)
    try:
        model_ops = ops if wrap is None else wrap(ops)
        weights = Weights(file, model_ops)
        model = _build(file, hparams, weights, model_ops)
        cache = KVCache.allocate(hparams, cache_lens, config.cache_type)
        ops.check_nodes()
        weights.lay_out(progress or (lambda *_: None))  # last: a file that cannot be used is refused before its gigabytes are read
    except BaseException:
        ops.close()
        raise
    name = str(file.metadata.get("general.name") or file.name)
    engine = LocalEngine(model, cache, ops, config.prefill_chunk, recorded=wrap is None)
    return LoadedModel(engine, name, cache_lens, cache.nbytes, ops.threads, ops.isa, hparams.moe.top_k if hparams.moe else 0)


def resolve_cache_lens(wanted: int | None, context: int) -> int:
    """KV tokens: what was asked for, else the smaller of 8192 and the model's context. Longer than the context is a ConfigError."""
    if wanted is None:
        return min(DEFAULT_CACHE_LENS, context)
    if wanted > context:
        raise ConfigError(f"--cache_lens {wanted} is more than the {context} tokens that the model was trained for. Use --cache_lens {context} or less.")
    return wanted


def with_experts_per_token(hparams: HParams, wanted: int | None) -> HParams:
    """The model with fewer routed experts a token than its own; None changes nothing. Raises ConfigError where it has not as many, or none at all.

    Groups are chosen as before: their experts are as many as the model's own count needs, so fewer always fit.
    """
    if wanted is None:
        return hparams
    if hparams.moe is None:
        raise ConfigError(f"--experts_per_token {wanted}: this model has no experts. Leave the flag out.")
    if wanted > hparams.moe.top_k:
        own = hparams.moe.top_k
        raise ConfigError(f"--experts_per_token {wanted} is more than the {own} that the model was trained with. Use {own} or fewer, or leave the flag out.")
    return replace(hparams, moe=replace(hparams.moe, top_k=wanted)).checked()


def _build(file: GGUFFile, hparams: HParams, weights: Weights, ops: Ops) -> Transformer:
    build = family(hparams.architecture)
    model = build(weights, hparams, _vocab_size(file, hparams), ops)
    weights.check_all_used()
    return model


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
        return overridden(hparams, json.loads(path.read_text(encoding="utf-8")))
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
