"""Questions: answers are right, checkers tell right from wrong, and the two shares never meet."""

from __future__ import annotations

import datetime
import itertools
import random
import re

import pytest

from recipes.tiny_r1.documents import document
from recipes.tiny_r1.thinking import answer_sentence
from server.bench.questions import LANGUAGES, SKILLS, Question, held_out, questions, sample
from server.bench.questions.dates import MONTHS
from server.bench.questions.words import WORDS

EVERY = [(skill, language) for skill in SKILLS for language in LANGUAGES]
ELSEWHERE = {
    "en": {"sorting": "1, 2, 3, 4, 5, 6, 7, 9", "weekday": "It is Someday.", "date": "The answer is March 0."},
    "zh": {"sorting": "1、2、3", "weekday": "星期八", "date": "答案是0月0日。"},
}


@pytest.mark.parametrize(("skill", "language"), EVERY)
def test_two_hundred_held_out_questions_of_each(skill: str, language: str) -> None:
    asked = list(questions("test", skill, language, 250, seed=1))
    assert len({question.operands for question in asked}) == 250
    assert all(held_out(question.skill, question.operands) for question in asked)
    assert asked == list(questions("test", skill, language, 250, seed=1))
    assert asked != list(questions("test", skill, language, 250, seed=2))


@pytest.mark.parametrize(("skill", "language"), EVERY)
def test_a_checker_takes_the_answer_and_nothing_else(skill: str, language: str) -> None:
    asked = list(questions("test", skill, language, 50, seed=3))
    for question, other in itertools.pairwise(asked):
        said = answer_sentence(question)
        assert question.accepts(said)
        assert question.accepts(f"<think>\n{answer_sentence(other)}\n</think>\n\n{said}")
        assert question.accepts(answer_sentence(other)) == (answer_sentence(other) == said)
        assert not question.accepts("")
        assert not question.accepts(f"<think>\n{said}\n</think>\n\n")


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_held_out_question_in_training(language: str) -> None:
    """By construction; here over 100,000 draws, by the question itself instead of its hash."""
    rng = random.Random(0)
    kept = {(skill, _unordered(question)) for skill in SKILLS for question in questions("test", skill, language, 250, seed=0)}
    drawn = {(question.skill, _unordered(question)) for question in (sample(rng, rng.choice(SKILLS), rng.choice(LANGUAGES), "train") for _ in range(50_000))}
    assert len(drawn) > 20_000
    assert not kept & drawn


def _unordered(question: Question) -> tuple[str | int, ...]:
    if question.skill == "letters":
        return question.operands[:1]
    return tuple(sorted(question.operands, key=str)) if question.skill in ("addition", "multiplication", "comparison", "sorting") else question.operands


def test_whole_chats_hold_no_held_out_word() -> None:
    """The words of letter questions are the easiest to find in a text: earlier turns must not ask for them either."""
    rng = random.Random(1)
    texts = "".join(document(rng) for _ in range(5000))
    spelt = [re.sub(r"\d", "", line) for line in re.findall(r"\n((?:[a-z]\d){3,})\n", texts)]
    assert len(spelt) > 300
    assert not [word for word in spelt if held_out("letters", (word, ""))]


def test_dates_against_the_standard_library() -> None:
    for question in (*questions("test", "dates", "en", 300, seed=0), *questions("train", "dates", "en", 300, seed=0)):
        kind, *numbers = question.operands
        first = datetime.date(2023, int(numbers[0]), int(numbers[1])) if not str(kind).startswith("weekday") else datetime.date(2024, 1, 1 + int(numbers[0]))
        days = datetime.timedelta(int(numbers[-1]))
        if kind == "days_between":
            assert question.answer == str((datetime.date(2023, int(numbers[2]), int(numbers[3])) - first).days)
        elif kind == "date_after":
            assert question.answer == f"{(first + days).month}-{(first + days).day}"
        else:
            assert question.answer == f"{first + days if kind == 'weekday_after' else first - days:%A}"


def test_words_fit_the_skill() -> None:
    assert all(re.fullmatch("[a-z]{3,12}", word) for word in WORDS)
    assert len(WORDS) == len(set(WORDS)) > 1000
    assert len(MONTHS) == 12
