"""How well a system prompt does on problems that are not trained on: one number with its interval and its count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from espl_train.records import Rollout
from espl_train.runs.summary import wilson


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The mean over problems of the mean reward of their samples, with a 95 % interval over problems.

    `faulted` episodes are masked; `problems` counts those that have at least one score.
    """

    mean: float
    low: float
    high: float
    problems: int
    faulted: int

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> Evaluation:
        """Rewards of 0 and 1, one per problem: Wilson's interval. Anything else: normal, with the larger of two
        standard errors, from the spread between problems and from the spread of the samples within them."""
        scored: dict[int, list[float]] = {}
        for rollout in rollouts:
            if not rollout.faulted:
                scored.setdefault(rollout.key.task, []).append(rollout.reward)
        faulted = sum(r.faulted for r in rollouts)
        if not scored:
            return cls(math.nan, math.nan, math.nan, 0, faulted)
        means = [math.fsum(rewards) / len(rewards) for rewards in scored.values()]
        mean = math.fsum(means) / len(means)
        if all(len(rewards) == 1 and rewards[0] in (0.0, 1.0) for rewards in scored.values()):
            low, high = wilson(mean, len(means))
        else:
            half = 1.96 * _standard_error(list(scored.values()))
            every = [reward for rewards in scored.values() for reward in rewards]
            unit = min(every) >= 0 and max(every) <= 1
            low, high = (max(mean - half, 0.0), min(mean + half, 1.0)) if unit else (mean - half, mean + half)
        return cls(mean, low, high, len(means), faulted)


def _standard_error(scored: Sequence[Sequence[float]]) -> float:
    """Of the mean over problems; NaN where a single value tells nothing about spread."""
    means = [math.fsum(rewards) / len(rewards) for rewards in scored]
    within = [_variance(rewards) / len(rewards) for rewards in scored if len(rewards) > 1]
    between = _variance(means) / len(means) if len(means) > 1 else math.nan
    inside = math.fsum(within) / len(scored) ** 2 if len(within) == len(scored) else math.nan
    known = [variance for variance in (between, inside) if math.isfinite(variance)]
    return math.sqrt(max(known)) if known else math.nan


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def weighted(parts: Sequence[tuple[float, float, float, float]]) -> tuple[float, float, float]:
    """Mean and interval of a weighted mean of independent (weight, mean, low, high).

    The distances of the bounds from the means are combined as standard errors are, below and above apart, so that
    intervals which are not symmetric stay what they are (Zou & Donner 2008: MOVER).
    """
    total = math.fsum(weight for weight, *_ in parts)
    shares = [(weight / total, mean, low, high) for weight, mean, low, high in parts]
    mean = math.fsum(share * centre for share, centre, _, _ in shares)
    below = math.hypot(*(share * (centre - low) for share, centre, low, _ in shares))
    above = math.hypot(*(share * (high - centre) for share, centre, _, high in shares))
    return mean, mean - below, mean + above


def overall(records: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]) -> dict[str, float]:
    """The weighted record of several `metrics`, by environment: the root prompts together, and the best rated. Empty
    where there is but one."""
    if len(records) < 2:
        return {}
    record: dict[str, float] = {}
    for name in ("validation/root", "validation/best"):
        parts = [(weights[env], r[name], r[f"{name}/low"], r[f"{name}/high"]) for env, r in records.items()]
        record |= dict(zip((name, f"{name}/low", f"{name}/high"), weighted(parts), strict=True))
    return {**record, "validation/count": sum(r["validation/count"] for r in records.values())}


def metrics(evaluations: Mapping[str, Evaluation], root: str, best: str) -> dict[str, float]:
    """The flat record of one validation: every prompt, and the root and the best rated under names of their own."""
    record: dict[str, float] = {}
    named = {**{prompt: prompt for prompt in evaluations}, "root": root, "best": best}
    for name, prompt in named.items():
        found = evaluations[prompt]
        record |= {
            f"validation/{name}": found.mean,
            f"validation/{name}/low": found.low,
            f"validation/{name}/high": found.high,
        }
    return {**record, "validation/count": evaluations[root].problems}
