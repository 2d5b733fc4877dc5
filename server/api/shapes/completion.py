"""The shape of /v1/completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from server.api.problems import Json
from server.api.shapes.base import Choice
from server.api.shapes.openai import OpenAIShape, Wanted
from server.api.shapes.tokens import finite
from server.scheduler.reply import Finished, Piece, ToolCall
from server.text.tokenizer import Tokenizer
from server.types import TokenLogprob


class CompletionShape(OpenAIShape):
    """Text and nothing else."""

    reply_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, reply_id: str, created: int, model: str, tokenizer: Tokenizer, wanted: Wanted) -> None:
        super().__init__(reply_id, created, model, tokenizer, wanted)
        self._offsets: Counter[int] = Counter()  # characters of each streamed choice so far, for text_offset

    def piece(self, index: int, piece: Piece) -> list[Json]:
        logprobs = self._logprobs(piece.logprobs, self._offsets[index]) if piece.logprobs else None
        self._offsets[index] += len(piece.text)
        return [self._chunk([{"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}])]

    def call(self, index: int, call: ToolCall) -> list[Json]:
        raise AssertionError("a completion has no tools, so that no call is looked for in it")

    def _last(self, index: int, end: Finished) -> Json:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": end.reason.value}

    def _choice(self, index: int, choice: Choice, end: Finished) -> Json:
        logprobs = self._logprobs(choice.logprobs("content"), 0) if self._wanted.logprobs else None
        return {"index": index, "text": choice.text("content"), "logprobs": logprobs, "finish_reason": end.reason.value}

    def _logprobs(self, entries: Sequence[TokenLogprob], offset: int) -> Json:
        tokens = [self._text(entry.token_id) for entry in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": [{self._text(each): finite(logprob) for each, logprob in _with_chosen(entry)} for entry in entries],
            "text_offset": [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))],
        }

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special=False)


def _with_chosen(entry: TokenLogprob) -> list[tuple[int, float]]:
    """The alternatives, and the chosen token where it is none of them, as OpenAI's completions list them."""
    return [*entry.top, *([] if entry.token_id in dict(entry.top) else [(entry.token_id, entry.logprob)])]
