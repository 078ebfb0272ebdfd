"""For the tests of the loop: a whole trainer on a small model from a folder; its episodes are dealt, not played."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from espl_envs.core.messages import Message
from espl_envs.core.tasks import Task
from espl_train import island
from espl_train.config import Config
from espl_train.evolution.breeding import Breeder, BreedingReport
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle
from espl_train.learner.update import Learner
from espl_train.loop import Trainer
from espl_train.records import Group, Rollout, RolloutKey, StopReason, Turn
from espl_train.rollout import Collector, Job
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory
from espl_train.runs.metrics import RunLog
from espl_train.runs.summary import Summary
from espl_train.settings import load

Reward = Callable[[RolloutKey, int | None], float]

SMALL: dict[str, Any] = {
    "env.id": "espl_parity:espl-test/Parity-v0", "steps": 2, "tensorboard": False, "rollout.problems": 2,
    "rollout.samples": 2, "rollout.prompts": 3, "evaluation.every": 0, "evaluation.problems": 3,
    "evaluation.test_problems": 4, "learner.learning_rate": 1e-3, "learner.rank": 4,
}  # fmt: skip


def by_turns(key: RolloutKey, policy: int | None) -> float:
    """Every group has contrast, and a newer prompt is the better one in training."""
    del policy
    return 10.0 * int(key.prompt[1:]) + key.sample % 2


@dataclass(frozen=True)
class Play:
    """One call of `acollect`, as it would have been played."""

    split: str              # of the environment, not of the key
    policy: int | None
    temperature: float | None
    jobs: Sequence[Job]
    rollouts: Sequence[Rollout]

    @property
    def prompts(self) -> list[str]:
        return list(dict.fromkeys(job.key.prompt for job in self.jobs))

    @property
    def tasks(self) -> list[int]:
        return list(dict.fromkeys(job.key.task for job in self.jobs))


@dataclass
class Theatre:
    """What happened, in order: `journal` by name, `plays` and `updates` in full."""

    journal: list[str] = field(default_factory=list)
    plays: list[Play] = field(default_factory=list)
    updates: list[Sequence[Group]] = field(default_factory=list)

    def of(self, split: str) -> list[Play]:
        return [play for play in self.plays if play.split == split]


def dealt(job: Job, reward: float, policy: int | None) -> Rollout:
    """An episode of one turn of two tokens."""
    turn = Turn((3, 4), (10 + job.key.sample % 9, 11), (-5.5, -5.5))
    messages = (Message("user", "Write."), Message("assistant", f"reply {job.key.sample}"))
    task_id = f"{job.key.split}-{job.key.task}"
    return Rollout(job.key, task_id, (turn,), messages, reward, StopReason.ANSWER, policy or 0)


def deal(monkeypatch: pytest.MonkeyPatch, reward: Reward = by_turns) -> Theatre:
    """From now on collectors deal the rewards that `reward` says, and everything that a step does is written down."""
    theatre = Theatre()

    async def acollect(
        self: Collector, jobs: Sequence[Job], policy: int | None, temperature: float | None = None,
        progress: object = None, top_p: float | None = None, earlier: Sequence[Rollout] = (),
    ) -> list[Rollout]:
        del progress, top_p, earlier
        split = str(self._make_env().unwrapped.split)
        rollouts = [dealt(job, reward(job.key, policy), policy) for job in jobs]
        theatre.journal.append(f"play {split}")
        theatre.plays.append(Play(split, policy, temperature, jobs, rollouts))
        return rollouts

    monkeypatch.setattr(Collector, "acollect", acollect)
    noted = {
        "select": (Population, "select"), "advantages": (island, "assign"), "reflection": (Breeder, "breed"),
        "update": (Learner, "update"), "rate": (Population, "rate"), "insert": (Population, "add"),
        "rollouts": (RunDirectory, "write_rollouts"), "metrics": (RunLog, "metrics"), "save": (RunDirectory, "save"),
        "show": (Console, "step"),
    }  # fmt: skip
    for name, (owner, attribute) in noted.items():
        monkeypatch.setattr(owner, attribute, _noted(theatre, name, getattr(owner, attribute)))
    return theatre


def _noted(theatre: Theatre, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def noted(*args: Any, **settings: Any) -> Any:
        theatre.journal.append(name)
        if name == "update":
            theatre.updates.append(args[1])
        return original(*args, **settings)

    return noted


def breed_simply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reflection brings one mutation child of the root, without a model."""

    async def breed(
        self: Breeder, step: int, population: Population, groups: Sequence[Group], tasks: Mapping[int, Task],
        complete: object, *more: object,
    ) -> BreedingReport:
        del self, groups, tasks, complete, more
        child = Child((Principle("G1", f"Rule of step {step}."),), "mutation", (population.root.id,), 1)
        return BreedingReport((child,), [], 0, {}, 0)

    monkeypatch.setattr(Breeder, "breed", breed)


def config(model: Path, out: Path, **changes: Any) -> Config:
    return load(overrides={**SMALL, "model.path": str(model), "out": str(out), **changes})


def run(settings: Config) -> tuple[Trainer, Summary]:
    """A new run from beginning to end."""
    with RunDirectory.create(settings) as directory:
        trainer = Trainer(settings, directory, Console(quiet=True))
        return trainer, trainer.train()


def resume(folder: Path, **overrides: Any) -> tuple[Trainer, Summary]:
    """An existing run from where it stands to its end."""
    with RunDirectory.open(folder, overrides) as directory:
        trainer = Trainer(directory.config, directory, Console(quiet=True))
        return trainer, trainer.train()


def keys(plays: Iterable[Play]) -> list[RolloutKey]:
    return [job.key for play in plays for job in play.jobs]
