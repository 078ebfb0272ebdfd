"""What the plan says a run costs: exact where settings fix it, and never less than what a real loop plays and asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hub_model import hub_model
from loop_kit import SMALL, Theatre, config, deal, run

from espl_envs.core.messages import Message
from espl_train import forecast, schedule
from espl_train.config import Config
from espl_train.evolution.reflection import PURPOSE
from espl_train.evolution.templates import TemplateSet
from espl_train.forecast import Forecast
from espl_train.problems import ProblemSets
from espl_train.reflecting.client import Client
from espl_train.settings import ConfigError, load

ENGLISH = TemplateSet.load("english")
SIZES = [{"train": 2000, "validation": 500, "test": 1000}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


def known(sizes: Sequence[Any] = SIZES, **settings: Any) -> Forecast:
    return Forecast(load(overrides={key.replace("__", "."): v for key, v in settings.items()}), sizes, ENGLISH)


def answer_by_hand(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Every critique brings another principle, every revision refuses to be read once, so that all is repaired."""
    asked: Counter[str] = Counter()

    async def complete(self: object, messages: Sequence[Message], seed: int) -> str:
        del self, messages
        asked[PURPOSE.get().stage] += 1
        word = "".join(chr(ord("a") + int(digit)) for digit in str(seed)[:9])
        if PURPOSE.get().stage in ("critique", "crossover"):
            return f'[{{"op": "add", "text": "Look {word} over."}}]'
        return "A summary." if PURPOSE.get().stage == "summary" else "no list" if seed % 2 else "[]"

    monkeypatch.setattr(Client, "complete", complete)
    return asked


EVERYTHING = {
    "evolution.acceptance": "minibatch", "evolution.prune_probability": 1.0, "evolution.immigrant_probability": 1.0,
    "evolution.crossover_probability": 1.0, "evolution.mutations": 2, "evolution.selection": "pareto",
    "evolution.pareto_scores": "validation", "evaluation.every": 1, "evolution.root": ("Be exact.", "Draw."),
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {**EVERYTHING, "steps": 3},
        {**EVERYTHING, "steps": 9, "schedule": "alternating", "schedule_period": 1, "budget_rollouts": 99,
         "rollout.dynamic_rounds": 1, "learner.mode": "lora"},
        {"steps": 2, "mode": "rl"},
    ],
)  # fmt: skip
def test_a_run_costs_what_the_plan_says_at_most(
    changes: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theatre: Theatre = deal(monkeypatch, lambda key, _: float(key.sample % 2 or key.split.startswith("trial")))
    asked = answer_by_hand(monkeypatch)
    settings = config(model, tmp_path / "run", **changes)
    sets = ProblemSets.of(settings.env)
    plan = Forecast(settings, [{problems.part: len(problems) for problems in sets}], ENGLISH)
    trainer, _ = run(settings)
    totals = trainer.totals
    if settings.budget_rollouts is None and not settings.rollout.dynamic_rounds:
        assert totals.rollouts == plan.training and trainer.step == plan.steps
    assert totals.rollouts <= plan.training and trainer.step <= plan.steps
    assert totals.trial_rollouts <= plan.tried and totals.validation_rollouts <= plan.validation
    tested = sum(len(play.jobs) for play in theatre.plays if play.jobs[0].key.split == "test")
    played = totals.rollouts + totals.trial_rollouts + totals.validation_rollouts + tested
    assert tested <= plan.test and played <= plan.rollouts and asked.total() <= plan.asked
    breeds = settings.mode != "rl"
    assert bool(totals.trial_rollouts) == bool(plan.tried) == bool(asked) == bool(plan.asked) == breeds
    if breeds:
        assert set(asked) <= {*plan.calls, "repair"} and len(trainer.islands[0].population) > 2


def test_the_parts_of_a_plan_by_hand() -> None:
    plain = known(steps=10, rollout__prompts=2, rollout__problems=3, rollout__samples=4, evaluation__every=3,
                  evaluation__temperature=0.0)
    assert (plain.step, plain.training, plain.trials, plain.tried) == (24, 240, {}, 0)
    assert plain.validations == 5 and plain.validation == (1 + 3 * 2 + 4) * 100 and plain.test == 4 * 200
    cases = min(4 * 8, 3 * 20)                  # problems that reflection is shown
    assert plain.calls == {"summary": cases * 8, "critique": 8 * 2, "revision": 2, "crossover": 2}
    assert plain.rollouts == 240 + 1100 + 800
    tried = known(steps=10, rollout__problems=3, evolution__acceptance="best", evolution__acceptance_samples=2,
                  evolution__mutations=3, evolution__acceptance_problems=2)
    assert tried.trials == {"acceptance": (3 + 1) * 2 * 2} and tried.tried == 160
    assert known(evolution__twin_problems=5, rollout__samples=8).check == 4 * 5 * 8
    assert known(reflection__max_calls=7).asked == 7
    assert known(mode="evolution").test == 2 * 200 and known(mode="rl").test == 2 * 200
    assert known(mode="rl").calls == {} and known(mode="rl").asked == 0


def test_a_budget_bounds_steps_and_rollouts_and_small_sets_bound_batches() -> None:
    short = known(steps=1000, budget_rollouts=500, rollout__problems=10, rollout__prompts=3, rollout__samples=8)
    assert short.steps == 3 and short.training == 3 * 240 and short.rounds == 1
    small = known([{"train": 4, "validation": 2, "test": 3}], steps=5, rollout__problems=10, evaluation__every=0)
    assert small.step == 3 * 4 * 8 and small.validation == (1 + 4) * 2 and small.test == 4 * 3
    assert known(steps=10**9).steps == 10**9        # at once


def test_several_environments_are_counted_together() -> None:
    both = {"envs__a__id": "espl/Conventions-v0", "envs__b__id": "espl/Countdown-v0"}
    plan = known([*SIZES, {"train": 50, "validation": 20, "test": 30}], evolution__migration=0.5,
                 evolution__acceptance="minibatch", evolution__acceptance_samples=1, **both)
    assert plan.trials["acceptance"] == (1 + 1 + 1) * 10 and plan.test == 4 * (200 + 30)
    assert plan.calls["revision"] == 2 * 2


def test_the_rows_say_all_of_it() -> None:
    chosen = load(overrides={
        "evolution.acceptance": "minibatch", "evolution.twin_problems": 5, "budget_rollouts": 5000, "steps": 100
    })  # fmt: skip
    rows = dict(forecast.rows(chosen, SIZES, ENGLISH))
    assert rows["  trials"].startswith("at most 480 rollouts a step (480 acceptance), ")
    assert "256 summary, 16 critique, 2 revision, 2 crossover" in rows["  reflection"]
    assert rows["  budget"] == "ends after the step that brings training and trials to 5,000 rollouts"
    assert rows["all"].startswith("at most 21 steps, at most ") and rows["  twins"].startswith("160 rollouts more")
    assert "at most" in rows["final test"] and rows["in all"].endswith("checks with twins aside")


@pytest.mark.parametrize("kind", ["joint", "sequential", "weights_then_prompts", "alternating"])
def test_schedules_are_counted_without_going_through_them(kind: str) -> None:
    for steps in range(2, 23):
        for period, share in ((1, 0.1), (2, 0.5), (5, 0.9)):
            try:
                chosen = load(overrides={
                    "steps": steps, "schedule": kind, "schedule_period": period, "schedule_share": share
                })  # fmt: skip
            except ConfigError:
                continue
            phases = [schedule.phase(chosen, step) for step in range(1, steps + 1)]
            assert schedule.counts(chosen) == (sum(p.breeds for p in phases), sum(p.learns for p in phases))
            turns = sum(a.breeds and b == schedule.WEIGHTS for a, b in pairwise(phases))
            assert schedule.handovers(chosen, steps) == turns
    assert SMALL["steps"] == 2 and schedule.counts(Config(steps=7, mode="rl")) == (0, 7)
