"""Runs on disk as the trainer leaves them, without the training: real weights, a real population, dealt scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from learner_kit import shake

from espl_train.config import Config
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle
from espl_train.learner.policy import Policy
from espl_train.problems import ProblemSets
from espl_train.runs import seal
from espl_train.runs.directory import RunDirectory
from espl_train.settings import load
from espl_train.totals import Totals

PARITY: dict[str, Any] = {
    "env.id": "espl_parity:espl-test/Parity-v0", "steps": 2, "tensorboard": False, "learner.rank": 4,
    "evaluation.test_problems": 4, "evaluation.problems": 3, "rollout.max_new_tokens": 6,
}  # fmt: skip


def write_run(
    model: Path, out: Path, principles: tuple[str, ...] = ("Write two words.",), size: float = 0.1, seed: int = 7,
    **changes: Any,
) -> tuple[Config, Policy, Population]:
    """A finished run of two steps: a child was born in the first one and chosen at the end, the weights were moved by
    `size` (0 trains nothing). Returns what it was made of."""
    config = load(overrides={**PARITY, "model.path": str(model), "out": str(out), **changes})
    policy = Policy.load(config.model, config.learner, config.seed)
    population = Population(config.evolution, config.rating, config.seed)
    with RunDirectory.create(config) as run:
        for problems in ProblemSets.of(config.env):
            run.log.event(0, "problems", **problems.facts())
        run.log.metrics({"step": 0, "best": "p0000", **_validated("p0000", 0.25)})
        _save(run, 0, policy, population)
        child = Child(tuple(Principle(f"G{i}", text) for i, text in enumerate(principles, 1)), "mutation", ("p0000",))
        for step in range(1, config.steps + 1):
            if step == 1 and config.mode != "rl" and principles:
                population.add([child], step)
            if size and config.mode != "evolution":
                shake(policy, size, seed + step)
                policy.advance(step)
            last = step == config.steps
            best = population.members[-1].prompt.id if last else "p0000"
            run.log.metrics({"step": step, "best": best, **(_validated(best, 0.75) if last else {})})
            _save(run, step, policy, population)
        seal.open_seal(out, seal.Opening(config.steps))
        policy.save_adapter(out / "policy")
    return config, policy, population


def _validated(prompt: str, mean: float) -> dict[str, float]:
    key = f"validation/{prompt}"
    return {key: mean, f"{key}/low": mean - 0.125, f"{key}/high": mean + 0.125, "validation/count": 3}


def _save(run: RunDirectory, step: int, policy: Policy, population: Population) -> None:
    islands = {"": {"population": population.to_json(), "chosen": None}}
    state = {"islands": islands, "totals": Totals().to_json()}
    run.save(step, {"state": state, "learner": {"policy": policy.state(), "version": policy.version}})
