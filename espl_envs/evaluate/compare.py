"""Is one run better than another? Paired over the tasks that both played, so that easy and hard tasks cancel out.

The difference is the mean over environments of the mean over tasks of (mean score of B - mean score of A), with an
interval by the bootstrap of `intervals` over tasks. The test is McNemar's exact one where each task has one sample of 0
or 1 per run and there is one environment, else a paired permutation test that swaps A and B within tasks (McNemar's is
the exact form of the same test). Several pairs are corrected by Holm's method. What cannot be decided is called so,
with the tasks or samples that would be needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from espl_envs.core.errors import EsplError
from espl_envs.evaluate.directory import RunDirectory
from espl_envs.evaluate.intervals import SIGNED, Estimate, from_draws, replicates, scale_of
from espl_envs.evaluate.significance import LEVEL, holm, mcnemar, needed_samples, needed_tasks, permutation, reach

EnvName = tuple[str, str]                   # id and split
TaskScores = dict[str, list[float]]         # task hash → scores of all samples, of all prompts


class Incomparable(EsplError):
    """Runs that were not about the same."""


@dataclass(frozen=True, slots=True)
class RunScores:
    """What a comparison needs of a run: the scores of every task by its hash, per environment."""

    path: Path
    name: str
    envs: Mapping[EnvName, TaskScores]
    hashes: Mapping[EnvName, str]
    kwargs: Mapping[EnvName, Mapping[str, Any]]
    expected: int
    masked: int


@dataclass(frozen=True, slots=True)
class Pair:
    """B against A on what both played.

    difference: B - A. p: of the test named; p_adjusted: after Holm's correction over all pairs. verdict: "better"
    (B is), "worse", "undecided". detectable: the difference that this many tasks and samples would find with 80 %
    power. needed_tasks, needed_samples: how many of each, the other kept, would decide a difference as large as the one
    seen; None where no number would or it cannot be told (`needed_samples` needs several samples per task).
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
    adjusted = holm([pair.p for pair in pairs])
    decided = [_decided(pair, p) for pair, p in zip(pairs, adjusted, strict=True)]
    return Comparison(tuple(run.name for run in loaded), tuple(decided), tuple(warnings))


def load_runs(paths: Sequence[Path]) -> list[RunScores]:
    """The scores of every run. A run is called by its agent, and by its directory too where that is not enough, and
    "changed" where the agent's files did while it was played."""
    directories = [RunDirectory.read(path) for path in paths]
    agents = Counter(directory.config.agent.name for directory in directories)
    folders = Counter(path.name for path in paths)
    names = []
    for path, directory in zip(paths, directories, strict=True):
        agent = directory.config.agent.name
        where = path.name if folders[path.name] == 1 else str(path)
        mixed = " (changed)" if directory.config.agent.changed else ""
        names.append((agent if agents[agent] == 1 else f"{agent} ({where})") + mixed)
    return [scores_of(directory, name) for directory, name in zip(directories, names, strict=True)]


def scores_of(directory: RunDirectory, name: str) -> RunScores:
    """The scores of one run. An episode that failed before its task was known belongs to the task of its index."""
    config = directory.config
    scores: dict[EnvName, dict[int, list[float]]] = {(env.id, env.split): {} for env in config.envs}
    hashes: dict[EnvName, dict[int, str]] = {env: {} for env in scores}
    for episode in directory.episodes(transcripts=False):
        env, task = (episode.key.env, episode.key.split), episode.key.task
        if episode.task_hash:
            hashes[env][task] = episode.task_hash
        if episode.score is not None:
            scores[env].setdefault(task, []).append(episode.score)
    envs = {
        env: {hashes[env].get(task, f"task {task}"): found for task, found in tasks.items()}
        for env, tasks in scores.items()
    }
    scored = sum(len(found) for tasks in scores.values() for found in tasks.values())
    return RunScores(
        directory.path, name, envs,
        {(env.id, env.split): env.data_hash for env in config.envs},
        {(env.id, env.split): env.kwargs for env in config.envs},
        config.expected(), config.expected() - scored,
    )  # fmt: skip


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
            elif alone := set(first.envs[env]) ^ set(other.envs[env]):
                left_out = f"{len(alone)} tasks that only one of {pair} has a score for are left out"
                warnings.append(f"{_names([env])}: {left_out}")
            if first.kwargs[env] != other.kwargs[env]:
                settings = f"{dict(first.kwargs[env])} and {dict(other.kwargs[env])}"
                warnings.append(f"{_names([env])}: the environment's settings differ between {pair}: {settings}")
    if problems and not intersect:
        raise Incomparable(f"{'; '.join(problems)}. --intersect compares the tasks that they share.")
    warnings += [f"{run.name}: {run.masked} episodes have no score and are left out" for run in runs if run.masked]
    return [f"compared on shared tasks only: {problem}" for problem in problems] + warnings


def _pair(a: RunScores, b: RunScores, far: float) -> Pair:
    """Everything but the correction of p; a difference of `far` standard errors is found with 80 % power."""
    shared = {env: sorted(set(a.envs[env]) & set(b.envs[env])) for env in a.envs if env in b.envs}
    shared = {env: tasks for env, tasks in shared.items() if tasks}
    if not shared:
        raise Incomparable(f"{a.name} and {b.name} share no task that both have a score for")
    rows = [[(a.envs[env][task], b.envs[env][task]) for task in tasks] for env, tasks in shared.items()]
    strata = [np.array([_mean(mine) - _mean(theirs) for theirs, mine in stratum]) for stratum in rows]
    flat = [row for stratum in rows for row in stratum]
    differences = np.concatenate(strata)
    scale = SIGNED if scale_of([s for row in flat for side in row for s in side]) else None
    keys = [(*env, a.hashes[env]) for env in shared]
    drawn = [replicates(s[:, None], scale, "pair", *key)[:, 0] for s, key in zip(strata, keys, strict=True)]
    draws = np.mean(drawn, axis=0)
    seen = float(np.mean([stratum.mean() for stratum in strata]))
    wins, losses = int((differences > 1e-12).sum()), int((differences < -1e-12).sum())
    single = len(strata) == 1 and all(len(side) == 1 and side[0] in (0.0, 1.0) for row in flat for side in row)
    p = mcnemar(wins, losses) if single else permutation(strata, a.name, b.name)
    deviation = float(draws.std())
    return Pair(
        a.name, b.name, len(flat), (_mean([len(x) for x, _ in flat]), _mean([len(y) for _, y in flat])),
        float(np.mean([_mean([_mean(x) for x, _ in stratum]) for stratum in rows])),
        float(np.mean([_mean([_mean(y) for _, y in stratum]) for stratum in rows])),
        from_draws(seen, draws, len(flat), scale), wins, len(flat) - wins - losses, losses,
        "McNemar, exact" if single else "paired permutation", p, p, "undecided", far * deviation,
        needed_tasks(seen, deviation, len(flat), far), needed_samples(seen, deviation, rows, far),
    )  # fmt: skip


def _decided(pair: Pair, p: float) -> Pair:
    decided = p < LEVEL and pair.difference.mean != 0
    verdict = ("better" if pair.difference.mean > 0 else "worse") if decided else "undecided"
    return replace(pair, p_adjusted=p, verdict=verdict)


def _names(envs: Sequence[EnvName]) -> str:
    return ", ".join(f"{name} ({split})" for name, split in envs)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
