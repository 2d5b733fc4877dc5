"""A grammar tried in a process of its own, run as a script: a bounded amount of memory, of stack and of time, for whatever a client sends.

The library bounds most of its work, but not all: a long chain of references overflows the stack, which nothing can catch, a `multipleOf` of eight digits would
keep a core busy for hours, and some GBNF for minutes. Here that costs a process of a tenth of a second instead of the server.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

# The library's own limits on one step (fuel and items) keep a mask below some 15 ms; states of the lexer are kept, and each takes 1 to 2 kB.
LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
_SECONDS = 2  # of a core
_PATIENCE_S = 15  # on a machine whose cores are all busy
NO_GRAMMAR = "Not to be read: "  # what a complaint begins with when it is of a reader of GBNF
_BYTES = 1 << 30  # of address space
_STACK = 1 << 20  # below what any thread of the server has
_turn = threading.Lock()  # one at a time, so that a flood of grammars takes one core
_places = threading.BoundedSemaphore(8)  # who waits for it holds one of the threads that read requests, of which some must be left to others


def trial(grammar: str, size: int, special: Mapping[int, str]) -> tuple[str, str]:
    """Compile the library's JSON form of a grammar for a vocabulary of `size` tokens with these special ones, whose text is theirs alone.

    Returns the grammar, `translated`, and "" if that can be done, else a sentence or two about what is wrong. Raises subprocess.TimeoutExpired where the
    machine was too busy to tell, or too many others wait for it.
    """
    task = json.dumps({"grammar": grammar, "size": size, "special": special}).encode()
    if not _places.acquire(blocking=False):
        raise subprocess.TimeoutExpired("a turn", 0)
    try:
        with _turn:
            done = subprocess.run([sys.executable, "-P", __file__], input=task, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_PATIENCE_S)
    finally:
        _places.release()
    if done.returncode == -signal.SIGXCPU:
        return grammar, f"It takes longer than {_SECONDS} s to compile. Send a simpler one: smaller numbers, shorter patterns."
    if done.returncode != 0:
        return grammar, "It is too large or too deeply nested to be compiled. Send a simpler one, with fewer rules or references behind each other."
    tried, complaint = json.loads(done.stdout)
    return tried, complaint


def translated(grammar: str) -> str:
    """The same with Lark in the place of GBNF. Raises whatever the library's reader of GBNF does."""
    forms = json.loads(grammar)
    for form in forms["grammars"]:
        if "lark_grammar" in form:
            form["lark_grammar"] = any_to_lark(form["lark_grammar"])
    return json.dumps(forms, ensure_ascii=False)


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    task = json.load(sys.stdin)
    backend = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Stub(task["size"], {int(i): text for i, text in task["special"].items()})))
    threading.stack_size(_STACK)
    thread = threading.Thread(target=lambda: print(json.dumps(_tried(backend, task["grammar"]))))
    thread.start()
    thread.join()


class _Stub:
    """A vocabulary with the special tokens in their places, nothing in others', and behind them the 256 bytes."""

    def __init__(self, size: int, special: Mapping[int, str]) -> None:
        self.tokens = [special.get(token_id, "").encode() for token_id in range(size)] + [bytes([byte]) for byte in range(256)]
        self.special_token_ids = list(special)
        self.eos_token_id = min(special)
        self.bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        return [len(self.tokens) - 256 + byte for byte in bytes(text)]


def _tried(backend: llguidance.LLTokenizer, grammar: str) -> tuple[str, str]:
    try:
        grammar = translated(grammar)
    except Exception as error:  # the library raises nothing narrower
        return grammar, f"{NO_GRAMMAR}{error}"
    matcher = llguidance.LLMatcher(backend, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return grammar, matcher.get_error()


if __name__ == "__main__":
    _main()
