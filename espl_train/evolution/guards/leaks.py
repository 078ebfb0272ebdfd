"""Leaks: the answers of known problems in a text, in every dress that numbers and words can wear.

A *telling* answer could hardly stand in general advice by accident and is refused wherever it turns up. Other answers
(short numbers, round ones, common words, labels that many problems share) are refused only in a text that also points
at a problem with this answer.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from espl_envs.core.tasks import Task
from espl_train.evolution.guards import disguises
from espl_train.evolution.guards.numerals import number, readings
from espl_train.evolution.guards.passages import WORDS, Passages
from espl_train.evolution.guards.pointing import Pointing
from espl_train.evolution.guards.spelled import digits_for_words
from espl_train.evolution.guards.writing import common, words
from espl_train.evolution.rejections import Reason, Rejection, excerpt

LEAST_DIGITS, LEAST_LETTERS = 3, 4
LEAST_DISGUISED = 5                       # letters of an answer that cannot come out of a cipher by accident
LEAST_PLACES, MOST_PLACES = 3, 15         # decimals of a rounded fraction
COMMON_COUNT, COMMON_SHARE = 3, 0.05      # a text that so many problems, and that part of them, answer is a label
LONGEST_ANSWER = 24                       # words; longer ones are passages
ASSERTED, PLAIN, ACROSS = 8.0, 14.0, 12.0   # margins in bits: beside "the answer is", without it, over two texts
LAYERS = 2                                # codes within codes
SEAM = 90                                 # characters on each side of the border of two texts
EVERYDAY = frozenset(map(Fraction, (
    "120 128 144 180 255 256 270 360 365 366 404 512 540 720 999 1024 2048 4096 8192 9999 32767 32768 65535 65536 99999 "
    "999999 1000000007 998244353 2147483647 2147483648 4294967296 3.14 3.142 3.1416 3.14159 2.718 2.71828 1.414 1.4142 "
    "1.732 0.125 0.375 0.001 0.999 9.81 6.28 101 100000007"
).split())) - {Fraction("0.125"), Fraction("0.375")}  # fmt: skip
ASSERTION = re.compile(
    r"\b(?:answer|result|solution|reply|respond|output|print|say|guess|submit|boxed?|it is|its|equals)\b|→|=>|->|:|="
)
GIVEN = re.compile(
    r"(?:\b(?:answer|result|solution|output)\b\W*(?:(?:to|of|for|here|this|that|it|one|will|must|should|always)\W+){0,4}"
    r"(?:is|are|be|equals?|=|:|→)|\b(?:answer|reply|respond|say|guess|submit|print|output|boxed?)\b(?:\s+with)?)"
    r"\W*(?:(?:always|exactly|just|simply|usually|the number)\W+)*(\d[\d,.\s]*)"
)
BEGINS = re.compile(r"\b(?:start|begin|first|leading|prefix|front|initial|opening|left half|part (?:1|one|a))\w*\b")
ENDS = re.compile(r"\b(?:end|last|final|trailing|suffix|rest|remaining|closing|right half|part (?:2|two|b))\w*\b")
NEAR = 5                                  # words after "starts with"


@dataclass(slots=True)
class Hits:
    """Answers found in one text: those that tell, and those that need a problem beside them."""

    telling: bool = False
    vague: dict[Fraction | str, list[str]] = field(default_factory=dict)     # key → the words that it is written with


class Leaks:
    """Remembers problems with their answers, and judges texts."""

    def __init__(self) -> None:
        self._numbers: dict[Fraction, set[int]] = {}
        self._texts: dict[str, set[int]] = {}
        self._spellings: dict[str, list[str]] = {}      # key of a text → its words
        self._inexact: list[Fraction] = []              # values that no short decimal writes
        self._pointing = Pointing()
        self._passages = Passages()
        self._count = 0

    def learn(self, problem: int, task: Task) -> None:
        """Remember a problem, its answers and what solves it."""
        self._count += 1
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
        if value is None and (found := _lone_number(answer)) is not None:
            self._numbers.setdefault(found, set()).add(problem)
        if value is not None:
            value = abs(value)
            self._numbers.setdefault(value, set()).add(problem)
            if (_places(value) or 0) >= LEAST_PLACES or _places(value) is None:
                insort(self._inexact, value)
        elif 0 < len(spoken) <= LONGEST_ANSWER:
            key = "".join(spoken)
            self._texts.setdefault(key, set()).add(problem)
            self._spellings.setdefault(key, spoken)

    def _answer(self, text: str, layer: int = 0) -> Rejection | None:
        hits = self._hits(text)
        if hits.telling or self._hidden(text) or self._halves(text, text):
            return Rejection(Reason.LEAKED_ANSWER, "the text contains the answer of a training problem")
        if hits.vague and self._points(text, hits, ASSERTED if ASSERTION.search(text.casefold()) else PLAIN):
            return Rejection(Reason.LEAKED_ANSWER, "the text tells a training problem's answer beside its details")
        if layer < LAYERS and any(self._answer(inner, layer + 1) for inner in disguises.decoded(text)):
            return Rejection(Reason.LEAKED_ANSWER, "the text contains an encoded answer of a training problem")
        return None

    def _passage(self, text: str) -> Rejection | None:
        piece = self._passages.find(text)
        return piece and Rejection(Reason.LEAKED_PROBLEM, f"words of a training problem: {excerpt(piece)}") or None

    def _hits(self, text: str) -> Hits:
        found, hits = readings(text), Hits()
        given = {v for m in GIVEN.finditer(digits_for_words(text.casefold())) for v in readings(m[1]).firm}
        for value in found.firm | found.loose:
            if value in self._numbers:
                if telling_number(value) or (value in given and value >= 10 ** (LEAST_DIGITS - 1)):
                    hits.telling = True
                elif value in found.firm:
                    hits.vague[value] = [str(value.numerator), str(value.denominator)]
            elif self._rounded(value):
                hits.telling = True
        for key in self._found(words(text)):
            if self._label(key) or not telling_text(self._spellings[key]):
                hits.vague[key] = self._spellings[key]
            else:
                hits.telling = True
        return hits

    def _found(self, spoken: Sequence[str]) -> Iterator[str]:
        """The keys of all answers in words, spelled as they are, run together or letter by letter."""
        for start in range(len(spoken)):
            key, single = "", True
            for end in range(start, min(start + LONGEST_ANSWER, len(spoken))):
                key += spoken[end]
                single = single and len(spoken[end]) <= 2
                if key in self._texts and (single or end == start or end - start + 1 == len(self._spellings[key])):
                    yield key

    def _hidden(self, text: str) -> bool:
        """Whether a telling answer in words, of some length, stands there in disguise."""
        return any(
            len(key) >= LEAST_DISGUISED and telling_text(self._spellings[key]) and not self._label(key)
            for reading in disguises.disguised(text)
            for key in self._found(words(reading))
        )

    def _rounded(self, value: Fraction) -> bool:
        """Whether a decimal is an answer cut or rounded to its places."""
        places = _places(value)
        if places is None or places < LEAST_PLACES or value in EVERYDAY:
            return False
        step = Fraction(1, 10**places)
        at = bisect_left(self._inexact, value - step)
        return at < len(self._inexact) and self._inexact[at] < value + step

    def _label(self, key: str) -> bool:
        return len(self._texts[key]) >= max(COMMON_COUNT, COMMON_SHARE * self._count)

    def _holders(self, key: Fraction | str) -> set[int]:
        return self._texts[key] if isinstance(key, str) else self._numbers[key]

    def _points(self, text: str, hits: Hits, margin: float) -> bool:
        """Whether the text points at a problem that has one of the vague answers."""
        spoken = words(digits_for_words(text.casefold()))
        for key, written in hits.vague.items():
            holders = self._holders(key)
            known = self._pointing.bits(len(holders))
            if any(b + known >= self._pointing.required(margin) for b in self._pointing.at(spoken, holders, written).values()):
                return True
        return False

    def _points_across(self, one: str, other: str) -> bool:
        """Whether one text names the problem and the other one its short answer."""
        both = f"{one} {other}"
        hits = Hits(vague={**self._hits(one).vague, **self._hits(other).vague})
        return bool(hits.vague) and bool(ASSERTION.search(both.casefold())) and self._points(both, hits, ACROSS)

    def _seam(self, one: str, other: str) -> bool:
        """Whether an answer lies across the border of two texts."""
        before, after = words(_tail(one)), words(_head(other))
        inside = {*self._found(before), *self._found(after)}
        if any(telling_text(self._spellings[k]) and not self._label(k) for k in {*self._found(before + after)} - inside):
            return True
        left, right = re.search(r"(\d[\d,.]*)\W*$", digits_for_words(one)), re.match(r"\W*(\d[\d,.]*)", digits_for_words(other))
        return bool(left and right) and self._is_telling(left[1].strip(".,") + right[1].strip(".,"))

    def _halves(self, one: str, other: str) -> bool:
        """Whether one text says how an answer begins and the other how it ends."""
        begins, ends = _fragments(one, BEGINS), _fragments(other, ENDS)
        return any(self._is_telling(b + e) for b in begins for e in ends)

    def _is_telling(self, spelled: str) -> bool:
        if spelled.isdigit():
            value = Fraction(spelled)
            return value in self._numbers and telling_number(value)
        return spelled in self._texts and telling_text(self._spellings[spelled]) and not self._label(spelled)


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
    if (places := _places(value)) is not None:
        return len(str(value.numerator * 10**places // value.denominator).strip("0")) >= LEAST_DIGITS
    digits = f"{value.numerator}{value.denominator}"
    return len(digits) >= LEAST_DIGITS or (value.numerator > 1 and value.denominator >= 7)


def telling_text(spoken: Sequence[str]) -> bool:
    """Whether an answer in words could hardly be part of general advice."""
    key = "".join(spoken)
    if len(key) < LEAST_LETTERS and not (key.isdigit() and len(key) >= LEAST_DIGITS):
        return False
    if all(w.isdigit() for w in spoken):
        return any(int(b) - int(a) != 1 for a, b in zip(spoken, spoken[1:], strict=False))
    if sum(c.isdigit() for c in key) >= LEAST_DIGITS:
        return True
    return len(spoken) > 2 and len(key) >= 2 * LEAST_LETTERS or not all(w.isdigit() or common(w) for w in spoken)


def _places(value: Fraction) -> int | None:
    """How many decimals write a value exactly; None where too many would be needed."""
    return next((p for p in range(MOST_PLACES) if (value * 10**p).denominator == 1), None)


def _lone_number(answer: str) -> Fraction | None:
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


def _tail(text: str) -> str:
    return text if len(text) <= SEAM else text[-SEAM:].partition(" ")[2]


def _head(text: str) -> str:
    return text if len(text) <= SEAM else text[:SEAM].rpartition(" ")[0]


def _fragments(text: str, cue: re.Pattern[str]) -> set[str]:
    """The words soon after a cue ("starts with 10")."""
    lower = digits_for_words(text.casefold())
    return {w for match in cue.finditer(lower) for w in words(lower[match.end() : match.end() + 60])[:NEAR]}
