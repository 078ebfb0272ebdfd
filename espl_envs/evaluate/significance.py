"""Tests and their arithmetic: whether a difference between two runs is one, and what it would take to tell.

Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure"; McNemar 1947; Miller 2024, "Adding Error Bars to
Evals: A Statistical Approach to Language Model Evaluations" (how many tasks and samples are needed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from espl_envs.evaluate.intervals import generator

LEVEL, POWER = 0.05, 0.8
PERMUTATIONS = 10_000
_CHUNK = 4_000_000      # swaps in memory at once

Row = tuple[Sequence[float], Sequence[float]]       # the samples of a task in one run, and in the other


def reach(pairs: int = 1) -> float:
    """A true difference of so many standard errors is found with 80 % power, at 5 % shared by `pairs` tests."""
    normal = NormalDist()
    return normal.inv_cdf(1 - LEVEL / 2 / pairs) + normal.inv_cdf(POWER)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values: the chance of even one false verdict stays below the level."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, p[index] * (len(p) - rank)))
        adjusted[index] = highest
    return adjusted


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p of `wins` against `losses` among the tasks on which two runs differ."""
    count, ways, below = wins + losses, 1, 0
    for i in range(min(wins, losses) + 1):
        below += ways                               # C(count, i), each from the one before
        ways = ways * (count - i) // (i + 1)
    return min(1.0, 2 * below / 2**count)


def permutation(strata: Sequence[np.ndarray], *key: str) -> float:
    """Two-sided p of the mean of stratum means of per-task differences, under random swaps within tasks. Exact up to
    the number of swaps that are tried; with all differences 0 it is 1."""
    random = generator("permutation", *key)
    seen = abs(np.mean([stratum.mean() for stratum in strata]))
    as_far, size = 0, max(1, _CHUNK // max(1, *(len(s) for s in strata)))
    for start in range(0, PERMUTATIONS, size):
        count = min(size, PERMUTATIONS - start)
        swapped = [(random.integers(0, 2, (count, len(s))) * 2 - 1) @ s / len(s) for s in strata]
        as_far += int((np.abs(np.mean(swapped, axis=0)) >= seen - 1e-12).sum())
    return (1 + as_far) / (1 + PERMUTATIONS)


def paired_test(strata: Sequence[Sequence[Row]], *key: str) -> tuple[str, float, float]:
    """Which test, the mean over strata of the mean over tasks of (mean of the second - mean of the first), and its
    two-sided p: McNemar's where every task of the only stratum has one sample of 0 or 1 on each side."""
    differences = [np.array([_mean(second) - _mean(first) for first, second in rows]) for rows in strata]
    seen = float(np.mean([stratum.mean() for stratum in differences]))
    sides = [side for rows in strata for row in rows for side in row]
    if len(strata) == 1 and all(len(side) == 1 and side[0] in (0.0, 1.0) for side in sides):
        return "McNemar, exact", seen, mcnemar(*won_and_lost(differences[0]))
    return "paired permutation", seen, permutation(differences, *key)


def won_and_lost(differences: np.ndarray) -> tuple[int, int]:
    """How many differences are above and below 0."""
    return int((differences > 1e-12).sum()), int((differences < -1e-12).sum())


def needed_tasks(difference: float, error: float, tasks: int, reach: float) -> int | None:
    """Tasks of the same kind that would find `difference`, given its standard error over `tasks`."""
    return math.ceil(tasks * (reach * error / difference) ** 2) if abs(difference) > 1e-9 else None


def needed_samples(
    difference: float, error: float, strata: Sequence[Sequence[tuple[Sequence[float], Sequence[float]]]], reach: float
) -> int | None:
    """Samples per task that would do the same over the same tasks. The variance of the difference is that between tasks
    plus that within them over the number of samples; only the second part shrinks. None where the first is too much,
    or where some task has one sample only, which cannot tell the two apart."""
    pairs = [row for stratum in strata for row in stratum]
    fewest = min(len(side) for row in pairs for side in row)
    if fewest < 2 or abs(difference) <= 1e-9:
        return None
    weights = [1 / len(strata) / len(stratum) for stratum in strata for _ in stratum]
    within = [(np.var(x, ddof=1), len(x), np.var(y, ddof=1), len(y)) for x, y in pairs]
    now = math.fsum(w * w * (vx / nx + vy / ny) for w, (vx, nx, vy, ny) in zip(weights, within, strict=True))
    single = math.fsum(w * w * (vx + vy) for w, (vx, _, vy, _) in zip(weights, within, strict=True))
    between = max(0.0, error**2 - now)
    room = (difference / reach) ** 2 - between
    return max(fewest, math.ceil(single / room)) if room > 0 else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
