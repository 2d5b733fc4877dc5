"""From the configuration to a loaded model, with words for the person who waits: what is loaded, how far it is, what it runs on."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from server.cli.contents import SHORT_TEXT, mix, size, type_totals
from server.cli.embedded import chosen_gguf
from server.cli.machine import gpu_nodes
from server.config import Config, EngineConfig, ModelConfig
from server.errors import RequestError

if TYPE_CHECKING:  # torch takes a second to import: wrong flags are answered before that
    from server.api.serving import Loaded, ModelFacts
    from server.engine.gguf.reader import GGUFFile
    from server.engine.loader import LoadedModel, Progress
    from server.metrics import Metrics
    from server.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def model_file(config: ModelConfig) -> GGUFFile:
    """The configured model's file, its header checked: whatever is wrong with it is said before anything is built. Raises ModelError."""
    from server.engine.gguf.reader import GGUFFile

    return GGUFFile.open(chosen_gguf(config))


def model_id(config: ModelConfig, file: GGUFFile) -> str:
    """What clients call the model: --model_name, an embedded model's own name, or the file's name: those inside files have spaces."""
    if config.model_name or config.gguf_path is None:
        return config.model_name or config.model
    return file.name


def model_facts(file: GGUFFile) -> ModelFacts:
    """What the API tells of the model beside its name."""
    from server.api.serving import ModelFacts

    totals = type_totals(file)
    template = file.metadata.get("tokenizer.chat_template")
    return ModelFacts(
        file.architecture, file.nbytes, sum(total.values for total in totals), totals[0].type, template if isinstance(template, str) else "",
        {key: value for key, value in file.metadata.items() if isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= SHORT_TEXT)},
    )  # fmt: skip


def load_engine(config: Config, file: GGUFFile, told: Progress | None = None) -> LoadedModel:
    """Build the engine, and tell the log what is loaded and what it runs on; `told` hears how far it is. Raises ModelError, ConfigError or DeviceError."""
    _log.info("Loading %s: %s, %s, %s.", file.path, file.architecture, size(file.nbytes), mix(file))
    _mention_gpu(config.engine)
    from server.engine.loader import load_model

    with _progress_bar(told) as progress:
        loaded = load_model(file, config.engine, hf_directory=config.model.model_path, progress=progress)
    _log.info(
        "%s is loaded: %s, %d threads, ISA %s, KV cache of %d tokens (%s, %s).",
        loaded.name, "CPU" if loaded.device == "cpu" else loaded.device, loaded.threads, loaded.isa, loaded.cache_lens, loaded.cache_type,
        size(loaded.cache_bytes),
    )  # fmt: skip
    if config.engine.experts_per_token is not None:
        _log.info("Each token uses %d routed experts (--experts_per_token); the model's own are %s.", loaded.experts_per_token, _own_experts(file))
    return loaded


def load_chat(config: Config, file: GGUFFile, metrics: Metrics) -> Loaded:
    """The engine behind its scheduler, and the model's text side. Close its service in the end."""
    from server.api.serving import Loaded
    from server.scheduler.service import Service
    from server.text.load import load_template, load_tokenizer

    tokenizer = load_tokenizer(file.metadata, config.model.model_path)
    template = load_template(file.metadata, tokenizer, config.model.model_path)
    threading.Thread(target=_prepare_grammars, args=(tokenizer,), name="vocabulary", daemon=True).start()
    loaded = load_engine(config, file, metrics.loading)
    metrics.experts_per_token.set(loaded.experts_per_token)
    metrics.model.info(_about(config, file, loaded))
    metrics.watch_engine(loaded.engine.use)
    service = Service(loaded.engine, config.scheduler, loaded.cache_lens, metrics, on_start=loaded.engine.start)
    return Loaded(service, tokenizer, template)


def _prepare_grammars(tokenizer: Tokenizer) -> None:
    """A large vocabulary takes a second or two, for which no request should wait. Models without an end of text have no grammars, which requests are told."""
    from server.text.token_mask import vocabulary_of

    with suppress(RequestError):
        vocabulary_of(tokenizer)


def _about(config: Config, file: GGUFFile, loaded: LoadedModel) -> dict[str, str]:
    """What the metrics say of the model."""
    return {
        "model": model_id(config.model, file), "architecture": file.architecture, "device": loaded.device, "isa": loaded.isa,
        "cache_type": loaded.cache_type, "bytes": str(file.nbytes),
    }  # fmt: skip


def _own_experts(file: GGUFFile) -> object:
    return file.metadata.get(f"{file.architecture}.expert_used_count")


def _mention_gpu(engine: EngineConfig) -> None:
    """A GPU that torch cannot use is worth a word, unless it was hidden on purpose."""
    if engine.device != "auto" or not gpu_nodes() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    import torch

    if torch.version.cuda is None:
        _log.info("There is a GPU, but this torch cannot use it, so everything runs on the CPU. For the GPU, install torch's CUDA build.")
    elif not torch.cuda.is_available():
        said = "There is a GPU, but everything runs on the CPU: torch is built for CUDA %s, and nvidia-smi shows up to which one the driver goes."
        _log.warning(f"{said} Update the driver, or install an older torch.", torch.version.cuda)


@contextmanager
def _progress_bar(told: Progress | None) -> Iterator[Progress | None]:
    """A bar of the bytes read, on a terminal; nothing in a log file. Whoever is `told` hears of them too."""
    if not sys.stderr.isatty():
        yield told
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    with Progress(TextColumn("Reading"), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if told is not None:
                told(done, total)

        yield progress
