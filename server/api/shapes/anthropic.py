"""The shape of Anthropic's /v1/messages: blocks of thinking, text and calls, one after another, each begun and ended by events of its own."""

from __future__ import annotations

from collections.abc import Sequence

from server.api import problems
from server.api.framing import NAMED
from server.api.problems import Json, Problem
from server.api.shapes.base import Call, Choice, Shape
from server.scheduler.reply import Finished, Piece, ToolCall
from server.text.reasoning import Kind
from server.types import FinishReason, GenerateRequest

SIGNATURE = "unsigned"  # what clients send back with a block of thinking; nothing here needs to check it


class AnthropicShape(Shape):
    """One message. `thinking`: the client is to see it; otherwise its block is left out."""

    framing = NAMED

    def __init__(self, reply_id: str, model: str, request: GenerateRequest, *, thinking: bool) -> None:
        self._head: Json = {"id": reply_id, "type": "message", "role": "assistant", "model": model}
        self._prompt_tokens = len(request.prompt_ids)
        self._max_tokens = request.max_tokens
        self._thinking = thinking
        self._open: Kind | int | None = None  # the block that has begun: text of a kind, or a call by its index
        self._block = -1  # its place in the message

    def opening(self) -> list[Json]:
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return [{"type": "message_start", "message": message}]

    def piece(self, index: int, piece: Piece) -> list[Json]:
        if not piece.text or (piece.kind == "reasoning" and not self._thinking):
            return []
        block, delta = _TEXTS[piece.kind]
        return [*self._begin(piece.kind, block), self._delta({"type": delta, block["type"]: piece.text})]

    def call(self, index: int, call: ToolCall) -> list[Json]:
        begun = self._begin(call.index, {"type": "tool_use", "id": call.call_id, "name": call.name, "input": {}})
        return [*begun, self._delta({"type": "input_json_delta", "partial_json": call.arguments})]

    def ending(self, index: int, end: Finished) -> list[Json]:
        return [*self._end_block(), {"type": "message_delta", "delta": self._stop(end), "usage": _usage(end)}, {"type": "message_stop"}]

    def failure(self, problem: Problem) -> list[Json]:
        return [problems.anthropic(problem)]

    def alive(self, status: str) -> bytes:
        return self.framing.event({"type": "ping"})

    def whole(self, choices: Sequence[Choice]) -> Json:
        (choice,) = choices
        assert choice.end is not None
        content: list[Json] = []
        if self._thinking and (thinking := choice.text("reasoning")):
            content.append({"type": "thinking", "thinking": thinking, "signature": SIGNATURE})
        if text := choice.text("content"):
            content.append({"type": "text", "text": text})
        content += [_tool_use(call) for call in choice.calls]
        return {**self._head, "content": content, **self._stop(choice.end), "usage": _usage(choice.end)}

    def _begin(self, what: Kind | int, block: Json) -> list[Json]:
        """The events that make `what` the open block."""
        if what == self._open:
            return []
        ended = self._end_block()
        self._open = what
        self._block += 1
        return [*ended, {"type": "content_block_start", "index": self._block, "content_block": block}]

    def _end_block(self) -> list[Json]:
        if self._open is None:
            return []
        signed = [self._delta({"type": "signature_delta", "signature": SIGNATURE})] if self._open == "reasoning" else []
        self._open = None
        return [*signed, {"type": "content_block_stop", "index": self._block}]

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._block, "delta": delta}

    def _stop(self, end: Finished) -> Json:
        return {"stop_reason": self._stop_reason(end), "stop_sequence": end.stop_string}

    def _stop_reason(self, end: Finished) -> str:
        match end.reason:
            case FinishReason.TOOL_CALLS:
                return "tool_use"
            case FinishReason.LENGTH if end.completion_tokens < self._max_tokens:
                return "model_context_window_exceeded"
            case FinishReason.LENGTH:
                return "max_tokens"
            case _:
                return "end_turn" if end.stop_string is None else "stop_sequence"


# Kind of text -> its empty block, and the type of its deltas.
_TEXTS: dict[Kind, tuple[Json, str]] = {
    "content": ({"type": "text", "text": ""}, "text_delta"),
    "reasoning": ({"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta"),
}


def _usage(end: Finished) -> Json:
    """Anthropic counts cached tokens apart from the others."""
    cached = end.timings.cached_tokens
    return {
        "input_tokens": end.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": end.completion_tokens,
    }


def _tool_use(call: Call) -> Json:
    return {"type": "tool_use", "id": call.call_id, "name": call.name, "input": call.parsed()}
