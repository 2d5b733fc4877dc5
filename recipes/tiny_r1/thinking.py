"""What the model learns to think before it answers: for each skill an algorithm written out, one small step after another.

Every step copies something that stands shortly before it, or reads a table small enough to be learnt by heart. The wording is in the
question's language, the steps are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from recipes.tiny_r1 import columns
from server.bench.questions import Question
from server.bench.questions.dates import MONTH_DAYS, MONTHS, WEEKDAYS, date_name
from server.bench.questions.problems import STEPS, apply

_OPENING = {
    "en": {
        "addition": "Add column by column.",
        "subtraction": "Compare, then subtract column by column.",
        "multiplication": "Multiply digit by digit.",
        "comparison": "Compare column by column.",
        "sorting": "Insert one number after another.",
        "letters": "Spell the word and count.",
        "problems": "Write it as a calculation.",
        "dates": "Count the days.",
    },
    "zh": {
        "addition": "按位相加。",
        "subtraction": "先比较,再按位相减。",
        "multiplication": "逐位相乘。",
        "comparison": "按位比较。",
        "sorting": "逐个插入。",
        "letters": "拼出单词并计数。",
        "problems": "写成算式。",
        "dates": "数一数天数。",
    },
}
_ANSWER = {"en": "The answer is {}.", "zh": "答案是{}。"}


def reply(question: Question, *, think: bool = True) -> str:
    """The whole reply in R1's form, with the thinking or with the empty thinking that R1 sometimes has."""
    thought = f"\n{thinking(question)}\n" if think else "\n\n"
    return f"<think>{thought}</think>\n\n{answer_sentence(question)}"


def thinking(question: Question) -> str:
    """The steps that lead to the answer."""
    return "\n".join([_OPENING[question.language][question.skill], *_STEPS[question.skill](question)])


def answer_sentence(question: Question) -> str:
    """The answer as it is said."""
    answer = question.answer
    if question.skill == "sorting":
        answer = answer.replace(",", ", " if question.language == "en" else "、")
    elif question.operands[0] == "date_after":
        month, day = map(int, answer.split("-"))
        answer = date_name(month, day, question.language)
    return _ANSWER[question.language].format(answer)


def _arithmetic(calculate: Callable[[int, int], list[str]]) -> Callable[[Question], list[str]]:
    return lambda question: calculate(*map(int, question.operands))


def _sort(question: Question) -> list[str]:
    """Insertion sort: the next number, then the sorted list with it."""
    done: list[int] = []
    lines = []
    for number in map(int, question.operands):
        done = sorted([*done, number])
        lines.append(f"{number}:{','.join(map(str, done))}")
    return lines


def _letters(question: Question) -> list[str]:
    """The letter, then the word's letters, each with the count up to it."""
    word, wanted = map(str, question.operands)
    return [wanted, "".join(f"{letter}{word[: at + 1].count(wanted)}" for at, letter in enumerate(word))]


def _problem(question: Question) -> list[str]:
    """Each step as a calculation of its own, starting with the result of the last."""
    kind, first, *rest = question.operands
    value, lines = int(first), []
    for operator, operand in zip(STEPS[str(kind)], rest, strict=True):
        lines += _calculation(operator, value, int(operand))
        value = apply(operator, value, int(operand))
    return lines


def _calculation(operator: str, a: int, b: int) -> list[str]:
    calculate = {"+": columns.add, "-": columns.subtract, "*": columns.multiply}[operator]
    return [f"{a}{operator}{b}", *calculate(a, b)]


def _date(question: Question) -> list[str]:
    kind, *rest = question.operands
    numbers = [int(value) for value in rest]
    if kind == "date_after":
        return _date_after(question.language, *numbers)
    if kind == "days_between":
        return _days_between(question.language, *numbers)
    return _weekday(question.language, numbers[0], numbers[1], 1 if kind == "weekday_after" else -1)


def _weekday(language: str, today: int, days: int, direction: int) -> list[str]:
    """Whole weeks drop out; the rest is counted day by day."""
    space = " " if language == "en" else ""
    names = WEEKDAYS[language]
    return [f"{days}=7*{days // 7}+{days % 7}", *(f"{step}{space}{names[(today + direction * step) % 7]}" for step in range(days % 7 + 1))]


def _date_after(language: str, month: int, day: int, days: int) -> list[str]:
    """Add to the day; as long as the month is too short for it, take the month away."""
    lines, day = _calculation("+", day, days), day + days
    while day > (length := MONTH_DAYS[month - 1]):
        lines += [_month(language, month), f"{day}>{length}", *_calculation("-", day, length)]
        month, day = month % 12 + 1, day - length
    return [*lines, _month(language, month), f"{day}<={MONTH_DAYS[month - 1]}"]


def _days_between(language: str, month: int, day: int, later_month: int, later_day: int) -> list[str]:
    """What is left of the first month, the whole months, and the days of the last one."""
    if month == later_month:
        return _calculation("-", later_day, day)
    left = MONTH_DAYS[month - 1] - day
    lines = [_month(language, month), *_calculation("-", MONTH_DAYS[month - 1], day)]
    for whole in range(month + 1, later_month):
        lines += [_month(language, whole), *_calculation("+", left, MONTH_DAYS[whole - 1])]
        left += MONTH_DAYS[whole - 1]
    return [*lines, _month(language, later_month), *_calculation("+", left, later_day)]


def _month(language: str, month: int) -> str:
    """A month and its length."""
    return f"{MONTHS[month - 1]} {MONTH_DAYS[month - 1]}" if language == "en" else f"{month}月{MONTH_DAYS[month - 1]}"


_STEPS: Mapping[str, Callable[[Question], list[str]]] = {
    "addition": _arithmetic(columns.add),
    "subtraction": _arithmetic(columns.difference),
    "multiplication": _arithmetic(columns.multiply),
    "comparison": _arithmetic(columns.compare),
    "sorting": _sort,
    "letters": _letters,
    "problems": _problem,
    "dates": _date,
}
