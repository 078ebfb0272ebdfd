"""Exact integer arithmetic, read by a parser of its own: + - * ( ) and max, min, abs. No text is ever evaluated.

Limits on length, nesting and size of numbers keep any expression within microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from espl_envs.core.cursor import Cursor
from espl_envs.core.messages import ToolSpec
from espl_envs.tools.base import ToolContext, ToolError, ToolResult, tool_spec

MAX_CHARACTERS = 200
MAX_DEPTH = 20
MAX_DIGITS = 40

TOKEN = re.compile(r"\s*(?:(\d+)|(max|min|abs)\b|([-+*(),]))", re.ASCII)
FUNCTIONS: dict[str, Callable[[list[int]], int]] = {"max": max, "min": min, "abs": lambda values: abs(values[0])}


class Calculator:
    """The tool `calculator`: one argument, `expression`; the result comes back as a decimal integer."""

    spec: ToolSpec = tool_spec(
        "calculator",
        "Exact integer arithmetic: + - * ( ) max(a, b) min(a, b) abs(a).",
        {"expression": {"type": "string", "description": "for example 47 * 12 + 5"}},
    )

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> ToolResult:  # noqa: ARG002
        """The value as text. Raises ToolError for what is no expression."""
        try:
            return ToolResult(str(evaluate(arguments["expression"])))
        except ValueError as problem:
            raise ToolError(f"{problem}.") from None


def evaluate(expression: str) -> int:
    """The value of an integer expression. Raises ValueError, with the reason, for anything else."""
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression has {len(expression)} characters, at most {MAX_CHARACTERS} are allowed")
    parser = _Parser(expression, TOKEN, ": only integers, + - * ( ) max min abs")
    value = parser.total(0)
    parser.finish()
    return value


class _Parser(Cursor):
    """Recursive descent: total = product ((+|-) product)*, product = factor (* factor)*."""

    def total(self, depth: int) -> int:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = _sized(value + sign * self.product(depth))
        return value

    def product(self, depth: int) -> int:
        value = self.factor(depth)
        while self.peek() == "*":
            self.take()
            value = _sized(value * self.factor(depth))
        return value

    def factor(self, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise ValueError(f"the expression is nested deeper than {MAX_DEPTH}")
        token = self.take()
        if token.isdigit():
            if len(token) > MAX_DIGITS:
                raise ValueError(f"a number has {len(token)} digits, at most {MAX_DIGITS} are allowed")
            return int(token)
        if token in ("-", "+"):
            value = self.factor(depth + 1)
            return -value if token == "-" else value
        if token == "(":
            value = self.total(depth + 1)
            self.take(")")
            return value
        if token in FUNCTIONS:
            return self.call(token, depth)
        raise ValueError(f"unexpected {token!r}")

    def call(self, name: str, depth: int) -> int:
        self.take("(")
        values = [self.total(depth + 1)]
        while self.peek() == ",":
            self.take()
            values.append(self.total(depth + 1))
        self.take(")")
        if (name == "abs") != (len(values) == 1):
            raise ValueError(f"{name} takes {'one value' if name == 'abs' else 'several values'}, not {len(values)}")
        return FUNCTIONS[name](values)


def _sized(value: int) -> int:
    if abs(value) >= 10**MAX_DIGITS:
        raise ValueError(f"the result has more than {MAX_DIGITS} digits")
    return value
