"""How the events of a stream become bytes: Server-Sent Events with or without names, or lines of JSON. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from server.api.problems import Json

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # UTF-8 as it is, which is shorter than escapes and as valid


@dataclass(frozen=True, slots=True)
class Framing:
    """One way to write events."""

    media_type: str
    event: Callable[[Json], bytes]
    end: bytes = b""  # what follows the last event of a stream that did not fail


def _data(event: Json) -> bytes:
    return b"data: " + _ENCODER.encode(event).encode() + b"\n\n"


def _named(event: Json) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\n" + _data(event)


def _line(event: Json) -> bytes:
    return _ENCODER.encode(event).encode() + b"\n"


def comment(text: str) -> bytes:
    """What readers of Server-Sent Events skip."""
    return b": " + text.encode() + b"\n\n"


DATA = Framing("text/event-stream", _data, end=b"data: [DONE]\n\n")  # OpenAI's chats and completions
NAMED = Framing("text/event-stream", _named)  # an event's `type` is its name too: Anthropic's messages and OpenAI's responses
LINES = Framing("application/x-ndjson", _line)  # Ollama's
