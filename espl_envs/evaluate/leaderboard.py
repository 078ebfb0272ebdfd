"""Many runs in one order: Bradley-Terry strengths over the problems that they share, beside the plain mean.

Every task is a game between every two runs that played it: a sample of one against a sample of the other, the higher
score wins, and the outcome counts as often as it happens over all pairs of samples. Equal scores are ties in Davidson's
form of the model: P(i beats j) : P(tie) : P(j beats i) = s_i : ν √(s_i s_j) : s_j. Unlike the mean it is fair to runs
that played different parts of the same data. Strengths are on the scale of chess (400 points are odds of 10 to 1, the
board's mean is 1000), intervals come from resampling tasks as in `intervals`: half a win of everybody over everybody
stands in for the imaginary tasks, so that a run that won every game has a finite strength.

Runs over different data never meet: there is one board per environment, split and data hash, and an overall board for
the environments that all runs have in common.

Davidson 1970, "On Extending the Bradley-Terry Model to Accommodate Ties in Paired Comparison Experiments".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from espl_envs.core.errors import EsplError
from espl_envs.evaluate.directory import CONFIG
from espl_envs.evaluate.intervals import Estimate, from_draws, generator, replicates, scale_of
from espl_envs.evaluate.scores import RunScores, load_runs
from espl_envs.evaluate.summary import MOST_MASKED

DRAWS = 400
POINTS = 400 / math.log(10)
TIE_PRIOR = 3.0                     # standard deviation of log ν; matters only where nobody ever ties

Identity = tuple[str, str, str]     # environment, split, data hash


@dataclass(frozen=True, slots=True)
class Standing:
    """One run on a board. mean: over the tasks it played. strength, low, high: points, None where it met nobody. ranks:
    the best and the worst rank that resampling gives it (95 %)."""

    name: str
    path: str
    mean: Estimate
    strength: float | None
    low: float | None
    high: float | None
    ranks: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Board:
    """Runs over the same data, strongest first. `tasks` counts those that at least two of them played."""

    title: str
    envs: tuple[Identity, ...]
    tasks: int
    standings: tuple[Standing, ...]


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """All boards under a folder; `left_out` says which runs are on none, and why."""

    folder: Path
    boards: tuple[Board, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    def __rich__(self) -> Any:
        from espl_envs.evaluate.tables import leaderboard_table

        return leaderboard_table(self)

    def __str__(self) -> str:
        from espl_envs.evaluate.tables import plain_text

        return plain_text(self)


def leaderboard(folder: Path, *, allow_faults: bool = False) -> Leaderboard:
    """The boards of every run in or below `folder`. Raises EsplError where there is none that has a score."""
    paths = sorted(path.parent for path in folder.rglob(CONFIG))
    if not paths:
        raise EsplError(f"There is no run of espl-eval in {folder}.")
    runs, left_out = [], []
    for run in load_runs(paths):
        if run.masked > (run.expected if allow_faults else MOST_MASKED * run.expected) or run.masked == run.expected:
            left_out.append(f"{run.name}: {run.masked} of {run.expected} episodes have no score")
        else:
            runs.append(run)
    if not runs:
        raise EsplError(f"No run in {folder} has a score: {'; '.join(left_out)}.")
    identities = sorted({identity for run in runs for identity in _identities(run)})
    shared = [i for i in identities if all(i in _identities(run) for run in runs)]
    boards = [_board(f"all {len(shared)} environments", runs, shared)] if len(runs) > 1 and len(shared) > 1 else []
    for identity in identities:
        players = [run for run in runs if identity in _identities(run)]
        boards.append(_board(f"{identity[0]} ({identity[1]}, data {identity[2]})", players, [identity]))
    return Leaderboard(folder, tuple(boards), tuple(left_out))


def _board(title: str, runs: Sequence[RunScores], envs: Sequence[Identity]) -> Board:
    means = [_mean(run, envs) for run in runs]
    wins, ties = _games(runs, envs)
    tasks = int(((wins + ties).sum(axis=(1, 2)) > 0).sum())
    if not tasks:
        entries = [Standing(run.name, str(run.path), mean, None, None, None, None)
                   for run, mean in zip(runs, means, strict=True)]  # fmt: skip
        return Board(title, tuple(envs), 0, tuple(sorted(entries, key=lambda s: -s.mean.mean)))
    strengths = strengths_of(wins.sum(axis=0), ties.sum(axis=0))
    drawn = _resampled(wins, ties, title)
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    places = (-drawn).argsort(axis=1).argsort(axis=1) + 1
    best, worst = np.quantile(places, (0.025, 0.975), axis=0, method="nearest")
    entries = [
        Standing(run.name, str(run.path), means[i], float(strengths[i]), min(float(low[i]), float(strengths[i])),
                 max(float(high[i]), float(strengths[i])), (int(best[i]), int(worst[i])))
        for i, run in enumerate(runs)
    ]  # fmt: skip
    return Board(title, tuple(envs), tasks, tuple(sorted(entries, key=lambda s: -(s.strength or 0.0))))


def strengths_of(wins: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Points of every run from [run, run] counts: how often row beat column, and how often they tied (symmetric).

    Newton's method on the log-likelihood of Davidson's model, which is concave in (log s, log ν), with half a win of
    everybody over everybody. Centred on 1000.
    """
    return _fit(wins + 0.5 * (1 - np.eye(len(wins))), ties)


def _fit(wins: np.ndarray, ties: np.ndarray) -> np.ndarray:
    count = len(wins)
    games = wins + wins.T + ties
    parameters = np.zeros(count + 1)                    # log strengths, log ν
    value = _likelihood(parameters, wins, ties, games)
    for _ in range(100):
        beats, tie = _chances(parameters)
        row = beats + tie / 2                           # expected share of the game that goes to the row
        gradient = np.append((wins + ties / 2 - games * row).sum(axis=1), (ties - games * tie).sum() / 2)
        gradient[-1] -= parameters[-1] / TIE_PRIOR**2
        curvature = np.zeros((count + 1, count + 1))
        curvature[:count, :count] = games * (tie / 4 - row * row.T)
        np.fill_diagonal(curvature, np.append((games * (beats + tie / 4 - row**2)).sum(axis=1), 0.0))
        curvature[:count, count] = curvature[count, :count] = (games * (tie / 2 - row * tie)).sum(axis=1)
        curvature[count, count] = (games * (tie - tie**2)).sum() / 2 + TIE_PRIOR**-2
        curvature[:count, :count] += 1 / count          # the one free direction: strengths have no zero of their own
        step = np.linalg.solve(curvature, gradient)
        while (ahead := _likelihood(parameters + step, wins, ties, games)) < value - 1e-12 * abs(value):
            step = step / 2
        parameters, value = parameters + step, ahead
        if np.abs(step).max() < 1e-9:
            break
    logs = parameters[:-1]
    return np.asarray(1000 + POINTS * (logs - logs.mean()))


def _chances(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[row, column] chances that row beats column, and that they tie."""
    logs, tie = parameters[:-1], parameters[-1]
    gap = logs[:, None] - logs[None, :]
    terms = np.stack([gap / 2, -gap / 2, np.full_like(gap, tie)])
    shares = np.exp(terms - terms.max(axis=0))
    shares /= shares.sum(axis=0)
    return shares[0], shares[2]


def _likelihood(parameters: np.ndarray, wins: np.ndarray, ties: np.ndarray, games: np.ndarray) -> float:
    logs, tie = parameters[:-1], parameters[-1]
    gap = logs[:, None] - logs[None, :]
    total = np.logaddexp(np.logaddexp(gap / 2, -gap / 2), tie)
    return float((wins * gap / 2).sum() + (ties.sum() * tie - (games * total).sum()) / 2 - (tie / TIE_PRIOR) ** 2 / 2)


def _games(runs: Sequence[RunScores], envs: Sequence[Identity]) -> tuple[np.ndarray, np.ndarray]:
    """[task, run, run] how often row beats column and how often they tie, per task adding up to 1 game a pair; the
    tasks of every environment together weigh the same."""
    wins, ties, sizes = [], [], []
    for env in envs:
        tables = [run.envs[env[:2]] for run in runs]
        tasks = sorted({task for table in tables for task in table})
        sizes.append(len(tasks))
        for task in tasks:
            beats, equal = np.zeros((2, len(runs), len(runs)))
            for i, mine in enumerate(tables):
                for j, theirs in enumerate(tables):
                    if i != j and task in mine and task in theirs:
                        gap = np.subtract.outer(mine[task], theirs[task])
                        beats[i, j], equal[i, j] = (gap > 0).mean(), (gap == 0).mean()
            wins.append(beats)
            ties.append(equal)
    weights = np.concatenate([np.full(size, np.mean(sizes) / size) for size in sizes])[:, None, None]
    return np.array(wins) * weights, np.array(ties) * weights


def _resampled(wins: np.ndarray, ties: np.ndarray, *key: str) -> np.ndarray:
    """[draw, run] points where tasks are weighed at random, and so are the two imaginary ones: some order of the runs,
    and its reverse."""
    random, count = generator("leaderboard", *key), wins.shape[1]
    drawn = []
    for _ in range(DRAWS):
        weights = random.standard_exponential(len(wins))
        order = random.permutation(count)
        above = (order[:, None] < order[None, :]).astype(float)
        one, other = random.standard_gamma(0.5, 2)
        imaginary = one * above + other * above.T + 1e-3 * (1 - np.eye(count))
        drawn.append(_fit(np.tensordot(weights, wins, 1) + imaginary, np.tensordot(weights, ties, 1)))
    return np.array(drawn)


def _mean(run: RunScores, envs: Sequence[Identity]) -> Estimate:
    """The equally weighed mean over environments of a run's mean over tasks."""
    columns = [np.array([[math.fsum(s) / len(s)] for _, s in sorted(run.envs[env[:2]].items())]) for env in envs]
    scale = scale_of(np.concatenate(columns))
    draws = np.mean([replicates(c, scale, *env)[:, 0] for c, env in zip(columns, envs, strict=True)], axis=0)
    mean = math.fsum(float(column.mean()) for column in columns) / len(columns)
    return from_draws(mean, draws, sum(map(len, columns)), scale)


def _identities(run: RunScores) -> Mapping[Identity, None]:
    return {(env, split, data): None for (env, split), data in run.hashes.items()}
