r"""Arithmetic that a model wrote, read by a parser of its own: numbers, + - * / ( ), \frac, and powers where allowed.

What a number or a name stands for is given by the caller (exact fractions, polynomials), so that one parser serves
every verifier. No text is ever evaluated; limits on length, nesting and exponents keep any answer within milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from espl_envs.core.cursor import Cursor

MAX_CHARACTERS = 1000
MAX_DEPTH = 40
MAX_DIGITS = 60

_SPELLINGS = {"×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/", "−": "-", "–": "-", "^": "**"}
_COMMANDS = {r"\times": "*", r"\cdot": "*", r"\ast": "*", r"\div": "/", r"\left": "", r"\right": ""}
_COMMAND = re.compile(r"\\(?:times|cdot|ast|div|left|right)(?![A-Za-z])|\\[,;:! ]")
_TOKEN = re.compile(r"\s*(?:(\d+)|(\\[dt]?frac)(?![A-Za-z])|([A-Za-z]\w*)|(\*\*|[-+*/(){}\[\]]))", re.ASCII)
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def _unknown(name: str) -> Any:
    raise ValueError(f"unexpected {name[:12]!r}: only numbers and operators stand in the expression")


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Algebra:
    """What the parts of an expression mean. `check` is asked about every result and raises ValueError to refuse it."""

    number: Callable[[str], Any]
    name: Callable[[str], Any] = _unknown
    check: Callable[[Any], Any] = _same
    largest_power: int = 0
    grouping: bool = True


def evaluate(text: str, algebra: Algebra) -> Any:
    """The value of an expression. Raises ValueError, with the reason, for what is none or has none."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the expression has {len(text)} characters, at most {MAX_CHARACTERS} are allowed")
    parser = _Parser(_spelt(text), algebra)
    value = parser.total(0)
    parser.finish()
    return value


def exact(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression over whole numbers, and the numbers in it in order. Raises ValueError."""
    used: list[int] = []

    def number(digits: str) -> Fraction:
        used.append(int(digits))
        return Fraction(used[-1])

    return evaluate(text, Algebra(number, check=_small)), used


def _small(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return value


def _spelt(text: str) -> str:
    text = _COMMAND.sub(lambda match: _COMMANDS.get(match.group(), " "), text)
    return "".join(_SPELLINGS.get(character, character) for character in text)


class _Parser(Cursor):
    """Recursive descent: total = product ((+|-) product)*, product = power ((*|/) power)*, power = factor (** n)?."""

    def __init__(self, text: str, algebra: Algebra) -> None:
        super().__init__(text, _TOKEN)
        self.algebra = algebra

    def total(self, depth: int) -> Any:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            operator, other = self.take(), self.product(depth)
            value = self.algebra.check(value + other if operator == "+" else value - other)
        return value

    def product(self, depth: int) -> Any:
        value = self.signed(depth)
        while self.peek() in ("*", "/"):
            operator, other = self.take(), self.signed(depth)
            value = self.algebra.check(value * other) if operator == "*" else self.divided(value, other)
        return value

    def signed(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"the expression is nested deeper than {MAX_DEPTH}")
        if self.peek() in ("+", "-"):
            return self.signed(depth + 1) if self.take() == "+" else -self.signed(depth + 1)
        return self.power(depth)

    def power(self, depth: int) -> Any:
        value = self.factor(depth)
        if self.peek() != "**":
            return value
        self.take()
        grouped = self.peek() in ("{", "(")
        closing = _CLOSING[self.take()] if grouped else ""
        exponent = self.take()
        if not exponent.isdigit() or len(exponent) > 4 or int(exponent) > self.algebra.largest_power:
            raise ValueError(f"the exponent {exponent[:12]!r} is not a whole number up to {self.algebra.largest_power}")
        if closing:
            self.take(closing)
        result = value
        for _ in range(int(exponent) - 1):
            result = self.algebra.check(result * value)
        return result if int(exponent) else self.algebra.number("1")

    def factor(self, depth: int) -> Any:
        token = self.take()
        if token.isdigit():
            if len(token) > MAX_DIGITS:
                raise ValueError(f"a number has {len(token)} digits, at most {MAX_DIGITS} are allowed")
            return self.algebra.number(token)
        if token in _CLOSING and self.algebra.grouping:
            return self.group(token, depth)
        if token.endswith("frac"):
            above = self.group(self.take("{"), depth)
            return self.divided(above, self.group(self.take("{"), depth))
        if token[0].isalpha():
            return self.algebra.name(token)
        raise ValueError(f"unexpected {token!r}")

    def group(self, opening: str, depth: int) -> Any:
        value = self.total(depth + 1)
        self.take(_CLOSING[opening])
        return value

    def divided(self, above: Any, below: Any) -> Any:
        try:
            return self.algebra.check(above / below)
        except ZeroDivisionError:
            raise ValueError("division by zero") from None
