"""The Chinese README follows the English one: the same flags, commands, links and tables. Pages for those who come from elsewhere say what is answered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.cli.flags import parse
from server.config import KEYS
from server.errors import ConfigError

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def test_each_links_to_the_other() -> None:
    assert "](README.zh-CN.md)" in ENGLISH[:400]
    assert "](README.md)" in CHINESE[:400]


@pytest.mark.parametrize(
    "pattern",
    [r"(?<![\w-])--[a-z_]+", r"^moespan +([a-z]+) ", r"`(/[a-z0-9_/*.]+)`", r"^#+ ", r"`([a-z0-9]+moe|deepseek2|llama|qwen\d)`"],
    ids=["flags", "commands", "routes", "headings", "families"],
)
def test_both_name_the_same(pattern: str) -> None:
    english, chinese = (re.findall(pattern, text, re.MULTILINE) for text in (ENGLISH, CHINESE))
    assert english
    if pattern == r"^#+ ":
        assert chinese == english
    assert set(chinese) == set(english)


def test_links_lead_to_what_there_is() -> None:
    for text in (ENGLISH, CHINESE):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), target


def test_flags_of_llama_cpp_are_answered_as_the_page_says() -> None:
    """docs/migrating.md, its last table."""
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8").partition("# From llama.cpp")[2]
    rows = re.findall(r"^\| (`-.*?) \| (.*?) \|", page, re.MULTILINE)
    assert len(rows) > 8
    for theirs, ours in rows:
        for flag in re.findall(r"`(-[^`]+)`", theirs):
            if ours == "the same":
                assert flag.lstrip("-").replace("-", "_") in KEYS
                continue
            with pytest.raises(ConfigError) as error:
                parse(["serve", flag, "1"])
            assert (f"It is {ours.strip('`')} here." if ours.startswith("`") else "Leave it out: ") in str(error.value)
