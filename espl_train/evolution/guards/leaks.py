"""Leaks: the answers of known problems in a text, in every dress that numbers and words can wear.

A *telling* answer could hardly stand in general advice by accident and is refused wherever it turns up. Other answers
(short numbers, round ones, common words, labels that many problems share) are refused only in a text that also points
at a problem with this answer.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

from espl_envs.core.tasks import Task
from espl_train.evolution.guards import disguises
from espl_train.evolution.guards.answers import (
    EVERYDAY,
    LEAST_DIGITS,
    answers,
    lone_number,
    long_texts,
    places,
    telling_number,
    telling_text,
)
from espl_train.evolution.guards.numerals import Readings, number, readings
from espl_train.evolution.guards.passages import Passages
from espl_train.evolution.guards.pointing import Pointing
from espl_train.evolution.guards.spelled import digits_for_words
from espl_train.evolution.guards.writing import common, words
from espl_train.evolution.rejections import Reason, Rejection, excerpt

LEAST_DISGUISED = 5                       # letters of an answer that cannot come out of a cipher by accident
LEAST_PLACES = 3                          # decimals of a rounded fraction
COMMON_COUNT, COMMON_SHARE = 3, 0.05      # a text that so many problems, and that part of them, answer is a label
LONGEST_ANSWER = 24                       # words; longer ones are passages
GIVEN_AS, ASSERTED, PLAIN = 3.0, 8.0, 14.0     # margins in bits: "the answer is 7", 7 near "answer", 7 anywhere
ACROSS = 4.0                              # more where the answer stands in another text than the problem
LAYERS = 2                                # codes within codes
SEAM = 90                                 # characters on each side of the border of two texts
ASSERTION = re.compile(
    r"\b(?:answer|result|solution|reply|respond|output|print|say|guess|submit|boxed?|it is|its|equals)\b|→|=>|->|:|="
)
_CUE = (
    r"(?:\b(?:answer|result|solution|output)\b\W*(?:(?:to|of|for|here|this|that|it|one|will|must|should|always)\W+){0,4}"
    r"(?:is|are|be|equals?|=|:|→)|\b(?:answer|reply|respond|say|guess|submit|print|output|result|boxed?)\b(?:\s+with)?)"
    r"\W*(?:(?:always|exactly|just|simply|usually|the number)\W+)*"
)
GIVEN = re.compile(_CUE + r"(\S+(?:\s\S+){0,4})", re.IGNORECASE)
SAID = re.compile(_CUE + r"(.{1,60})", re.IGNORECASE)
BEGINS = re.compile(r"\b(?:start|begin|first|leading|prefix|front|initial|opening|left half|part (?:1|one|a))\w*\b")
ENDS = re.compile(r"\b(?:end|last|final|trailing|suffix|rest|remaining|closing|right half|part (?:2|two|b))\w*\b")
NEAR = 5                                  # words after "starts with"


@dataclass(slots=True)
class Hits:
    """Answers found in one text: those that tell, and those that need a problem beside them."""

    telling: bool = False
    vague: dict[Fraction | str, list[str]] = field(default_factory=dict)     # key → the words that it is written with
    given: set[Fraction | str] = field(default_factory=set)                  # vague ones that are given as an answer


class Leaks:
    """Remembers problems with their answers, and judges texts."""

    def __init__(self) -> None:
        self._numbers: dict[Fraction, set[int]] = {}
        self._texts: dict[str, set[int]] = {}
        self._spellings: dict[str, list[str]] = {}      # key of a text → its words
        self._telling: set[str] = set()
        self._inexact: list[Fraction] = []              # values that no short decimal writes
        self._pointing = Pointing()
        self._passages = Passages()
        self.learnt: set[int] = set()

    def learn(self, problem: int, task: Task) -> None:
        """Remember a problem, its answers and what solves it."""
        self.learnt.add(problem)
        self._pointing.add(problem, words(task.question))
        self._passages.add(task.question)
        for answer in answers(task):
            self._remember(problem, answer)
        for text in long_texts(task):
            self._passages.add(text)

    def check(self, text: str) -> Rejection | None:
        """The leak in one text, or None."""
        return self._answer(text) or self._passage(text)

    def check_together(self, texts: Sequence[str], new: Iterable[int]) -> Rejection | None:
        """The leak that only shows when texts are read together; pairs without one of the `new` texts are not read."""
        fresh = set(new)
        pairs = [(i, j) for i in range(len(texts)) for j in range(len(texts)) if i != j and {i, j} & fresh]
        for i, j in pairs:
            seam = f"{_tail(texts[i])} {_head(texts[j])}"
            if self._seam(texts[i], texts[j]) or self._passage(seam):
                return Rejection(Reason.LEAKED_ANSWER, "two principles together hold the answer of a training problem")
            if self._halves(texts[i], texts[j]) or (i < j and self._points_across(texts[i], texts[j])):
                return Rejection(Reason.LEAKED_ANSWER, "two principles together give away a training problem's answer")
        return None

    def _remember(self, problem: int, answer: str) -> None:
        value, spoken = number(answer), words(answer)
        if value is None and (found := lone_number(answer)) is not None:
            self._numbers.setdefault(found, set()).add(problem)
        if value is not None:
            value = abs(value)
            self._numbers.setdefault(value, set()).add(problem)
            if (places(value) or 0) >= LEAST_PLACES or places(value) is None:
                insort(self._inexact, value)
        elif 0 < len(spoken) <= LONGEST_ANSWER:
            key = "".join(spoken)
            self._texts.setdefault(key, set()).add(problem)
            self._spellings.setdefault(key, spoken)
            if telling_text(spoken, named=all(w[0].isupper() for w in answer.split())):
                self._telling.add(key)

    def _answer(self, text: str) -> Rejection | None:
        hits = Hits()
        self._read(text, hits)
        if hits.telling or self._halves(text, text):
            return Rejection(Reason.LEAKED_ANSWER, "the text contains the answer of a training problem")
        if hits.vague and self._points(text, hits):
            return Rejection(Reason.LEAKED_ANSWER, "the text tells a training problem's answer beside its details")
        return None

    def _passage(self, text: str) -> Rejection | None:
        piece = self._passages.find(text)
        return (piece and Rejection(Reason.LEAKED_PROBLEM, f"words of a training problem: {excerpt(piece)}")) or None

    def _read(self, text: str, hits: Hits, layer: int = 0) -> None:
        """Add the answers in a text, in what is encoded in it and in what it is disguised as."""
        self._numbers_in(text, hits)
        self._texts_in(text, hits, 1)
        for reading in disguises.disguised(text):
            self._texts_in(reading, hits, LEAST_DISGUISED)
        for inner in disguises.decoded(text) if layer < LAYERS else ():
            self._read(inner, hits, layer + 1)

    def _numbers_in(self, text: str, hits: Hits) -> None:
        found = readings(text)
        for value in _all(found):
            if value not in self._numbers:
                hits.telling = hits.telling or self._rounded(value)
            elif telling_number(value):
                hits.telling = True
            else:
                hits.vague[value] = [str(value.numerator), str(value.denominator)]
        if not hits.telling and hits.vague:
            said = (m[1] for form in (text, digits_for_words(text.casefold())) for m in GIVEN.finditer(form))
            for part in said:
                values = {v for v in _all(readings(part)) if v in hits.vague}
                hits.given |= values
                if values and not common(words(part)[0]):      # "answer 360", not "answer within 360 words"
                    hits.telling = hits.telling or max(values) >= 10 ** (LEAST_DIGITS - 1)

    def _texts_in(self, text: str, hits: Hits, least: int) -> None:
        """Answers in words of at least that length."""
        for key in self._found(words(text)):
            if len(key) >= least:
                if self._tells(key):
                    hits.telling = True
                else:
                    hits.vague[key] = self._spellings[key]
                    hits.given |= {key} if any(key in "".join(words(m[1])) for m in SAID.finditer(text)) else set()

    def _found(self, spoken: Sequence[str]) -> Iterator[str]:
        """The keys of all answers in words, spelled as they are, run together or letter by letter."""
        for start in range(len(spoken)):
            key, single = "", True
            for end in range(start, min(start + LONGEST_ANSWER, len(spoken))):
                key += spoken[end]
                single = single and len(spoken[end]) <= 2
                if key in self._texts and (single or end - start < len(self._spellings[key])):
                    yield key

    def _rounded(self, value: Fraction) -> bool:
        """Whether a decimal is an answer cut or rounded to its places."""
        count = places(value)
        if count is None or count < LEAST_PLACES or value in EVERYDAY:
            return False
        step = Fraction(1, 10**count)
        at = bisect_left(self._inexact, value - step)
        return at < len(self._inexact) and self._inexact[at] < value + step

    def _tells(self, key: str) -> bool:
        """Whether an answer in words is telling, and no label that many problems share."""
        return key in self._telling and len(self._texts[key]) < max(COMMON_COUNT, COMMON_SHARE * len(self.learnt))

    def _points(self, text: str, hits: Hits, more: float = 0.0) -> bool:
        """Whether the text points at a problem that has one of the vague answers, with `more` bits than usual."""
        lower = text.casefold()
        spoken = words(digits_for_words(lower))
        usual = ASSERTED if ASSERTION.search(lower) else PLAIN
        for key, written in hits.vague.items():
            holders = self._texts[key] if isinstance(key, str) else self._numbers[key]
            needed = self._pointing.required((GIVEN_AS if key in hits.given else usual) + more)
            known = self._pointing.bits(len(holders))
            if any(b + known >= needed for b in self._pointing.at(spoken, holders, written).values()):
                return True
        return False

    def _points_across(self, one: str, other: str) -> bool:
        """Whether one text names the problem and the other one its short answer."""
        both, hits = f"{one} {other}", Hits()
        if not ASSERTION.search(both.casefold()):
            return False
        for text in (one, other):
            self._numbers_in(text, hits)
            self._texts_in(text, hits, 1)
        return bool(hits.vague) and self._points(both, hits, ACROSS)

    def _seam(self, one: str, other: str) -> bool:
        """Whether an answer lies across the border of two texts."""
        before, after = words(_tail(one)), words(_head(other))
        inside = {*self._found(before), *self._found(after)}
        if any(map(self._tells, {*self._found(before + after)} - inside)):
            return True
        left = re.search(r"(\d[\d,.]*)\W*$", digits_for_words(one))
        right = re.match(r"\W*(\d[\d,.]*)", digits_for_words(other))
        return left is not None and right is not None and self._is_telling(left[1].strip(".,") + right[1].strip(".,"))

    def _halves(self, one: str, other: str) -> bool:
        """Whether one text says how an answer begins and the other how it ends."""
        begins, ends = _fragments(one, BEGINS), _fragments(other, ENDS)
        return any(self._is_telling(b + e) for b in begins for e in ends)

    def _is_telling(self, spelled: str) -> bool:
        if spelled.isdigit():
            value = Fraction(spelled)
            return value in self._numbers and telling_number(value)
        return spelled in self._texts and self._tells(spelled)


def _all(found: Readings) -> set[Fraction]:
    return found.firm | found.loose


def _tail(text: str) -> str:
    return text if len(text) <= SEAM else text[-SEAM:].partition(" ")[2]


def _head(text: str) -> str:
    return text if len(text) <= SEAM else text[:SEAM].rpartition(" ")[0]


def _fragments(text: str, cue: re.Pattern[str]) -> set[str]:
    """The words soon after a cue ("starts with 10"), alone and with the next one."""
    found: set[str] = set()
    for lower in dict.fromkeys((text.casefold(), digits_for_words(text.casefold()))):
        for match in cue.finditer(lower):
            near = words(lower[match.end() : match.end() + 60])[:NEAR]
            found |= {*near, *(a + b for a, b in pairwise(near))}
    return found
