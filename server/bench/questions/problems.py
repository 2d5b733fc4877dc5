"""Small word problems: who has what, and what becomes of it. One or two steps on numbers below a hundred."""

from __future__ import annotations

import random
from collections.abc import Mapping

from server.bench.questions.question import Operands

# Each kind's steps: a running value starts at the first number; then an operator and the number that it takes, in order.
STEPS: Mapping[str, str] = {
    "gain": "+",
    "lose": "-",
    "times": "*",
    "gain_gain": "++",
    "gain_lose": "+-",
    "lose_gain": "-+",
    "times_gain": "*+",
    "times_lose": "*-",
}

_TALES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "en": {
        "gain": (
            "{who} has {0} {what} and buys {1} more. How many {what} does {who} have now?",
            "There are {0} {what} in a box. {who} puts {1} more into it. How many {what} are in the box?",
        ),
        "lose": (
            "{who} has {0} {what} and gives away {1}. How many {what} are left?",
            "{who} had {0} {what} and lost {1} of them. How many {what} does {who} still have?",
        ),
        "times": (
            "{who} has {1} boxes with {0} {what} each. How many {what} are there in all?",
            "There are {0} {what} in a bag. {who} has {1} bags. How many {what} does {who} have?",
        ),
        "gain_gain": (
            "{who} has {0} {what}, buys {1} and then finds {2} more. How many {what} does {who} have?",
            "{who} picked {0} {what} on Monday, {1} on Tuesday and {2} on Wednesday. How many {what} is that in all?",
        ),
        "gain_lose": (
            "{who} has {0} {what}, buys {1} more and gives away {2}. How many {what} are left?",
            "A shop has {0} {what}. It gets {1} more and sells {2}. How many {what} does the shop have now?",
        ),
        "lose_gain": (
            "{who} has {0} {what}, gives away {1} and then buys {2}. How many {what} does {who} have now?",
            "A shop has {0} {what}. It sells {1} and gets {2} new ones. How many {what} does the shop have now?",
        ),
        "times_gain": (
            "{who} has {1} boxes with {0} {what} each and {2} single {what}. How many {what} is that in all?",
            "There are {0} {what} in a bag. {who} buys {1} bags and {2} loose {what}. How many {what} does {who} have?",
        ),
        "times_lose": (
            "{who} has {1} boxes with {0} {what} each and gives away {2} {what}. How many {what} are left?",
            "There are {0} {what} in a bag. {who} buys {1} bags and uses {2} {what}. How many {what} are left?",
        ),
    },
    "zh": {
        "gain": ("{who}有{0}{what},又买了{1}{unit}。现在{who}有多少{what}?", "盒子里有{0}{what},{who}又放进{1}{unit}。盒子里有多少{what}?"),
        "lose": ("{who}有{0}{what},送给别人{1}{unit}。还剩多少{what}?", "{who}原来有{0}{what},丢了{1}{unit}。{who}还有多少{what}?"),
        "times": ("{who}有{1}个盒子,每个盒子里有{0}{what}。一共有多少{what}?", "一袋有{0}{what},{who}买了{1}袋。{who}有多少{what}?"),
        "gain_gain": (
            "{who}有{0}{what},买了{1}{unit},又找到{2}{unit}。{who}有多少{what}?",
            "{who}星期一摘了{0}{what},星期二摘了{1}{unit},星期三摘了{2}{unit}。一共是多少{what}?",
        ),
        "gain_lose": (
            "{who}有{0}{what},又买了{1}{unit},送给别人{2}{unit}。还剩多少{what}?",
            "商店有{0}{what},进货{1}{unit},卖出{2}{unit}。商店现在有多少{what}?",
        ),
        "lose_gain": (
            "{who}有{0}{what},送给别人{1}{unit},又买了{2}{unit}。现在有多少{what}?",
            "商店有{0}{what},卖出{1}{unit},进货{2}{unit}。商店现在有多少{what}?",
        ),
        "times_gain": (
            "{who}有{1}个盒子,每个盒子里有{0}{what},另外还有{2}{unit}。一共有多少{what}?",
            "一袋有{0}{what},{who}买了{1}袋,又单买了{2}{unit}。{who}有多少{what}?",
        ),
        "times_lose": (
            "{who}有{1}个盒子,每个盒子里有{0}{what},送给别人{2}{unit}。还剩多少{what}?",
            "一袋有{0}{what},{who}买了{1}袋,用掉{2}{unit}。还剩多少{what}?",
        ),
    },
}
_WHO = {
    "en": ("Tom", "Anna", "Ben", "Lucy", "Sam", "Maria", "Leo", "Emma", "Jack", "Nina", "Peter", "Rosa"),
    "zh": ("小明", "小红", "小华", "小丽", "小刚", "小芳", "小李", "小王"),
}
_WHAT_EN = ("apples", "books", "pencils", "marbles", "stamps", "coins", "cards", "cookies", "flowers", "eggs", "oranges", "stickers")
_WHAT_ZH = (
    ("个", "苹果"),
    ("本", "书"),
    ("支", "铅笔"),
    ("个", "球"),
    ("张", "邮票"),
    ("枚", "硬币"),
    ("张", "卡片"),
    ("块", "饼干"),
    ("朵", "花"),
    ("个", "鸡蛋"),
)


def draw(rng: random.Random) -> Operands:
    """(kind, numbers...): no step goes below zero."""
    kind = rng.choice(tuple(STEPS))
    value = rng.randrange(2, 100)
    numbers = [value]
    for operator in STEPS[kind]:
        number = _next_number(rng, operator, value)
        numbers.append(number)
        value = apply(operator, value, number)
    return kind, *numbers


def value(operands: Operands) -> int:
    """What the problem comes to."""
    kind, first, *rest = operands
    result = int(first)
    for operator, number in zip(STEPS[str(kind)], rest, strict=True):
        result = apply(operator, result, int(number))
    return result


def apply(operator: str, a: int, b: int) -> int:
    """One step."""
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def tell(rng: random.Random, language: str, operands: Operands) -> str:
    """The problem as a story; in Chinese each number has its measure word."""
    kind, *numbers = operands
    tale, who = rng.choice(_TALES[language][str(kind)]), rng.choice(_WHO[language])
    if language == "en":
        return tale.format(*numbers, who=who, what=rng.choice(_WHAT_EN))
    unit, what = rng.choice(_WHAT_ZH)
    # "{0}{what}" reads "12个苹果", and "多少{what}" reads "多少个苹果".
    return tale.format(*numbers, who=who, what=unit + what, unit=unit)


def _next_number(rng: random.Random, operator: str, value: int) -> int:
    if operator == "*":
        return rng.randrange(2, 10)
    return rng.randrange(1, 100 if operator == "+" else min(value, 99) + 1)
