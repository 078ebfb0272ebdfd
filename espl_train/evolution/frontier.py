"""The per-problem frontier: which prompts are the best on some problem of late (GEPA, arXiv 2507.19457, algorithm 2).

A mean hides a prompt that alone solves what the others do not; the frontier keeps it breeding and playing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from espl_train.evolution.ratings import ROUNDING, Table


class Frontier:
    """Mean scores by problem and prompt, the newest of each, for the last `window` iterations.

    Scores of different iterations are compared as they are: a policy that improves favours the newer ones, the more
    the longer the window.
    """

    def __init__(self, window: float) -> None:
        self.window = window
        self._seen: dict[int, dict[str, tuple[int, float]]] = {}     # problem → prompt → (step, mean)

    def record(self, step: int, rewards: Table) -> None:
        """Take in a batch and forget what is older than the window."""
        for prompt, rows in rewards.items():
            for problem, row in rows.items():
                self._seen.setdefault(problem, {})[prompt] = (step, sum(row) / len(row))
        oldest = step - self.window
        recent = {q: {p: seen for p, seen in row.items() if seen[0] > oldest} for q, row in self._seen.items()}
        self._seen = {q: row for q, row in recent.items() if row}

    def wins(self, alive: Collection[str]) -> dict[str, int]:
        """On how many problems each living prompt is among the best of those alive, dominated prompts left out.

        A prompt is dominated where others are as good on every problem that it is best on. The weakest are looked at
        first; among equals the older.
        """
        living = set(alive)
        fronts = [front for row in self._seen.values() if (front := _best(row, living))]
        count = Counter(prompt for front in fronts for prompt in front)
        for prompt in sorted(count, key=lambda p: (count[p], p)):
            if all(len(front) > 1 for front in fronts if prompt in front):
                for front in fronts:
                    front.discard(prompt)
        count = Counter(prompt for front in fronts for prompt in front)
        return {prompt: count[prompt] for prompt in alive}

    def means(self) -> dict[str, float]:
        """The mean of every prompt over the problems that it has scores of."""
        found: dict[str, list[float]] = {}
        for row in self._seen.values():
            for prompt, (_, mean) in row.items():
                found.setdefault(prompt, []).append(mean)
        return {prompt: round(math.fsum(values) / len(values), 9) for prompt, values in found.items()}

    def forget(self, prompt: str) -> None:
        """A prompt is no more."""
        for row in self._seen.values():
            row.pop(prompt, None)

    def to_json(self) -> list[list[Any]]:
        """Plain data: rows of problem, prompt, step, mean."""
        return [[q, prompt, *seen] for q, row in self._seen.items() for prompt, seen in row.items()]

    @classmethod
    def from_json(cls, rows: Sequence[Sequence[Any]], window: float) -> Frontier:
        """The frontier that `to_json` wrote down."""
        frontier = cls(window)
        for problem, prompt, step, mean in rows:
            frontier._seen.setdefault(problem, {})[prompt] = (step, mean)
        return frontier


def _best(row: Mapping[str, tuple[int, float]], living: set[str]) -> set[str]:
    means = {prompt: mean for prompt, (_, mean) in row.items() if prompt in living}
    top = max(means.values(), default=0.0)
    return {prompt for prompt, mean in means.items() if mean >= top - ROUNDING}
