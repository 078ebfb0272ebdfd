"""The population: exact round trips, safe evictions, and which prompt is "the" prompt."""

from __future__ import annotations

import json

import pytest
from evolution_cases import ADD, Scripted, batch, breed, outcome, plan, setting

from espl_envs.core.errors import EsplError
from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle, Rating

RATING = RatingConfig()


def population(**settings: object) -> Population:
    return Population(EvolutionConfig(**{"root": ("Be exact.",), **settings}), RATING, seed=3)  # type: ignore[arg-type]


def child(text: str, *parents: str) -> Child:
    return Child((Principle("G1", text),), "crossover" if len(parents) > 1 else "mutation", parents, last_id=4)


def grown(size: int = 3, **settings: object) -> Population:
    people = population(**settings)
    for i in range(1, size):
        people.add([child(f"rule {i}", "p0000")], step=i)
    return people


def test_it_starts_with_the_root_alone() -> None:
    people = population()
    assert people.root.texts == ("Be exact.",) and people.elite == people.root and len(people) == 1
    assert people.rating("p0000") == Rating(25.0, 25 / 3)
    assert people.select(0, places=3, samples=8) == {"p0000": 24}


def test_children_inherit_from_their_parents_as_they_are_now() -> None:
    people = population()
    people.add([child("a", "p0000")], 0)
    people.rate(batch(p0000=[[0, 0], [0, 0]], p0001=[[1, 1], [1, 1]]))
    cross, mutant = people.add([child("b", "p0000", "p0001"), child("c", "p0001")], 1)
    assert (cross.id, mutant.id) == ("p0002", "p0003") and cross.born == 1 and mutant.last_id == 4
    assert people.rating("p0003").mu == people.rating("p0001").mu > people.rating("p0002").mu
    assert people.games("p0001") == 1 and people.games("p0003") == 0


def test_a_match_moves_only_its_players() -> None:
    people = grown(3)
    before = people.rating("p0002")
    report = people.rate(batch(p0000=[[0.0]] * 4, p0001=[[1.0]] * 4))
    assert report["ranks"] == {"p0001": 0, "p0000": 1} and report["values"]["p0001"] == 1.0
    assert people.rating("p0002") == before and people.games("p0002") == 0
    json.dumps(report)
    alone = people.rate(batch(p0001=[[1.0]]))
    assert alone["ranks"] == {} and people.games("p0001") == 1


def test_a_preview_changes_nothing() -> None:
    people = grown(2)
    before = people.to_json()
    _, after = people.preview(batch(p0000=[[0.0]], p0001=[[1.0]]))
    assert people.to_json() == before and after["p0001"].mu > 25


def test_the_round_trip_is_exact_to_the_last_bit() -> None:
    people = grown(5, capacity=4)
    for i in range(7):
        people.rate(batch(p0000=[[0.1 * i, 0.3]], p0003=[[0.2, 0.7]], p0004=[[1 / 3, 0.9]]))
    text = json.dumps(people.to_json())
    again = Population.from_json(json.loads(text), EvolutionConfig(root=("Be exact.",), capacity=4), RATING, seed=3)
    assert again.members == people.members and json.dumps(again.to_json()) == text
    assert again.select(9, 3, 8) == people.select(9, 3, 8)
    assert again.add([child("x", "p0000")], 9) == people.add([child("x", "p0000")], 9)
    assert again.members == people.members


@pytest.mark.parametrize("kind", ["trueskill", "openskill", "item_response"])
def test_every_kind_of_rating_goes_on_as_if_there_had_been_no_break(kind: str) -> None:
    """The same matches with and without a checkpoint in the middle: ratings, draws and births are the same bits."""
    settings, rating = EvolutionConfig(selection="thompson", capacity=4), RatingConfig(kind=kind)  # type: ignore[arg-type]
    whole = Population(settings, rating, seed=3)
    for step in range(1, 9):
        if step == 5:
            text = json.dumps(whole.to_json())
            again = Population.from_json(json.loads(text), settings, rating, seed=3)
            assert json.dumps(again.to_json()) == text
        for people in (whole, again) if step >= 5 else (whole,):
            players = people.select(step, 3, 2)
            rows = {p: [[(i + step) % 3 / 2, 1 / 3 * (i % 2)] for i in range(4 + len(p))] for p in players}
            report = people.rate(batch(step, **rows))
            people.add([child(f"rule {step}", list(players)[-1]), child(f"both {step}", *list(players)[:2])], step)
    assert json.dumps(again.to_json()) == json.dumps(whole.to_json()) and len(whole) == 4
    assert set(report["ratings"]) == set(players)


def test_ratings_never_go_on_as_another_kind() -> None:
    saved = grown(3).to_json()
    with pytest.raises(EsplError, match=r"kind trueskill and cannot go on as item_response"):
        Population.from_json(saved, EvolutionConfig(), RatingConfig(kind="item_response"), seed=3)
    with pytest.raises(EsplError, match=r"kind trueskill and cannot go on as openskill"):
        Population.from_json(saved, EvolutionConfig(), RatingConfig(kind="openskill"), seed=3)


def test_a_checkpoint_from_before_there_were_kinds_is_trueskill() -> None:
    people = grown(3)
    people.rate(batch(p0000=[[0.0]] * 4, p0001=[[1.0]] * 4))
    old = {key: value for key, value in people.to_json().items() if key in ("born", "members", "lineage")}
    assert Population.from_json(old, EvolutionConfig(), RATING, seed=3).members == people.members
    with pytest.raises(EsplError):
        Population.from_json(old, EvolutionConfig(), RatingConfig(kind="item_response"), seed=3)


def test_item_response_rates_and_chooses_like_the_others() -> None:
    people = Population(EvolutionConfig(root=("Be exact.",)), RatingConfig(kind="item_response"), seed=3)
    people.add([child("a", "p0000"), child("b", "p0000")], 0)
    played = batch(1, p0000=[[0.5] * 8] * 8, p0001=[[1.0] * 8] * 8, p0002=[[0.0] * 8] * 8)
    preview = people.preview(played)[1]
    report = people.rate(played)
    assert people.elite.id == "p0001" and people.rating("p0001") == preview["p0001"]
    assert people.rating("p0002").mu < 25 == people.rating("p0000").mu < people.rating("p0001").mu
    assert report["ability"]["sigma"] > 0 and "ability" not in grown(2).rate(batch(p0000=[[0.0]], p0001=[[1.0]]))
    json.dumps(report)


@pytest.mark.parametrize("capacity", [1, 2, 3, 5])
def test_eviction_never_drops_root_or_elite(capacity: int) -> None:
    """Method §11 item 5: FIFO deletes neither where everything comes from nor the best that there is."""
    people = grown(2, capacity=max(capacity, 2))
    people.rate(batch(p0000=[[0.0]] * 8, p0001=[[1.0]] * 8))
    assert people.elite.id == "p0001"
    people._evolution = people._evolution.model_copy(update={"capacity": capacity})
    for i in range(30):
        people.add([child(f"more {i}", "p0001")], i)
        assert "p0000" in people and "p0001" in people
    assert len(people) == max(capacity, 2)


def test_without_an_elite_slot_the_oldest_goes() -> None:
    people = grown(2, capacity=3, elite=False)
    people.rate(batch(p0000=[[0.0]] * 8, p0001=[[1.0]] * 8))
    people.add([child("x", "p0001"), child("y", "p0001")], 2)
    assert [m.prompt.id for m in people.members] == ["p0000", "p0002", "p0003"]


def test_ids_are_never_used_again() -> None:
    people = grown(6, capacity=2)
    assert [m.prompt.id for m in people.members] == ["p0000", "p0005"]


def test_a_child_that_never_played_is_not_the_prompt() -> None:
    """Method §11 item 4: the reference tests the newest, never played child."""
    people = grown(2)
    people.rate(batch(p0000=[[0.0]] * 8, p0001=[[1.0]] * 8))
    people.add([child("untested", "p0001")], 2)
    assert people.best("lower_bound").id == people.best("validation").id == "p0001"
    assert people.best("latest").id == "p0002"
    assert people.top(5) == ["p0001", "p0000"]


def test_validation_scores_decide_and_unknown_ones_are_ignored() -> None:
    people = grown(3)
    people.rate(batch(p0000=[[0.0]] * 8, p0001=[[1.0]] * 8, p0002=[[0.5]] * 8))
    assert people.best("validation", {"p0000": 0.4, "p0002": 0.6, "gone": 0.9}).id == "p0002"
    assert people.best("validation", {"p0000": 0.5, "p0001": 0.5}).id == "p0001"
    assert people.best("lower_bound", {"p0000": 1.0}).id == "p0001"


def test_selection_is_keyed_by_step() -> None:
    people = grown(9, selection="softmax", root_anchor=False)
    draws = [tuple(people.select(step, 3, 4)) for step in range(12)]
    assert draws == [tuple(people.select(step, 3, 4)) for step in range(12)] and len(set(draws)) > 3
    assert all(sum(people.select(s, 3, 4).values()) == 12 for s in range(3))


def test_nobody_is_bred_while_children_wait() -> None:
    """No call goes out and the reason is on record; once the last child plays its first game, breeding goes on."""
    config = setting(nursery=1)
    people = Population(config, RATING, seed=1)
    people.add([child("waits", "p0000")], 0)
    model = Scripted(critique=plan(ADD))
    played = batch(1, p0000=[[1.0, 0.0], [0.0, 1.0]])
    assert outcome(breed(model, played, config, people)) == "crowded" and model.asked == []
    both = [*played, *batch(1, p0001=[[1.0, 0.0], [0.0, 1.0]])]
    assert outcome(breed(model, both, config, people)) == "child"
    free = Population(setting(), RATING, seed=1)
    free.add([child("waits", "p0000")], 0)
    assert outcome(breed(model, played, setting(), free)) == "child"
