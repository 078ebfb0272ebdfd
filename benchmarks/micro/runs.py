"""One run of an arm in a world, in this process, without a trace on the disk: what it was given, and what came of it.

The trainer is the library's own, driven by its public `iterate`; a run directory exists only because a trainer wants
one, and is gone afterwards. The test split is opened once, at the end: sampled at temperature 1 and greedily, and in
the cells of the transplant matrix.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.micro.arms import ARMS, Cell
from espl_envs.tasks.conventions import oracle_principles
from espl_train.config import Config
from espl_train.evaluation import Evaluation
from espl_train.evolution.prompts import Principle
from espl_train.loop import Trainer
from espl_train.records import Rollout, RolloutKey
from espl_train.rollout import Job as Episode
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory

TESTED = 100        # test problems, the same for all arms of a world
Texts = tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """What is to be run: an arm with tuned settings (`chosen`) in a cell of a world; `stage` says what for.

    `transplant`: also measure the end's weights under no prompt, under the oracle's and, where `after` is the key of
    another job, under the prompt which that one ended with.
    """

    stage: str
    arm: str
    world: int
    cell: Cell
    chosen: Mapping[str, Any] = field(default_factory=dict)
    transplant: bool = False
    after: str | None = None
    steps: int | None = None

    @property
    def key(self) -> str:
        """Its name in the record."""
        tuned = ",".join(f"{name}={value}" for name, value in sorted(self.chosen.items()))
        dials = f"{self.cell.declarative:g}/{self.cell.procedural:g}"
        return f"{self.stage}|{self.arm}|{self.world}|{dials}|{tuned}|{self.steps or ''}"


def run(job: Job, evolved: Texts | None = None) -> dict[str, Any]:
    """The row of one run: accuracies on the test split as shares, budgets as counts."""
    started, arm = time.perf_counter(), ARMS[job.arm]
    with tempfile.TemporaryDirectory() as folder:
        chosen = {**job.chosen, **({"steps": job.steps} if job.steps else {})}
        config = arm.config(job.world, job.cell, chosen, f"{folder}/run")
        with opened(config) as trainer:
            row = trained(trainer, config.steps) if arm.trained else untrained(trainer)
            own = tuple(row["principles"])
            oracle = oracle_principles(job.world, job.cell.declarative)
            row["right"] = len(set(own) & set(oracle))
            row["greedy"] = tested(trainer, {"own": own}, arm.trained, 0.0)["own"]
            prompts = {"own": own}
            if job.transplant:
                prompts |= {"none": (), "oracle": oracle}
                prompts |= {"evolved": evolved} if evolved is not None else {}
            accuracies = tested(trainer, prompts, arm.trained, 1.0)
            row |= {"test": accuracies.pop("own"), "transplant": accuracies}
    row["seconds"] = round(time.perf_counter() - started, 1)
    return {"key": job.key, "stage": job.stage, "arm": job.arm, "world": job.world, **asdict(job.cell),
            "chosen": dict(job.chosen), "steps": config.steps if arm.trained else 0, **row}


@contextmanager
def opened(config: Config) -> Iterator[Trainer]:
    """A trainer at its start; its engine and environments are closed in the end."""
    with RunDirectory.create(config) as directory:
        trainer = Trainer(config, directory, Console(quiet=True))
        try:
            yield trainer
        finally:
            trainer.close()


def untrained(trainer: Trainer) -> dict[str, Any]:
    """Nothing happens: the root prompt on the base weights."""
    (island,) = trainer.islands
    return {"principles": list(island.population.root.texts), "rollouts": 0, "tokens": 0, "reflection_tokens": 0}


def trained(trainer: Trainer, steps: int) -> dict[str, Any]:
    """All iterations, and the prompt that validation chooses after the last one."""
    (island,) = trainer.islands
    population = island.population
    curve, best, counts = [], population.root.id, {"rollouts": 0, "tokens": 0, "reflection_tokens": 0}
    for _ in range(steps):
        leader = island.leader
        done = trainer.iterate()
        best = done.islands[island.name].best
        led = [r for r in done.rollouts if r.key.prompt == leader]
        curve.append([mean(done.rollouts), mean(led) if led else None])
        counts["rollouts"] += len(done.rollouts)
        counts["tokens"] += sum(r.sampled_tokens for r in done.rollouts)
        counts["reflection_tokens"] += done.reflection_tokens
    validation = trainer.phases.whole.get("validation")
    return {
        "principles": list(population[best].texts), "born": len(population) - 1, **counts,
        "validation_tokens": validation.tokens if validation else 0, "curve": curve,
    }  # fmt: skip


def tested(
    trainer: Trainer, prompts: Mapping[str, Texts], trained: bool, temperature: float
) -> dict[str, float]:
    """Mean reward on the same test problems under each prompt, with the weights of the end or of the base model."""
    (island,) = trainer.islands
    problems = island.sets.test
    tasks = problems.sample(trainer.config.seed, TESTED)
    texts = {name: island.templates.system(numbered(prompt)) for name, prompt in prompts.items()}
    keys = [RolloutKey(trainer.step, name, task, 0, split="test") for name in texts for task in tasks]
    trainer.engine.load_policy(trainer.policy.version)
    policy = trainer.policy.version if trained else None
    jobs = [Episode(key, texts[key.prompt]) for key in keys]
    played = island.collectors[problems.part].collect(jobs, policy, temperature)
    return {name: Evaluation.of([r for r in played if r.key.prompt == name]).mean for name in texts}


def numbered(texts: Sequence[str]) -> tuple[Principle, ...]:
    """Principles with ids, as the templates want them."""
    return tuple(Principle(f"G{i}", text) for i, text in enumerate(texts, 1))


def mean(rollouts: Sequence[Rollout]) -> float:
    """Of the rewards of those that have one."""
    rewards = [r.reward for r in rollouts if not r.faulted]
    return round(sum(rewards) / len(rewards), 4) if rewards else 0.0
