"""OpenAI's batch format: a line of the input as a request, and its answer as a line of the output. Nothing here is HTTP or a file.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}}, "error": null}

An answer's id is a digest of what was asked, so that the output alone says which lines are done, and of which input.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from server.api import problems
from server.api.answer import Answer
from server.api.convert import Prepared
from server.api.errors import problem_of
from server.api.exchanges import openai as exchanges
from server.api.exchanges.base import Reader
from server.api.problems import Json
from server.api.sentences import quoted, type_name
from server.api.serving import Loaded, Serving
from server.errors import EngineFailure, MoespanError, RequestError, ShuttingDown
from server.scheduler.reply import TextRules
from server.types import GenerateRequest, SamplingParams

log = logging.getLogger(__name__)

ID_BYTES = 12
READERS: Mapping[str, Reader] = {"/v1/chat/completions": exchanges.chat, "/v1/completions": exchanges.completion}


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a line is no request; the code is OpenAI's where it has one."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input. It is read again when its turn comes: thousands of parsed bodies would take several times the file's size."""

    number: int  # in the file, from 1
    raw: bytes
    id: str  # of its answer
    custom_id: str | None  # None: it has none that is a text
    fault: Fault | None


def read_line(number: int, raw: bytes) -> Line:
    """The line, or what is wrong with it."""
    try:
        asked = json.loads(raw)
        known_by = json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()  # however it is spaced; a lone half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        return Line(number, raw, _id(b"%d %b" % (number, raw)), None, Fault("invalid_json_line", f"Line {number} is not valid JSON: {error}."))
    custom_id, fault = _custom_id(asked), _fault(asked)
    if fault is not None:
        fault = Fault(fault.code, f"Line {number} {fault.message}")
    return Line(number, raw, _id(known_by if custom_id else b"%d %b" % (number, known_by)), custom_id, fault)


def _id(known_by: bytes) -> str:
    return f"batch_req_{blake2b(known_by, digest_size=ID_BYTES).hexdigest()}"


def _custom_id(asked: object) -> str | None:
    found = asked.get("custom_id") if isinstance(asked, dict) else None
    return found if isinstance(found, str) and found else None


def _fault(asked: object) -> Fault | None:
    """What is wrong with the line around the body; the message goes on after 'Line 3'."""
    if not isinstance(asked, dict):
        return Fault("invalid_json_line", f"must be a JSON object, not {type_name(asked)}.")
    if _custom_id(asked) is None:
        return Fault("missing_required_parameter", "needs a 'custom_id', a text by which its answer is found.")
    if asked.get("method") != "POST":
        return Fault("invalid_method", f"has the method {quoted(asked.get('method'))}; a batch is made of 'POST' alone.")
    if asked.get("url") not in list(READERS):  # which asks for no hash: it may be anything
        return Fault("invalid_url", f"has the url {quoted(asked.get('url'))}; a batch can ask {' and '.join(READERS)}.")
    if not isinstance(asked.get("body"), dict):
        return Fault("missing_required_parameter", f"needs a 'body', an object, not {type_name(asked.get('body'))}.")
    return None


async def answer(line: Line, serving: Serving, loaded: Loaded) -> Json:
    """The line's answer, whatever comes of it. Cancelled, or with the service closed (ShuttingDown), there is none."""
    if line.fault is not None:
        return _written(line, None, {"code": line.fault.code, "message": line.fault.message, "line": line.number})
    asked = json.loads(line.raw)
    try:
        body = await _reply(asked["url"], json.dumps(asked["body"]).encode(), serving, loaded)
    except ShuttingDown:
        raise
    except Exception as error:
        if not isinstance(error, MoespanError):
            log.exception("Line %d failed", line.number)
        problem = problem_of(error)
        return _written(line, {"status_code": problem.status, "request_id": line.id, "body": problems.openai(problem)})
    return _written(line, {"status_code": 200, "request_id": body["id"], "body": body})


async def _reply(url: str, body: bytes, serving: Serving, loaded: Loaded) -> Json:
    """What the server answers to a client that does not stream."""
    exchange = READERS[url](body, serving, loaded)
    if exchange.stream:
        raise RequestError("'stream' is not possible in a batch: its answers are whole. Leave it out.", param="stream", code="unsupported_parameter")
    with closing(exchange.submit(loaded)) as reply:
        return await reply.whole(exchange.shape)


def _written(line: Line, response: Json | None, error: Json | None = None) -> Json:
    return {"id": line.id, "custom_id": line.custom_id, "response": response, "error": error}


async def engine_works(loaded: Loaded) -> bool:
    """Whether a token can be had at all: when it cannot, a line that failed says nothing of itself."""
    probe = Prepared(GenerateRequest("probe", (0,), 1, SamplingParams(temperature=0)), TextRules())
    try:
        with closing(Answer(loaded, [probe])) as reply:
            async for _ in reply.batches():
                pass
    except EngineFailure:
        return False
    return True


def status(answered: Json) -> int | None:
    """The HTTP status of an answer; None: the line was no request."""
    response: dict[str, Any] | None = answered["response"]
    return response["status_code"] if response else None
