"""Migration: what wins on an island is told by comparisons there, tried once elsewhere, and wins there or does not."""

from __future__ import annotations

from typing import Any

import pytest
from evolution_cases import batch

from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution import migration
from espl_train.evolution.edits import Limits, fingerprint
from espl_train.evolution.migration import Harbour, count, land, migrate, wins
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle, SystemPrompt
from espl_train.evolution.rejections import Reason, Rejection

COUNT, DRAW = "Count twice.", "Draw a picture."
PROBLEMS = 10
Ports = dict[str, tuple[Population, Harbour]]


def population(name: str, *texts: str, better: bool = True, problems: int = PROBLEMS, **given: Any) -> Population:
    """A root and, if there are `texts`, a child with them that has beaten it on so many problems (or lost)."""
    people = Population(EvolutionConfig(root=("Be exact.",), **given), RatingConfig(), 1, name)
    if texts:
        added = tuple(Principle(f"G{i}", text) for i, text in enumerate(texts, 2))
        (child,) = people.add([Child((*people.root.principles, *added), "mutation", (people.root.id,), 9)], 1)
        meet(people, people.root.id, child.id, better, problems)
    return people


def meet(people: Population, worse: str, better: str, truly: bool = True, problems: int = PROBLEMS) -> None:
    """Two prompts play the same problems, four attempts each; the second is the better one, or (not `truly`) not."""
    rows = {True: [1.0, 1.0, 1.0, 0.0], False: [1.0, 0.0, 0.0, 0.0]}
    people.rate(batch(**{worse: [rows[not truly]] * problems, better: [rows[truly]] * problems}))


def ports(**people: Population) -> Ports:
    return {name: (found, Harbour()) for name, found in people.items()}


def test_prompts_of_an_island_carry_its_name_and_keep_it_over_a_resume() -> None:
    people = population("a", COUNT)
    assert [m.prompt.id for m in people.members] == ["a:p0000", "a:p0001"]
    again = Population.from_json(people.to_json(), EvolutionConfig(root=("Be exact.",)), RatingConfig(), 1)
    (born,) = again.add([Child((Principle("G1", "New."),), "mutation", ("a:p0001",))], 2)
    assert born.id == "a:p0002"
    (alone,) = Population(EvolutionConfig(), RatingConfig(), 1).members
    assert alone.prompt.id == "p0000"


def test_what_wins_has_beaten_its_parent_on_enough_problems_and_is_not_the_roots() -> None:
    found = wins(population("a", COUNT, DRAW))
    assert {win.text for win in found.values()} == {COUNT, DRAW}
    assert found[fingerprint(COUNT)].name == "a:p0001.G2" and found[fingerprint(COUNT)].gain > 0.1
    assert wins(population("a", COUNT, better=False)) == {}
    assert wins(population("a", COUNT, problems=migration.LEAST - 1)) == {}
    assert wins(population("a")) == {}


def test_a_winner_whose_carriers_fell_below_the_root_wins_no_more() -> None:
    people = population("a", COUNT)
    meet(people, "a:p0001", "a:p0000")
    for _ in range(3):
        meet(people, "a:p0001", "a:p0000")
    assert people.rating("a:p0001").mu < people.rating("a:p0000").mu and wins(people) == {}


def test_a_harbour_hears_of_what_wins_elsewhere_the_most_promising_first() -> None:
    strong, weak = population("a", COUNT, problems=40), population("b", DRAW, problems=9)
    here = ports(a=strong, b=weak, c=population("c"))
    land(here)
    assert [win.text for win in here["c"][1].waiting] == [COUNT, DRAW]
    assert [win.text for win in here["a"][1].waiting] == [DRAW]
    here["b"][1].won[fingerprint(DRAW)] = here["a"][1].won[fingerprint(DRAW)] = 1       # won in two: it goes first
    land(here)
    assert [win.text for win in here["c"][1].waiting] == [DRAW, COUNT] and here["c"][1].waiting[0].islands == 2
    assert here["a"][1].waiting == ()


def test_a_migrant_is_all_that_its_child_changes_and_comes_with_its_origin() -> None:
    here, events = ports(a=population("a", COUNT), b=population("b")), list[dict[str, Any]]()
    land(here)
    people, harbour = here["b"]
    child = migrate(people.root, harbour, Limits(), events)
    assert isinstance(child, Child) and child.operator == "migration" and child.parents == ("b:p0000",)
    assert [p.text for p in child.principles] == ["Be exact.", COUNT]
    (born,) = people.add([child], 2)
    written = people.lineage.written(born.id, child.principles[-1].id)
    assert written.origin.sources == ("a:p0001.G2",)
    assert events[0]["event"] == "migrant" and events[0]["written"] == "a:p0001.G2"


def refusing(text: str) -> Rejection | None:
    return Rejection(Reason.LEAKED_ANSWER, "here it is an answer") if text == COUNT else None


def test_what_was_tried_is_not_tried_again_whether_it_was_let_in_or_not() -> None:
    here = ports(a=population("a", COUNT), b=population("b"))
    land(here)
    people, harbour = here["b"]
    refused = migrate(people.root, harbour, Limits(check=refusing), [])
    assert isinstance(refused, Rejection) and refused.reason == Reason.LEAKED_ANSWER
    land(here)
    none = migrate(people.root, harbour, Limits(), [])
    assert isinstance(none, Rejection) and none.reason == Reason.NO_MIGRANT
    assert Harbour.from_json(harbour.to_json()).tried == {fingerprint(COUNT)}


def test_a_prompt_that_says_it_already_takes_the_next_one() -> None:
    here = ports(a=population("a", COUNT, DRAW, problems=20), b=population("b"))
    land(here)
    host = SystemPrompt("b:p0009", (Principle("G1", COUNT.upper()),), last_id=1)
    child = migrate(host, here["b"][1], Limits(), [])
    assert isinstance(child, Child) and [p.text for p in child.principles] == [COUNT.upper(), DRAW]


def confirmed(better: bool) -> list[dict[str, Any]]:
    """What the log hears when the migrant's child has met its parent."""
    here = ports(a=population("a", COUNT), b=population("b"))
    assert list(count(1, here)) == []
    land(here)
    people, harbour = here["b"]
    child = migrate(people.root, harbour, Limits(), [])
    assert isinstance(child, Child)
    people.add([child], 2)
    assert list(count(2, here)) == []                  # born, not played
    meet(people, "b:p0000", "b:p0001", better)
    found = list(count(3, here))
    assert list(count(4, here)) == []                  # told once
    return found


def test_it_has_won_in_two_when_its_child_has_beaten_the_parent_there_too() -> None:
    (victory,) = confirmed(better=True)
    assert (victory["principle"], victory["env"], victory["islands"]) == (COUNT, "b", ["a", "b"])
    assert victory["written"] == "b:p0001.G2"
    assert confirmed(better=False) == []


def test_winning_by_rating_alone_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: whatever stands in a prompt above the root counts, however little was seen of it."""
    monkeypatch.setattr(migration, "_sure", lambda _: 1.0)
    with pytest.raises(AssertionError):
        test_what_wins_has_beaten_its_parent_on_enough_problems_and_is_not_the_roots()
