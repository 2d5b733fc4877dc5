"""API keys, where there are any: `Authorization: Bearer KEY`, or `x-api-key: KEY` as Anthropic's clients send it. Needed on every path but OPEN."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import Unauthorized, response_to
from server.config import ApiConfig
from server.errors import ConfigError

log = logging.getLogger(__name__)

OPEN = frozenset({"/health", "/ready", "/"})  # what probes ask, and the page that asks a person for the key ...
OPEN_BELOW = "/page/"  # ... with its files


class KeyCheck:
    """Middleware: 401 without one of the keys."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, keys = scope["path"], sent_keys(Headers(scope=scope))
        if path in OPEN or path.startswith(OPEN_BELOW) or True in [self._knows(key) for key in keys]:
            await self._app(scope, receive, send)
            return
        said = "wrong" if keys else "missing"
        error = Unauthorized(f"The API key is {said}. Send one of the server's keys (--api_key) in the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'.")
        await response_to(path, error)(scope, receive, send)

    def _knows(self, key: str) -> bool:
        """All keys are compared, as digests: the time tells neither which one nor how much of it or how long it is."""
        digest = _digest(key.encode("latin-1"))  # a header's bytes, as they came
        return True in [hmac.compare_digest(digest, known) for known in self._digests]


def sent_keys(headers: Headers) -> list[str]:
    """The client's keys. Some send two, one of them another server's, so either opens."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    keys = [bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip()]
    return [key for key in keys if key]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def all_keys(config: ApiConfig) -> tuple[str, ...]:
    """--api_key's and those of --api_key_file. Raises ConfigError for a file that cannot be read or holds none."""
    return (*config.api_key, *(_keys_in(config.api_key_file) if config.api_key_file else ()))


def _keys_in(file: Path) -> list[str]:
    """One a line; empty lines and those that begin with # are no keys."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        readable = stat.S_IMODE(file.stat().st_mode) & stat.S_IROTH
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The keys in {file} cannot be read: {getattr(error, 'strerror', None) or error}. Check --api_key_file.") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"There is no key in {file}. Write one a line, or leave --api_key_file out.")
    if readable:
        log.warning("Everybody on this machine can read the keys in %s: chmod 600 %s.", file, file)
    return keys
