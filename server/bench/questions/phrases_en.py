"""How questions are worded in English. A terse wording is one that the training data often answers without thinking."""

from __future__ import annotations

from collections.abc import Mapping

PLAIN: Mapping[str, tuple[str, ...]] = {
    "addition": (
        "What is {0} + {1}?",
        "Calculate {0} + {1}.",
        "Please add {0} and {1}.",
        "How much is {0} plus {1}?",
        "Find the sum of {0} and {1}.",
        "Work out {0}+{1}.",
        "what's {0}+{1}?",
        "{0} + {1} = ?",
        "Can you compute {0} + {1} for me?",
    ),
    "subtraction": (
        "What is {0} - {1}?",
        "Calculate {0} - {1}.",
        "How much is {0} minus {1}?",
        "Find the difference {0} - {1}.",
        "Work out {0}-{1}.",
        "what's {0}-{1}?",
        "{0} - {1} = ?",
        "Can you compute {0} - {1} for me?",
    ),
    "multiplication": (
        "What is {0} * {1}?",
        "Calculate {0} x {1}.",
        "How much is {0} times {1}?",
        "Multiply {0} by {1}.",
        "Find the product of {0} and {1}.",
        "Work out {0}*{1}.",
        "what's {0} times {1}?",
        "{0} \u00d7 {1} = ?",
        "Can you compute {0} * {1} for me?",
    ),
    "comparison": (
        "Which is larger, {0} or {1}?",
        "Which number is bigger: {0} or {1}?",
        "Compare {0} and {1}. Which one is greater?",
        "Is {0} or {1} the larger number?",
        "Tell me the larger of {0} and {1}.",
        "Which of the two is greater, {0} or {1}?",
    ),
    "sorting": (
        "Sort these numbers from smallest to largest: {0}.",
        "Put these numbers in ascending order: {0}",
        "Arrange in increasing order: {0}.",
        "Please sort {0}.",
        "Sort the list {0} in ascending order.",
        "Can you order these numbers from low to high? {0}",
    ),
    "letters": (
        'How many times does the letter "{1}" occur in "{0}"?',
        "How many {1}'s are in {0}?",
        "Count the letter {1} in the word {0}.",
        "How often does {1} appear in the word {0}?",
        "How many letters {1} are there in {0}?",
        "In the word {0}, how many {1} are there?",
    ),
    "weekday_after": (
        "Today is {0}. What day of the week is it in {1} days?",
        "If today is {0}, which weekday is it {1} days from now?",
        "It is {0}. What day will it be after {1} days?",
        "Which day of the week comes {1} days after {0}?",
    ),
    "weekday_before": (
        "Today is {0}. What day of the week was it {1} days ago?",
        "If today is {0}, which weekday was it {1} days ago?",
        "It is {0}. What day was it {1} days earlier?",
        "Which day of the week comes {1} days before {0}?",
    ),
    "date_after": (
        "What date is {1} days after {0} in a common year?",
        "Which date comes {1} days after {0}? It is not a leap year.",
        "Today is {0} of a common year. What is the date in {1} days?",
        "Add {1} days to {0} (no leap year). What date is it?",
    ),
    "days_between": (
        "How many days are there from {0} to {1} in a common year?",
        "How many days is it from {0} until {1}? It is not a leap year.",
        "Today is {0} of a common year. How many days are left until {1}?",
        "Count the days from {0} to {1} (no leap year).",
    ),
}

TERSE: Mapping[str, tuple[str, ...]] = {
    "addition": ("{0}+{1}", "{0} + {1}", "Quick: {0} + {1}?", "Just the answer: {0} + {1}"),
    "subtraction": ("{0}-{1}", "{0} - {1}", "Quick: {0} - {1}?", "Just the answer: {0} - {1}"),
    "multiplication": ("{0}*{1}", "{0} x {1}", "Quick: {0} * {1}?", "Just the answer: {0} * {1}"),
    "comparison": ("Larger: {0}, {1}", "Quick: {0} or {1}, which is larger?", "Just the answer: the larger of {0} and {1}"),
    "sorting": ("Sort: {0}", "Quick, sort {0}.", "Just the answer: sort {0}"),
    "letters": ("{1} in {0}", "Quick: how many {1} in {0}?", "Just the answer: count {1} in {0}"),
    "weekday_after": ("{0} plus {1} days", "Quick: which weekday is {1} days after {0}?", "Just the answer: {0} + {1} days"),
    "weekday_before": ("{0} minus {1} days", "Quick: which weekday is {1} days before {0}?", "Just the answer: {0} - {1} days"),
    "date_after": ("{0} plus {1} days", "Quick: what date is {1} days after {0}?", "Just the answer: {0} + {1} days"),
    "days_between": ("Days from {0} to {1}", "Quick: how many days from {0} to {1}?", "Just the answer: days from {0} to {1}"),
}

HURRY = ("Quick: ", "Just the answer: ")
