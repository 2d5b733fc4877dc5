"""Every error that a person can meet, drawn as one tree. Each message says what the person can do about it.

MoespanError
├── ConfigError            a flag or a configuration file is wrong            (exit status 2)
├── ModelError             the model's files cannot be used                    (exit status 1)
│   ├── ModelNotFound      no such file, directory or embedded model
│   ├── GGUFError          the file is damaged or is not a GGUF
│   └── UnsupportedModel   a sound file that this version cannot run
├── DeviceError            the machine cannot do what was asked (ISA, memory, port)  (exit status 1)
├── RequestError           one request is wrong                                (HTTP 400)
│   └── ContextOverflow    prompt and reply cannot fit into the KV cache       (HTTP 400)
├── QueueFull              try again later                                     (HTTP 429)
├── Busy                   as many as can be are being read already            (HTTP 429)
├── ShuttingDown           the server is going away, or is not there yet       (HTTP 503)
├── SlowReader             the client did not take its reply                   (ends its stream)
└── EngineFailure          our own fault                                       (HTTP 500)
"""

from __future__ import annotations


class MoespanError(Exception):
    """The root. `str(error)` is a sentence for the person who meets it."""


class ConfigError(MoespanError):
    """A flag or a configuration value that cannot be used."""


class ModelError(MoespanError):
    """The model's files cannot be used."""


class ModelNotFound(ModelError):
    """No such file, directory or embedded model."""


class GGUFError(ModelError):
    """The file is damaged, cut short, or no GGUF at all."""


class UnsupportedModel(ModelError):
    """A sound GGUF whose architecture, tokenizer or tensor types this version does not run."""


class DeviceError(MoespanError):
    """The machine cannot do what was asked for."""


class RequestError(MoespanError):
    """One request is wrong; `param` names the field and `code` is OpenAI's error code, where there is one."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextOverflow(RequestError):
    """The prompt does not leave room for a single new token in the KV cache."""

    def __init__(self, prompt_tokens: int, cache_lens: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens, but the KV cache holds {cache_lens} tokens for prompt and reply together. "
            f"Shorten the prompt, or start the server with a larger --cache_lens.",
            param="messages",
            code="context_length_exceeded",
        )
        self.prompt_tokens = prompt_tokens
        self.cache_lens = cache_lens


class QueueFull(MoespanError):
    """As many requests wait as --max_queue allows; `retry_after_s` is a guess at when to try again."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests are waiting already. Try again in {retry_after_s} s, or start the server with a larger --max_queue.")
        self.retry_after_s = retry_after_s


class Busy(MoespanError):
    """Requests come faster than they can be read; `retry_after_s` is a guess at when to try again."""

    def __init__(self, what: str, retry_after_s: int) -> None:
        super().__init__(f"The server is busy: {what}. Try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


class ShuttingDown(MoespanError):
    """The server does not take requests now: it is still loading, or it is going down."""


class SlowReader(MoespanError):
    """The client takes its reply so slowly that more of it waits than may."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"The reply was ended because {waiting} tokens of it were not read. Read the stream as it comes, or ask without 'stream'.")


class EngineFailure(MoespanError):
    """The engine failed on this request; the log has the traceback."""
