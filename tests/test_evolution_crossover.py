"""Crossover: who won which problem, and edits that can only touch set A."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from evolution_cases import ENGLISH, Scripted, batch, breed, outcome, plan, setting, tasks, two

from espl_envs.core.tasks import Task
from espl_train.config import EvolutionConfig
from espl_train.evolution.breeding import Breeder
from espl_train.evolution.crossover import MOST_SETS, probability_best, prompt_sets, winners
from espl_train.evolution.encounters import Encounter
from espl_train.evolution.prompts import Child, Principle, SystemPrompt
from espl_train.evolution.templates import TemplateSet

CROSSING = setting(crossover_probability=1.0, mutate=False)
WIN = batch(p0000=[[1] * 8, [1] * 8, [0] * 8], p0001=[[0] * 8, [0] * 8, [1] * 8])


def test_crossover_edits_the_best_set_only() -> None:
    modify = {"op": "modify", "id": "A.G2", "text": "Draw and test small cases.", "evidence": "B.G3 won a problem"}
    model = Scripted(crossover=plan(modify, {"op": "add", "text": "Test small cases."}))
    report = breed(model, WIN, CROSSING, two(CROSSING))
    edited = ("Be exact.", "Draw and test small cases.", "Test small cases.")
    principles = tuple(Principle(f"G{i}", text) for i, text in enumerate(edited, 1))
    (child,) = report.children
    assert replace(child, origins={}) == Child(principles, "crossover", ("p0000", "p0001"), 3)
    prompt = model.asked[0][1]
    assert "A.G1: Be exact." in prompt and "B.G3: Test small cases." in prompt
    assert "A: 0.00 over 8 attempts, B: 1.00 over 8 attempts" in prompt and "question 2" in prompt
    made = next(e for e in report.events if e["event"] == "plan")
    assert made["operations"][0]["evidence"] == "B.G3 won a problem"


def test_a_copy_of_another_prompt_is_no_child() -> None:
    model = Scripted(crossover=plan({"op": "add", "text": "Test small cases."}, {"op": "remove", "id": "A.G2"}))
    report = breed(model, WIN, CROSSING, two(CROSSING))
    assert report.children == () and outcome(report, "crossover") == "duplicate_prompt"


@pytest.mark.parametrize("target", ["B.G3", "B.G1", "G1", "C.G1"])
def test_another_sets_principle_is_no_target(target: str) -> None:
    """Method §8: "B.G1" is not applied to A's G1 by accident, and a bare id that both have is ambiguous."""
    model = Scripted(crossover=plan({"op": "modify", "id": target, "text": "x y z"}), repair="")
    report = breed(model, WIN, CROSSING, two(CROSSING))
    assert report.children == () and report.rejections["foreign_id"] == 1
    assert outcome(report, "crossover") == "foreign_id"


def test_crossover_needs_a_rival_that_won_something() -> None:
    assert outcome(breed(Scripted(), batch(p0000=[[1, 0]]), CROSSING), "crossover") == "no_rival"
    swept = batch(p0000=[[1] * 8], p0001=[[0] * 8])
    assert outcome(breed(Scripted(), swept, CROSSING, two(CROSSING)), "crossover") == "no_other_winner"
    assert outcome(breed(Scripted(crossover="[]"), WIN, CROSSING, two(CROSSING)), "crossover") == "no_contrast"


def test_crossover_is_drawn_with_its_probability() -> None:
    config = setting(crossover_probability=0.3, mutate=False)
    people = two(config)
    breeder = Breeder(config, ENGLISH, seed=5)
    drawn = []
    for step in range(200):
        groups = batch(step, p0000=[[1] * 8], p0001=[[0] * 8])
        drawn.append(outcome(asyncio.run(breeder.breed(step, people, groups, tasks(1), Scripted())), "crossover"))
    assert 35 < sum(d == "no_other_winner" for d in drawn) < 85 and "not_drawn" in drawn


def met(**rewards: list[list[float]]) -> list[Encounter]:
    """Encounters from a row of rewards per prompt."""
    columns = zip(*rewards.values(), strict=True)
    return [Encounter(0, q, dict(zip(rewards, map(tuple, column), strict=True))) for q, column in enumerate(columns)]


def won(encounters: list[Encounter], config: EvolutionConfig) -> list[tuple[int, str]]:
    return [(w.encounter.problem, w.prompt) for w in winners(encounters, "a", config)]


def test_winners_by_probability_and_by_margin() -> None:
    rewards = met(a=[[1] * 8, [1, 0], [1] * 8], b=[[0] * 8, [0, 0], [1] * 8])
    assert won(rewards, EvolutionConfig(winner_probability=0.95)) == [(0, "a")]
    assert won(rewards, EvolutionConfig(winner="margin")) == [(0, "a"), (1, "a")]
    assert won(met(a=[[1.0] * 8], b=[[-1.0] * 8]), EvolutionConfig()) == [(0, "a")]


def test_prompts_of_one_family_do_not_hide_each_others_wins() -> None:
    """Two that know the same win together; by the reference's rule neither does, for neither is alone in front."""
    family = met(a=[[0] * 8], b=[[1] * 8], c=[[1] * 8])
    assert won(family, EvolutionConfig()) == [(0, "b"), (0, "c")]
    assert won(family, EvolutionConfig(winner="margin")) == []


def a_set(prompt: str, *texts: str) -> SystemPrompt:
    return SystemPrompt(prompt, tuple(Principle(f"G{i}", text) for i, text in enumerate(texts, 1)))


def test_the_sets_are_those_that_add_a_win_to_the_ones_before() -> None:
    """A family that won the same problems is there once; scores are over the problems that a set shared with set A."""
    lost, good = [0.0] * 8, [1.0] * 8
    encounters = met(a=[lost, lost, lost, good], b=[good, good, lost, lost], c=[good, good, lost, lost])
    encounters += [Encounter(1, 9, {"a": (0.0,) * 8, "d": (1.0,) * 8})]
    others = [a_set("b", "B."), a_set("c", "C."), a_set("d", "D.")]
    sets = prompt_sets(a_set("a", "A."), others, encounters, EvolutionConfig(), tasks(10))
    shown = [(s.name, s.prompt, s.wins, s.problems) for s in sets]
    assert shown == [("A", "a", 1, 5), ("B", "b", 2, 4), ("C", "d", 1, 1)]
    assert (sets[1].mean, sets[1].base) == (0.5, 0.25) and sets[2].won == ["question 9"]
    many = [a_set(f"r{i}", f"R{i}.") for i in range(9)]
    every = [Encounter(0, i, {"a": (0.0,) * 8, f"r{i}": (1.0,) * 8}) for i in range(9)]
    assert len(prompt_sets(a_set("a"), many, every, EvolutionConfig(), tasks(10))) == MOST_SETS


def test_prompts_are_compared_over_the_window_and_only_where_they_met() -> None:
    """One batch holds too few problems; what two prompts scored in different iterations is never put side by side."""
    config = setting(crossover_probability=1.0, mutate=False, evidence_window=3)
    people = two(config)
    breeder = Breeder(config, ENGLISH, seed=1)
    met_at_0 = [*batch(0, p0000=[[1] * 8, [1] * 8, [0] * 8], p0001=[[0] * 8, [0] * 8, [1] * 8])]
    later = {step: batch(step, p0000=[[1] * 8]) for step in (1, 2, 3)}
    asyncio.run(breeder.breed(0, people, met_at_0, tasks(4), Scripted()))
    fresh = Breeder(config, ENGLISH, seed=1)
    fresh.restore(json.loads(json.dumps(breeder.state())))
    for one in (breeder, fresh):
        reports = {s: asyncio.run(one.breed(s, people, g, tasks(4), Scripted())) for s, g in later.items()}
        assert [outcome(r, "crossover") for r in reports.values()] == ["no_contrast", "no_contrast", "no_rival"]
    paper = setting(crossover_probability=1.0, mutate=False, evidence_window=0)
    breeder = Breeder(paper, ENGLISH, seed=1)
    asyncio.run(breeder.breed(0, people, met_at_0, tasks(4), Scripted()))
    report = asyncio.run(breeder.breed(1, people, later[1], tasks(4), Scripted()))
    assert outcome(report, "crossover") == "no_rival", "the paper compares the last batch"


def test_donors_are_among_the_sources_of_what_they_gave() -> None:
    add = {"op": "add", "text": "test  small CASES"}
    modify = {"op": "modify", "id": "A.G2", "text": "Draw less.", "evidence": "B.G3 won problem 3, Z.G1 and B.G77"}
    report = breed(Scripted(crossover=plan(add, modify)), WIN, CROSSING, two(CROSSING))
    origins = report.children[0].origins
    assert origins["G3"].op == "add" and origins["G3"].sources == ("p0001.G3",)
    assert origins["G2"].sources == ("p0000.G2", "p0001.G3") and "problem 3" in origins["G2"].evidence


def test_the_micro_set_shows_what_explains_a_win_and_what_stands_against_it() -> None:
    best, donor = a_set("a", "⊕ adds", "⊗ peaks"), a_set("b", "⊕ adds", "⊗ dips", "⊖ adds")
    question = "Start at 4. (1) ⊕ 2. (2) ⊗ 7. (3) stop."
    encounters = [Encounter(0, 0, {"a": (0.0,) * 8, "b": (1.0,) * 8})]
    sets = prompt_sets(best, [donor], encounters, EvolutionConfig(), {0: Task("t", "train", question, "1")})
    (message,) = TemplateSet.load("micro").messages("crossover", {"sets": sets, "max_words": 9, "max_tokens": 0})
    rows = [line for line in message.content.splitlines() if line.startswith(("right", "wrong"))]
    assert rows == ["right ⊗ dips.", "wrong ⊗ peaks."] and "now ⊗ A.G2: ⊗ peaks, held." in message.content


def test_the_probability_of_being_best() -> None:
    assert probability_best([[1], [1]]) == pytest.approx([0.5, 0.5])
    assert probability_best([[1], [0]]) == pytest.approx([5 / 6, 1 / 6], abs=1e-3)      # ∫∫ 2p · 2(1-q) over p > q
    assert sum(probability_best([[1, 0], [1, 1], [0, 0]])) == pytest.approx(1)
    assert probability_best([[1.0] * 500, [0.0] * 500])[0] == pytest.approx(1)
