"""Quarantine: a prompt that helps on problems it has seen, and not on their twins, has learnt answers and not advice.

Both a prompt and the root play problems that reflection was shown and others that it never was: renumbered twins, or
fresh problems of the same set. What counts is the difference of differences, (prompt - root) on the seen ones less
(prompt - root) on the others: whatever makes problems hard, or the weights good at them, cancels. A prompt whose lead
vanishes by more than `twin_margin` standard errors is set aside until a later check clears it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from espl_train.config import LEAST_TWINS
from espl_train.evolution.lineage import Lineage

CLEARED = 1 / 3      # of the margin: below it a prompt in quarantine is let out
Scores = Mapping[int, Sequence[float]]      # problem → rewards


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check came to. `gap`: how much of the lead over the root is gone on problems that nobody has shown, with
    its standard `error`, over `problems` problems that were shown."""

    gap: float
    error: float
    problems: int
    twins: bool

    @property
    def score(self) -> float:
        """The gap in standard errors."""
        return self.gap / self.error

    def __str__(self) -> str:
        others = "renumbered twins" if self.twins else "fresh problems"
        return f"{self.gap:+.2f} ± {self.error:.2f} of its lead is gone on {others} of {self.problems} problems"


def compare(seen: tuple[Scores, Scores], others: tuple[Scores, Scores], twins: bool) -> Finding | None:
    """The check of (prompt, root) on `seen` problems and on `others`; None where too few of them have scores.

    Twins are compared with their own problem, pair by pair; fresh problems as two samples. One imaginary observation of
    the noise that chance alone may make keeps the error from vanishing where all few attempts agree.
    """
    first, second = _leads(*seen), _leads(*others)
    if twins:
        both = [p for p in first if p in second]
        first, second = {p: first[p] for p in both}, {p: second[p] for p in both}
    if min(len(first), len(second)) < LEAST_TWINS:
        return None
    attempts = min(len(row) for scores in (*seen, *others) for row in scores.values() if row)
    noise = 0.5 / attempts          # of a lead: two means of so many rewards of 0 or 1
    if twins:
        gaps = [first[p] - second[p] for p in first]
        return Finding(fmean(gaps), math.sqrt(_spread(gaps, 2 * noise) / len(gaps)), len(gaps), twins)
    one, two = list(first.values()), list(second.values())
    error = math.sqrt(_spread(one, noise) / len(one) + _spread(two, noise) / len(two))
    return Finding(fmean(one) - fmean(two), error, len(one), twins)


class Quarantine:
    """Who was checked, and who is under suspicion. `state` and `restore` carry it over a resume."""

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self._cleared: set[str] = set()
        self._held: set[str] = set()
        self._asked: dict[str, int] = {}      # prompt → step of its last check

    def due(self, candidates: Collection[str], alive: Collection[str], step: int) -> list[str]:
        """Who has to be checked in `step`: candidates that were never cleared, and those in quarantine that are still
        alive; nobody twice."""
        self._held &= set(alive)
        self._cleared &= set(alive)
        wanted = dict.fromkeys([*(p for p in candidates if p not in self._cleared), *sorted(self._held)])
        found = [p for p in wanted if self._asked.get(p) != step]
        self._asked |= dict.fromkeys(found, step)
        return found

    def judge(self, prompt: str, finding: Finding) -> bool:
        """Whether the prompt is in quarantine after this finding."""
        held = finding.score > self._margin * (CLEARED if prompt in self._held else 1.0)
        (self._held if held else self._cleared).add(prompt)
        (self._cleared if held else self._held).discard(prompt)
        return held

    @property
    def held(self) -> frozenset[str]:
        """Who is in quarantine."""
        return frozenset(self._held)

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"cleared": sorted(self._cleared), "held": sorted(self._held)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` wrote down."""
        self._cleared, self._held = set(state["cleared"]), set(state["held"])


def ancestry(prompt: str, lineage: Lineage) -> list[int]:
    """The steps at which a prompt and its ancestors were born, newest first: whatever it knows it was shown then."""
    steps, left, known = set[int](), [prompt], set[str]()
    while left:
        birth = lineage.births.get(left.pop())
        if birth is not None and birth.prompt not in known:
            known.add(birth.prompt)
            steps.add(birth.step)
            left += birth.parents
    return sorted(steps, reverse=True)


def _leads(prompt: Scores, root: Scores) -> dict[int, float]:
    return {p: fmean(row) - fmean(root[p]) for p, row in prompt.items() if row and root.get(p)}


def _spread(values: Sequence[float], prior: float) -> float:
    """The variance, with one imaginary observation of `prior`."""
    mean = fmean(values)
    return (math.fsum((v - mean) ** 2 for v in values) + prior) / len(values)
