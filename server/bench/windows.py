"""What perplexity and KL divergence are measured on: windows of tokens, each run with an empty KV cache, and in each the tokens that are scored.

The chats that ship with moespan (`chats.jsonl`, written by recipes/tiny_r1/eval_chats.py) are held-out questions with their thinking: a window is
one chat in the model's own template, and the reply is scored, or all of it. Of a reply that is worked out step by step a good model is nearly sure; of a
question it can only guess, as of most text. A text is cut as llama.cpp's perplexity tool does: windows follow each other
without overlap, a rest is dropped, BOS replaces the first token where the model wants one, and the second half of each window is scored, so that
every scored token has half a window before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import takewhile

import numpy as np

from server.errors import ConfigError
from server.text.reasoning import THINK_OPEN
from server.text.template import ChatTemplate, opens_think
from server.text.tokenizer import Tokenizer

WINDOW = 512  # tokens of a text's window


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids; those from `first` on are scored, each by what the model says after the one before it."""

    ids: tuple[int, ...]
    first: int  # >= 1


def text_windows(text: str, tokenizer: Tokenizer, size: int) -> list[Window]:
    """A text in windows of `size` tokens, 4 or more. Control tokens that are written in it are plain text. Raises ConfigError for less than a window."""
    ids = tokenizer.encode(text, special=False)
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    if bos:
        ids = bos + ids
    windows = [Window(tuple((bos or ids[start : start + 1]) + ids[start + 1 : start + size]), size // 2 + 1) for start in range(0, len(ids) - size + 1, size)]
    if not windows:
        raise ConfigError(f"The text has {len(ids)} tokens, less than one window of {size}. Give a longer --text, or a smaller --window.")
    return windows


def chat_windows(tokenizer: Tokenizer, template: ChatTemplate, limit: int | None = None, *, whole: bool = False) -> list[Window]:
    """The first `limit` of the chats that ship; scored are the replies, or with `whole` the questions too."""
    lines = (files("server.bench") / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    windows = [_chat(json.loads(line), tokenizer, template) for line in lines]
    if whole:
        # After what all chats begin with a model says the same in each: counted, it would be one observation taken for hundreds.
        first = _alike(windows) + 1
        windows = [replace(window, first=first) for window in windows]
    return windows[:limit]


def _alike(windows: Sequence[Window]) -> int:
    """Tokens that all windows begin with."""
    return sum(1 for _ in takewhile(lambda place: len(set(place)) == 1, zip(*(window.ids for window in windows), strict=False)))


def _chat(chat: dict[str, str], tokenizer: Tokenizer, template: ChatTemplate) -> Window:
    prompt, reply = template.render([{"role": "user", "content": chat["prompt"]}]), chat["reply"]
    if opens_think(prompt):
        prompt, reply = prompt.rstrip(), reply.removeprefix(THINK_OPEN)
    ids = tokenizer.encode_prompt(prompt)
    end = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    return Window((*ids, *tokenizer.encode(reply), *end), max(len(ids), 1))


def digest(windows: Sequence[Window]) -> str:
    """The same for the same tokens, scored in the same places."""
    hashed = hashlib.blake2b(digest_size=8)
    for window in windows:
        hashed.update(np.array([window.first, len(window.ids), *window.ids], np.int64).tobytes())
    return hashed.hexdigest()
