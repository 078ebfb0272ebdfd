"""Baselines over the same loop: who plays, who is the answer, what is counted, and when a budget of rollouts ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from evolution_cases import batch
from hub_model import hub_model
from loop_kit import Theatre, breed_simply, config, deal, resume, run

from espl_envs.core.tasks import Task
from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution.acceptance import decide
from espl_train.evolution.breeding import Breeder, BreedingReport
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle
from espl_train.evolution.ratings import scores
from espl_train.loop import Trainer
from espl_train.randomness import generator
from espl_train.records import Group, RolloutKey
from espl_train.runs.metrics import read_lines
from espl_train.settings import load
from espl_train.trials import Trials

GEPA = EvolutionConfig(selection="pareto", pareto_scores="validation", newest=False, elite=False, root_anchor=False)
TINY = {"steps": 3, "rollout.problems": 2, "rollout.samples": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


def people(settings: EvolutionConfig, children: int) -> Population:
    found = Population(settings, RatingConfig(), seed=0)
    for step in range(1, children + 1):
        found.add([Child((Principle("G1", f"Rule {step}."),), "mutation", ("p0000",), 1)], step)
    return found


def plays(population: Population) -> dict[str, int]:
    """How often each plays in 200 iterations that have one place."""
    chosen = [next(iter(population.select(step, 1, 4))) for step in range(200)]
    return {prompt: chosen.count(prompt) for prompt in sorted(set(chosen))}


def test_gepa_draws_parents_in_proportion_to_the_validation_problems_that_they_are_best_on() -> None:
    population = people(GEPA, 2)
    population.score(0, batch(p0000=[[1], [0], [0], [0], [0]]))
    population.score(1, batch(p0001=[[0], [1], [1], [1], [0]], p0002=[[0], [0], [0], [0], [0]]))
    drawn = plays(population)
    assert drawn.keys() == {"p0000", "p0001"}, "who is the best on no problem is no parent"
    assert 25 <= drawn["p0000"] <= 80, "one win out of four"


def test_training_batches_are_no_part_of_that_frontier_and_it_forgets_nothing() -> None:
    population = people(GEPA, 1)
    population.score(0, batch(p0000=[[1]], p0001=[[0]]))
    for step in range(1, 40):
        population.rate(batch(step, p0000=[[0]] * 3, p0001=[[1]] * 3))
    assert plays(population) == {"p0000": 200}
    again = Population.from_json(population.to_json(), GEPA, RatingConfig(), 0)
    assert plays(again) == {"p0000": 200} and again.top(2) == population.top(2) == ["p0000", "p0001"]


def test_the_frontier_of_batches_is_what_it_was() -> None:
    usual = EvolutionConfig(selection="pareto", newest=False, elite=False, root_anchor=False)
    population = people(usual, 1)
    population.score(0, batch(p0000=[[1]], p0001=[[0]]))
    population.rate(batch(1, p0000=[[0]] * 3, p0001=[[1]] * 3))
    assert plays(population) == {"p0001": 200}


def test_the_answer_of_a_pool_is_the_best_mean_and_that_of_a_climb_the_newest() -> None:
    pool = people(GEPA, 2)
    pool.score(1, batch(p0000=[[1], [0]], p0001=[[1], [1]], p0002=[[0], [1]]))
    assert pool.top(3) == ["p0001", "p0002", "p0000"]
    climb = people(EvolutionConfig(acceptance="minibatch"), 2)
    assert climb.top(2) == ["p0002", "p0001"] and people(EvolutionConfig(), 2).top(2) == ["p0000"]


def test_one_prompt_climbs() -> None:
    settings = load(["reflective_evolution"]).evolution
    assert plays(people(settings, 3)) == {"p0003": 200}


def good(key: RolloutKey, policy: int | None) -> float:
    """Even children are better than odd ones in trials and on validation; training has contrast everywhere."""
    del policy
    return float(key.sample % 2) if key.split == "train" else float(int(key.prompt[-1]) % 2 == 0)


def breed_and_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child a step, named by the step, which enters by the configured acceptance."""

    async def breed(
        self: Breeder, step: int, population: Population, groups: Sequence[Group], tasks: Mapping[int, Task],
        complete: object, trial: Trials, closed: object = None,
    ) -> BreedingReport:
        del population, tasks, complete, closed
        parent = groups[0].prompt
        child = Child((Principle("G1", f"Rule of step {step}."),), "mutation", (parent,), 1)
        problems = sorted({group.task for group in groups})
        random = generator(step)
        found = await decide({f"c{step}": child}, scores(groups), problems, trial, self._config, random)
        children = () if any(d.refused for d in found.values()) else (child,)
        return BreedingReport(children, [], 0, {}, 0)

    monkeypatch.setattr(Breeder, "breed", breed)


def test_gepa_plays_its_newborn_once_counts_it_and_goes_on_from_a_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theatre = deal(monkeypatch, good)
    breed_and_try(monkeypatch)
    preset: dict[str, Any] = {
        **TINY, "steps": 4, "mode": "evolution", "rollout.prompts": 1,
        **{f"evolution.{k}": getattr(load(["gepa"]).evolution, k) for k in (
            "selection", "pareto_scores", "window", "capacity", "elite", "root_anchor", "newest", "acceptance",
            "crossover_probability",
        )},
    }  # fmt: skip
    trainer, _ = run(config(model, tmp_path / "whole", **preset))
    assert {m.prompt.id for m in trainer.islands[0].population.members} == {"p0000", "p0001", "p0002"}
    records = list(read_lines(tmp_path / "whole" / "metrics.jsonl"))
    assert [r.get("trials/rollouts") for r in records] == [None, 4, 4 + 3, 4, 4 + 3]
    assert trainer.totals.trial_rollouts == 22 and trainer.totals.rollouts == 4 * 4 == trainer.totals.used - 22
    assert theatre.updates == []
    original = Trainer.iterate

    def iterate(self: Trainer) -> object:
        if self.step == 2:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "iterate", iterate)
        run(config(model, tmp_path / "stopped", **preset))
    again, _ = resume(tmp_path / "stopped")
    assert again.islands[0].state() == trainer.islands[0].state()
    assert again.totals.trial_rollouts == 22


@pytest.mark.parametrize(("budget", "steps"), [(1, 1), (12, 1), (13, 2), (1000, 3)])
def test_a_budget_ends_the_run_after_the_step_that_reaches_it(
    budget: int, steps: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of training is 2 problems x 3 prompts x 2 samples; the run ends as any other does."""
    breed_simply(monkeypatch)
    theatre: Theatre = deal(monkeypatch)
    trainer, summary = run(config(model, tmp_path / "run", budget_rollouts=budget, **TINY))
    assert trainer.step == summary.steps == steps
    assert "validation/rollouts" in list(read_lines(tmp_path / "run" / "metrics.jsonl"))[-1]
    assert theatre.journal[-1] == "play test"
    (totals,) = [e for e in read_lines(tmp_path / "run" / "events.jsonl") if e["kind"] == "totals"]
    assert totals["rollouts"] == 12 * steps and totals["validation_rollouts"] > 0
    assert any("of training" in note for note in summary.notes)
    again, _ = resume(tmp_path / "run", budget_rollouts=budget + 12)
    assert again.step == min(steps + 1, 3), "a larger budget goes on"
