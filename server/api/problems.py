"""What went wrong, in the words of each protocol. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client hears of it, in OpenAI's terms."""

    status: int  # of HTTP
    message: str  # a sentence
    kind: str  # OpenAI's `type`
    param: str | None = None
    code: str | None = None


def openai(problem: Problem) -> Json:
    """OpenAI's body of an error."""
    return {"error": {"message": problem.message, "type": problem.kind, "param": problem.param, "code": problem.code}}


def anthropic(problem: Problem) -> Json:
    """Anthropic's body of an error, which is also the event that ends a stream."""
    return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(problem.status, "api_error"), "message": problem.message}}


def ollama(problem: Problem) -> Json:
    """Ollama's body of an error, which is also the line that ends a stream."""
    return {"error": problem.message}


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

_WRITERS: dict[str, Callable[[Problem], Json]] = {"/api": ollama, "/v1/messages": anthropic}


def writer_for(path: str) -> Callable[[Problem], Json]:
    """Who writes the errors of this path: the protocol that it belongs to, OpenAI's where it is none's."""
    return next((write for root, write in _WRITERS.items() if path == root or path.startswith(f"{root}/")), openai)
