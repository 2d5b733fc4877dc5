"""Configuration: frozen; merged from defaults, a YAML file and flags (the later wins) and checked once, before anything is built.

`load_config` reads as its steps: the file's settings, the flags laid over them, the dataclasses built, the values checked.
What depends on the machine (cpu_infer) or on the model (cache_lens) stays None here; the engine fills it in as it is built.
A key's name is the same everywhere: field here, key in the file's section, flag on the command line.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from server.errors import ConfigError

ReasoningFormat = Literal["deepseek", "none"]
CacheType = Literal["auto", "f16", "bf16", "f32"]
Device = Literal["auto", "cpu", "cuda"]
Numa = Literal["auto", "shard", "replicate", "off"]
Prefill = Literal["auto", "cpu", "stream", "split"]
Precision = Literal["auto", "bf16", "int8"]
LogFormat = Literal["text", "json"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Where the model comes from. gguf_path wins over model; a person who gives both at once is told."""

    model: str = "tiny-r1"  # an embedded model's name
    gguf_path: Path | None = None  # a GGUF file, or a directory that holds one model
    model_path: Path | None = None  # local HF directory that overrides config, tokenizer and chat template
    model_name: str | None = None  # what /v1/models calls it; None: from the GGUF


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the model runs."""

    cpu_infer: int | None = None  # pinned CPU threads; None: every CPU that affinity and cgroup allow
    numa: Numa = "auto"  # how experts are spread over nodes of memory; auto: shard where there are several, else off
    cache_lens: int | None = None  # KV tokens; None: the smaller of 8192 and the model's context
    cache_type: CacheType = "auto"  # how the KV cache is stored; auto: bf16 on a GPU, f16 on the CPU
    prefill_chunk: int | None = None  # the most prompt tokens in one step; None: 2048 on a GPU, 512 on the CPU
    experts_per_token: int | None = None  # fewer routed experts than the model's own; None: its own
    prefill_precision: Precision = "auto"  # of activations where many tokens meet weights; auto: bf16 on AMX, int8 elsewhere
    prefill: Prefill = "auto"  # where a prompt's routed experts are computed with a GPU; auto: as measured at start, by the number of tokens
    device: Device = "auto"  # of everything but the routed experts; auto: the GPU where there is one with room for it


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How requests wait."""

    max_queue: int = 64  # waiting requests; more get 429
    max_new_tokens: int = 2048  # a reply's cap when the request names none
    grace_s: float = 30.0  # how long the running request may go on after SIGTERM


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """How the HTTP side behaves."""

    host: str = "127.0.0.1"
    port: int = 10002
    api_key: tuple[str, ...] = field(default=(), repr=False)  # any one of them opens the API
    api_key_file: Path | None = None  # more of them, one a line
    allowed_hosts: tuple[str, ...] = ()  # names in the Host header beside this machine's own; "*": any
    cors_origins: tuple[str, ...] = ()  # web pages that may call the API from a browser; "*": any
    ssl_keyfile: Path | None = None
    ssl_certfile: Path | None = None
    force_think: bool = False
    reasoning_format: ReasoningFormat = "deepseek"
    keep_alive_s: float = 5.0  # between SSE comments while a stream waits
    max_body_mb: float = 16.0  # 10^6 bytes of a request's body; more gets 413
    read_timeout_s: float = 30.0  # for a request's head, and then for its body, to arrive
    write_timeout_s: float = 60.0  # a client that takes nothing of its reply for so long is cut off
    request_timeout_s: float | None = None  # a request's waiting and running together; None: for ever
    metrics_port: int | None = None  # /metrics on a port of its own; None: on the API's
    metrics_host: str = "127.0.0.1"  # the address of that port
    log_format: LogFormat = "text"
    log_prompts: bool = False  # what the model is given, word for word


@dataclass(frozen=True, slots=True)
class Config:
    """All of it."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    api: ApiConfig = ApiConfig()


SECTIONS: dict[str, type] = {"model": ModelConfig, "engine": EngineConfig, "scheduler": SchedulerConfig, "api": ApiConfig}
KEYS: dict[str, str] = {key: section for section, kind in SECTIONS.items() for key in get_type_hints(kind)}  # key -> its section

Settings = dict[str, Any]  # key -> value of the field's type; keys are unique over the sections


def load_config(file: Path | None = None, flags: Mapping[str, object] | None = None) -> Config:
    """Defaults < the YAML file < flags (key -> a flag's text, or a value). Raises ConfigError with a sentence for whatever is wrong."""
    from_file = _one_model(_read_file(file)) if file else {}
    from_flags = _one_model({key: _convert(f"--{key}", key, value) for key, value in (flags or {}).items()})
    if "model" in from_flags:  # a name on the command line also beats a path in the file
        from_file.pop("gguf_path", None)
    config = _build({**from_file, **from_flags})
    _check(config)
    return config


# --- The YAML file -----------------------------------------------------------


def _place(error: Exception) -> str:
    """Where the library found what it could not read, and what it says of it."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return (f" in line {mark.line + 1}, column {mark.column + 1}" if mark else "") + (f": {problem}" if problem else "")


def _read_file(file: Path) -> Settings:
    settings: Settings = {}
    for section, keys in _parse_yaml(file).items():
        if section not in SECTIONS:
            raise ConfigError(f"{file}: there is no section '{section}'.{_hint(str(section), SECTIONS)}")
        if keys is not None and not isinstance(keys, dict):
            raise ConfigError(f"{file}: the section '{section}' must hold lines of `key: value`, not {keys!r}.")
        for key, value in (keys or {}).items():
            _check_key(file, section, str(key))
            settings[key] = _convert(f"{file}: {section}.{key}", key, value)
    return {key: value for key, value in settings.items() if value is not None}


def _parse_yaml(file: Path) -> dict[Any, Any]:
    import yaml

    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the configuration file {file}: {getattr(error, 'strerror', None) or error}. Check --config.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML{_place(error)}.") from None  # what the library quotes may be a key
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold the sections {', '.join(SECTIONS)}; see configs/server.yaml for every key.")
    return tree or {}


def _check_key(file: Path, section: str, key: str) -> None:
    if KEYS.get(key) == section:
        return
    if key in KEYS:
        raise ConfigError(f"{file}: '{key}' belongs to the section '{KEYS[key]}', not to '{section}'.")
    raise ConfigError(f"{file}: there is no key '{key}' in the section '{section}'.{_hint(key, KEYS)}")


def _hint(word: str, known: Mapping[str, object]) -> str:
    """The nearest known name, or all of them."""
    near = difflib.get_close_matches(word.replace("-", "_"), known, n=1)
    return f" Did you mean '{near[0]}'?" if near else f" There are: {', '.join(known)}."


# --- One value ---------------------------------------------------------------


def _convert(label: str, key: str, value: object) -> Any:
    """`value` (from YAML, or a flag's text) as the field's type; `label` names it in the error."""
    kind = get_type_hints(SECTIONS[KEYS[key]])[key]
    if isinstance(kind, types.UnionType):  # X | None
        if value is None:
            return None
        kind = get_args(kind)[0]
    elif value is None:  # `key:` with nothing after it: the default stands
        return None
    if get_origin(kind) is Literal:
        return _choice(label, value, get_args(kind))
    if get_origin(kind) is tuple:
        return _to_words(label, value)
    return _CONVERTERS[kind](label, value)


def _choice(label: str, value: object, choices: tuple[str, ...]) -> str:
    if value is False and "off" in choices:  # what YAML reads `off` as
        value = "off"
    if value in choices:
        return str(value)
    raise ConfigError(f"{label} must be one of {', '.join(choices)}, not {value!r}.")


def _to_bool(label: str, value: object) -> bool:
    word = str(value).lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ConfigError(f"{label} must be true or false, not {value!r}.")


def _to_int(label: str, value: object) -> int:
    try:
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise ConfigError(f"{label} must be a whole number, not {value!r}.")


def _to_float(label: str, value: object) -> float:
    try:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise ConfigError(f"{label} must be a number, not {value!r}.")


def _to_str(label: str, value: object) -> str:
    if isinstance(value, (dict, list)) or value == "":
        raise ConfigError(f"{label} must be some text, not {value!r}.")
    return str(value)


def _to_words(label: str, value: object) -> tuple[str, ...]:
    """`a,b` or a YAML list of texts."""
    words = value if isinstance(value, (list, tuple)) else _to_str(label, value).split(",")
    if not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{label} must be a list of texts. Put quotes around each of them, as in '123'.")
    return tuple(_to_str(label, word).strip() for word in words)


def _to_path(label: str, value: object) -> Path:
    return Path(_to_str(label, value)).expanduser()


_CONVERTERS: dict[type, Callable[[str, object], object]] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, Path: _to_path}


# --- All values together -----------------------------------------------------


def _one_model(settings: Settings) -> Settings:
    """Refuse two models given in one place; a flag over a file's key is no conflict."""
    if settings.get("model") and settings.get("gguf_path"):
        raise ConfigError(f"model ({settings['model']}) and gguf_path ({settings['gguf_path']}) both name a model: give one of them.")
    return settings


def _build(settings: Settings) -> Config:
    parts = {section: kind(**{key: value for key, value in settings.items() if KEYS[key] == section}) for section, kind in SECTIONS.items()}
    return Config(**parts)


def _check(config: Config) -> None:
    """Raise the sentence of the first rule that the configuration breaks."""
    for holds, sentence in (*_engine_rules(config.engine), *_scheduler_rules(config.scheduler), *_api_rules(config.api)):
        if not holds:
            raise ConfigError(sentence)


def _engine_rules(engine: EngineConfig) -> list[tuple[bool, str]]:
    threads, tokens, experts, chunk = engine.cpu_infer, engine.cache_lens, engine.experts_per_token, engine.prefill_chunk
    return [
        (threads is None or threads >= 1, f"cpu_infer is {threads}, but the model needs at least one CPU thread. Leave it out to use every CPU."),
        (
            tokens is None or tokens >= 2,
            f"cache_lens is {tokens}, but the KV cache must hold the prompt and the reply, so at least 2 tokens. "
            "Leave it out for the smaller of 8192 and the model's context.",
        ),
        (chunk is None or chunk >= 1, f"prefill_chunk is {chunk}, but a step takes at least 1 token. Leave it out for 512, or 2048 on a GPU."),
        (
            experts is None or experts >= 1,
            f"experts_per_token is {experts}, but a token uses at least 1 routed expert. Leave it out for as many as the model was trained with.",
        ),
    ]


def _scheduler_rules(scheduler: SchedulerConfig) -> list[tuple[bool, str]]:
    return [
        (scheduler.max_queue >= 1, f"max_queue is {scheduler.max_queue}, but at least 1 request must be able to wait. The default is 64."),
        (scheduler.max_new_tokens >= 1, f"max_new_tokens is {scheduler.max_new_tokens}, but a reply has at least 1 token. The default is 2048."),
        (scheduler.grace_s >= 0, f"grace_s is {scheduler.grace_s}, but it counts seconds, 0 or more. The default is 30."),
    ]


def _api_rules(api: ApiConfig) -> list[tuple[bool, str]]:
    return [*_address_rules(api), *_limit_rules(api)]


def _address_rules(api: ApiConfig) -> list[tuple[bool, str]]:
    missing = [path for path in (api.ssl_keyfile, api.ssl_certfile) if path and not path.is_file()]
    metrics = api.metrics_port
    origin = next((origin for origin in api.cors_origins if not _ORIGIN.fullmatch(origin)), None)
    host = next((host for host in api.allowed_hosts if not _HOST.fullmatch(host)), None)
    return [
        (0 <= api.port <= 65535, f"port is {api.port}, but ports go from 1 to 65535 (0 takes any free one). The default is 10002."),
        (metrics is None or 0 <= metrics <= 65535, f"metrics_port is {metrics}, but ports go from 1 to 65535 (0 takes any free one)."),
        (metrics in (None, 0) or metrics != api.port, f"metrics_port and port are both {metrics}: leave metrics_port out to have /metrics on the API's port."),
        (origin is None, f"cors_origins has {origin!r}; an origin is like https://chat.example.com or http://localhost:3000, without a path, or * for any."),
        (host is None, f"allowed_hosts has {host!r}; a host is a name or an address, without http:// and without a port, or * for any."),
        ((api.ssl_keyfile is None) == (api.ssl_certfile is None), "HTTPS needs both ssl_keyfile and ssl_certfile: give the other one as well."),
        (not missing, f"There is no file {missing[0] if missing else ''}: ssl_keyfile and ssl_certfile must name PEM files."),
    ]


# Scheme, name or [address], and a port that is not the scheme's own: what a browser writes into Origin.
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/:@\[\]]+)(:\d+)?")
_HOST = re.compile(r"\*|[0-9a-fA-F:]+|[^\s/:@\[\]]+")


def _limit_rules(api: ApiConfig) -> list[tuple[bool, str]]:
    limit = api.request_timeout_s
    return [
        (api.keep_alive_s > 0, f"keep_alive_s is {api.keep_alive_s}, but it counts the seconds between two signs of life, more than 0. The default is 5."),
        (api.max_body_mb > 0, f"max_body_mb is {api.max_body_mb}, but a body has a size, in millions of bytes. The default is 16."),
        (api.read_timeout_s > 0, f"read_timeout_s is {api.read_timeout_s}, but it counts seconds, more than 0. The default is 30."),
        (api.write_timeout_s > 0, f"write_timeout_s is {api.write_timeout_s}, but it counts seconds, more than 0. The default is 60."),
        (limit is None or limit > 0, f"request_timeout_s is {limit}, but it counts seconds, more than 0. Leave it out to let a request take its time."),
    ]
