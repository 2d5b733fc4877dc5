"""Stop strings: found however the text is cut, never shown, and no more held back than needed."""

from __future__ import annotations

import itertools

import pytest

from server.text.stop import StopStrings
from tests.text.conftest import cuts


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """What is shown of the reply in `pieces`, and whether a stop string ended it."""
    finder, shown = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = finder.push(piece)
        shown += text
        if stopped:
            assert finder.flush() == ""
            return shown, True
    return shown + finder.flush(), False


def expected(stops: list[str], text: str) -> tuple[str, bool]:
    """The definition, read slowly: the first position at which some stop string is complete, and the longest one there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["END"], "one two END three", "one two "),
        (["END"], "one two EN", "one two EN"),
        (["aab"], "aaaab", "aa"),
        (["abab", "bb"], "aababb", "a"),
        (["\n\n", "User:"], "hi\nUser: x\n\n", "hi\n"),
        (["abcd", "b"], "abcd", "a"),
        (["bc", "abc", "c"], "xabc", "x"),
        (["</s>", "。"], "你好。再见", "你好"),
        (["👧"], "👨‍👩‍👧", "👨‍👩‍"),
        ([], "anything", "anything"),
    ],
)
def test_every_cut_gives_the_same(stops: list[str], text: str, shown: str) -> None:
    assert expected(stops, text)[0] == shown
    for pieces in cuts(text):
        assert run(stops, pieces) == expected(stops, text), pieces


def test_all_short_texts_over_two_letters() -> None:
    words = ["".join(letters) for size in (1, 2, 3, 4) for letters in itertools.product("ab", repeat=size)]
    texts = ["".join(letters) for letters in itertools.product("ab", repeat=7)]
    for stops in itertools.combinations(words, 2):
        for text in texts:
            assert run(list(stops), list(text)) == expected(list(stops), text), (stops, text)


def test_holds_back_only_what_may_become_a_stop_string() -> None:
    finder = StopStrings(["<end>", "fin"])
    assert finder.push("a < b, fi") == ("a < b, ", False)
    assert finder.push("sh <e") == ("fish ", False)
    assert finder.push("nd>more") == ("", True)
    assert finder.push("still more") == ("", True)


def test_a_long_stop_string_costs_no_more() -> None:
    stop = "ab" * 5000 + "c"
    assert run([stop], ["ab" * 500] * 40 + ["c!"]) == ("ab" * 15000, True)


def test_the_stop_string_that_ended_the_reply_is_known() -> None:
    finder = StopStrings(["never", "llo", "o"])
    finder.push("hel")
    assert finder.found is None
    finder.push("lo there")
    assert finder.found == "llo"
