"""What comparisons and leaderboards need of a run: the scores of its tasks, and which of them it lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espl_envs.evaluate.config import EnvConfig, EvalConfig
from espl_envs.evaluate.directory import RunDirectory

EnvName = tuple[str, str]                   # id and split
TaskScores = dict[str, list[float]]         # task hash → scores of all samples, of all prompts


@dataclass(slots=True)
class Part:
    """One environment of a run. each: episodes that a task was to have (samples × prompts). By the task's index, where
    there are any: `scores`, `faults` (how many), `names` (its hash)."""

    env: EnvConfig
    each: int
    scores: dict[int, list[float]] = field(default_factory=dict)
    faults: Counter[int] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)

    @property
    def by_hash(self) -> TaskScores:
        """The scores by the content of the task; one whose content is not known keeps its place for a name."""
        return {self.names.get(task, f"task {task}"): found for task, found in self.scores.items()}


@dataclass(frozen=True, slots=True)
class RunScores:
    """The scores of every task by its hash, per environment; `masked` of `expected` episodes have none."""

    path: Path
    name: str
    parts: Mapping[EnvName, Part]
    envs: Mapping[EnvName, TaskScores]
    hashes: Mapping[EnvName, str]
    kwargs: Mapping[EnvName, Mapping[str, Any]]
    expected: int
    masked: int


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
    parts = _parts(config)
    for episode in directory.episodes(transcripts=False):
        part, task = parts[episode.key.env, episode.key.split], episode.key.task
        if episode.task_hash:
            part.names[task] = episode.task_hash
        if episode.score is None:
            part.faults[task] += 1
        else:
            part.scores.setdefault(task, []).append(episode.score)
    scored = sum(len(found) for part in parts.values() for found in part.scores.values())
    return RunScores(
        directory.path, name, parts,
        {env: part.by_hash for env, part in parts.items()},
        {env: part.env.data_hash for env, part in parts.items()},
        {env: part.env.kwargs for env, part in parts.items()},
        config.expected(), config.expected() - scored,
    )  # fmt: skip


def _parts(config: EvalConfig) -> dict[EnvName, Part]:
    each = config.k * max(1, len(config.system_prompts))
    return {(env.id, env.split): Part(env, each) for env in config.envs}
