"""The API key, when there is one: `Authorization: Bearer KEY`, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

from fastapi import Request

from server.api.errors import Unauthorized


def require_key(api_key: str | None) -> Callable[[Request], Awaitable[None]]:
    """A dependency that lets a request pass or raises Unauthorized."""

    async def check(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # As bytes: compare_digest takes no text beyond ASCII, and a strange key must be wrong, not a failure.
        if api_key is not None and not (scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), api_key.encode())):
            said = "wrong" if key else "missing"
            raise Unauthorized(f"The API key is {said}. Send the server's --api_key in the header 'Authorization: Bearer KEY'.")

    return check
