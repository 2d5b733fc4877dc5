"""Tokens and their log probabilities, as OpenAI's chats and Ollama write them."""

from __future__ import annotations

from server.api.problems import Json
from server.text.tokenizer import Tokenizer
from server.types import TokenLogprob


def with_alternatives(tokenizer: Tokenizer, entry: TokenLogprob) -> Json:
    """A token, and the likeliest ones in its place."""
    return {**_token(tokenizer, entry.token_id, entry.logprob), "top_logprobs": [_token(tokenizer, *each) for each in entry.top]}


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> Json:
    raw = tokenizer.token_bytes(token_id, skip_special=False)
    return {"token": raw.decode("utf-8", errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """JSON has no infinities; OpenAI writes -9999 for a token that cannot be."""
    return max(logprob, -9999.0)
