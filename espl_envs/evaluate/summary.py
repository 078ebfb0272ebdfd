"""`summary.json`: what a run came to, per environment and as one headline.

The headline `mean` is the mean over environments, equally weighed, of the mean over tasks of the mean over samples (and
over system prompts, where there are several). Faulted and missing episodes are masked: never a 0, and while they are
more than 1 % of an environment there is no score at all, unless `allow_faults` says that it may be partial.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from espl_envs.evaluate.config import EnvConfig, EvalConfig
from espl_envs.evaluate.directory import RunDirectory
from espl_envs.evaluate.intervals import (
    UNIT,
    Bounds,
    Estimate,
    estimates,
    from_draws,
    prompt_spread,
    replicates,
    scale_of,
)
from espl_envs.evaluate.metrics import (
    Sample,
    budget_grid,
    chance,
    majority,
    mean_score,
    pass_at_k,
    pass_hat_k,
    share,
    sizes_of_k,
    within_budget,
)
from espl_envs.evaluate.records import Episode, Outcome

Name = tuple[str, int | str]
Column = Callable[[list[Sample]], float]
FORMAT = 1
SUMMARY = "summary.json"
MOST_MASKED = 0.01
OUTCOMES = (Outcome.ANSWERED, Outcome.NO_ANSWER, Outcome.TRUNCATED, Outcome.AGENT_ERROR)
BUDGETS = ("completion_tokens", "tool_calls")


@dataclass(frozen=True, slots=True)
class Summary:
    """What `summary.json` holds. `mean` is the headline, None where it is refused; `refused` says why."""

    run: Path
    data: Mapping[str, Any]

    @property
    def mean(self) -> float | None:
        mean: float | None = self.data["mean"]
        return mean

    @property
    def refused(self) -> str | None:
        refused: str | None = self.data["refused"]
        return refused

    def to_json(self) -> Mapping[str, Any]:
        return self.data

    def __rich__(self) -> Any:
        from espl_envs.evaluate.tables import summary_table

        return summary_table(self)

    def __str__(self) -> str:
        from espl_envs.evaluate.tables import plain_text

        return plain_text(self)


@dataclass(slots=True)
class _Part:
    """One environment of a run: its scored samples by task and prompt, and how many episodes are faults."""

    env: EnvConfig
    expected: int
    cells: dict[int, dict[int, list[Sample]]] = field(default_factory=dict)
    stops: Counter[str] = field(default_factory=Counter)
    faults: int = 0

    @property
    def samples(self) -> list[Sample]:
        return [sample for prompts in self.cells.values() for cell in prompts.values() for sample in cell]

    def add(self, episode: Episode) -> None:
        if episode.outcome is Outcome.FAULT:
            self.faults += 1
            return
        key = episode.key
        self.cells.setdefault(key.task, {}).setdefault(key.system_prompt, []).append(Sample.of(episode))
        self.stops[episode.stop_reason] += 1

    def estimated(self, columns: Mapping[Name, Column], bounds: Bounds) -> dict[Name, Estimate | None]:
        """Every column with its interval, all of them resampled together."""
        values = self.values(columns.values())
        draws = replicates(values, bounds, self.env.id, self.env.split, self.env.data_hash)
        return dict(zip(columns, estimates(values, draws, bounds), strict=True))

    def values(self, columns: Iterable[Column]) -> np.ndarray:
        """[tasks, columns]: the mean over prompts of a column's value; NaN where there is none."""
        functions = list(columns)
        return np.array([
            [_known_mean([function(cell) for cell in prompts.values()]) for function in functions]
            for _, prompts in sorted(self.cells.items())
        ])  # fmt: skip


def summarise(run: Path | RunDirectory, *, allow_faults: bool = False) -> Summary:
    """Compute the summary of a run and write `summary.json`. Raises RunError where there is no run."""
    directory = run if isinstance(run, RunDirectory) else RunDirectory.read(run)
    data = summary_of(directory, allow_faults)
    directory.write_json(SUMMARY, data)
    return Summary(directory.path, data)


def summary_of(
    directory: RunDirectory, allow_faults: bool = False, episodes: Sequence[Episode] | None = None
) -> dict[str, Any]:
    """The content of `summary.json`; nothing is written. `episodes`: all of the run's, where somebody has them."""
    config = directory.config
    if episodes is None:
        episodes = list(directory.episodes(transcripts=False))
    parts = {(env.id, env.split): _Part(env, config.expected(env)) for env in config.envs}
    for episode in episodes:
        parts[episode.key.env, episode.key.split].add(episode)
    envs = [_environment(part, config, allow_faults) for part in parts.values()]
    refused = "; ".join(f"{env['id']}: {env['refused']}" for env in envs if env["refused"]) or None
    headline = None if refused or not envs else _headline(list(parts.values()))
    masked = {name: sum(env["episodes"][name] for env in envs) for name in ("expected", "scored", "faults", "missing")}
    return {
        "format": FORMAT, "agent": config.agent.name, "model": config.agent.model,
        "agent_files": dict(config.agent.files), "agent_changed": config.agent.changed,
        **_interval(headline), "refused": refused, "partial": masked["scored"] < masked["expected"],
        "k": config.k, "tasks": sum(env["tasks"] for env in envs), "prompts": max(1, len(config.system_prompts)),
        "episodes": masked, "damaged_lines": directory.damaged,
        "envs": envs,
        "usage": _usage(episodes, config.prices.currency if config.prices else None),
        "errors": _errors(episodes),
        "suite": config.suite, "started": config.started,
    }  # fmt: skip


def _environment(part: _Part, config: EvalConfig, allow_faults: bool) -> dict[str, Any]:
    env, samples = part.env, part.samples
    missing = part.expected - len(samples) - part.faults
    refused = _refusal(part.expected, part.faults, missing, len(samples), allow_faults)
    outcomes = Counter(sample.outcome for sample in samples)
    result = {
        "id": env.id, "split": env.split, "data_hash": env.data_hash, "kwargs": dict(env.kwargs),
        "tasks": env.tasks, "size": env.size,
        "episodes": {"expected": part.expected, "scored": len(samples), "faults": part.faults, "missing": missing},
        "outcomes": {str(outcome): outcomes[outcome] for outcome in OUTCOMES},
        "stop_reasons": dict(part.stops.most_common()),
        "fault_rate": part.faults / part.expected if part.expected else 0.0,
        "refused": refused,
        **_interval(None),
    }  # fmt: skip
    return result if refused else result | _scores(part, config.k, len(config.system_prompts))


def _refusal(expected: int, faults: int, missing: int, scored: int, allow_faults: bool) -> str | None:
    if not scored:
        return f"none of {expected} episodes has a score"
    if allow_faults or faults + missing <= MOST_MASKED * expected:
        return None
    what = " and ".join(f"{count} {name}" for count, name in ((faults, "faulted"), (missing, "missing")) if count)
    return f"{what} of {expected} episodes, and a score needs 99 % of them: resume the run, or allow faults"


def _scores(part: _Part, k: int, prompts: int) -> dict[str, Any]:
    """Everything that is a mean over tasks, each with its interval."""
    samples, sizes = part.samples, sizes_of_k(k)
    scale = scale_of([sample.score for sample in samples])
    spent = {unit: [getattr(sample, unit) for sample in samples] for unit in BUDGETS}
    grids = {unit: budget_grid(min(values), max(values)) for unit, values in spent.items() if None not in values}
    worth: dict[Name, Column] = {("mean", 0): mean_score}
    worth |= {("maj@k", size): partial(majority, size) for size in sizes}
    worth |= {(unit, b): partial(within_budget, unit, b) for unit, grid in grids.items() for b in grid}
    shares: dict[Name, Column] = {("rates", str(outcome)): partial(share, outcome) for outcome in OUTCOMES}
    shares |= {("pass@k", size): partial(chance, pass_at_k, size) for size in sizes}
    shares |= {("pass^k", size): partial(chance, pass_hat_k, size) for size in sizes}
    found = part.estimated(worth, scale) | part.estimated(shares, UNIT)

    def group(wanted: str) -> dict[str, Any]:
        return {str(label): _interval(found[name, label], True) for name, label in found if name == wanted}

    return {
        **_interval(found["mean", 0]),
        **{name: group(name) for name in ("pass@k", "pass^k", "maj@k", "rates")},
        "budgets": {unit: group(unit) if unit in grids else None for unit in BUDGETS},
        "prompt_sensitivity": _sensitivity(part, prompts) if prompts > 1 else None,
    }


def _headline(parts: Sequence[_Part]) -> Estimate:
    """The equally weighed mean over environments; they are resampled independently of each other."""
    columns = [part.values([mean_score]) for part in parts]
    scale = scale_of(np.concatenate(columns))
    draws = [
        replicates(values, scale, part.env.id, part.env.split, part.env.data_hash)[:, 0]
        for values, part in zip(columns, parts, strict=True)
    ]
    mean = math.fsum(math.fsum(values[:, 0]) / len(values) for values in columns) / len(columns)
    return from_draws(mean, np.mean(draws, axis=0), sum(map(len, columns)), scale)


def _sensitivity(part: _Part, prompts: int) -> dict[str, Any] | None:
    """Per prompt and between prompts, on the tasks that have a score under every prompt; None where there are none."""
    shared = [by_prompt for _, by_prompt in sorted(part.cells.items()) if len(by_prompt) == prompts]
    if not shared:
        return None
    cells = np.array([[mean_score(by_prompt[prompt]) for by_prompt in shared] for prompt in range(prompts)])
    scale = scale_of(cells)
    found = estimates(cells.T, replicates(cells.T, scale, part.env.id, part.env.split, part.env.data_hash), scale)
    return {"prompts": [_interval(e, True) for e in found], "tasks": len(shared), **prompt_spread(cells, part.env.id)}


def _usage(episodes: Sequence[Episode], currency: str | None) -> dict[str, Any]:
    """Tokens, tool calls, money and time of all episodes that are there, faults included: they were paid for, too."""
    right = sum(episode.score is not None and episode.score >= 1 for episode in episodes)
    cost = _spread(episode.cost for episode in episodes)
    each = cost["total"] / right if right and cost["total"] is not None else None
    ends = [(at, at + e.seconds) for e in episodes if (at := _timestamp(e.started)) is not None]
    return {
        "episodes": len(episodes),
        "calls": sum(len(episode.turns) for episode in episodes),
        "attempts": sum(episode.attempts for episode in episodes),
        "prompt_tokens": _spread(episode.prompt_tokens for episode in episodes),
        "completion_tokens": _spread(episode.completion_tokens for episode in episodes),
        "tool_calls": _spread(episode.tool_calls for episode in episodes),
        "seconds": _spread(episode.seconds for episode in episodes),
        "elapsed_seconds": max(end for _, end in ends) - min(start for start, _ in ends) if ends else None,
        "cost": {"currency": currency, "per_right": each, **cost} if currency else None,
    }


def _spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Total, mean and quantiles of what is known, and how many values are not. Where some are not, nothing but zeros
    (of episodes that failed before they cost anything) is nothing known."""
    listed = list(values)
    known = sorted(value for value in listed if value is not None)
    if not known or (len(known) < len(listed) and not any(known)):
        return {"total": None, "mean": None, "median": None, "p95": None, "max": None, "unknown": len(listed)}
    return {
        "total": sum(known), "mean": sum(known) / len(known), "median": statistics.median(known),
        "p95": known[math.ceil(0.95 * len(known)) - 1], "max": known[-1], "unknown": len(listed) - len(known),
    }  # fmt: skip


def _errors(episodes: Sequence[Episode], most: int = 10) -> list[dict[str, Any]]:
    """What went wrong, most frequent first."""
    counted = Counter((str(episode.outcome), episode.error) for episode in episodes if episode.error)
    return [{"outcome": outcome, "error": error, "count": n} for (outcome, error), n in counted.most_common(most)]


def _interval(estimate: Estimate | None, tasks: bool = False) -> dict[str, Any]:
    """mean, low, high, and over how many tasks if asked for; nulls where there is no estimate."""
    values = estimate.to_json() if estimate else {"mean": None, "low": None, "high": None, "tasks": 0}
    return values if tasks else {name: values[name] for name in ("mean", "low", "high")}


def _known_mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _timestamp(started: str) -> float | None:
    try:
        return datetime.fromisoformat(started).timestamp()
    except ValueError:
        return None
