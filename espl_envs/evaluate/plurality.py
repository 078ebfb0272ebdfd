"""Who wins a vote among k of n ballots, over all C(n, k) ways to choose them: the arithmetic of maj@k.

Counts drawn without replacement are independent binomial counts, given that they add up to k. So every probability here
is one coefficient of a product of polynomials, one factor per party: that of x^k. It is read off by evaluating the
product at roots of unity (a discrete Fourier transform), whose rounding errors stay near 1e-16 because the chance k/n
makes k the likeliest sum. Parties of one size have the same chances, so of them only the mean score matters.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import groupby

import numpy as np

Party = tuple[int, float]       # votes in all, mean score of those who gave them
NEGLIGIBLE = 1e-18              # a chance that cannot change a float
_CHUNK = 1_000_000              # complex numbers in memory at once


@lru_cache(maxsize=65536)
def plurality(parties: tuple[Party, ...], abstainers: int, k: int) -> float:
    """The expected score of the party with most votes among k of all ballots. `parties` in ascending order of size;
    ties are broken by lot, and where nobody voted the score is 0. Exact up to rounding (1e-12 for thousands)."""
    total = sum(size for size, _ in parties) + abstainers
    if not parties or k == total:
        winners = [score for size, score in parties if size == parties[-1][0]]
        return math.fsum(winners) / len(winners) if winners else 0.0
    if len(parties) == 1 and not abstainers:
        return parties[0][1]
    kinds = [(size, [score for _, score in alike]) for size, alike in groupby(parties, key=lambda party: party[0])]
    sizes, counts = np.array([size for size, _ in kinds]), np.array([len(scores) for _, scores in kinds])
    sums = np.array([math.fsum(scores) for _, scores in kinds])
    chance, turns = k / total, max(k, total - k) + 1
    chances, likely = [_binomial(size, chance) for size in sizes], float(_binomial(total, chance)[k])
    points = np.exp(2j * np.pi * np.arange(turns // 2 + 1) / turns)
    at_most = np.zeros(len(sizes))                              # per size: the chance of at most `votes`
    below = np.zeros((len(sizes), len(points)), complex)        # and the part of its polynomial under `votes`
    spectrum = np.zeros(len(points), complex)
    for votes in range(min(k, int(sizes[-1])) + 1):
        here = np.array([table[votes] if votes < len(table) else 0.0 for table in chances])
        exactly = here[:, None] * points**votes
        at_most += here
        if votes and _all(np.minimum(at_most, 1.0), counts) > NEGLIGIBLE * likely:
            able = sizes >= votes
            others = abstainers + int((sizes * counts)[~able].sum())        # ballots of those who cannot get there
            rest, tied = (1 - chance + chance * points) ** others, min(k // votes, int(counts[able].sum()))
            spectrum += _won(below[able], exactly[able], counts[able], sums[able], rest, tied)
        below += exactly
    return _coefficient(spectrum, k, turns) / likely


def _won(
    below: np.ndarray, exactly: np.ndarray, counts: np.ndarray, sums: np.ndarray, rest: np.ndarray, tied: int
) -> np.ndarray:
    """At every point, the polynomial of the votes cast where the winner has just so many, times its expected score.

    Per size of party: `below` [size, point], the polynomial of fewer votes; `exactly`, that of just so many; how many
    such parties there are, and the sum of their scores. `rest` [point]: that of all other ballots. With t tied winners
    each is chosen with probability 1/t, the integral of y^(t-1) over 0 to 1: every tied vote gets a factor y, and a
    Gauss-Legendre rule integrates the polynomial in y, for at most `tied` winners, without error.
    """
    nodes, weights = np.polynomial.legendre.leggauss((tied + 1) // 2)
    spectrum, size = np.zeros(len(rest), complex), max(1, _CHUNK // len(rest))
    for start in range(0, len(nodes), size):
        y, weight = (nodes[start : start + size] + 1) / 2, weights[start : start + size] / 2
        product = np.broadcast_to(rest, (len(y), len(rest)))
        chosen = np.zeros_like(product)             # the same with one party, each in turn, taken for the winner
        for fewer, tie, count, scores in zip(below, exactly, counts, sums, strict=True):
            factor = fewer + y[:, None] * tie
            all_but_one = factor ** (count - 1)
            whole = all_but_one * factor
            chosen = chosen * whole + product * (all_but_one * (tie * scores))
            product = product * whole
        spectrum += weight @ chosen
    return spectrum


def _coefficient(values: np.ndarray, k: int, points: int) -> float:
    """The coefficient of x^k of a real polynomial from its values at the first half of so many roots of unity: more
    than k, and more than the degree beyond k, so that no other coefficient falls on the same place."""
    place = np.arange(len(values))
    terms = (values * np.exp(-2j * np.pi * (place * k % points) / points)).real
    twice = np.where((place == 0) | (2 * place == points), 1.0, 2.0)
    return math.fsum(terms * twice) / points


def _binomial(trials: int, chance: float) -> np.ndarray:
    """The chances of 0 to `trials` successes."""
    steps = np.arange(1, trials + 1)
    logs = np.cumsum(np.log((trials - steps + 1) / steps) + math.log(chance / (1 - chance)))
    weights = np.exp(np.append(0.0, logs) - max(0.0, logs.max(initial=0.0)))
    return np.asarray(weights / math.fsum(weights))


def _all(chances: np.ndarray, counts: np.ndarray) -> float:
    """The chance that independent events, so many of each kind, all happen."""
    return math.exp(float(np.log(chances) @ counts)) if chances.all() else 0.0
