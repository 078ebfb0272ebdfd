"""Prompts that say what another one says cost no rollouts: whatever the order, the wording, and who was dropped."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from evolution_cases import ENGLISH, Scripted, batch, outcome, plan, setting, tasks

from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution.breeding import Breeder, BreedingReport
from espl_train.evolution.guards import duplicates
from espl_train.evolution.guards.duplicates import TABU, Duplicates, behaves_alike, likeness, similarity
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle, SystemPrompt

MIXED = batch(p0000=[[1, 0, 1, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Check the sign at the end.", "At the end, check the signs!"),
        ("Don't guess.", "do not guess"),
        ("Work modulo 7.", "work modulo seven"),
        ("Avoid rounding.", "Never round."),
        ("Use the calculator for every product.", "For every product, please use the calculator"),
    ],
)
def test_other_wording_is_the_same_principle(one: str, other: str) -> None:
    assert similarity(one, other) == similarity(other, one) == 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Never round.", "Round."),
        ("Do not guess.", "Guess."),
        ("Work modulo 7.", "Work modulo 9."),
        ("Subtract a from b.", "Subtract b from a."),
        ("Multiply before you add.", "Add before you multiply."),
        ("Always find the largest value and check the boundary of the interval for it.",
         "Always find the smallest value and check the boundary of the interval for it."),
        ("⊕ multiplies", "⊕ adds"),
        ("⊕ multiplies", "⊗ multiplies"),
        ("Draw.", "Draw a figure and label it."),
    ],
)
def test_another_meaning_is_another_principle(one: str, other: str) -> None:
    assert similarity(one, other) == similarity(other, one) < 0.9


def test_sets_are_alike_if_every_principle_has_its_like() -> None:
    rules = ["Check the sign.", "Draw a figure.", "Never round."]
    assert likeness(rules, ["never round", "Check the signs.", "Draw the figure!"]) == 1.0
    assert likeness(rules, ["Round.", "Check the signs.", "Draw the figure!"]) == 0.0
    assert likeness(rules, rules[:2]) == likeness(rules, [*rules, "Test small cases."]) == 0.0
    assert likeness(["Draw.", "Draw."], ["Draw.", "Guess."]) == 0.0, "one partner each"


def bred(
    people: Population, text: str, breeder: Breeder | None = None, step: int = 0, **changes: Any
) -> BreedingReport:
    config = setting(root=("Check the sign at the end.",), critiques=1, **changes)
    breeder = breeder or Breeder(config, ENGLISH, seed=1)
    model = Scripted(critique=plan({"op": "modify", "id": "G1", "text": text}))
    groups = [g for g in MIXED if g.prompt == "p0000"]
    return asyncio.run(breeder.breed(step, people, groups, tasks(4), model))


def people(**changes: Any) -> Population:
    return Population(EvolutionConfig(root=("Check the sign at the end.",), **changes), RatingConfig(), seed=1)


def test_a_child_that_only_says_it_otherwise_is_refused_before_it_plays() -> None:
    reworded = "At the end, check the signs."
    assert outcome(bred(people(), reworded)) == "duplicate_prompt"
    assert outcome(bred(people(), reworded, duplicate_similarity=1.0)) == "child", "equal texts only"
    assert outcome(bred(people(), "Never check the sign at the end.")) == "child"


def test_without_the_look_at_negation_its_opposite_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_denied", lambda _: False)
    assert outcome(bred(people(), "Never check the sign at the end.")) == "duplicate_prompt"


def test_what_was_dropped_is_tabu_for_a_while_and_over_a_resume() -> None:
    crowd = people(capacity=2, elite=False)
    config = setting(root=("Check the sign at the end.",), critiques=1)
    breeder = Breeder(config, ENGLISH, seed=1)
    crowd.add([Child((Principle("G1", "Test small cases first."),), "mutation", ("p0000",), 1)], 0)
    bred(crowd, "Compare both sides.", breeder, 0)
    crowd.add([Child((Principle("G1", "Name the unknowns."),), "mutation", ("p0000",), 1)], 1)
    assert "p0001" not in crowd
    assert outcome(bred(crowd, "Test the small case first!", breeder, 1)) == "duplicate_prompt"
    resumed = Breeder(config, ENGLISH, seed=1)
    resumed.restore(json.loads(json.dumps(breeder.state())))
    assert outcome(bred(crowd, "Test the small case first!", resumed, 2)) == "duplicate_prompt"
    assert outcome(bred(crowd, "Test the small case first!", None, 2)) == "child", "it is the memory that refuses it"


def test_the_memory_is_bounded() -> None:
    known = Duplicates(0.9)
    for i in range(TABU + 5):
        known.forbid(f"p{i}", (f"Rule {i}.",))
    assert known.like(("Rule 2.",), {}) is None and known.like(("Rule 7.",), {}) == "p7"


def test_what_is_dropped_at_once_is_remembered_in_the_order_of_birth() -> None:
    """Whatever the hashes of this process are: a resumed run forgets the same ones first."""
    known = Duplicates(0.9)
    known.observe(SystemPrompt(f"p{i}", (Principle("G1", f"Rule {i}."),)) for i in range(20))
    known.observe(())
    assert list(known.state()["tabu"]) == [f"p{i}, which was dropped" for i in range(20)]


def results(gap: float, problems: int, attempts: int, seed: int) -> list[tuple[list[float], list[float]]]:
    """Two prompts on the same problems, the second one better by `gap`."""
    draw = random.Random(seed)
    rates = [draw.uniform(0.1, 0.8) for _ in range(problems)]
    return [
        ([float(draw.random() < r) for _ in range(attempts)], [float(draw.random() < r + gap) for _ in range(attempts)])
        for r in rates
    ]


def test_equal_behaviour_is_recognised_and_no_other() -> None:
    same = sum(behaves_alike(results(0.0, 150, 8, seed)) for seed in range(40))
    better = sum(behaves_alike(results(0.2, 150, 8, seed)) for seed in range(40))
    assert same > 20 and better == 0
    assert not behaves_alike(results(0.0, 10, 8, 1)), "too few problems to tell"
    assert not behaves_alike([((1.0,) * 8, (0.0,) * 8), ((0.0,) * 8, (1.0,) * 8)] * 40), "equal on average only"


def test_the_younger_of_two_that_say_and_do_the_same_retires() -> None:
    old = SystemPrompt("p1", (Principle("G1", "Check the sign of every single term."),))
    young = SystemPrompt("p2", (Principle("G1", "Check the sign of every term."),))
    other = SystemPrompt("p3", (Principle("G1", "Draw a figure."),))
    met = next(found for seed in range(20) if behaves_alike(found := results(0.0, 150, 8, seed)))
    meetings = {("p1", "p2"): met, ("p1", "p3"): met, ("p2", "p3"): met}
    assert Duplicates(0.9).retired([old, young, other], meetings) == {"p2": "p1"}
    assert Duplicates(0.9).retired([old, young], {("p1", "p2"): results(0.3, 150, 8, 1)}) == {}
    assert Duplicates(0.9).retired([old, young], {("p1", "p2"): met[:10]}) == {}


def test_who_is_set_aside_neither_plays_nor_leads_until_it_is_readmitted() -> None:
    config = EvolutionConfig(root=("R.",), selection="ucb", juvenile_games=3)
    crowd = Population(config, RatingConfig(), seed=1)
    crowd.add([Child((Principle("G1", f"Rule {i}."),), "mutation", ("p0000",), 1) for i in range(3)], 0)
    for step in range(6):
        crowd.rate(batch(step, p0000=[[0, 1]] * 6, p0001=[[0, 1]] * 6, p0002=[[0, 1]] * 6, p0003=[[1, 1]] * 6))
    assert crowd.elite.id == "p0003" and "p0003" in crowd.select(7, 3, 2)
    crowd.set_aside("p0003", "quarantine: a reason")
    crowd.set_aside("p0000", "nobody sets the root aside")
    again = Population.from_json(json.loads(json.dumps(crowd.to_json())), config, RatingConfig(), 1)
    for population in (crowd, again):
        assert population.aside == {"p0003": "quarantine: a reason"}
        assert population.elite.id != "p0003" and "p0003" not in population.top(9)
        assert all("p0003" not in population.select(step, 3, 2) for step in range(30))
        assert population.best("latest").id == "p0002"
        assert population.best("validation", {"p0003": 0.9, "p0001": 0.2}).id == "p0001"
    crowd.readmit("p0003")
    assert crowd.elite.id == "p0003" and not crowd.aside
