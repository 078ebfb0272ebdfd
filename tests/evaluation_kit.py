"""Runs of espl-eval made by hand: what every episode was worth is given, the rest is filled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from espl_envs.core.messages import Message
from espl_envs.evaluate.config import AgentConfig, EnvConfig, EvalConfig
from espl_envs.evaluate.directory import RunDirectory
from espl_envs.evaluate.records import Episode, EpisodeKey, Outcome, TurnUsage

ENV = "espl/Countdown-v0"
Scores = Mapping[str, Sequence[Sequence[float | None]]]     # environment → task → sample → score, None for a fault


def episode(key: EpisodeKey, score: float | None = 1.0, **fields: Any) -> Episode:
    """An episode worth `score`; a fault where it is None. The task's hash follows from its index."""
    outcome = Outcome.FAULT if score is None else Outcome.ANSWERED
    filled: dict[str, Any] = {
        "task_id": f"task-{key.task}", "task_hash": f"{key.env}/{key.task}", "outcome": outcome, "score": score,
        "reward": score, "stop_reason": "answer", "answer": "42", "reference": "42", "seconds": 2.0,
        "messages": (Message("user", "What is it?"), Message("assistant", r"\boxed{42}")),
        "turns": (TurnUsage(100, 10, 0, 1.5),), "started": "2026-01-02T03:04:05+00:00",
        "error": "The endpoint was away." if score is None else None,
    }  # fmt: skip
    return Episode(key, **(filled | fields))


def config(scores: Scores, name: str = "agent", k: int | None = None, **fields: Any) -> EvalConfig:
    """The configuration to which `scores` belong; every environment's data hash is its name."""
    envs = tuple(EnvConfig(env, "test", len(tasks), 100, f"data of {env}") for env, tasks in scores.items())
    most = max((len(task) for tasks in scores.values() for task in tasks), default=0) or 1
    return EvalConfig(envs, AgentConfig("callable", name), k or most, **fields)


def write_run(
    path: Path,
    scores: Scores,
    name: str = "agent",
    change: Callable[[Episode], Episode] = lambda episode: episode,
    **fields: Any,
) -> Path:
    """A run on disk: one episode per score (samples of all system prompts in a row), passed through `change`."""
    settings = config(scores, name, **fields)
    with RunDirectory.create(path, settings) as run:
        for key in settings.keys():  # noqa: SIM118
            samples = scores[key.env][key.task]
            number = key.system_prompt * settings.k + key.sample
            if number < len(samples):
                run.append(change(episode(key, samples[number])))
    return path
