"""Lineage: of every principle of every prompt one can say who wrote it, from what, why, and how its carriers fared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from evolution_cases import ADD, Scripted, batch, breed, plan, setting, two
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution.edits import Edited, Limits, Operation, apply, composed, last_id, qualified
from espl_train.evolution.lineage import Duel, Lineage, provenance, told
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Origin, Principle, SystemPrompt
from espl_train.evolution.ratings import paired_difference

MIXED = batch(p0000=[[1, 0, 1, 0], [1, 1, 0, 0]])


def again(lineage: Lineage) -> Lineage:
    return Lineage.from_json(json.loads(json.dumps(lineage.to_json())))


def bred() -> Population:
    """p0001 from the root by mutation, p0002 from both by crossover; each met its first parent."""
    config = setting()
    people = Population(config, RatingConfig(), seed=1)
    merge = {"op": "merge", "ids": ["G2", "G3"], "text": "Draw, and write products.", "evidence": "they go together"}
    people.add(breed(Scripted(critique=plan(ADD), revision=plan(merge)), MIXED, config, people).children, 3)
    people.rate(batch(4, p0000=[[0, 0], [1, 0]], p0001=[[1, 1], [1, 0]]))
    crossing = setting(crossover_probability=1.0, mutate=False)
    groups = batch(5, p0000=[[1] * 8, [1] * 8, [0] * 8], p0001=[[0] * 8, [0] * 8, [1] * 8])
    change = {"op": "modify", "id": "A.G2", "text": "Draw, write products in full.", "evidence": "B.G4 won problem 2"}
    people.add(breed(Scripted(crossover=plan(change)), groups, crossing, people).children, 5)
    return people


def test_a_merged_principle_knows_its_parts_its_reason_and_its_prompts_results() -> None:
    lineage = again(bred().lineage)
    exact, merged = provenance("p0001", lineage)
    assert exact["written"] | {"prompt": "p0000", "op": "root", "step": 0} == exact["written"] and not exact["dropped"]
    written = merged["written"]
    assert (written["prompt"], written["step"], written["operator"], written["op"]) == ("p0001", 3, "mutation", "merge")
    assert written["sources"] == ["p0000.G2"] and written["evidence"] == "they go together" and written["support"] == 2
    assert [a["text"] for a in merged["ancestors"]] == ["Draw."]
    pairs = [((1, 1), (0, 0)), ((1, 0), (1, 0))]
    gain, error = paired_difference(pairs)
    assert written["against_parent"] == {"problems": 2, "gain": gain, "error": error}
    assert merged["carriers"] == ["p0001"]


def test_what_crossover_took_from_a_donor_descends_from_it() -> None:
    lineage = bred().lineage
    row = next(r for r in provenance("p0002", lineage) if r["id"] == "G2")
    assert row["written"]["operator"] == "crossover" and row["written"]["sources"] == ["p0000.G2", "p0001.G4"]
    assert [(a["prompt"], a["id"]) for a in row["ancestors"]] == [("p0000", "G2"), ("p0001", "G4")]
    dropped = provenance("p0000", lineage)[1]["dropped"]
    assert [(d["prompt"], d["operator"]) for d in dropped] == [("p0001", "mutation"), ("p0002", "crossover")]


def test_it_is_told_in_a_few_lines() -> None:
    text = "\n".join(told("p0002", bred().lineage, "G2"))
    assert "step 5, crossover of p0000 and p0001: modify of p0000.G2 and p0001.G4" in text
    assert "because “B.G4 won problem 2”" in text and "p0002 against p0000: never met" in text
    assert "p0001 against p0000: +0.500 ± " in text and "carried by 1 prompt: p0002" in text
    assert "there from the start" in "\n".join(told("p0002", bred().lineage))


def test_a_prompt_that_was_dropped_is_still_in_the_book() -> None:
    people = Population(EvolutionConfig(root=("Be exact.",), capacity=2, elite=False), RatingConfig(), seed=1)
    for step in range(1, 6):
        parent = people.members[-1].prompt
        text = Principle(f"G{step + 1}", f"Rule {step}.")
        people.add([Child((*parent.principles, text), "mutation", (parent.id,), step + 1)], step)
    assert len(people) == 2 and len(people.lineage.births) == 6
    assert [r["written"]["prompt"] for r in provenance("p0005", people.lineage)] == [f"p000{i}" for i in range(6)]


def test_a_child_that_explains_nothing_is_understood_from_its_parents() -> None:
    """Writers that know no origins: the same text in a parent is its source, the same id a change."""
    people = two(setting())
    principles = (Principle("G1", "Be very exact."), Principle("G2", "Draw."), Principle("G9", "test small cases"))
    (child,) = people.add([Child(principles, "crossover", ("p0000", "p0001"), 9)], 1)
    origins = {i: w.origin for i, w in people.lineage.births[child.id].written.items()}
    assert origins == {"G1": Origin("modify", ("p0000.G1",)), "G9": Origin("add", ("p0001.G3",))}


def test_batches_add_up_to_the_difference_over_all_of_them() -> None:
    pairs = [((1.0, 0.0), (0.0, 0.0)), ((1.0,), (1.0,)), ((0.5, 1.0), (0.0, 1.0)), ((0.0,), (1.0,))]
    duel = Duel().plus(pairs[:3]).plus(pairs[3:])
    assert duel.problems == 4 and duel.gain == pytest.approx(paired_difference(pairs)[0])
    assert Duel().plus(pairs) == Duel(4, *paired_difference(pairs))
    same = Duel().plus(pairs).plus(pairs)
    assert same.gain == pytest.approx(duel.gain) and same.error == pytest.approx(Duel().plus(pairs).error / 2**0.5)


def test_a_resumed_population_goes_on_with_the_same_book() -> None:
    people = bred()
    config, rating = setting(), RatingConfig()
    resumed = Population.from_json(json.loads(json.dumps(people.to_json())), config, rating, 1)
    later = batch(6, p0000=[[1, 0], [0, 0]], p0002=[[1, 1], [1, 0]])
    for population in (people, resumed):
        population.rate(later)
        population.add([Child((Principle("G9", "New."),), "mutation", ("p0002",), 9)], 6)
    assert people.lineage.to_json() == resumed.lineage.to_json()
    assert people.lineage.births["p0002"].duel.problems == 2


WORDS = st.sampled_from(["Draw.", "Count.", "Be exact.", "Check.", "Write.", "Read.", "Test.", "Stop."])
CHOICES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9), WORDS), max_size=3)
BIRTHS = st.lists(st.tuples(st.integers(0, 99), CHOICES, CHOICES), max_size=8)


def operations(choices: list[tuple[int, int, int, str]], principles: tuple[Principle, ...]) -> Iterator[Operation]:
    ids = [p.id for p in principles]
    for kind, a, b, text in choices:
        if kind == 0 or not ids:
            yield Operation("add", text, (), "because")
        elif kind == 1:
            yield Operation("modify", text, (ids[a % len(ids)],))
        elif kind == 2:
            yield Operation("remove", "", (ids[a % len(ids)],))
        elif len(set(ids)) > 1 and a % len(ids) != b % len(ids):
            yield Operation("merge", text, (ids[a % len(ids)], ids[b % len(ids)]))


def grown(births: list[tuple[int, list, list]]) -> list[SystemPrompt]:  # type: ignore[type-arg]
    """Prompts by random plans in two stages, any of the earlier ones edited; refused plans leave no trace."""
    root = SystemPrompt("p0000", (Principle("G1", "Draw."), Principle("G2", "Count.")), last_id=2)
    prompts, book = [root], Lineage()
    book.add(root, {})
    for number, (who, first, second) in enumerate(births, 1):
        parent = prompts[who % len(prompts)]
        half = apply(parent.principles, list(operations(first, parent.principles)), Limits(), parent.last_id)
        if not isinstance(half, Edited):
            continue
        whole = apply(half.principles, list(operations(second, half.principles)), Limits(), half.last_id)
        if not isinstance(whole, Edited):
            continue
        origins = qualified(composed(half.origins, whole.origins), parent.id)
        child = SystemPrompt(f"p{number:04d}", whole.principles, "mutation", (parent.id,), number, whole.last_id)
        book.add(child, origins)
        prompts.append(child)
    BOOKS.append(book)
    return prompts


BOOKS: list[Lineage] = []


@settings(max_examples=150, deadline=None)
@given(BIRTHS)
def test_every_ancestor_is_found_and_no_id_ever_comes_back(births: list) -> None:  # type: ignore[type-arg]
    prompts = grown(births)
    book = again(BOOKS.pop())
    by_id = {p.id: p for p in prompts}
    for prompt in prompts:
        assert tuple(book.principles(prompt.id).values()) == prompt.principles
        assert [row["id"] for row in provenance(prompt.id, book)] == [p.id for p in prompt.principles]
        seen, ancestor = set(), prompt
        while ancestor.parents:
            ancestor = by_id[ancestor.parents[0]]
            seen |= {p.id for p in ancestor.principles}
        for i, written in book.births[prompt.id].written.items():
            assert all(source.rpartition(".")[0] in by_id for source in written.origin.sources)
            assert len(book.sources(written)) == len(written.origin.sources), "every source is in the book"
            assert prompt.operator == "root" or written.origin.op == "modify" or i not in seen
            assert written not in book.ancestors(written)
            assert prompt.id == book.carriers(written)[0]
        assert prompt.last_id >= last_id(prompt.principles)


def test_lost_origins_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above has teeth: sources in ids of a list that never was a prompt are not found."""
    births = [(0, [(0, 0, 0, "Read.")], [(3, 1, 2, "Both.")])]
    grown(births)
    (merged,) = BOOKS.pop().births["p0001"].written.values()
    assert merged.origin.sources == ("p0000.G2",)
    monkeypatch.setitem(grown.__globals__, "composed", lambda first, second: {**first, **second})
    grown(births)
    book = BOOKS.pop()
    (merged,) = book.births["p0001"].written.values()
    assert len(book.sources(merged)) < len(merged.origin.sources)


def test_an_evidence_written_once_is_kept_through_a_revision() -> None:
    first = {"G3": Origin("add", (), "seen twice", 2), "G2": Origin("modify", ("G2",), "wrong", 1)}
    assert composed(first, {"G3": Origin("modify", ("G3",))})["G3"] == Origin("add", (), "seen twice", 2)
    both = composed(first, {"G4": Origin("merge", ("G2", "G3"))})["G4"]
    assert both == Origin("merge", ("G2",), "wrong · seen twice", 3)
    assert replace(both, evidence="said") == composed(first, {"G4": Origin("merge", ("G2", "G3"), "said")})["G4"]
