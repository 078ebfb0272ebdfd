"""The operators: every way to a child by its name, and what an operator sees of a step.

A new one is a function of a `Scene` and its line in `OPERATORS`; its name stands in `prompts.py`. Each brings a child
or the reason why there is none, and knows nothing of the others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from espl_envs.core.tasks import Task
from espl_train.config import EvolutionConfig
from espl_train.evolution.crossover import cross
from espl_train.evolution.edits import Limits
from espl_train.evolution.encounters import Encounter
from espl_train.evolution.evidence import Contrast
from espl_train.evolution.immigrant import immigrate
from espl_train.evolution.migration import Harbour, migrate
from espl_train.evolution.mutation import mutate
from espl_train.evolution.prompts import Child, Operator, SystemPrompt
from espl_train.evolution.prune import Trial, prune
from espl_train.evolution.reflection import Reflector
from espl_train.evolution.rejections import Reason, Rejection
from espl_train.randomness import generator


@dataclass(frozen=True, slots=True)
class Scene:
    """What an operator sees of a step. Population and ratings are as they were before the batch was counted."""

    step: int
    seed: int
    best: SystemPrompt                          # once the batch is counted
    root: SystemPrompt
    others: tuple[SystemPrompt, ...]            # everybody alive but the best
    contrasts: Sequence[Contrast]
    encounters: Sequence[Encounter]             # where the best one met the others
    tasks: Mapping[int, Task]
    rollouts: int                               # of the batch
    taken: Mapping[frozenset[str], str]         # fingerprints of everybody alive
    config: EvolutionConfig
    limits: Limits
    reflector: Reflector
    trial: Trial | None
    harbour: Harbour
    events: list[dict[str, Any]]                # an operator's own, for the log

    def again(self, number: int) -> Scene:
        """The same scene for one more try: the same evidence, and a reflector that says something else."""
        return replace(self, reflector=self.reflector.again(number)) if number else self


async def _immigrate(scene: Scene) -> Child | Rejection:
    if scene.config.mutate and scene.best.id == scene.root.id:
        return Rejection(Reason.NO_RIVAL, "the root itself is the best prompt: its mutation child would be the same")
    return await immigrate(scene.root, scene.contrasts, scene.reflector, scene.config, scene.limits)


async def _prune(scene: Scene) -> Child | Rejection:
    if scene.trial is None:
        return Rejection(Reason.NO_TRIAL, "there is nobody who plays trials")
    random = generator(scene.seed, "prune", "problems", scene.step)
    problems = sorted(scene.tasks)
    return await prune(scene.best, scene.taken, problems, scene.rollouts, scene.trial, random, scene.events)


async def _migrate(scene: Scene) -> Child | Rejection:
    return migrate(scene.best, scene.harbour, scene.limits, scene.events)


async def _cross(scene: Scene) -> Child | Rejection:
    reflector, config, limits = scene.reflector, scene.config, scene.limits
    return await cross(scene.best, scene.others, scene.encounters, scene.tasks, reflector, config, limits)


async def _mutate(scene: Scene) -> Child | Rejection:
    return await mutate(scene.best, scene.contrasts, scene.reflector, scene.config, scene.limits)


@dataclass(frozen=True, slots=True)
class Way:
    """A way to a child: how likely it is in an iteration, and whether it reads attempts, which are summarised first."""

    chance: Callable[[EvolutionConfig], float]
    breed: Callable[[Scene], Awaitable[Child | Rejection]]
    reads: bool = False


# In the order of insertion: the last one is the newest of the population, who is sure to play. The others have the good
# name of their parents; an immigrant has none.
OPERATORS: dict[Operator, Way] = {
    "prune": Way(lambda config: config.prune_probability, _prune),
    "migration": Way(lambda config: config.migration, _migrate),
    "crossover": Way(lambda config: config.crossover_probability, _cross),
    "mutation": Way(lambda config: float(config.mutate), _mutate, reads=True),
    "immigrant": Way(lambda config: config.immigrant_probability, _immigrate, reads=True),
}
