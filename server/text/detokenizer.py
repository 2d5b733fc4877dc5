"""Token ids to text while they stream in: no half character is ever emitted, and the joined text equals decoding all ids at once."""

from __future__ import annotations

import codecs

from server.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """One reply's token ids, pushed one by one, in constant time each. A character whose bytes lie in several tokens comes with the last of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back at most three bytes

    def push(self, token_id: int) -> str:
        """The text that is complete with this token; bytes that can never become UTF-8 are U+FFFD. Control tokens have no text."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The reply is over: U+FFFD for a character that was cut short, else nothing."""
        return self._decoder.decode(b"", final=True)
