"""What is thought leads to the answer: every line of arithmetic holds, and each line follows from those before."""

from __future__ import annotations

import random
import re

import pytest

from recipes.tiny_r1 import columns
from recipes.tiny_r1.thinking import reply, thinking
from server.bench.questions import LANGUAGES, SKILLS, Question, questions

STEP = re.compile(r"[a-g](\d)([-+*])(\d)([-+])(\d)=(\d)[A-Z](\d)")
EVERY = [(skill, language) for skill in SKILLS for language in LANGUAGES]


def replay(steps: list[str]) -> None:
    """Check each digit step by plain arithmetic: digit op digit with a carry in gives a carry out and a digit."""
    for line in steps:
        if found := STEP.match(line):
            x, operator, y, _, before, carry, digit = found.groups()
            a, b, c = int(x), int(y), int(before)
            total = {"+": a + b + c, "*": a * b + c, "-": a - b - c}[operator]
            assert total == (int(digit) - 10 * int(carry) if operator == "-" else int(digit) + 10 * int(carry)), line


@pytest.mark.parametrize(("skill", "language"), EVERY)
def test_thinking_ends_in_the_answer(skill: str, language: str) -> None:
    for question in (*questions("train", skill, language, 200, seed=0), *questions("test", skill, language, 100, seed=0)):
        steps = thinking(question).splitlines()
        replay(steps)
        assert _conclusion(question, steps), question
        assert question.accepts(reply(question))
        assert question.accepts(reply(question, think=False))


def _conclusion(question: Question, steps: list[str]) -> bool:
    """Whether the last line says the answer, read without knowing how it came about."""
    last, answer = steps[-1], question.answer
    if question.skill == "sorting":
        return last.endswith(f":{answer}") and len(steps) == len(question.operands) + 1
    if question.skill == "letters":
        return re.sub(r"\d", "", last) == question.operands[0] and last[-1] == answer
    if question.skill == "comparison":
        a, sign, b = re.fullmatch(r"[a-g](\d)([<=>])(\d)", last).groups()  # type: ignore[union-attr]
        return (a > b) == (sign == ">") and answer == str(question.operands[0 if sign == ">" else 1])
    if str(question.operands[0]).startswith("weekday"):
        return last.endswith(answer)
    if question.operands[0] == "date_after":
        return last.startswith(f"{answer.split('-')[1]}<=")
    return last == f"={answer}"


@pytest.mark.parametrize("seed", range(3))
def test_arithmetic_of_any_size(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        a, b = rng.randrange(10 ** rng.randrange(1, 6)), rng.randrange(10 ** rng.randrange(1, 6))
        assert columns.add(a, b)[-1] == f"={a + b}"
        assert columns.difference(a, b)[-1] == f"={a - b}"
        assert columns.multiply(a % 1000, b % 100)[-1] == f"={a % 1000 * (b % 100)}"


def test_every_digit_is_looked_up_under_a_letter_that_stands_before_it() -> None:
    """The point of the notation: what a step takes from further up follows its own letter there."""
    lines = columns.multiply(307, 46)
    for at, line in enumerate(lines):
        if found := STEP.match(line):
            assert any(line[:2] in earlier for earlier in lines[:at]), line
            assert found
    assert lines[-2:] == ["E1D4C1B2A2", "=14122"] or lines[-2:] == ["F0E1D4C1B2A2", "=14122"]


def test_thoughts_are_short() -> None:
    lengths = [len(reply(question)) for skill in SKILLS for question in questions("train", skill, "zh", 100, seed=0)]
    assert max(lengths) < 320
