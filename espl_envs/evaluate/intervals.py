"""95 % intervals over tasks, and everything else that comes of resampling them.

The bootstrap here is Rubin's Bayesian one, clustered by task: each draw weighs the tasks by a flat Dirichlet and takes
the weighted mean of their values, so samples of one task stay together. Percentile and BCa intervals of the ordinary
bootstrap collapse to a point when every task is right, and reach 1 when nearly all are. Here every draw also holds two
imaginary tasks of half a weight each, at the bottom and at the top of the scale: with one sample of 0 or 1 per task the
interval is exactly Jeffreys' (Beta(right + 1/2, wrong + 1/2)), it never is a point, and it means something for a single
task. Tasks are thought of as drawn from the problems that one cares about. `benchmarks/intervals.py` measures how often
intervals hold the truth: these 0.91 to 0.99 of the time, the others down to 0.23.

Rubin 1981, "The Bayesian Bootstrap"; Brown, Cai, DasGupta 2001, "Interval Estimation for a Binomial Proportion".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from espl_envs.core.randomness import derive

DRAWS = 4000
UNIT = (0.0, 1.0)
SIGNED = (-1.0, 1.0)
_CHUNK = 4_000_000      # weights in memory at once

Bounds = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `tasks` tasks with its 95 % interval; None where one task of an unbounded score tells no spread."""

    mean: float
    low: float | None
    high: float | None
    tasks: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.low is not None else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def generator(*key: str | int) -> np.random.Generator:
    """A numpy generator for a key; equal keys give equal streams, on every machine."""
    return np.random.Generator(np.random.Philox(key=derive(*key)))


def replicates(values: np.ndarray, bounds: Bounds, *key: str | int) -> np.ndarray:
    """Bootstrap draws of the column means of `values` [tasks, columns]; NaN marks a task that has no such value.

    Returns [DRAWS, columns]. All columns see the same weights, so that columns can be compared draw by draw.
    """
    tasks, random = len(values), generator("bootstrap", *key)
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    rows = []
    size = max(1, _CHUNK // max(tasks, 1))
    for start in range(0, DRAWS, size):
        count = min(size, DRAWS - start)
        weights = random.standard_exponential((count, tasks))
        above, below = weights @ filled, weights @ known
        if bounds is not None:
            extra = random.standard_gamma(0.5, (count, 2))
            above += (extra @ np.array(bounds))[:, None]
            below += extra.sum(axis=1, keepdims=True)
        rows.append(np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0))
    return np.concatenate(rows)


def estimates(values: np.ndarray, draws: np.ndarray, bounds: Bounds) -> list[Estimate | None]:
    """One per column of `values`, from its `replicates`; None for a column without any value."""
    found: list[Estimate | None] = []
    for column, drawn in zip(values.T, draws.T, strict=True):
        known = column[~np.isnan(column)]
        found.append(from_draws(math.fsum(known) / len(known), drawn, len(known), bounds) if len(known) else None)
    return found


def from_draws(mean: float, draws: np.ndarray, tasks: int, bounds: Bounds) -> Estimate:
    """Mean and percentile interval; the interval always holds the mean."""
    if bounds is None and tasks < 2:
        return Estimate(mean, None, None, tasks)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(mean, min(float(low), mean), max(float(high), mean), tasks)


def scale_of(scores: Sequence[float] | np.ndarray) -> Bounds:
    """The bounds of a score: 0 to 1 where all are within, else none are known."""
    scores = np.asarray(scores, float)
    return UNIT if scores.size == 0 or (scores.min() >= 0 and scores.max() <= 1) else None


def prompt_spread(cells: np.ndarray, *key: str | int) -> dict[str, float | None]:
    """How much the system prompt matters: `cells` [prompts, tasks] are mean scores, every cell known.

    sd is the standard deviation between the prompts' true means: the observed one less the share that sampling puts
    there (two-way analysis of variance without replication: (MS_prompts - MS_residual) / tasks, not below 0). p is the
    chance of a spread like this among equally good prompts, by relabelling the prompts within every task.
    """
    prompts, tasks = cells.shape
    means = cells.mean(axis=1)
    spread: dict[str, float | None] = {
        "mean": float(means.mean()), "min": float(means.min()), "max": float(means.max()),
        "sd_observed": None, "sd": None, "p": None,
    }  # fmt: skip
    if prompts < 2:
        return spread
    spread["sd_observed"] = float(means.std(ddof=1))
    if tasks < 2:
        return spread
    residual = cells - means[:, None] - cells.mean(axis=0) + cells.mean()
    noise = float((residual**2).sum()) / ((prompts - 1) * (tasks - 1))
    spread["sd"] = math.sqrt(max(0.0, float(means.var(ddof=1)) - noise / tasks))
    random = generator("prompts", *key)
    relabelled = [random.permuted(cells, axis=0).mean(axis=1).var() for _ in range(1000)]
    spread["p"] = (1 + sum(value >= means.var() - 1e-12 for value in relabelled)) / (1 + len(relabelled))
    return spread
