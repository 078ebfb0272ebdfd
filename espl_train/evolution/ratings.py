"""Ratings: every iteration is one match, a free-for-all among the prompts that played the same problems.

Who beat whom comes from the mean rewards V. A difference that the batch cannot decide is a draw: by default a paired
difference per problem with its standard error, as in the reference implementation a fixed tolerance. What a match says
of skills is the business of `Beliefs`, of which there are several kinds (`beliefs.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

import numpy as np

from espl_train.config import RatingConfig
from espl_train.evolution.prompts import Rating
from espl_train.records import Group

ROUNDING = 1e-9

Table = Mapping[str, Mapping[int, tuple[float, ...]]]      # prompt → problem → rewards


@dataclass(frozen=True, slots=True)
class Match:
    """One batch seen as a tournament, on the problems that every player has a score for.

    `values` are the V_i, best first; `ranks` 0 is best and equal ranks are draws. Both empty where nobody can be
    compared. `rewards` are all that were seen, those of other problems included; `step` is when.
    """

    problems: tuple[int, ...]
    values: Mapping[str, float]
    ranks: Mapping[str, int]
    rewards: Table = field(default_factory=dict)
    step: int = 0


class Beliefs(Protocol):
    """What is known of the skill of every living prompt. Immutable: whatever happens makes new beliefs."""

    def rating(self, prompt: str) -> Rating:
        """Mean and standard deviation of one prompt's skill."""
        ...

    def after(self, match: Match) -> Beliefs:
        """The beliefs once a match is counted; the same where it says nothing."""
        ...

    def born(self, child: str, parents: Sequence[str]) -> Beliefs:
        """The beliefs with a child, known by its parents alone; nothing is known of it where there are none."""
        ...

    def without(self, prompt: str) -> Beliefs:
        """The beliefs without a prompt that is no longer there."""
        ...

    def draw(self, prompts: Sequence[str], random: np.random.Generator) -> np.ndarray:
        """One joint draw of skills. [len(prompts)]"""
        ...

    def details(self) -> dict[str, Any]:
        """What the log should know beside the ratings."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain data, all that the ratings themselves do not say."""
        ...


def scores(groups: Sequence[Group]) -> dict[str, dict[int, tuple[float, ...]]]:
    """Rewards as prompt → problem → rewards. Faulted rollouts are masked: they never count as 0."""
    table: dict[str, dict[int, tuple[float, ...]]] = {}
    for group in groups:
        rewards = tuple(r.reward for r in group.rollouts if not r.faulted)
        if rewards:
            row = table.setdefault(group.prompt, {})
            row[group.task] = row.get(group.task, ()) + rewards
    return table


def match(groups: Sequence[Group], config: RatingConfig) -> Match:
    """The tournament of one batch.

    Players are sorted by V. Going down, a player opens a new rank as soon as one member of the rank above it beats it
    decidedly, otherwise it joins that rank. So ranks are transitive, agree with V, and never call a decided pair a
    draw; what they may do is part an undecided pair that a third player stands between.
    """
    table, step = scores(groups), max((r.key.step for g in groups for r in g.rollouts), default=0)
    shared = set.intersection(*(set(row) for row in table.values())) if table else set()
    if not shared:
        return Match((), {}, {}, table, step)
    problems = tuple(sorted(shared))
    values = {p: fmean([fmean(row[q]) for q in problems]) for p, row in table.items()}
    order = sorted(values, key=lambda p: (-values[p], p))
    beats = _paired(table, problems, config) if config.ties == "paired" else _tolerance(values, config)
    ranks: dict[str, int] = {}
    block: list[str] = []
    rank = 0
    for player in order:
        if any(beats(member, player) for member in block):
            rank, block = rank + 1, []
        ranks[player] = rank
        block.append(player)
    return Match(problems, {p: values[p] for p in order}, ranks, table, step)


def _tolerance(values: Mapping[str, float], config: RatingConfig) -> Callable[[str, str], bool]:
    return lambda better, worse: values[better] - values[worse] > config.tolerance + ROUNDING


def _paired(
    table: Table, problems: Sequence[int], config: RatingConfig
) -> Callable[[str, str], bool]:
    def beats(better: str, worse: str) -> bool:
        mean, error = paired_difference([(table[better][q], table[worse][q]) for q in problems])
        return mean > config.decisive * error + ROUNDING

    return beats


def paired_difference(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[float, float]:
    """Mean over problems of (mean a - mean b), and its standard error.

    The error is the larger of two estimates: from the spread between problems, and from the spread of the samples
    within them. Few problems can agree by accident, and a single one has no spread at all.
    """
    differences = [fmean(a) - fmean(b) for a, b in pairs]
    count = len(differences)
    within = math.fsum(_error2(a) + _error2(b) for a, b in pairs) / count**2
    return fmean(differences), math.sqrt(max(within, _error2(differences)))


def _error2(values: Sequence[float]) -> float:
    """The squared standard error of a mean; 0 where one value tells nothing about spread."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = fmean(values)
    return math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count
