"""Is one run better than another? Paired over the tasks that both played, so that easy and hard tasks cancel out.

The difference is the mean over environments of the mean over tasks of (mean score of B - mean score of A), with an
interval by the bootstrap of `intervals` over tasks. The test is McNemar's exact one where each task has one sample of 0
or 1 per run and there is one environment, else a paired permutation test that swaps A and B within tasks (McNemar's is
the exact form of the same test). Several pairs are corrected by Holm's method. What cannot be decided is called so,
with the tasks or samples that would be needed. Tasks without a score in both runs are left out, and seldom a random
part: every pair says which and why, and whether what is missing could have turned the verdict (`missing.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from espl_envs.core.errors import EsplError
from espl_envs.evaluate.intervals import SIGNED, Estimate, from_draws, replicates, scale_of
from espl_envs.evaluate.missing import Missing, lacking, sentence
from espl_envs.evaluate.scores import EnvName, RunScores, load_runs
from espl_envs.evaluate.significance import (
    LEVEL,
    Row,
    holm,
    needed_samples,
    needed_tasks,
    paired_test,
    reach,
    won_and_lost,
)


class Incomparable(EsplError):
    """Runs that were not about the same."""


@dataclass(frozen=True, slots=True)
class Pair:
    """B against A on what both played.

    difference: B - A. p: of the test named; p_adjusted: after Holm's correction over all pairs. verdict: "better"
    (B is), "worse", "undecided". detectable: the difference that this many tasks and samples would find with 80 %
    power. needed_tasks, needed_samples: how many of each, the other kept, would decide a difference as large as the one
    seen; None where no number would or it cannot be told (`needed_samples` needs several samples per task). missing:
    what both were to play and one has no score for; None where there is nothing.
    """

    a: str
    b: str
    tasks: int
    samples: tuple[float, float]
    mean_a: float
    mean_b: float
    difference: Estimate
    wins: int
    ties: int
    losses: int
    test: str
    p: float
    p_adjusted: float
    verdict: str
    detectable: float
    needed_tasks: int | None
    needed_samples: int | None
    missing: Missing | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All pairs of the runs, in their order; `warnings` says what was not quite the same."""

    runs: tuple[str, ...]
    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Any:
        from espl_envs.evaluate.tables import comparison_table

        return comparison_table(self)

    def __str__(self) -> str:
        from espl_envs.evaluate.tables import plain_text

        return plain_text(self)


def compare(runs: Sequence[Path], *, intersect: bool = False) -> Comparison:
    """Compare two or more runs, each with each.

    Runs over different environments, splits or data are refused (`Incomparable`), unless `intersect` asks for what they
    share, task by task. A different number of tasks of the same data (`--limit`) costs a warning only.
    """
    if len(runs) < 2:
        raise EsplError("a comparison needs at least two runs")
    places = Counter(path.resolve() for path in runs)
    if twice := next((path for path, times in places.items() if times > 1), None):
        raise EsplError(f"{twice} is named twice: a run is no better or worse than itself")
    loaded = load_runs(runs)
    warnings = _check_alike(loaded, intersect)
    far = reach(math.comb(len(loaded), 2))
    pairs = [_pair(a, b, far) for a, b in combinations(loaded, 2)]
    tested, decided = [pair.p for pair in pairs], []
    for number, pair in enumerate(pairs):
        judge = partial(_judged, tested, number)
        verdict, adjusted = judge(pair.difference.mean, pair.p)
        missing = pair.missing and pair.missing.judged(verdict, lambda *end, judge=judge: judge(*end)[0])
        decided.append(replace(pair, p_adjusted=adjusted, verdict=verdict, missing=missing))
        warnings += [sentence(pair.a, pair.b, verdict, missing)] if missing is not None else []
    return Comparison(tuple(run.name for run in loaded), tuple(decided), tuple(warnings))


def _judged(tested: Sequence[float], number: int, difference: float, p: float) -> tuple[str, float]:
    """The verdict on pair `number` of those with p-values `tested`, and its p after Holm's correction, if it were this
    difference with this p."""
    adjusted = holm([*tested[:number], p, *tested[number + 1 :]])[number]
    decided = adjusted < LEVEL and difference != 0
    return ("better" if difference > 0 else "worse") if decided else "undecided", adjusted


def _check_alike(runs: Sequence[RunScores], intersect: bool) -> list[str]:
    """Warnings; raises Incomparable where the runs differ in what they were about."""
    first, problems, warnings = runs[0], [], []
    for other in runs[1:]:
        pair = f"{first.name} and {other.name}"
        if only := sorted(set(first.envs) ^ set(other.envs)):
            problems.append(f"{pair} were not played on the same environments and splits: only one has {_names(only)}")
        for env in sorted(set(first.envs) & set(other.envs)):
            if first.hashes[env] != other.hashes[env]:
                hashes = f"data {first.hashes[env]} and {other.hashes[env]}"
                problems.append(f"{pair} were not played on the same tasks of {_names([env])}: {hashes}")
            elif beyond := abs(first.parts[env].env.tasks - other.parts[env].env.tasks):
                tasks = "a task" if beyond == 1 else f"{beyond:,} tasks"
                warnings.append(f"{_names([env])}: {tasks} that only one of {pair} was to play: left out")
            if first.kwargs[env] != other.kwargs[env]:
                settings = f"{dict(first.kwargs[env])} and {dict(other.kwargs[env])}"
                warnings.append(f"{_names([env])}: the environment's settings differ between {pair}: {settings}")
    if problems and not intersect:
        raise Incomparable(f"{'; '.join(problems)}. --intersect compares the tasks that they share.")
    return [f"compared on shared tasks only: {problem}" for problem in problems] + warnings


def _pair(a: RunScores, b: RunScores, far: float) -> Pair:
    """Everything but the correction of p; a difference of `far` standard errors is found with 80 % power."""
    shared = {env: rows for env in a.envs if env in b.envs and (rows := _rows(a, b, env))}
    if not shared:
        raise Incomparable(f"{a.name} and {b.name} share no task that both have a score for")
    strata = [np.array([_mean(second) - _mean(first) for first, second in rows]) for rows in shared.values()]
    flat = [row for rows in shared.values() for row in rows]
    scale = SIGNED if scale_of([s for row in flat for side in row for s in side]) else None
    drawn = [replicates(s[:, None], scale, "pair", *env, a.hashes[env])[:, 0]
             for env, s in zip(shared, strata, strict=True)]  # fmt: skip
    draws = np.mean(drawn, axis=0)
    test, seen, p = paired_test(list(shared.values()), a.name, b.name)
    wins, losses = won_and_lost(np.concatenate(strata))
    alike = {env: (part, b.parts[env]) for env, part in a.parts.items() if b.hashes.get(env) == a.hashes[env]}
    deviation = float(draws.std())
    return Pair(
        a.name, b.name, len(flat), (_mean([len(x) for x, _ in flat]), _mean([len(y) for _, y in flat])),
        float(np.mean([_mean([_mean(x) for x, _ in rows]) for rows in shared.values()])),
        float(np.mean([_mean([_mean(y) for _, y in rows]) for rows in shared.values()])),
        from_draws(seen, draws, len(flat), scale), wins, len(flat) - wins - losses, losses,
        test, p, p, "undecided", far * deviation,
        needed_tasks(seen, deviation, len(flat), far), needed_samples(seen, deviation, list(shared.values()), far),
        lacking(alike, a.name, b.name),
    )  # fmt: skip


def _rows(a: RunScores, b: RunScores, env: EnvName) -> list[Row]:
    """The scores of the tasks that both have some for: by their place where the data is the same, else by content."""
    first: Mapping[Any, list[float]] = a.envs[env]
    second: Mapping[Any, list[float]] = b.envs[env]
    if a.hashes[env] == b.hashes[env]:
        first, second = a.parts[env].scores, b.parts[env].scores
    return [(first[task], second[task]) for task in sorted(first.keys() & second.keys())]


def _names(envs: Sequence[EnvName]) -> str:
    return ", ".join(f"{name} ({split})" for name, split in envs)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
