"""Which tokens may come next: the grammar library's view of our vocabulary, and one request's walk through its grammar."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import llguidance

from server.errors import RequestError
from server.text.grammar_trial import LIMITS, trial
from server.text.tokenizer import Tokenizer

_REMEMBERED = 64  # grammars whose trial need not be repeated


class Vocabulary:
    """A tokenizer's tokens as the library wants them. To make one takes a second for 129,000 tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.stop_ids:
            raise RequestError("This model's file names no end-of-text token, so a reply cannot be told to end. Send the request without a grammar or schema.")
        self.size = tokenizer.vocab_size
        self.stop_ids = tokenizer.stop_ids
        tokens = _Tokens(tokenizer)
        self._special = {token_id: tokens.tokens[token_id].decode("utf-8", errors="replace") for token_id in tokens.special_token_ids}
        self._backend = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens), eos_token=sorted(tokenizer.stop_ids))
        self._trials = functools.lru_cache(maxsize=_REMEMBERED)(lambda grammar: _Once(lambda: self._trial(grammar)))

    def words(self, ids: frozenset[int]) -> memoryview:
        """A mask of these tokens."""
        bits = bytearray(-(-self.size // 32) * 4)
        for token_id in ids:
            bits[token_id // 8] |= 1 << token_id % 8
        return memoryview(bytes(bits)).cast("i")

    def trial(self, grammar: str) -> tuple[str, str]:
        """What came of a grammar's trial; who asks while it runs waits for it, so that one grammar takes one place however many ask for it at once."""
        return self._trials(grammar).result()

    def _trial(self, grammar: str) -> tuple[str, str]:
        """A grammar in the library's JSON form, its GBNF translated, and what is wrong with it, found out where it harms nobody; "" for nothing."""
        return trial(grammar, self.size, self._special)

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A walk at the beginning of a grammar that has passed its trial; what is still wrong with it, for this vocabulary, is in its `get_error`."""
        return llguidance.LLMatcher(self._backend, grammar, log_level=0, limits=LIMITS)


class _Once:
    """Something made when it is first asked for; a failure is not kept."""

    def __init__(self, make: Callable[[], tuple[str, str]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: tuple[str, str] | None = None

    def result(self) -> tuple[str, str]:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


@functools.lru_cache(maxsize=1)
def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer's vocabulary, made once. RequestError when it has no token that ends a reply."""
    return Vocabulary(tokenizer)


class _Tokens:
    """What the library asks a tokenizer for. A token is special, so that no text can stand for it, if its bytes are not part of a reply."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token_id, skip_special=False) for token_id in ids]
        self.special_token_ids = [i for i in ids if i in tokenizer.stop_ids or (self.tokens[i] and not tokenizer.token_bytes(i))]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(bytes(text).decode("utf-8", errors="replace"), special=False)


class GrammarMask:
    """One request's constraint: server.types.TokenMask. Tokens that end a reply are allowed exactly where the grammar may end, and behind the end alone."""

    def __init__(self, vocabulary: Vocabulary, matcher: llguidance.LLMatcher) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._words: memoryview | None = None  # of the next token, once asked for
        self._ended = False

    def mask(self) -> memoryview:
        """Which tokens may come next; see TokenMask. Raises RequestError when none may, or when to tell would take too long."""
        if self._words is None:
            self._words = self._computed()
        return self._words

    def accept(self, token_id: int) -> None:
        """The token that was drawn. Raises RequestError when the grammar cannot go on with it."""
        self._words = None
        if token_id in self._vocabulary.stop_ids:
            self._ended = True
        elif self._ended or not self._matcher.consume_token(token_id):
            raise self._stuck()

    def _computed(self) -> memoryview:
        if self._ended:
            return self._vocabulary.words(self._vocabulary.stop_ids)
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error() or bits.count(0) == len(bits):
            raise self._stuck()
        return memoryview(bits).cast("i")

    def _stuck(self) -> RequestError:
        if "too" in (error := self._matcher.get_error()):  # "too many states", "too many expressions"
            return RequestError(f"The grammar became too large to follow within the reply ({_first_line(error)}). Use simpler patterns or smaller counts.")
        return RequestError("The grammar allows nothing that this model can say next. Look for a part of it that nothing can match.")


def _first_line(error: str) -> str:
    return error.strip().split("\n", 1)[0].removeprefix("lexer error: ")
