"""Numbers of one task from its samples: mean@k, pass@k, pass^k, maj@k, and what is left of the score under a budget.

All are unbiased: with n samples and k < n they are the mean over every way to choose k of the n. A sample is *right*
when its score is 1 or more; partial credit counts in the mean alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Self

from espl_envs.evaluate.plurality import plurality
from espl_envs.evaluate.records import Episode, Outcome
from espl_envs.grading.latex import canonical, normalise
from espl_envs.grading.limits import breach
from espl_envs.grading.numbers import read_number

Samples = Sequence["Sample"]
LONGEST_VOTE = 300      # characters; a longer answer is a text or a program, compared as it stands


@dataclass(frozen=True, slots=True)
class Sample:
    """What the numbers need of a scored episode."""

    score: float
    answer: str | None
    outcome: Outcome
    completion_tokens: int | None
    tool_calls: int

    @classmethod
    def of(cls, episode: Episode) -> Self:
        """Raises ValueError for a fault."""
        if episode.score is None:
            raise ValueError(f"{episode.key} is a fault: it has no score")
        return cls(episode.score, episode.answer, episode.outcome, episode.completion_tokens, episode.tool_calls)


@lru_cache(maxsize=4096)
def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k is right, given that c of n are: 1 - C(n-c, k) / C(n, k), correctly rounded.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code".
    """
    _check(n, c, k)
    return float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))


@lru_cache(maxsize=4096)
def pass_hat_k(n: int, c: int, k: int) -> float:
    """pass^k: the chance that all k are right, given that c of n are: C(c, k) / C(n, k), correctly rounded.

    Yao et al. 2024, "τ-bench".
    """
    _check(n, c, k)
    return float(Fraction(math.comb(c, k), math.comb(n, k)))


def maj_at_k(answers: Sequence[str | None], scores: Sequence[float], k: int) -> float:
    """The expected score of the answer that most of k samples give.

    Answers are one vote if they write the same number or, spelling aside, the same text (`vote`); whether a grader
    takes them for equal is not asked, since a voter has no grader. No answer is no vote, and without votes the score is
    0. Ties are broken by lot: their mean counts. The score of an answer is the mean over the samples that gave it.
    """
    _check(len(answers), 0, k)
    ballots: dict[Hashable, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            ballots.setdefault(vote(answer), []).append(score)
    parties = sorted((len(party), math.fsum(party) / len(party)) for party in ballots.values())
    return plurality(tuple(parties), len(answers) - sum(size for size, _ in parties), k)


@lru_cache(maxsize=65536)
def vote(answer: str) -> Hashable:
    """What an answer is counted as: the number it writes, else its text without LaTeX spelling, case and spaces."""
    text = " ".join(answer.split())
    if len(text) > LONGEST_VOTE or "\n" in answer.strip() or breach(text):
        return text
    plain = normalise(text)
    number = read_number(plain)
    return number.value if number else canonical(plain).casefold().rstrip(".") or text


def mean_score(samples: Samples) -> float:
    """mean@k, k being all of them."""
    return math.fsum(sample.score for sample in samples) / len(samples)


def chance(formula: Callable[[int, int, int], float], k: int, samples: Samples) -> float:
    """`pass_at_k` or `pass_hat_k` of the samples; NaN where there are fewer than k."""
    right = sum(sample.score >= 1 for sample in samples)
    return formula(len(samples), right, k) if len(samples) >= k else math.nan


def majority(k: int, samples: Samples) -> float:
    """`maj_at_k` of the samples; NaN where there are fewer than k."""
    if len(samples) < k:
        return math.nan
    return maj_at_k([sample.answer for sample in samples], [sample.score for sample in samples], k)


def share(outcome: Outcome, samples: Samples) -> float:
    """How many of the samples ended so."""
    return sum(sample.outcome is outcome for sample in samples) / len(samples)


def within_budget(unit: str, budget: int, samples: Samples) -> float:
    """The mean score where a sample counts iff all that it spent fits in; `unit` is "completion_tokens" or
    "tool_calls", which every sample must know. Exact for agents that are not told their budget."""
    return math.fsum(sample.score for sample in samples if getattr(sample, unit) <= budget) / len(samples)


def budget_grid(least: int, most: int) -> list[int]:
    """Budgets from where the first sample fits in to where all do: every number of a few, else round ones."""
    if most <= 24:
        return list(range(most + 1))
    powers = range(len(str(most)) + 1)
    round_ones = (mantissa * 10**power // 10 for power in powers for mantissa in (10, 15, 20, 30, 50, 70))
    steps = [0, *round_ones]
    first = max(step for step in steps if step <= least)
    last = min(step for step in steps if step >= most)
    return sorted({step for step in steps if first <= step <= last})


def sizes_of_k(k: int) -> list[int]:
    """The k that curves are drawn over: powers of two, and k itself."""
    return sorted({*(2**power for power in range(k.bit_length()) if 2**power <= k), k})


def _check(n: int, c: int, k: int) -> None:
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"n = {n} samples, c = {c} right, k = {k}: expected 1 <= k <= n and 0 <= c <= n")
