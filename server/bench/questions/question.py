"""One question, which share it belongs to, and whether a reply answers it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from server.bench.questions.dates import MONTHS, WEEKDAYS

SKILLS = ("addition", "subtraction", "multiplication", "comparison", "sorting", "letters", "problems", "dates")
LANGUAGES = ("en", "zh")
Operands = tuple[str | int, ...]

_HELD_OUT_OF = 8  # one question in so many is held out
_ORDERLESS = frozenset({"addition", "multiplication", "comparison", "sorting"})


@dataclass(frozen=True, slots=True)
class Question:
    """A question as it is asked, and its answer in canonical form: digits, digits with commas, a weekday's name, or `month-day`."""

    skill: str
    language: str
    operands: Operands  # what the question is about, without its wording; see sampling.py for each skill's
    prompt: str
    answer: str
    terse: bool  # worded so that the training data often answers it without thinking

    def accepts(self, reply: str) -> bool:
        """Whether a reply gives the answer: the last number (list, weekday, date) after the reasoning must be it."""
        said = reply.rpartition("</think>")[2]
        if self.skill == "sorting":
            return re.findall(r"\d+", said) == self.answer.split(",")
        if self.answer in WEEKDAYS[self.language]:
            return _last(WEEKDAYS[self.language], said) == self.answer
        if self.operands[0] == "date_after":
            return _last_date(said, self.language) == self.answer
        found = re.findall(r"-?\d+", said)
        return bool(found) and found[-1] == self.answer


def held_out(skill: str, operands: Operands) -> bool:
    """Whether a question is kept from training. The order of what has none (7 + 5, 5 + 7) does not count; for letters the word decides."""
    if skill in _ORDERLESS:
        operands = tuple(sorted(operands))
    elif skill == "letters":
        operands = operands[:1]
    key = f"{skill}:{','.join(map(str, operands))}".encode()
    return hashlib.blake2b(key, digest_size=4).digest()[0] % _HELD_OUT_OF == 0


def _last(names: tuple[str, ...], text: str) -> str | None:
    """The name that occurs last in `text`."""
    found = max(names, key=text.rfind)
    return found if found in text else None


def _last_date(text: str, language: str) -> str | None:
    """The last date in `text` as month-day: "March 15" or "3月15日"."""
    if language == "zh":
        found = re.findall(r"(\d+)月(\d+)", text)
        return f"{int(found[-1][0])}-{int(found[-1][1])}" if found else None
    found = re.findall(rf"({'|'.join(MONTHS)}) (\d+)", text)
    return f"{MONTHS.index(found[-1][0]) + 1}-{int(found[-1][1])}" if found else None
