"""The calendar that the questions know: weekdays, and the months of a common year."""

from __future__ import annotations

from collections.abc import Mapping

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
WEEKDAYS: Mapping[str, tuple[str, ...]] = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
MOST_DAYS = 60  # that a question goes forward, so that at most two months end on the way


def date_name(month: int, day: int, language: str) -> str:
    """A date as people write it; month 1 .. 12."""
    return f"{month}月{day}日" if language == "zh" else f"{MONTHS[month - 1]} {day}"


def after(month: int, day: int, days: int) -> tuple[int, int]:
    """The date so many days later, within a common year or into the next."""
    day += days
    while day > MONTH_DAYS[month - 1]:
        day -= MONTH_DAYS[month - 1]
        month = month % 12 + 1
    return month, day


def between(month: int, day: int, later_month: int, later_day: int) -> int:
    """Days from one date to a later one of the same year."""
    return sum(MONTH_DAYS[month - 1 : later_month - 1]) + later_day - day
