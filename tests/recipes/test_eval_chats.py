"""The chats that ship are what the recipe writes now."""

from __future__ import annotations

from importlib.resources import files

from recipes.tiny_r1.eval_chats import lines


def test_the_chats_that_ship_are_the_recipes_own() -> None:
    """If this fails: python -m recipes.tiny_r1.eval_chats > server/bench/chats.jsonl"""
    assert (files("server.bench") / "chats.jsonl").read_text(encoding="utf-8").splitlines() == list(lines())
