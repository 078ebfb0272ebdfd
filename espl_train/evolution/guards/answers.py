"""Answers as the guard knows them, and which of them nobody writes by accident."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise

from espl_envs.core.tasks import Task
from espl_train.evolution.guards.numerals import number
from espl_train.evolution.guards.passages import WORDS
from espl_train.evolution.guards.writing import common, words

LEAST_DIGITS, LEAST_LETTERS = 3, 4
MOST_PLACES = 15
# Longer numbers that general advice is made of, round ones aside.
EVERYDAY = frozenset(map(Fraction, [
    "101", "120", "128", "144", "180", "255", "256", "270", "360", "365", "366", "404", "512", "540", "720", "999",
    "1024", "2048", "4096", "8192", "9999", "32767", "32768", "65535", "65536", "99999", "999999", "998244353",
    "1000000007", "2147483647", "2147483648", "4294967296", "3.14", "3.142", "3.1416", "3.14159", "2.718", "2.71828",
    "1.414", "1.4142", "1.732", "0.999", "9.81", "6.28",
]))  # fmt: skip


def answers(task: Task) -> tuple[str, ...]:
    """The answer, and what else counts as it (`data["accepted"]`)."""
    return (task.answer, *map(str, task.data.get("accepted", ())))


def long_texts(task: Task) -> Iterator[str]:
    """The answers and whatever the grader knows (solutions, tests, queries) that is long enough to be a passage."""
    for text in (*answers(task), *_strings(task.data)):
        if text.count(" ") >= WORDS - 1 or len(text) > 40:
            yield text


def telling_number(value: Fraction) -> bool:
    """Whether a number (without sign) could hardly be part of general advice."""
    if value in EVERYDAY:
        return False
    if value.denominator == 1:
        digits = str(value.numerator)
        return len(digits) >= LEAST_DIGITS and len(digits.rstrip("0")) > 1
    if (count := places(value)) is not None:
        return len(str(value.numerator * 10**count // value.denominator).strip("0")) >= LEAST_DIGITS
    digits = f"{value.numerator}{value.denominator}"
    return len(digits) >= LEAST_DIGITS or (value.numerator > 1 and value.denominator >= 7)


def telling_text(spoken: Sequence[str], named: bool = False) -> bool:
    """Whether an answer in words could hardly be part of general advice. `named`: each of them has a capital."""
    key = "".join(spoken)
    if len(key) < LEAST_LETTERS and not (key.isdigit() and len(key) >= LEAST_DIGITS):
        return False
    if all(w.isdigit() for w in spoken):
        return any(int(b) - int(a) != 1 for a, b in pairwise(spoken))
    if sum(c.isdigit() for c in key) >= LEAST_DIGITS:
        return True
    if not all(w.isdigit() or common(w) for w in spoken):
        return True
    return len(spoken) > (1 if named else 2) and len(key) >= 2 * LEAST_LETTERS


def places(value: Fraction) -> int | None:
    """How many decimals write a value exactly; None where too many would be needed."""
    return next((p for p in range(MOST_PLACES) if (value * 10**p).denominator == 1), None)


def lone_number(answer: str) -> Fraction | None:
    """The number in an answer of one number and at most two words ("1,038 metres")."""
    found = re.findall(r"\d[\d,]*(?:\.\d+)?(?:/\d+)?", answer)
    return number(found[0]) if len(found) == 1 and len(words(answer)) <= len(words(found[0])) + 2 else None


def _strings(data: object) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _strings(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _strings(value)
