"""Random JSON schemas of what the grammar library can enforce, and random walks through a constraint's masks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from server.text.grammar import GrammarSpec, compile_constraint
from server.text.tokenizer import Tokenizer
from server.types import TokenMask

CLOSERS = (b'"', b"]", b"}", b",", b":", b"</think>")  # what a token begins with that brings a reply to its end sooner


def allowed(mask: memoryview | None) -> list[int]:
    assert mask is not None
    return [i * 32 + bit for i, word in enumerate(mask) if word for bit in range(32) if word >> bit & 1]


def may_follow(constraint: TokenMask, token_id: int) -> bool:
    words = constraint.mask()
    assert words is not None
    return bool(words[token_id // 32] >> token_id % 32 & 1)


def takes(spec: GrammarSpec, tokenizer: Tokenizer, text: str, *, after_think: bool = False) -> bool:
    """Whether the whole of a text can be a reply."""
    constraint = compile_constraint(spec, tokenizer, after_think=after_think)
    for token_id in tokenizer.encode(text):
        if not may_follow(constraint, token_id):
            return False
        constraint.accept(token_id)
    ends = [may_follow(constraint, token_id) for token_id in tokenizer.stop_ids]
    assert all(ends) or not any(ends)
    return all(ends)


def walk(constraint: TokenMask, tokenizer: Tokenizer, rng: random.Random, most: int = 4000) -> str:
    """The answer of a reply whose tokens are drawn evenly from what is allowed, but for some haste to end it within `most` tokens."""
    text = b""
    for _ in range(most):
        ids = allowed(constraint.mask())
        ending = [token_id for token_id in ids if token_id in tokenizer.stop_ids]
        hasty = [token_id for token_id in ids if tokenizer.token_bytes(token_id).startswith(CLOSERS)]
        choices = ending or (hasty if hasty and rng.random() < 0.5 else ids)
        token_id = rng.choice(choices)
        constraint.accept(token_id)
        if ending:
            reply = text.decode()
            return reply.partition("</think>")[2] if reply.startswith("<think>") else reply
        text += tokenizer.token_bytes(token_id)
    raise AssertionError(f"no end within {most} tokens: {text[-300:]!r}")


def schema(rng: random.Random, depth: int = 3) -> Any:
    """One of every kind; containers only while there is depth left."""
    kinds: list[Callable[[random.Random, int], Any]] = [_string, _integer, _number, _enum, _pattern, _simple]
    if depth:
        kinds += [_object, _array, _tuple, _any_of, _object, _discriminated]
    return rng.choice(kinds)(rng, depth - 1)


def _string(rng: random.Random, depth: int) -> Any:
    least = rng.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(12)}


def _integer(rng: random.Random, depth: int) -> Any:
    low = rng.randrange(-300, 300)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(400)}


def _number(rng: random.Random, depth: int) -> Any:
    low = rng.uniform(-9, 9)
    return {"type": "number", "minimum": round(low, 3), "exclusiveMaximum": round(low + rng.uniform(0.1, 9), 3)}


def _enum(rng: random.Random, depth: int) -> Any:
    return {"enum": rng.sample(["a", "ab", 'quo"te', "b\\s", "北京", "🙂", "", 1, -2.5, None, True, ["x", {"y": 1}]], rng.randrange(1, 5))}


def _pattern(rng: random.Random, depth: int) -> Any:
    return {"type": "string", "pattern": rng.choice(["^[a-c]{2,4}$", "^\\d{3}-\\d{2}$", "^(yes|no|maybe)$", "^é[^\\W\\d_]?$", '^"+$'])}


def _simple(rng: random.Random, depth: int) -> Any:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}


def _object(rng: random.Random, depth: int) -> Any:
    names = rng.sample(["id", "name", "x y", "größe", "型", 'q"', "z"], rng.randrange(0, 5))
    required = rng.sample(names, rng.randrange(len(names) + 1))
    return {"type": "object", "properties": {name: schema(rng, depth) for name in names}, "required": required, "additionalProperties": False}


def _array(rng: random.Random, depth: int) -> Any:
    least = rng.randrange(3)
    return {"type": "array", "items": schema(rng, depth), "minItems": least, "maxItems": least + rng.randrange(3)}


def _tuple(rng: random.Random, depth: int) -> Any:
    parts = [schema(rng, depth) for _ in range(rng.randrange(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _any_of(rng: random.Random, depth: int) -> Any:
    return {"anyOf": [schema(rng, depth) for _ in range(rng.randrange(1, 4))]}


def _discriminated(rng: random.Random, depth: int) -> Any:
    """A union as pydantic writes one."""
    kinds = rng.sample(["cat", "dog", "fish"], 2)
    return {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": kind}, "value": schema(rng, depth)}, "required": ["kind"], "additionalProperties": False}
            for kind in kinds
        ]
    }
