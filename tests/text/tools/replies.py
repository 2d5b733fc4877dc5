"""Replies with calls, cut in every way, and what a parser made of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from server.text.tools.calls import Tool, ToolCall
from server.text.tools.formats import ToolFormat

WEATHER = Tool(
    "weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "deep": {"type": "object"},
            "quick": {"type": "boolean"},
            "note": {"type": ["string", "null"]},
        },
        "required": ["city"],
    },
)
CLOCK = Tool("clock")
TOOLS = (WEATHER, CLOCK)

Part = str | tuple[str, str, str]  # text, or a call's id, name and arguments


def parsed(form: ToolFormat, pieces: Iterable[str], tools: Iterable[Tool] = TOOLS) -> list[Part]:
    """The reply's parts, joined; calls are numbered from id0."""
    ids = (f"id{number}" for number in count())
    parser = form.parser(tuple(tools), lambda: next(ids))
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, str):
            assert part, "an empty text"
            joined[-1:] = [last + part] if isinstance(last, str) else [*joined[-1:], part]
        elif part.name is not None:
            assert part.call_id
            assert part.index == len(calls(joined))
            joined.append((part.call_id, part.name, part.arguments))
        else:
            assert isinstance(last, tuple), "arguments of no call"
            assert part.arguments, "an empty part of a call"
            joined[-1] = (*last[:2], last[2] + part.arguments)
    return joined


def calls(parts: Iterable[Part | ToolCall]) -> list[Any]:
    return [part for part in parts if isinstance(part, tuple)]


def cuts(text: str, times: int, seed: int = 0) -> Iterator[list[str]]:
    """The text whole, in single characters, in two at each place near its end, and in random pieces."""
    yield [text]
    yield list(text)
    for at in range(max(1, len(text) - 40), len(text)):
        yield [text[:at], text[at:]]
    rng = random.Random(seed)
    for _ in range(times):
        places = sorted(rng.sample(range(1, len(text)), min(rng.randrange(1, 40), len(text) - 1))) if len(text) > 1 else []
        yield [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]
