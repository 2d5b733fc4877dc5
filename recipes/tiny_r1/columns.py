"""Arithmetic as it is thought: digit by digit, each step within the reach of a small transformer.

Digits are looked up, never counted: each column of a number has a letter (a: ones, b: tens ...), and every step writes the letter right
before the digit that a later step will look for. So a step is a few copies of "what followed this letter" and one entry of a table.

    47382 + 9645        e40d79c36b84a25     the columns, the shorter number padded with zeros
                        a2+5+0=0A7          digit + digit + carry = carry, then the digit under its letter
                        b8+4+0=1B2
                        ...
                        F0E5D7C0B2A7        the result, read from its letters
                        =57027
"""

from __future__ import annotations

COLUMNS = "abcdefg"  # of what goes into a calculation
RESULT = "ABCDEFG"  # of what comes out
_ONES_PRODUCT, _TENS_PRODUCT = "KLMN", "RSTU"  # of the two rows of a long multiplication, which are added in the end

Lines = list[str]


def add(a: int, b: int, width: int = 1) -> Lines:
    """a + b, for a, b >= 0, in `width` columns or more."""
    x, y = _aligned(a, b, width)
    lines, carry = [_pairs(x, y)], 0
    for place, (p, q) in enumerate(zip(x, y, strict=True)):
        total = p + q + carry
        lines.append(f"{COLUMNS[place]}{p}+{q}+{carry}={total // 10}{RESULT[place]}{total % 10}")
        carry = total // 10
    return [*lines, *_read_out(a + b, len(x) + 1)]


def subtract(a: int, b: int) -> Lines:
    """a - b, for a >= b >= 0: digit - digit - borrowed = borrow, then the digit."""
    x, y = _aligned(a, b)
    lines, borrow = [_pairs(x, y)], 0
    for place, (p, q) in enumerate(zip(x, y, strict=True)):
        digit, before = (p - q - borrow) % 10, borrow
        borrow = int(p - q - borrow < 0)
        lines.append(f"{COLUMNS[place]}{p}-{q}-{before}={borrow}{RESULT[place]}{digit}")
    return [*lines, *_read_out(a - b, len(x))]


def difference(a: int, b: int) -> Lines:
    """a - b of any sign: which is larger, then the smaller one from the larger, then the sign."""
    lines = compare(a, b)
    if a >= b:
        return [*lines, *subtract(a, b)[1:]]  # the columns are there already
    return [*lines, f"-({b}-{a})", *subtract(b, a), f"=-{b - a}"]


def compare(a: int, b: int) -> Lines:
    """Columns from the highest down to the first where the digits differ."""
    x, y = _aligned(a, b)
    lines = [_pairs(x, y)]
    for place in reversed(range(len(x))):
        sign = "=" if x[place] == y[place] else ">" if x[place] > y[place] else "<"
        lines.append(f"{COLUMNS[place]}{x[place]}{sign}{y[place]}")
        if sign != "=":
            break
    return lines


def multiply(a: int, b: int) -> Lines:
    """a * b, for 0 <= a < 1000 and 0 <= b < 100: a row for each digit of b, and their sum."""
    digits = _digits(a)
    lines = ["".join(f"{COLUMNS[place]}{digit}" for place, digit in reversed(list(enumerate(digits)))) + f"*{b}"]
    lines += _row(digits, b % 10, _ONES_PRODUCT)
    if b < 10:
        return [*lines, *_read_out(a * b, len(digits) + 1, _ONES_PRODUCT)]
    lines += _row(digits, b // 10, _TENS_PRODUCT)
    return [*lines, *add(a * (b % 10), a * (b // 10) * 10, len(digits) + 2)]


def _row(digits: list[int], factor: int, labels: str) -> Lines:
    """digit * factor + carry = carry, then the digit; the last carry is the row's highest digit."""
    lines, carry = [], 0
    for place, digit in enumerate(digits):
        total = digit * factor + carry
        lines.append(f"{COLUMNS[place]}{digit}*{factor}+{carry}={total // 10}{labels[place]}{total % 10}")
        carry = total // 10
    lines[-1] += f"{labels[len(digits)]}{carry}"
    return lines


def _digits(number: int) -> list[int]:
    """Ones first."""
    return [int(digit) for digit in reversed(str(number))]


def _aligned(a: int, b: int, width: int = 1) -> tuple[list[int], list[int]]:
    x, y = _digits(a), _digits(b)
    width = max(len(x), len(y), width)
    return x + [0] * (width - len(x)), y + [0] * (width - len(y))


def _pairs(x: list[int], y: list[int]) -> str:
    return "".join(f"{COLUMNS[place]}{x[place]}{y[place]}" for place in reversed(range(len(x))))


def _read_out(result: int, width: int, labels: str = RESULT) -> Lines:
    """The result's digits from their letters, highest first, then the number without leading zeros."""
    digits = _digits(result)
    digits += [0] * (width - len(digits))
    return ["".join(f"{labels[place]}{digits[place]}" for place in reversed(range(width))), f"={result}"]
