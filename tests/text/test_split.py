"""Reasoning, answer and calls told apart, with both parsers at work."""

from __future__ import annotations

import json

import pytest

from server.text.split import Splitter
from server.text.tools.calls import ToolCall
from server.text.tools.formats import FORMATS, HERMES, ToolFormat, ToolRules
from tests.text.tools.replies import TOOLS, cuts

CALL = [("weather", {"city": "Köln"})]


def split(pieces: list[str], splitter: Splitter) -> tuple[str, str, list[tuple[str | None, str]]]:
    """The reasoning, the content, and the calls."""
    parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.flush()
    texts = {kind: "".join(part[1] for part in parts if isinstance(part, tuple) and part[0] == kind) for kind in ("reasoning", "content")}
    calls = [part for part in parts if isinstance(part, ToolCall)]
    heads = [call for call in calls if call.name]
    return texts["reasoning"], texts["content"], [(head.name, "".join(call.arguments for call in calls if call.index == head.index)) for head in heads]


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_thoughts_then_calls(form: ToolFormat) -> None:
    text = f"hm, {form.write(CALL)}?\n</think>\n\n{form.write(CALL)}"
    for pieces in cuts(text, 20):
        thought, content, calls = split(pieces, Splitter("opened", ToolRules(form, TOOLS)))
        assert (thought, content) == (f"hm, {form.write(CALL)}?", "")
        assert [(name, json.loads(arguments)) for name, arguments in calls] == CALL


def test_a_call_in_a_raw_thought_is_content() -> None:
    thought, rest = f"<think>\n{HERMES.write(CALL)}?\n</think>", "\n\nSo: "
    for pieces in cuts(thought + rest + HERMES.write(CALL), 20):
        assert split(pieces, Splitter("closed", ToolRules(HERMES, TOOLS), raw=True)) == ("", thought + rest.rstrip(), [("weather", '{"city": "Köln"}')])
        assert split(pieces, Splitter("closed", None, raw=True)) == ("", "".join(pieces), [])


def test_without_tools_markers_are_text() -> None:
    assert split([HERMES.write(CALL)], Splitter(None, None)) == ("", HERMES.write(CALL), [])


def test_one_call_finishes_a_reply_that_wants_no_more() -> None:
    text = HERMES.write([*CALL, *CALL]) + " bye"
    for pieces in cuts(text, 20):
        splitter = Splitter("closed", ToolRules(HERMES, TOOLS, parallel=False))
        assert split(pieces, splitter) == ("", "", [("weather", '{"city": "Köln"}')])
        assert splitter.finished
    assert not Splitter("closed", ToolRules(HERMES, TOOLS)).finished


def test_whether_it_is_still_thinking() -> None:
    splitter = Splitter("opened", None)
    assert splitter.thinking
    splitter.push("hm</think>")
    assert not splitter.thinking
    assert not Splitter("closed", None).thinking
    assert not Splitter(None, None).thinking
