"""Duplicates before they cost rollouts: prompts that say what another one says, in another order or in other words.

Two prompts are the same if their principles can be paired so that no pair differs in more than wording. A pair differs
whenever one of them is negated, speaks of other numbers, or turns a word into its opposite: "never round" is no
"round". What was dropped or refused of late stays forbidden for a while (tabu), or it would be bred again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

from espl_train.evolution.guards.spelled import digits_for_words
from espl_train.evolution.guards.writing import stem, words
from espl_train.evolution.prompts import SystemPrompt

TABU = 200           # prompts that are remembered after they were dropped or refused
LOOSELY = 0.7        # part of the threshold that texts must reach where behaviour is the same
LEAST_SHARED = 20    # problems that two prompts must have met on before their behaviour says anything
NO_MATTER = 0.1      # a difference in mean reward that would not matter
FILLERS = frozenset(
    [
        "a", "an", "the", "of", "to", "in", "on", "at", "by", "for", "and", "or", "is", "are", "be", "it", "its",
        "this", "that", "these", "those", "with", "as", "you", "your", "so", "very", "always", "please", "just",
        "also", "each", "do", "does", "make", "sure", "should", "must", "there"
    ]
)
NEGATIONS = frozenset([
    "not", "no", "never", "none", "nor", "neither", "without", "avoid", "dont", "cannot", "refuse", "stop", "skip",
    "omit", "instead"
])
DIRECTED = frozenset(map(stem, [
    "before", "after", "from", "than", "into", "over", "until", "unless", "rather", "first", "last", "per", "minus",
]))  # fmt: skip
OPPOSITES = {
    frozenset(map(stem, pair.split("/"))) for pair in [
        "max/min", "maximise/minimise", "maximize/minimize", "maximum/minimum", "maximal/minimal", "largest/smallest",
        "larger/smaller", "highest/lowest", "increase/decrease", "more/less", "more/fewer", "most/least", "most/fewest",
        "add/subtract", "plus/minus", "multiply/divide", "odd/even", "positive/negative", "left/right", "up/down",
        "upper/lower", "first/last", "before/after", "long/short", "longer/shorter", "longest/shortest", "open/close",
        "include/exclude", "inclusive/exclusive", "true/false", "yes/no", "ascending/descending", "asc/desc",
        "early/late", "earliest/latest", "row/column", "sin/cos", "numerator/denominator", "union/intersection",
        "expand/simplify", "high/low", "greater/less", "above/below", "inside/outside", "wrong/right", "same/different",
    ]
}  # fmt: skip
Meetings = Mapping[tuple[str, str], Sequence[tuple[Sequence[float], ...]]]      # rewards where two prompts met


def similarity(one: str, other: str) -> float:
    """How alike two principles are, from 0 to 1; 0 where a negation, a number or an opposite tells them apart."""
    first, second = _content(one), _content(other)
    if _denied(one) != _denied(other) or _figures(first) != _figures(second):
        return 0.0
    only, alone = set(first) - set(second), set(second) - set(first)
    if any(frozenset((a, b)) in OPPOSITES for a in only for b in alone):
        return 0.0
    if not first or not second:
        return float(first == second)
    if DIRECTED & {*first, *second}:
        return SequenceMatcher(None, first, second, autojunk=False).ratio()
    return len({*first} & {*second}) / len({*first} | {*second})


def likeness(one: Sequence[str], other: Sequence[str]) -> float:
    """How alike two sets of principles are: the worst pair when each is paired with its like; 0 where one has more."""
    if len(one) != len(other):
        return 0.0
    ranked = sorted(((similarity(a, b), i, j) for i, a in enumerate(one) for j, b in enumerate(other)), reverse=True)
    left, right, worst = set(range(len(one))), set(range(len(other))), 1.0
    for value, i, j in ranked:
        if i in left and j in right:
            left.discard(i)
            right.discard(j)
            worst = min(worst, value)
    return worst


def behaves_alike(pairs: Iterable[tuple[Sequence[float], ...]]) -> bool:
    """Whether two prompts do equally well, problem by problem: the 95 % interval of the mean difference of their mean
    rewards lies within what would not matter, and single problems differ no more than attempts at them do."""
    met = [(a, b) for a, b in pairs if a and b]
    if len(met) < LEAST_SHARED:
        return False
    gaps = [math.fsum(a) / len(a) - math.fsum(b) / len(b) for a, b in met]
    noise = [_variance(a, b) for a, b in met]
    mean = math.fsum(gaps) / len(gaps)
    spread = math.fsum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1)
    error = math.sqrt(max(spread, math.fsum(noise) / len(noise)) / len(gaps))
    excess = math.fsum(g * g / v for g, v in zip(gaps, noise, strict=True)) - len(gaps)
    return abs(mean) + 1.96 * error <= NO_MATTER and excess <= 2 * math.sqrt(2 * len(gaps))


class Duplicates:
    """What is alive, and what is forbidden for a while. `state` and `restore` carry it over a resume."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._alive: dict[str, tuple[str, ...]] = {}
        self._tabu: dict[str, tuple[str, ...]] = {}

    def observe(self, prompts: Iterable[SystemPrompt]) -> None:
        """Who is alive now. Those that were, and are not any more, become tabu."""
        now = {p.id: p.texts for p in prompts}
        for name, texts in self._alive.items():
            if name not in now:
                self.forbid(f"{name}, which was dropped", texts)
        self._alive = now

    def forbid(self, name: str, texts: Sequence[str]) -> None:
        """Remember a prompt that is not to be bred again soon."""
        self._tabu[name] = tuple(texts)
        while len(self._tabu) > TABU:
            del self._tabu[next(iter(self._tabu))]

    def like(self, texts: Sequence[str], also: Mapping[str, Sequence[str]]) -> str | None:
        """Who says the same: a living prompt, one of `also`, or one that is tabu; None where nobody does."""
        known: list[tuple[str, Sequence[str]]] = [*self._alive.items(), *also.items(), *self._tabu.items()]
        return next((name for name, other in known if likeness(texts, other) >= self._threshold), None)

    def retired(self, prompts: Sequence[SystemPrompt], meetings: Meetings) -> dict[str, str]:
        """The younger ones of prompts that say nearly the same and do as well, with the older one that stays.

        `prompts` are in the order of birth, the first one (the root) is never retired; `meetings` are rewards on shared
        problems by pairs, the older one first.
        """
        found: dict[str, str] = {}
        texts = {p.id: p.texts for p in prompts}
        for (older, younger), met in sorted(meetings.items()):
            if older in found or younger in found or len(met) < LEAST_SHARED:
                continue
            if likeness(texts[older], texts[younger]) >= LOOSELY * self._threshold and behaves_alike(met):
                found[younger] = older
        return found

    @property
    def texts(self) -> frozenset[str]:
        """All principles of living prompts."""
        return frozenset(text for texts in self._alive.values() for text in texts)

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "alive": {name: list(texts) for name, texts in self._alive.items()},
            "tabu": {name: list(texts) for name, texts in self._tabu.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` wrote down."""
        self._alive = {k: tuple(v) for k, v in state["alive"].items()}
        self._tabu = {k: tuple(v) for k, v in state["tabu"].items()}


@lru_cache(maxsize=8192)
def _content(text: str) -> tuple[str, ...]:
    return tuple(stem(w) for w in words(digits_for_words(_spread(text))) if w not in FILLERS and w not in NEGATIONS)


@lru_cache(maxsize=8192)
def _denied(text: str) -> bool:
    """Whether an odd number of negations stand in a text."""
    return sum(w in NEGATIONS for w in words(_spread(text))) % 2 == 1


def _spread(text: str) -> str:
    """Lower case, with "not" as a word of its own."""
    return text.casefold().replace("’", "'").replace("can't", "cannot").replace("n't", " not")


def _figures(content: Sequence[str]) -> list[str]:
    return sorted({w for w in content if any(c.isdigit() for c in w)})


def _variance(one: Sequence[float], other: Sequence[float]) -> float:
    """Of the difference of two means, from the spread of the attempts; never 0: few attempts prove little."""
    total = 0.0
    for values in (one, other):
        mean = (math.fsum(values) + 0.5) / (len(values) + 1)      # half an attempt more: no rate is certain
        total += max(mean * (1 - mean), 0.05) / len(values)
    return total
