"""Acceptance: a child that is worse in its trial is not born, the best of several is, and trials cost what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from evolution_cases import ADD, ENGLISH, Scripted, batch, plan, setting, tasks

from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution import acceptance, breeding
from espl_train.evolution.acceptance import decide
from espl_train.evolution.breeding import Breeder, BreedingReport
from espl_train.evolution.operators import OPERATORS, Way
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle
from espl_train.evolution.rejections import Reason, Rejection
from espl_train.settings import ConfigError, load

MIXED = batch(p0000=[[1, 0], [0, 0], [1, 1]])


class Judge:
    """A trial whose rewards are a function of the last principle's text."""

    def __init__(self, **worth: Sequence[float] | float) -> None:
        self.worth, self.asked = worth, []

    async def __call__(
        self, candidates: Mapping[str, tuple[Principle, ...]], problems: Sequence[int], samples: int, /
    ) -> dict[str, dict[int, list[float]]]:
        self.asked.append((sorted(candidates), list(problems), samples))
        await asyncio.sleep(0)

        def row(principles: tuple[Principle, ...]) -> dict[int, list[float]]:
            worth = self.worth[principles[-1].text.split()[-1].strip(".")]
            return {q: list(worth) if isinstance(worth, Sequence) else [worth] * samples for q in problems}

        return {name: row(principles) for name, principles in candidates.items()}


def breed(model: Scripted, judge: Judge | None, seed: int = 1, **changes: Any) -> BreedingReport:
    config = setting(**changes)
    breeder = Breeder(config, ENGLISH, seed)
    people = Population(config, RatingConfig(), seed)
    return asyncio.run(breeder.breed(0, people, MIXED, tasks(4), model, judge))


def says(*words: str) -> Scripted:
    """Mutation after mutation adds "Think <word>."."""
    return Scripted(critique=[plan({"op": "add", "text": f"Think {word}."}) for word in words])


@pytest.mark.parametrize(("worth", "born"), [(0.4, False), (0.5, False), (0.6, True)])
def test_a_child_enters_only_if_it_beats_its_parent_on_the_batch(worth: float, born: bool) -> None:
    """The parent has a mean of one half; a draw is no improvement (GEPA, algorithm 1)."""
    judge = Judge(fast=worth)
    report = breed(says("fast"), judge, acceptance="minibatch")
    assert bool(report.children) == born
    assert judge.asked == [(["mutation 0"], [0, 1, 2], 2)], "all problems, as many attempts as the parent had"
    (trial,) = [e for e in report.events if e["event"] == "trial"]
    assert trial["accepted"] == born and trial["parent"] == 0.5 and trial["mean"] == pytest.approx(worth)
    assert report.rejections == ({} if born else {"not_better": 1})


def test_the_test_above_notices_acceptance_that_lets_all_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "_better_than_its_parent", lambda found, _: found)
    assert breed(says("fast"), Judge(fast=0.0), acceptance="minibatch").children


def test_a_margin_asks_for_more_than_luck() -> None:
    lucky = Judge(fast=[1, 0, 1, 1])
    assert breed(says("fast"), lucky, acceptance="minibatch").children
    assert not breed(says("fast"), lucky, acceptance="minibatch", acceptance_margin=3.0).children


def test_fewer_problems_and_other_samples_where_asked_for() -> None:
    judge = Judge(fast=1.0)
    breed(says("fast"), judge, acceptance="minibatch", acceptance_problems=2, acceptance_samples=5)
    ((_, problems, samples),) = judge.asked
    assert len(problems) == 2 and samples == 5 and set(problems) < {0, 1, 2}


def test_the_best_of_several_mutations_is_born_whatever_its_parent_did() -> None:
    judge = Judge(fast=0.1, slow=0.3, hard=0.2)
    model = says(*["fast"] * 2, *["slow"] * 2, *["hard"] * 2)
    report = breed(model, judge, mutations=3, acceptance="best", cases=4)
    model = Scripted(critique=[plan({"op": "add", "text": f"Think {w}."}) for w in ("fast", "slow", "hard")])
    report = breed(model, judge, mutations=3, acceptance="best", cases=4)
    assert [c.principles[-1].text for c in report.children] == ["Think slow."]
    assert report.rejections == {"not_better": 2} and len(judge.asked[-1][0]) == 3, "one trial for all"
    seeds = [seed for stage, _, seed in model.asked if stage == "critique"]
    prompts = {text for stage, text, _ in model.asked if stage == "critique"}
    assert len(set(seeds)) == 3 and len(prompts) == 3, "other seeds and other nonces, the same evidence"
    assert report.calls == len(model.asked), "one book for all tries"
    assert model.stages.count("summary") == len({t for s, t, _ in model.asked if s == "summary"}), "written once"


def test_without_acceptance_all_mutations_are_born_and_equal_ones_once() -> None:
    model = Scripted(critique=[plan({"op": "add", "text": f"Think {w}."}) for w in ("fast", "slow", "fast")])
    report = breed(model, None, mutations=3, cases=4)
    assert [c.principles[-1].text for c in report.children] == ["Think fast.", "Think slow."]
    assert report.rejections == {"duplicate_prompt": 1}


def test_one_mutation_is_what_it_was_before_there_were_several() -> None:
    one, three = says("fast"), Scripted(critique=plan(ADD))
    breed(one, None, cases=4)
    breed(three, None, mutations=3, cases=4)
    assert one.asked[: len(one.stages) - 1][-1] == three.asked[: len(one.stages) - 1][-1]


def test_what_could_not_be_scored_is_not_born() -> None:
    report = breed(says("fast"), Judge(fast=[]), acceptance="minibatch")
    assert not report.children and report.rejections == {"no_trial": 1}
    report = breed(says("fast"), Judge(fast=[]), acceptance="best")
    assert not report.children and report.rejections == {"no_trial": 1}


def test_a_pruned_child_has_been_played_already_and_an_immigrant_is_measured_by_who_played() -> None:
    judge, new = Judge(fast=1.0), (Principle("G1", "Think fast."),)
    children = {"a": Child(new, "prune", ("p0000",)), "b": Child(new, "immigrant", ("p0007",))}
    config = EvolutionConfig(acceptance="minibatch")
    rewards = {"p0000": {0: (1.0, 0.0)}}
    found = asyncio.run(decide(children, rewards, [0], judge, config, breeding.generator(0)))
    assert list(found) == ["b"] and found["b"].parent == 0.5 and found["b"].refused is None


@pytest.mark.parametrize("changes", [{"acceptance": "minibatch"}, {"writer": "placebo"}])
def test_another_operator_shifts_nobodys_draws(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_: object) -> Rejection:
        raise AssertionError

    before, after = Judge(fast=0.6), Judge(fast=0.6)
    one = breed(says("fast"), before, mutations=2, **changes)
    first: dict[Any, Way] = {"another": Way(lambda _: 0.0, never)}
    monkeypatch.setattr(breeding, "OPERATORS", {**first, **OPERATORS})
    other = breed(says("fast"), after, mutations=2, **changes)
    assert one.children and one.children == other.children and before.asked == after.asked


def test_the_guard_and_the_duplicates_come_before_the_trial() -> None:
    judge = Judge()
    report = breed(Scripted(critique=plan({"op": "add", "text": "Draw."})), judge, acceptance="minibatch")
    assert not report.children and judge.asked == []


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"evolution.acceptance_samples": 2}, "acceptance_samples .* no trial"),
        ({"evolution.acceptance": "best", "evolution.acceptance_margin": 1}, "acceptance_margin .* minibatch"),
        ({"evolution.mutations": 2, "evolution.reflection_temperature": 0}, "all the same"),
        ({"evolution.mutations": 2, "evolution.mutate": False}, "evolution.mutate is off"),
        ({"evolution.mutations": 5, "evolution.capacity": 7}, "room for 8"),
        ({"evolution.migration": 0.5, "evolution.prune_probability": 0.1, "evolution.capacity": 5}, "room for 6"),
        ({"evolution.acceptance": "minibatch", "mode": "rl"}, "mode is rl, which breeds nothing"),
        ({"evolution.writer": "placebo", "mode": "rl"}, "mode is rl, which breeds nothing"),
        ({"evolution.writer": "placebo", "evolution.evidence": "shuffled"}, "reads no evidence"),
        ({"evolution.pareto_scores": "validation"}, "selection is lucb"),
        ({"budget_rollouts": 9, "schedule": "sequential"}, "might end before its turn"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(overrides=settings)
    assert Reason.NOT_BETTER.value == "not_better"
