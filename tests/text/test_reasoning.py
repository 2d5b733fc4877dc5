"""Reasoning and answer: the tags gone, the same split however the reply is cut."""

from __future__ import annotations

import pytest

from server.text.reasoning import ReasoningParser
from tests.text.conftest import cuts


def split(pieces: list[str], opened: bool) -> tuple[str, str]:
    parser = ReasoningParser(opened=opened)
    found = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    assert all(text for _, text in found)
    kinds = [kind for kind, _ in found]
    assert kinds == sorted(kinds, reverse=True), "reasoning first, then content"
    return "".join(text for kind, text in found if kind == "reasoning"), "".join(text for kind, text in found if kind == "content")


@pytest.mark.parametrize(
    ("opened", "reply", "reasoning", "content"),
    [
        (False, "<think>\nso\nit is\n</think>\n\nYes.\n", "so\nit is", "Yes.\n"),
        (False, " \n<think>so</think>Yes.", "so", "Yes."),
        (False, "<think>\n\n</think>\n\nYes.", "", "Yes."),
        (False, "<think>never ends\n", "never ends\n", ""),
        (False, "<think>ends</thin", "ends</thin", ""),
        (False, "<think>done</think>\n", "done", ""),
        (False, "plain\n", "", "plain\n"),
        (False, "\n plain", "", "\n plain"),
        (False, "a <think>b</think> c", "", "a <think>b</think> c"),
        (False, "<thinker>", "", "<thinker>"),
        (False, "<thi", "", "<thi"),
        (False, " \n", "", " \n"),
        (False, "<think>a\n\n</thing>\n</think>b</think>c", "a\n\n</thing>", "b</think>c"),
        (True, "so\n</think>\n\nYes.", "so", "Yes."),
        (True, "\n\nso <i>\n\n</think> Yes.", "so <i>", " Yes."),
        (True, "<think>\nagain</think>Yes.", "again", "Yes."),
        (True, "</think>Yes.", "", "Yes."),
        (True, "never ends", "never ends", ""),
        (True, "\n<thi", "<thi", ""),
        (True, "\n", "", ""),
        (True, "想\n一想</think>\n好。", "想\n一想", "好。"),
        (True, "", "", ""),
    ],
)
def test_every_cut_gives_the_same(opened: bool, reply: str, reasoning: str, content: str) -> None:
    for pieces in cuts(reply):
        assert split(pieces, opened) == (reasoning, content), pieces


@pytest.mark.parametrize(
    ("opened", "thought", "rest"),
    [
        (False, "\n<think>\nso\n</think>", "\n\nYes. <think>\n"),
        (True, "\n\nso\n\n</think>", "</think>"),
        (True, "<think>again</thin\n", ""),
        (True, "\n", ""),
        (False, "", "\nplain </think>"),
        (False, "<think></think>", "\n"),
    ],
)
def test_raw_drops_nothing_and_knows_where_the_thought_ends(opened: bool, thought: str, rest: str) -> None:
    for pieces in cuts(thought + rest):
        parser = ReasoningParser(opened=opened, raw=True)
        found = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
        assert "".join([text for kind, text in found if kind == "reasoning"]) == thought, pieces
        assert "".join([text for kind, text in found if kind == "content"]) == rest, pieces


def test_text_comes_as_soon_as_it_is_certain() -> None:
    parser = ReasoningParser(opened=False)
    assert parser.push("<think>\nlet me") == [("reasoning", "let me")]
    assert parser.push(" see\n") == [("reasoning", " see")]
    assert parser.push("</th") == []
    assert parser.push("ing") == [("reasoning", "\n</thing")]
    assert parser.push(".</think>\n\nAha") == [("reasoning", "."), ("content", "Aha")]
    assert parser.push("! <think>") == [("content", "! <think>")]
    assert parser.flush() == []
