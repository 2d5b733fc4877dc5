"""Bodies that nobody would send on purpose, into the application itself: no crash, no 5xx, and every answer in the shape of its protocol.

`pytest -m slow tests/api/test_fuzz.py` sends 100,000 of them; a small number is sent in every run.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.api.app import create_app
from server.api.openapi import ERRORS, POSTS
from server.api.problems import writer_for
from server.api.serving import Loaded, Serving
from server.config import ApiConfig, Config, SchedulerConfig
from server.metrics import Metrics
from server.scheduler.service import Service
from server.text.template import ChatTemplate
from tests.api.bodies import GOOD
from tests.api.live import MODEL, TEMPLATE, fake_tokenizer
from tests.api.process import Forgetful

STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 1e308, -1e-308, 0.1, 5e-324,
    "", "\x00", "a", "🦙", "\ud800", "x" * 3000, "%s{}", "true",
    [], [[]], [None], {}, {"": None}, {"a": {"a": {"a": []}}}, [0] * 300, ["a", 1, None], {"type": "text"}, {"type": []},
    {"type": {}}, {"$ref": "#"}, "((((", "(a*)*b", [{}],
]  # fmt: skip


def mutated(rng: random.Random, value: Any) -> Any:
    """A JSON value with one thing in it that is not as it was."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.1:
            return {other: each for other, each in value.items() if other != key}
        if action < 0.2:
            return {**value, rng.choice([*POSTS_FIELDS, "", "\x00", "__proto__"]): rng.choice(STRANGE)}
        return {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        index = rng.randrange(len(value))
        return [*value[:index], mutated(rng, value[index]), *value[index + rng.randint(0, 1) :]]
    return rng.choice(STRANGE)


POSTS_FIELDS = sorted({name for post in POSTS.values() for name in (*post.body.model_fields, *post.body.unsupported)})


def structure(rng: random.Random, good: dict[str, Any]) -> bytes:
    """The good body, changed in one to three places."""
    body: Any = good
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        body = mutated(rng, body)
    return json.dumps(body).encode()


def text(rng: random.Random, good: dict[str, Any]) -> bytes:
    """The good body's bytes, changed in a few places."""
    raw = bytearray(json.dumps(good, ensure_ascii=rng.random() < 0.5).encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw))
        raw[at : at + rng.randint(0, 8)] = rng.choice([b"", rng.randbytes(2), b"\\ud83d", b"1e999", b"-", b"NaN", b"{", b"[", b'"', b"\\u0000", b"9" * 500])
    return bytes(raw)


def garbage(rng: random.Random, good: dict[str, Any]) -> bytes:
    """Nothing of the good body, or too much of something."""
    depth = rng.choice([50, 99, 101, 500, 5000])
    nest = rng.choice([b"[", b'{"a":', b'{"messages":[', b'[{"role":'])
    whole = b'{"messages":' + b"[" * depth + b"]" * depth + b"}"
    key = rng.choice(list(good))
    deep = json.dumps({**good, key: "@"}).encode().replace(b'"@"', b'{"items":' * depth + b"1" + b"}" * depth)
    digits = json.dumps({**good, key: "@"}).encode().replace(b'"@"', b"7" * rng.choice([20, 400, 5000]))
    wide = b"{" + b'"a":1,' * 2000 + b'"b":1}'
    return rng.choice([rng.randbytes(rng.randint(0, 200)), nest * depth, whole, deep, digits, wide, b"", b"null", b'"a"', b"\xef\xbb\xbf{}"])


MAKERS: list[Callable[[random.Random, dict[str, Any]], bytes]] = [structure, structure, structure, text, garbage]


def fake_app(service: Service) -> Any:
    serving = Serving(MODEL, Config(api=ApiConfig(host="127.0.0.1")), Metrics())
    serving.ready(Loaded(service, fake_tokenizer(), ChatTemplate(TEMPLATE)))
    return create_app(serving)


def complaint(path: str, reply: httpx.Response) -> str | None:
    """What is wrong with an answer."""
    if reply.status_code >= 500:
        return "a server error"
    if reply.status_code == 200:
        return None
    body = reply.json()
    shape = ERRORS[writer_for(path).__name__]
    if not set(shape["required"]) <= set(body) or reply.status_code not in (400, 404):
        return "an error of another shape"
    message = body["error"] if isinstance(body["error"], str) else body["error"]["message"]
    return None if message and len(message) < 5000 else "no sentence"


async def send(app: Any, seed: int, count: int) -> tuple[Counter[int], list[str]]:
    """So many bodies, one after another."""
    statuses: Counter[int] = Counter()
    complaints: list[str] = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://localhost", timeout=30) as client:
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            path = rng.choice(list(GOOD))
            body = rng.choice(MAKERS)(rng, GOOD[path])
            reply = await client.post(path, content=body)
            statuses[reply.status_code] += 1
            if said := complaint(path, reply):
                complaints.append(f"{number}: {path} {body[:300]!r} -> {said}: {reply.status_code} {reply.text[:200]}")
    return statuses, complaints


def fuzz(seed: int, count: int) -> None:
    service = Service(Forgetful(script=list(b"some words")), SchedulerConfig(max_new_tokens=8), 1024, Metrics())
    try:
        statuses, complaints = asyncio.run(send(fake_app(service), seed, count))
        assert not complaints, "\n".join(complaints[:20])
        assert service.open == 0
    finally:
        service.close()
    print(dict(statuses))
    assert min(statuses[200], statuses[400]) > count // 20


def test_the_good_bodies_are_good() -> None:
    service = Service(Forgetful(script=list(b"some words")), SchedulerConfig(max_new_tokens=8), 1024, Metrics())

    async def statuses() -> dict[str, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(fake_app(service)), base_url="http://localhost") as client:
            return {path: (await client.post(path, json=body)).status_code for path, body in GOOD.items()}

    try:
        assert set(GOOD) == set(POSTS)
        assert asyncio.run(statuses()) == dict.fromkeys(GOOD, 200)
    finally:
        service.close()


def test_500_bodies() -> None:
    fuzz(seed=1, count=500)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_100_000_bodies() -> None:
    fuzz(seed=2, count=100_000)
