"""The document at /openapi.json: what each route takes, answers and refuses.

Routes read their bodies by hand, for their sentences, so FastAPI knows the paths alone. The rest is put in here: bodies from the schemas that read
them (with the fields that are refused, of which only what asks for nothing is taken), answers and errors in the shape of the path's protocol.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from server.api import problems
from server.api.problems import Json
from server.api.schemas import anthropic, ollama, openai, responses
from server.api.schemas.body import Body

DESCRIPTION = "One local model, spoken to as OpenAI's, Anthropic's or Ollama's. Fields that nobody knows are ignored; every error is a sentence."
REFERENCE = "#/components/schemas/{model}"
EVENTS, LINES = "text/event-stream", "application/x-ndjson"


@dataclass(frozen=True, slots=True)
class Post:
    """What a POST takes and answers."""

    body: type[Body]
    keys: tuple[str, ...]  # that an answer always has
    stream: str | None = None  # the media type of an answer in parts


POSTS: dict[str, Post] = {
    "/v1/chat/completions": Post(openai.ChatRequest, ("id", "object", "created", "model", "choices", "usage"), EVENTS),
    "/v1/completions": Post(openai.CompletionRequest, ("id", "object", "created", "model", "choices", "usage"), EVENTS),
    "/v1/responses": Post(responses.ResponsesRequest, ("id", "object", "created_at", "model", "status", "output"), EVENTS),
    "/v1/messages": Post(anthropic.MessagesRequest, ("id", "type", "role", "model", "content", "stop_reason", "usage"), EVENTS),
    "/v1/messages/count_tokens": Post(anthropic.CountRequest, ("input_tokens",)),
    "/api/chat": Post(ollama.ChatRequest, ("model", "created_at", "message", "done"), LINES),
    "/api/generate": Post(ollama.GenerateRequest, ("model", "created_at", "response", "done"), LINES),
    "/api/show": Post(ollama.ShowRequest, ("details", "model_info", "capabilities", "template")),
    "/tokenize": Post(openai.TokenizeRequest, ("tokens", "count", "max_model_len")),
    "/detokenize": Post(openai.DetokenizeRequest, ("prompt",)),
}

# What is no JSON, beside the page's files.
PLAIN = {"/metrics": "text/plain", "/": "text/html"}

ERRORS: dict[str, Json] = {
    problems.openai.__name__: {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string", "description": "A sentence that says what to do."},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    problems.anthropic.__name__: {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {"type": "object", "required": ["type", "message"], "properties": {"type": {"type": "string"}, "message": {"type": "string"}}},
        },
    },
    problems.ollama.__name__: {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
}


class Api(FastAPI):
    """An application that answers with this document. No /docs: FastAPI's pages load their scripts from elsewhere."""

    def __init__(self, *, keys: bool) -> None:
        super().__init__(title="moespan", version="1", docs_url=None, redoc_url=None)
        self._keys = keys  # whether it asks for one

    def openapi(self) -> Json:
        """The document, made once."""
        self.openapi_schema = self.openapi_schema or _document(self, keys=self._keys)
        return self.openapi_schema


def _document(app: FastAPI, *, keys: bool) -> Json:
    with warnings.catch_warnings(action="ignore"):  # of operation ids that are not unique yet
        document = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    bodies, definitions = models_json_schema([(post.body, "validation") for post in POSTS.values()], ref_template=REFERENCE)
    schemas = {**definitions.get("$defs", {}), **{f"{name}_error": schema for name, schema in ERRORS.items()}}
    document["components"] = {"schemas": schemas}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _describe(operation, path, method)
            if path in POSTS and method == "post":
                _describe_post(operation, POSTS[path], bodies[POSTS[path].body, "validation"])
    if keys:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"x-api-key": []}]
    return document


def _describe(operation: Json, path: str, method: str) -> None:
    """What all operations of a path share: the shape of its errors."""
    error: Json = {"description": "A sentence that says what to do."}
    if method != "head":
        schema = {"$ref": REFERENCE.format(model=f"{problems.writer_for(path).__name__}_error")}
        error["content"] = {"application/json": {"schema": schema}}
    operation["operationId"] = "_".join([*re.findall(r"\w+", path), method])
    operation["responses"] = {"200": _answer(path, method), "4XX": error, "5XX": error}
    if path == "/ready":
        operation["responses"]["503"] = operation["responses"]["200"]


def _answer(path: str, method: str) -> Json:
    if method == "head" or path.startswith("/page/"):
        return {"description": "Done."}
    return {"description": "The answer.", "content": {PLAIN.get(path, "application/json"): {}}}


def _describe_post(operation: Json, post: Post, body: Json) -> None:
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object", "required": list(post.keys)}}}
    if post.stream is not None:
        content[post.stream] = {"schema": {"type": "string"}}
    operation["responses"]["200"] = {"description": "The answer, whole or (`stream`) in parts.", "content": content}
