"""Drawing questions: operands by skill, then one of the wordings, then the share that was asked for.

Operands by skill: addition, subtraction, multiplication, comparison (a, b); sorting eight numbers (fewer in training as well); letters
(word, letter); problems (kind, numbers...) of problems.py; dates ("weekday_after" | "weekday_before", weekday 0-6, days),
("date_after", month, day, days), ("days_between", month, day, later month, later day).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from server.bench.questions import dates, phrases_en, phrases_zh, problems
from server.bench.questions.question import Operands, Question, held_out
from server.bench.questions.words import WORDS

Split = Literal["train", "test"]

_TERSE_SHARE = 0.25
_PHRASES = {"en": phrases_en, "zh": phrases_zh}
_FULL_WIDTH = str.maketrans("?,:()", "\uff1f\uff0c\uff1a\uff08\uff09")  # people write Chinese with either
_DIGITS, _DIGIT_WEIGHTS = (1, 2, 3, 4, 5), (1, 2, 3, 4, 5)


def questions(split: Split, skill: str, language: str, n: int, seed: int) -> Iterator[Question]:
    """`n` questions of one skill and language from one share, no operands twice. Raises ValueError where the share has fewer."""
    rng = random.Random(f"{split} {skill} {language} {seed}")
    seen: set[Operands] = set()
    for _ in range(1000 * n):
        if len(seen) == n:
            return
        question = sample(rng, skill, language, split)
        if question.operands not in seen:
            seen.add(question.operands)
            yield question
    if len(seen) < n:
        raise ValueError(f"there are only about {len(seen)} {split} questions of {skill}: ask for fewer")


def sample(rng: random.Random, skill: str, language: str, split: Split) -> Question:
    """One question of a share. Sorting and letters in the training share have easier and made-up cases beside the real ones."""
    draw = (_EASIER if split == "train" else {}).get(skill) or _DRAW[skill]
    operands = draw(rng)
    while held_out(skill, operands) != (split == "test"):
        operands = draw(rng)
    return phrase(rng, skill, language, operands)


def phrase(rng: random.Random, skill: str, language: str, operands: Operands) -> Question:
    """Put operands into words."""
    terse = rng.random() < _TERSE_SHARE
    prompt = problems.tell(rng, language, operands) if skill == "problems" else _ask(rng, skill, language, operands, terse)
    if skill == "problems" and terse:
        prompt = rng.choice(_PHRASES[language].HURRY) + prompt
    if language == "zh" and rng.random() < 0.5:
        prompt = prompt.translate(_FULL_WIDTH)
    return Question(skill, language, operands, prompt, answer(skill, language, operands), terse)


def answer(skill: str, language: str, operands: Operands) -> str:
    """The answer in canonical form; see Question."""
    if skill == "letters":
        return str(str(operands[0]).count(str(operands[1])))
    if skill == "dates":
        return _date_answer(language, operands)
    if skill == "problems":
        return str(problems.value(operands))
    numbers = [int(operand) for operand in operands]
    if skill == "sorting":
        return ",".join(map(str, sorted(numbers)))
    a, b = numbers
    return str({"addition": a + b, "subtraction": a - b, "multiplication": a * b, "comparison": max(a, b)}[skill])


def _ask(rng: random.Random, skill: str, language: str, operands: Operands, terse: bool) -> str:
    table = _PHRASES[language]
    kind = str(operands[0]) if skill == "dates" else skill
    form = rng.choice((table.TERSE if terse else table.PLAIN)[kind])
    return str(form.format(*_spoken(skill, language, operands)))


def _spoken(skill: str, language: str, operands: Operands) -> list[str]:
    """Operands as a wording's fields take them."""
    if skill == "sorting":
        return [(", " if language == "en" else "、").join(map(str, operands))]
    if skill != "dates":
        return [str(operand) for operand in operands]
    kind, *numbers = operands
    values = [int(number) for number in numbers]
    if kind == "date_after":
        return [dates.date_name(values[0], values[1], language), str(values[2])]
    if kind == "days_between":
        return [dates.date_name(values[0], values[1], language), dates.date_name(values[2], values[3], language)]
    return [dates.WEEKDAYS[language][values[0]], str(values[1])]


def _date_answer(language: str, operands: Operands) -> str:
    kind, *rest = operands
    values = [int(value) for value in rest]
    if kind == "date_after":
        month, day = dates.after(values[0], values[1], values[2])
        return f"{month}-{day}"
    if kind == "days_between":
        return str(dates.between(values[0], values[1], values[2], values[3]))
    step = values[1] if kind == "weekday_after" else -values[1]
    return dates.WEEKDAYS[language][(values[0] + step) % 7]


def _number(rng: random.Random) -> int:
    """A number of up to five digits, long ones more often."""
    digits = rng.choices(_DIGITS, _DIGIT_WEIGHTS)[0]
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _pair(rng: random.Random) -> Operands:
    return _number(rng), _number(rng)


def _difference(rng: random.Random) -> Operands:
    """Mostly with a positive result."""
    a, b = _number(rng), _number(rng)
    return (b, a) if a < b and rng.random() < 0.8 else (a, b)


def _factors(rng: random.Random) -> Operands:
    if rng.random() < 0.85:
        return rng.randrange(100, 1000), rng.randrange(10, 100)
    return rng.randrange(2, 1000), rng.randrange(2, 100)


def _rivals(rng: random.Random) -> Operands:
    """Two different numbers, half of the time alike in their first digits."""
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.5:
        low = 10 ** rng.randrange(1, len(str(a)) + 1)
        b = a - a % low + rng.randrange(low)
    return (a, b) if a != b else (a, b + 1)


def _eight(rng: random.Random) -> Operands:
    return tuple(rng.randrange(100) for _ in range(8))


def _up_to_eight(rng: random.Random) -> Operands:
    return tuple(rng.randrange(100) for _ in range(8 if rng.random() < 0.6 else rng.randrange(2, 8)))


def _letter_of(rng: random.Random, word: str) -> Operands:
    """The word and a letter to count, mostly one that it has; often one that it has twice."""
    twice = [letter for letter in set(word) if word.count(letter) > 1]
    if twice and rng.random() < 0.4:
        return word, rng.choice(sorted(twice))
    return word, rng.choice(word if rng.random() < 0.8 else "abcdefghijklmnopqrstuvwxyz")


def _word(rng: random.Random) -> Operands:
    return _letter_of(rng, rng.choice(WORDS))


def _any_word(rng: random.Random) -> Operands:
    """Real words, words glued from the parts of real ones, and rows of random letters: what the spelling of any piece is learnt from."""
    kind = rng.random()
    if kind < 0.4:
        return _word(rng)
    if kind < 0.85:
        parts = [_part(rng) for _ in range(rng.randrange(2, 5))]
        return _letter_of(rng, "".join(parts)[:12])
    return _letter_of(rng, "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(3, 13))))


def _part(rng: random.Random) -> str:
    word = rng.choice(WORDS)
    start = rng.randrange(len(word) - 1)
    return word[start : start + rng.randrange(2, 6)]


def _date(rng: random.Random) -> Operands:
    kind = rng.choice(("weekday_after", "weekday_before", "date_after", "date_after", "days_between", "days_between"))
    if kind.startswith("weekday"):
        return kind, rng.randrange(7), rng.randrange(1, 100)
    month = rng.randrange(1, 13)
    day = rng.randrange(1, dates.MONTH_DAYS[month - 1] + 1)
    if kind == "date_after":
        return kind, month, day, rng.randrange(1, dates.MOST_DAYS + 1)
    later = dates.after(month, day, rng.randrange(1, dates.MOST_DAYS + 1))
    return (kind, month, day, *later) if later > (month, day) else _date(rng)


_DRAW: Mapping[str, Callable[[random.Random], Operands]] = {
    "addition": _pair,
    "subtraction": _difference,
    "multiplication": _factors,
    "comparison": _rivals,
    "sorting": _eight,
    "letters": _word,
    "problems": problems.draw,
    "dates": _date,
}
_EASIER: Mapping[str, Callable[[random.Random], Operands]] = {"sorting": _up_to_eight, "letters": _any_word}
