"""Which problem does a text speak of? Short answers are leaks only beside what tells one problem from the others.

"Answer 12" is advice of a kind; "when Alice buys 7 apples, answer 12" is a memory. The evidence is counted in bits: a
word of a problem that one problem in a thousand has is worth ten; together with those of the answer they must outweigh
the number of problems that there are, with a margin against coincidence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from espl_train.evolution.guards.writing import common, stem

PRIOR = 64           # problems that we pretend to know besides: a small set says little about what is rare
DIGIT_BITS = 2.0     # a single digit stands in every other problem
COVERED, LEAST = 0.6, 3     # who names that part of a problem's telling words, and so many, has named the problem
FREQUENT = 1 / 8     # a word in more problems than that is not looked up
AT_LEAST = 200       # as soon as there are so many


class Pointing:
    """An index from telling words to problems."""

    def __init__(self) -> None:
        self._count = 0
        self._problems: dict[str, list[int]] = {}
        self._sizes: dict[int, int] = {}

    def add(self, problem: int, spoken: Sequence[str]) -> None:
        """Remember the words of a problem."""
        self._count += 1
        telling = _telling(spoken)
        self._sizes[problem] = len(telling)
        for word in telling:
            self._problems.setdefault(word, []).append(problem)

    def required(self, margin: float) -> float:
        """The bits that tell one problem from all the others, and `margin` more."""
        return math.log2(self._count + PRIOR) + margin

    def bits(self, count: int) -> float:
        """What it is worth to know something that `count` problems have."""
        return math.log2((self._count + PRIOR) / (count + 1))

    def at(self, spoken: Sequence[str], among: Collection[int], without: Collection[str]) -> Mapping[int, float]:
        """Problem → bits with which a text points at it, for those `among` the problems that it names at all."""
        found: dict[int, float] = {}
        words: Counter[int] = Counter()
        named: set[int] = set()
        for word in _telling(spoken) - {stem(w) for w in without}:
            holders = self._problems.get(word, ())
            if self._count > AT_LEAST and len(holders) > FREQUENT * self._count and word.isdigit():
                continue
            digit = word.isdigit() and len(word) == 1
            bits = min(self.bits(len(holders)), DIGIT_BITS) if digit else self.bits(len(holders))
            for problem in filter(among.__contains__, holders):
                found[problem] = found.get(problem, 0.0) + bits
                words[problem] += 1
                if not digit:
                    named.add(problem)
        return {
            problem: math.inf if words[problem] >= max(LEAST, COVERED * self._sizes[problem]) else bits
            for problem, bits in found.items()
            if problem in named
        }


def _telling(spoken: Sequence[str]) -> set[str]:
    """The words that general advice is not made of, all numbers, and signs of their own."""
    return {stem(w) for w in spoken if w.isdigit() or (not common(w) and (len(w) > 2 or not w.isascii()))}
