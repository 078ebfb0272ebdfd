"""What parsers of little languages share: a text cut into tokens, and a place among them."""

from __future__ import annotations

import re


class Cursor:
    """The tokens of a text, one by one. Raises ValueError where `pattern` finds none; `hint` says what it knows."""

    def __init__(self, text: str, pattern: re.Pattern[str], hint: str = "") -> None:
        self.tokens: list[str] = []
        self.at, place, end = 0, 0, len(text.rstrip())
        while place < end:
            match = pattern.match(text, place)
            if match is None:
                raise ValueError(f"cannot read {text[place:].strip()[:12]!r}{hint}")
            self.tokens.append(match.group().strip())
            place = match.end()

    def peek(self) -> str:
        """The token that comes next, "" at the end."""
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        """The next token, which is read now. Raises ValueError where there is none, or another than `expected`."""
        token = self.peek()
        if not token:
            raise ValueError(f"the expression ends too early{f', expected {expected!r}' if expected else ''}")
        if expected and token != expected:
            raise ValueError(f"unexpected {token!r}, expected {expected!r}")
        self.at += 1
        return token

    def finish(self) -> None:
        """Raises ValueError where anything is left."""
        if self.peek():
            raise ValueError(f"unexpected {self.peek()!r} after the expression")
