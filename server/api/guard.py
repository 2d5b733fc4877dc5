"""Who may talk to a server that asks for no key: a program of this machine's, but no web page that someone happens to look at.

A page of any site can send requests to 127.0.0.1, and with a DNS name that first means its own server and then 127.0.0.1 ("DNS rebinding") it can
read the answers too. The browser tells on it: the Host header has that name then, and Origin says whose page it is. Programs that are no browsers
send this machine's name as Host and no Origin.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import Forbidden, response_to
from server.api.sentences import quoted
from server.config import ApiConfig


def is_loopback(host: str) -> bool:
    """Whether the name or address means this machine to itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HostGuard:
    """Middleware: 403 for foreign names in Host and Origin. Put it up where `wanted` says so."""

    def __init__(self, app: ASGIApp, config: ApiConfig) -> None:
        self._app = app
        self._hosts = {host.lower() for host in config.allowed_hosts}
        self._origins = set(config.cors_origins)

    @staticmethod
    def wanted(config: ApiConfig, *, keys: bool) -> bool:
        """On loopback without a key; and wherever --allowed_hosts names some."""
        return "*" not in config.allowed_hosts and (bool(config.allowed_hosts) or (is_loopback(config.host) and not keys))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._complaint(Headers(scope=scope))
        answer = self._app if error is None else response_to(scope["path"], error)
        await answer(scope, receive, send)

    def _complaint(self, headers: Headers) -> Forbidden | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._ours(_host_of(f"//{host}")):
            return Forbidden(
                f"This server does not go by the name {quoted(host)}, and without an API key a name that it does not know may be a web page's trick. "
                f"Call it at 127.0.0.1 or localhost, or start it with --allowed_hosts {_host_of(f'//{host}') or 'NAME'}."
            )
        if origin is not None and not self._may_ask(origin):
            return Forbidden(f"Web pages of {quoted(origin)} may not use this server. Start it with --cors_origins {origin} if they should.")
        return None

    def _ours(self, host: str) -> bool:
        return is_loopback(host) or host in self._hosts

    def _may_ask(self, origin: str) -> bool:
        """Pages of this machine and those that were allowed; and what is no web page: applications with a scheme of their own (app://, tauri://)."""
        if "*" in self._origins or origin in self._origins:
            return True
        scheme = origin.partition("://")[0]
        return scheme not in ("http", "https", "null") or self._ours(_host_of(origin))


def _host_of(url: str) -> str:
    """The host's name without port and brackets, in small letters; "" where there is none, or none that could be one."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
