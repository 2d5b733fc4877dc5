"""From a GGUF file to a running engine: check, build, read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from server.config import CacheType, EngineConfig
from server.engine.engine import LocalEngine
from server.engine.gguf.reader import GGUFFile
from server.engine.gpu.devices import find_gpu, kernels_for
from server.engine.gpu.engine import GpuEngine
from server.engine.gpu.memory import RING_BYTES, MemoryPlan, dense_bytes, no_memory_left, scratch_bytes
from server.engine.gpu.ops import GpuOps
from server.engine.kv_cache import PAGE_SIZE, KVCache, bytes_per_token, resolve_cache_type
from server.engine.limits import cpus_allowed
from server.engine.models.config import HParams
from server.engine.models.hf_config import overridden
from server.engine.models.registry import family
from server.engine.models.transformer import Transformer
from server.engine.native import NativeOps, open_ops
from server.engine.ops import Ops
from server.engine.ram import check_ram, laid_out_bytes
from server.engine.weights import Weights
from server.errors import ConfigError, DeviceError, ModelError, ModelNotFound

_log = logging.getLogger(__name__)

DEFAULT_CACHE_LENS = 8192  # KV tokens, where the model was trained for as many
CPU_CHUNK, GPU_CHUNK = 512, 2048  # prompt tokens a step; a GPU's fixed costs, and experts that are read once a step, want more of them

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the composition root gets: the engine, and what the rest of the server wants to know of the model."""

    engine: LocalEngine
    name: str
    cache_lens: int  # KV tokens that a sequence can use
    cache_bytes: int
    cache_type: CacheType
    device: str  # "cpu", or the GPU's name
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
    gpu = _gpu_with_room(file, hparams, config)
    native = open_ops(_threads(config.cpu_infer, gpu), config.numa, precision=config.prefill_precision)
    with _closed_on_failure(native):
        ops = native if gpu is None else GpuOps(native, gpu, kernels_for(gpu), hparams.context // PAGE_SIZE, config.prefill)
        engine = _engine(file, hparams, config, ops, wrap, progress)
    cache_type = resolve_cache_type(config.cache_type, gpu is not None)
    return LoadedModel(
        engine=engine,
        name=str(file.metadata.get("general.name") or file.name),
        cache_lens=cache_lens,
        cache_bytes=bytes_per_token(hparams, cache_type) * hparams.context,
        cache_type=cache_type,
        device="cpu" if gpu is None else torch.cuda.get_device_name(gpu),
        threads=native.threads,
        isa=native.isa,
        experts_per_token=hparams.moe.top_k if hparams.moe else 0,
    )


@contextmanager
def _closed_on_failure(native: NativeOps) -> Iterator[None]:
    """What fails within ends the pool's threads; a GPU without memory is a DeviceError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        native.close()
        raise no_memory_left("for the model", error) from error
    except BaseException:
        native.close()
        raise


def _engine(
    file: GGUFFile, hparams: HParams, config: EngineConfig, ops: NativeOps | GpuOps, wrap: Callable[[Ops], Ops] | None, progress: Progress | None
) -> LocalEngine:
    """The weights are read last: a file that cannot be used is refused before its gigabytes are."""
    native, on_gpu = (ops.native, True) if isinstance(ops, GpuOps) else (ops, False)
    model_ops = ops if wrap is None else wrap(ops)
    weights = Weights(file, model_ops)
    model = _build(file, hparams, weights, model_ops)
    cache = KVCache.allocate(hparams, hparams.context, resolve_cache_type(config.cache_type, on_gpu), ops.device)
    native.check_nodes()
    check_ram(laid_out_bytes(file.tensors, hparams, on_gpu=on_gpu))
    weights.lay_out(progress or (lambda *_: None))
    chunk = config.prefill_chunk or (GPU_CHUNK if on_gpu else CPU_CHUNK)
    return GpuEngine(model, cache, ops, chunk, wrap is None) if isinstance(ops, GpuOps) else LocalEngine(model, cache, ops, chunk, wrap is None)


def _gpu_with_room(file: GGUFFile, hparams: HParams, config: EngineConfig) -> torch.device | None:
    """The GPU that the configuration asks for, if its memory has room for the model; what it takes is logged. Raises DeviceError.

    `hparams.context` is what the KV cache has room for. With "auto", a GPU that is too small is no error: the CPU runs everything.
    """
    gpu = find_gpu(config.device)
    if gpu is None:
        return None
    plan = memory_plan(file, hparams, config)
    free, _ = torch.cuda.mem_get_info(gpu)
    try:
        plan.check(free)
    except DeviceError as error:
        if config.device == "cuda":
            raise
        _log.warning("%s Everything runs on the CPU.", error)
        return None
    _log.info("On the GPU (%s, %.1f GB free): %s.", torch.cuda.get_device_name(gpu), free / 1e9, plan)
    return gpu


def memory_plan(file: GGUFFile, hparams: HParams, config: EngineConfig) -> MemoryPlan:
    """What the model takes of a GPU's memory, with a KV cache of hparams.context tokens."""
    cache_type = resolve_cache_type(config.cache_type, on_gpu=True)
    return MemoryPlan(
        weights=dense_bytes(file.tensors, hparams),
        cache=bytes_per_token(hparams, cache_type) * hparams.context,
        scratch=scratch_bytes(hparams, _vocab_size(file, hparams), config.prefill_chunk or GPU_CHUNK),
        ring=RING_BYTES if hparams.moe is not None and config.prefill != "cpu" else 0,
    )


def _threads(cpu_infer: int | None, gpu: torch.device | None) -> int | None:
    """None for a thread on each CPU; with a GPU one CPU is left to its driver, and to the server."""
    return cpu_infer if cpu_infer is not None or gpu is None else max(1, len(cpus_allowed()) - 1)


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
    return overridden(hparams, _hf_config(hf_directory))


def _hf_config(hf_directory: Path) -> dict[str, Any]:
    path = hf_directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFound(f"--model_path {hf_directory}: it has no config.json. Name a local Hugging Face model directory, or leave the flag out.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Download it again, or leave --model_path out.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object. Download it again, or leave --model_path out.")
    return config


def _vocab_size(file: GGUFFile, hparams: HParams) -> int:
    """Rows of the token embedding: files differ in whether they name the vocabulary's size."""
    info = file.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2 or info.shape[1] != hparams.hidden:
        raise ModelError(f"{file.path}: token_embd.weight is missing or does not fit an embedding length of {hparams.hidden}. Convert the model again.")
    return int(info.shape[0])
