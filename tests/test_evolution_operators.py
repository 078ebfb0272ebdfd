"""Pruning, immigrants and the budget of tokens: what each may do to a population, and that none stops the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from evolution_cases import ADD, ENGLISH, Scripted, batch, breed, outcome, plan, setting, tasks
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_train.config import RatingConfig
from espl_train.evolution import operators, prune
from espl_train.evolution.breeding import Breeder, BreedingReport
from espl_train.evolution.edits import Limits, Operation
from espl_train.evolution.mutation import candidates, fitted
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle, SystemPrompt
from espl_train.evolution.rejections import Reason, Rejection

MIXED = batch(p0000=[[1, 0, 1, 0], [1, 1, 0, 0]])
PRUNING = setting(mutate=False, prune_probability=1.0)
THREE = ("Be exact.", "Draw.", "Always guess.")


@dataclass
class Players:
    """Plays trials: a rollout is right with the chance that the principles give, by a table or a function of texts."""

    worth: Callable[[frozenset[str]], float]
    seed: int = 0
    calls: list[tuple[dict[str, tuple[Principle, ...]], list[int], int]] = field(default_factory=list)

    async def __call__(
        self, candidates: Mapping[str, tuple[Principle, ...]], problems: Sequence[int], samples: int
    ) -> dict[str, dict[int, list[float]]]:
        random = np.random.default_rng([self.seed, len(self.calls)])
        self.calls.append((dict(candidates), list(problems), samples))
        chances = {name: self.worth(frozenset(p.text for p in listed)) for name, listed in candidates.items()}
        shape = (len(problems), samples)
        rolled = {name: (random.random(shape) < chance).astype(float).tolist() for name, chance in chances.items()}
        return {name: dict(zip(problems, rows, strict=True)) for name, rows in rolled.items()}

    @property
    def rollouts(self) -> int:
        return sum(len(candidates) * len(problems) * samples for candidates, problems, samples in self.calls)


def harmful(texts: frozenset[str]) -> float:
    """Each of the first two helps, guessing does harm."""
    return 0.2 + 0.35 * ("Be exact." in texts) + 0.35 * ("Draw." in texts) - 0.2 * ("Always guess." in texts)


def one_of_eight_problems_each(texts: frozenset[str]) -> float:
    return 0.1 + 0.8 * len(texts) / 8


def helpful(texts: frozenset[str]) -> float:
    return 0.05 + 0.3 * len(texts)


def pruned(worth: Callable[[frozenset[str]], float], root: Sequence[str] = THREE) -> tuple[BreedingReport, Players]:
    """One step of a breeder that only prunes, after a batch of 240 rollouts."""
    config = PRUNING.model_copy(update={"root": tuple(root)})
    players = Players(worth)
    groups = batch(p0000=[[1, 0] * 30] * 4)
    breeder, people = Breeder(config, ENGLISH, 1), Population(config, RatingConfig(), 1)
    return asyncio.run(breeder.breed(0, people, groups, tasks(200), Scripted(), players)), players


def test_the_principle_that_does_harm_goes() -> None:
    report, players = pruned(harmful)
    (child,) = report.children
    assert child == Child((Principle("G1", "Be exact."), Principle("G2", "Draw.")), "prune", ("p0000",), 3)
    assert report.calls == 0, "nobody is asked"
    (screening, first, _), (duel, second, _) = players.calls
    assert set(screening) == {"p0000", "p0000-G1", "p0000-G2", "p0000-G3"} and set(duel) == {"p0000", "p0000-G3"}
    assert not set(first) & set(second), "what was lucky in the screening has to be so again elsewhere"


def test_the_differences_are_in_the_log() -> None:
    report, _ = pruned(harmful)
    screening, duel = (e for e in report.events if e["event"] == "leave_one_out")
    rows = {row["id"]: row for row in screening["absences"]}
    assert rows["G3"]["gain"] > 0 > rows["G1"]["gain"] and rows["G3"]["text"] == "Always guess."
    assert all(row["error"] > 0 and row["problems"] == 30 for row in rows.values()) and screening["samples"] == 1
    assert [row["id"] for row in duel["absences"]] == ["G3"] and duel["absences"][0]["problems"] == 60


def kept(worth: Callable[[frozenset[str]], float], count: int = 8) -> float:
    """How often pruning leaves `count` principles alone, over seeds, with the default batch of 240 rollouts."""
    best = SystemPrompt("p1", tuple(Principle(f"G{i}", f"Rule {i}.") for i in range(count)))
    random = [np.random.default_rng(seed) for seed in range(40)]
    results = [
        asyncio.run(prune.prune(best, (), range(500), 240, Players(worth, seed), random[seed], []))
        for seed in range(len(random))
    ]
    return float(np.mean([isinstance(result, Rejection) for result in results]))


def test_principles_that_are_all_needed_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """And would not, were the screening to decide: the best of several that were played little looks harmless."""
    report, _ = pruned(helpful)
    assert report.children == () and outcome(report, "prune") == "all_needed"
    detail = next(e["detail"] for e in report.events if e["event"] == "prune")
    assert "missed least" in detail and "±" in detail
    safe = kept(one_of_eight_problems_each)
    monkeypatch.setattr(prune.Absence, "missed", False)       # whatever was least useful goes
    assert kept(one_of_eight_problems_each) == 0 and safe > 0.8
    monkeypatch.undo()
    assert kept(lambda _: 0.5) < 0.7, "useless ones go after a few draws"


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 200), st.integers(1, 100))
def test_no_more_is_played_than_a_batch(principles: int, budget: int, problems: int) -> None:
    players = Players(lambda _: 0.5)
    listed = tuple(Principle(f"G{i}", f"Rule {i}.") for i in range(principles))
    best, random = SystemPrompt("p1", listed, last_id=20), np.random.default_rng(0)
    result = asyncio.run(prune.prune(best, (), range(problems), budget, players, random, []))
    assert players.rollouts <= max(budget // 2, principles + 1) + max(budget // 2, 2)
    if isinstance(result, Child):
        assert set(result.principles) < set(listed) and len(result.principles) == principles - 1
        assert result.last_id == 20
    assert all(len(set(chosen)) == len(chosen) for _, chosen, _ in players.calls)


def test_pruning_says_why_it_brings_nothing() -> None:
    assert outcome(pruned(harmful, THREE[:1])[0], "prune") == "too_few_principles"
    assert outcome(pruned(lambda _: 0.0)[0], "prune") == "no_contrast"
    assert outcome(breed(Scripted(), MIXED, PRUNING), "prune") == "no_trial"

    async def broken(candidates: Mapping[str, Any], problems: Sequence[int], samples: int) -> dict[str, Any]:
        del samples
        return {name: {q: [] for q in problems} for name in candidates}

    people, breeder = Population(PRUNING, RatingConfig(), 1), Breeder(PRUNING, ENGLISH, 1)
    report = asyncio.run(breeder.breed(0, people, MIXED, tasks(4), Scripted(), broken))
    assert outcome(report, "prune") == "no_trial"


def test_a_variant_that_is_a_prompt_already_is_not_played() -> None:
    people, players = Population(PRUNING, RatingConfig(), 1), Players(lambda _: 0.5)
    people.add([Child((Principle("G2", "Draw."),), "mutation", ("p0000",), 2)], 0)
    breeder = Breeder(PRUNING, ENGLISH, 1)
    for _ in range(3):
        people.rate(batch(p0000=[[1.0]] * 9, p0001=[[0.0]] * 9))
    asyncio.run(breeder.breed(0, people, MIXED, tasks(40), Scripted(), players))
    assert set(players.calls[0][0]) == {"p0000", "p0000-G2"}
    people.add([Child((Principle("G1", "Be exact."),), "mutation", ("p0000",), 2)], 0)
    report = asyncio.run(breeder.breed(1, people, MIXED, tasks(40), Scripted(), players))
    assert outcome(report, "prune") == "duplicate_prompt"


IMMIGRATION = setting(immigrant_probability=1.0, root=("Be exact.",))


def settled() -> Population:
    """A root, and a child that is much better by now."""
    people = Population(IMMIGRATION, RatingConfig(), 1)
    principles = (Principle("G1", "Be exact."), Principle("G2", "Trust the examiner."))
    people.add([Child(principles, "mutation", ("p0000",), 2)], 0)
    for _ in range(6):
        people.rate(batch(p0000=[[0.0]] * 9, p0001=[[1.0]] * 9))
    return people


def test_an_immigrant_has_seen_the_evidence_and_none_of_the_others_principles() -> None:
    model = Scripted(summary=lambda text: "by p0001" if "attempt p0001" in text else "by p0000", critique=plan(ADD))
    people = settled()
    report = breed(model, batch(p0000=[[1, 0], [0, 0]], p0001=[[1, 0], [1, 1]]), IMMIGRATION, people)
    mutant, immigrant = report.children
    assert (mutant.operator, immigrant.operator) == ("mutation", "immigrant"), "who has no name yet is the newest"
    assert [p.text for p in immigrant.principles] == ["Be exact.", ADD["text"]] and immigrant.parents == ("p0000",)
    critiques = [text for stage, text, _ in model.asked if stage == "critique"]
    theirs = [text for text in critiques if "Trust the examiner." not in text]
    assert len(theirs) == len(critiques) / 2 and all("by p0001" in text for text in theirs), "attempts of everybody"
    seeds = [seed for _, _, seed in model.asked]
    assert len(set(seeds)) == len(seeds), "no call of the two is the same"
    assert model.stages.count("summary") == 8, "each attempt once, whoever reads it"


@pytest.mark.parametrize("kind", ["trueskill", "openskill", "item_response"])
def test_nothing_is_known_of_an_immigrant(kind: Any) -> None:
    rating = RatingConfig(kind=kind)
    people = Population(IMMIGRATION, rating, 1)
    start = people.rating("p0000")
    for _ in range(6):
        people.add([Child((Principle("G2", f"Rule {len(people)}."),), "mutation", ("p0000",), 2)], 0)
        people.rate(batch(p0000=[[1, 0]] * 9, **{people.members[-1].prompt.id: [[0, 0]] * 9}))
    (stranger,) = people.add([Child((Principle("G3", "New."),), "immigrant", ("p0000",), 3)], 1)
    found = people.rating(stranger.id)
    if kind == "item_response":
        assert found.mu == people.rating("p0000").mu and found.sigma == pytest.approx(rating.novelty)
    else:
        assert found == start and found.sigma > people.rating("p0000").sigma
    assert people.lineage.births[stranger.id].parents == ("p0000",)


def test_the_roots_own_mutation_is_no_immigrant() -> None:
    assert outcome(breed(Scripted(critique=plan(ADD)), MIXED, IMMIGRATION), "immigrant") == "no_rival"
    alone = setting(immigrant_probability=1.0, mutate=False)
    report = breed(Scripted(critique=plan(ADD)), MIXED, alone)
    assert [c.operator for c in report.children] == ["immigrant"]


def test_operators_are_drawn_apart_and_off_by_default() -> None:
    report = breed(Scripted(), MIXED)
    assert {outcome(report, o) for o in ("prune", "immigrant", "crossover")} == {"switched_off"}
    drawn = []
    config = setting(prune_probability=0.4, immigrant_probability=0.4, mutate=False)
    for seed in range(30):
        breeder, people = Breeder(config, ENGLISH, seed), Population(config, RatingConfig(), seed)
        report = asyncio.run(breeder.breed(0, people, MIXED, tasks(4), Scripted()))
        drawn.append((outcome(report, "prune") != "not_drawn", outcome(report, "immigrant") != "not_drawn"))
    assert {(a, b) for a in (True, False) for b in (True, False)} == set(drawn)
    assert 4 < sum(a for a, _ in drawn) < 20


def test_an_operator_that_brings_nothing_stops_no_other() -> None:
    config = setting(prune_probability=1.0, immigrant_probability=1.0, crossover_probability=1.0)
    report = breed(Scripted(critique=plan(ADD)), MIXED, config)
    outcomes = {e["event"]: e["outcome"] for e in report.events if e["event"] in operators.OPERATORS}
    assert list(outcomes) == list(operators.OPERATORS), "one after the other, in the order of insertion"
    wanted = {"prune": "no_trial", "crossover": "no_rival", "mutation": "child", "immigrant": "no_rival"}
    assert outcomes | wanted == outcomes


def words(text: str) -> int:
    """A tokenizer for which every word of the rendered prompt is a token."""
    return len(text.split())


OVERHEAD = words(ENGLISH.system([Principle("G1", "x")])) - 1      # of the template, and the id of one principle


def limited(limit: int, model: Scripted, **changes: Any) -> BreedingReport:
    config = setting(max_prompt_tokens=limit, **changes)
    breeder, people = Breeder(config, ENGLISH, 1, tokens=words), Population(config, RatingConfig(), 1)
    return asyncio.run(breeder.breed(0, people, MIXED, tasks(4), model))


def test_the_whole_prompt_has_a_budget_of_tokens() -> None:
    """The root is 3 words and one more id; the addition 4 words and an id. The reviser is told, and asked once more."""
    exact = OVERHEAD + 1 + 3 + 5
    assert len(limited(exact, Scripted(critique=plan(ADD))).children) == 1
    shorter = plan({"op": "merge", "ids": ["G2", "G3"], "text": "Draw, write."})
    model = Scripted(critique=plan(ADD), revision="[]", repair=shorter)
    report = limited(exact - 1, model)
    assert [p.text for p in report.children[0].principles] == ["Be exact.", "Draw, write."]
    assert report.rejections == {"too_many_tokens": 1} and report.repaired == 1
    revision, repair = (next(t for s, t, _ in model.asked if s == stage) for stage in ("revision", "repair"))
    assert f"at most {exact - 1} tokens long" in revision and f"are {exact} tokens long" in repair


def test_where_nothing_fits_there_is_no_child_and_a_reason() -> None:
    report = limited(OVERHEAD + 4, Scripted(critique=plan(ADD), revision="[]", repair=""))
    assert report.children == () and outcome(report) == "too_many_tokens"
    assert report.rejections["too_many_tokens"] == 2
    free = limited(0, Scripted(critique=plan(ADD), revision="[]"))
    assert len(free.children) == 1


def test_the_least_supported_is_given_up_first() -> None:
    parent = SystemPrompt("p1", (Principle("G1", "One."), Principle("G2", "Two.")), last_id=2)
    asked = [
        Operation("add", "Three four five.", support=3), Operation("modify", "Two and six.", ("G2",), support=2),
        Operation("add", "Seven.", support=1),
    ]  # fmt: skip
    pool, _ = candidates(parent, asked, carry_out_removals=False)

    def left(limit: int) -> list[str] | Reason:
        counted = Limits(max_tokens=limit, tokens=lambda listed: sum(len(p.text.split()) for p in listed))
        found = fitted(parent, pool, counted)
        return found.reason if isinstance(found, Rejection) else [p.text for p in found]

    assert left(8) == ["One.", "Two and six.", "Three four five.", "Seven."]
    assert left(7) == ["One.", "Two and six.", "Three four five."]
    assert left(4) == ["One.", "Two and six."]
    assert left(3) is left(1) is Reason.TOO_MANY_TOKENS
