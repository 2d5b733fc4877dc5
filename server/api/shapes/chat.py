"""The shape of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server.api.problems import Json
from server.api.shapes.base import Call, Choice
from server.api.shapes.openai import OpenAIShape
from server.api.shapes.tokens import with_alternatives
from server.scheduler.reply import Finished, Piece, ToolCall
from server.text.reasoning import Kind
from server.types import TokenLogprob


class ChatShape(OpenAIShape):
    """Deltas of a message."""

    reply_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> list[Json]:
        return [self._delta(index, {"role": "assistant", "content": ""}) for index in range(self._wanted.choices)]

    def piece(self, index: int, piece: Piece) -> list[Json]:
        key = _KEYS[piece.kind]
        return [self._delta(index, {key: piece.text}, {key: piece.logprobs} if piece.logprobs else None)]

    def call(self, index: int, call: ToolCall) -> list[Json]:
        function = {"arguments": call.arguments} if call.name is None else {"name": call.name, "arguments": call.arguments}
        begun = {} if call.call_id is None else {"id": call.call_id, "type": "function"}
        return [self._delta(index, {"tool_calls": [{"index": call.index, **begun, "function": function}]})]

    def _last(self, index: int, end: Finished) -> Json:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": end.reason.value}

    def _choice(self, index: int, choice: Choice, end: Finished) -> Json:
        message: Json = {"role": "assistant", "content": choice.text("content") or (None if choice.calls else "")}
        if reasoning := choice.text("reasoning"):
            message[_KEYS["reasoning"]] = reasoning
        if choice.calls:
            message["tool_calls"] = [_call(call) for call in choice.calls]
        found = {key: logprobs for kind, key in _KEYS.items() if (logprobs := choice.logprobs(kind)) or kind == "content"}
        return {"index": index, "message": message, "logprobs": self._logprobs(found) if self._wanted.logprobs else None, "finish_reason": end.reason.value}

    def _delta(self, index: int, delta: Json, logprobs: Mapping[str, Sequence[TokenLogprob]] | None = None) -> Json:
        written = self._logprobs(logprobs) if logprobs is not None else None
        return self._chunk([{"index": index, "delta": delta, "logprobs": written, "finish_reason": None}])

    def _logprobs(self, by_key: Mapping[str, Sequence[TokenLogprob]]) -> Json:
        return {key: [with_alternatives(self._tokenizer, entry) for entry in entries] for key, entries in by_key.items()}


def _call(call: Call) -> Json:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


_KEYS: dict[Kind, str] = {"content": "content", "reasoning": "reasoning_content"}  # of text and log probabilities alike, as DeepSeek's API names them
