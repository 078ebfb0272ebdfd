"""Selection: the rules by hand, the slots around them, and how samples are shared out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from evolution_cases import batch
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution import ratings
from espl_train.evolution.frontier import Frontier
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle, Rating
from espl_train.evolution.selection import RULES, Contender, allocate, candidates, select

#            oldest                                                           newest
#  lower         22                 8                 18                10
#  upper         28                32                 26                30
FOUR = [
    Contender("a", Rating(25, 1.5)),
    Contender("b", Rating(20, 6)),
    Contender("c", Rating(22, 2)),
    Contender("d", Rating(20, 5)),
]
PLAIN = EvolutionConfig(root_anchor=False, elite=False)


def play(rule: str, places: int, contenders: list[Contender] = FOUR, seed: int = 0, **settings: float) -> list[str]:
    config = PLAIN.model_copy(update=settings)
    return RULES[rule](contenders, places, config, np.random.default_rng(seed))


def test_uniform_always_plays_the_newest_and_draws_the_others() -> None:
    drawn = [play("uniform", 3, seed=s) for s in range(200)]
    assert all(d[0] == "d" and len(set(d)) == 3 for d in drawn)
    counts = [sum(x in d for d in drawn) for x in "abc"]
    assert all(100 < c < 165 for c in counts) and sum(counts) == 400


def test_lucb_plays_champion_challengers_and_newest() -> None:
    assert play("lucb", 2) == ["a", "d"]                    # b would be the challenger, the newest takes its place
    assert play("lucb", 3) == ["a", "b", "d"]
    assert play("lucb", 4) == ["a", "b", "d", "c"]
    assert play("lucb", 1) == ["d"]
    assert play("lucb", 3, [FOUR[3], FOUR[1], FOUR[0]]) == ["a", "b", "d"]      # the champion is the newest itself


def test_ucb_plays_the_highest_upper_bounds() -> None:
    assert play("ucb", 2) == ["b", "d"]
    assert play("ucb", 2, [*FOUR[:3]]) == ["b", "c"]        # a would be second, the newest takes the last place
    assert play("ucb", 2, explore=0.0) == ["a", "d"]


def test_ucb_uniform_plays_the_highest_and_draws_the_others() -> None:
    drawn = [play("ucb_uniform", 2, seed=s) for s in range(300)]
    assert all(d[0] == "b" for d in drawn)
    assert all(70 < sum(d[1] == x for d in drawn) < 130 for x in "acd")


def test_softmax_follows_its_probabilities() -> None:
    pair = [Contender("x", Rating(10, 0)), Contender("y", Rating(10 + np.log(3), 0))]
    first = [play("softmax", 1, pair, seed=s)[0] for s in range(2000)]
    assert sum(f == "y" for f in first) / 2000 == pytest.approx(0.75, abs=0.03)
    assert sum(play("softmax", 1, pair, seed=s, temperature=1e-3)[0] == "y" for s in range(50)) == 50
    far = [Contender("x", Rating(-1e6, 0)), Contender("y", Rating(1e6, 0)), Contender("z", Rating(0, 0))]
    assert play("softmax", 3, far) == ["y", "z", "x"]       # nothing underflows into a missing prompt


def test_ties_go_to_the_newer_prompt() -> None:
    same = [Contender(x, Rating(25, 8)) for x in "abcd"]
    assert play("lucb", 2, same) == ["d", "c"]
    assert play("ucb", 3, same) == ["d", "c", "b"]
    assert play("ucb_uniform", 1, same) == ["d"]


@pytest.mark.parametrize("rule", RULES)
def test_one_prompt_and_more_places_than_prompts(rule: str) -> None:
    assert play(rule, 3, FOUR[:1]) == ["a"]
    assert sorted(play(rule, 9)) == ["a", "b", "c", "d"]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(RULES)),
    st.lists(st.builds(Rating, st.floats(0, 50), st.floats(0, 9)), min_size=1, max_size=12),
    st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_what_holds_for_every_rule(
    rule: str, ratings: list[Rating], places: int, window: int, anchor: bool, elite: bool, seed: int
) -> None:
    config = EvolutionConfig(selection=rule, window=window, root_anchor=anchor, elite=elite)
    members = [Contender(f"p{i}", r) for i, r in enumerate(ratings)]
    best = max(members, key=lambda m: m.rating.lower()).id
    first, again = (select(members, "p0", best, places, config, np.random.default_rng(seed)) for _ in range(2))
    assert first == again and len(set(first)) == len(first) <= places
    allowed = {m.id for m in members[-window:]} | ({best} if elite else set()) | ({"p0"} if anchor else set())
    assert set(first) <= allowed or (anchor and set(first) <= allowed | {members[-window - 1].id})
    if anchor and places > 1:
        assert first[0] == "p0"
    if rule in ("uniform", "lucb", "ucb") and (places > 2 or not anchor):
        assert members[-1].id in first
    assert sum(allocate(first, places, 5).values()) == places * 5


def test_the_elite_stays_a_candidate_however_old() -> None:
    """Method §11 item 5."""
    old = [Contender("root", Rating(20, 1)), Contender("best", Rating(40, 1))]
    members = old + [Contender(f"n{i}", Rating(20, 3)) for i in range(10)]
    assert [c.id for c in candidates(members, 3, "best")] == ["best", "n7", "n8", "n9"]
    assert [c.id for c in candidates(members, 3, None)] == ["n7", "n8", "n9"]
    config = EvolutionConfig(selection="lucb", window=3, elite=True, root_anchor=True)
    assert select(members, "root", "best", 3, config, np.random.default_rng(0)) == ["root", "best", "n9"]
    without = EvolutionConfig(selection="lucb", window=3, elite=False, root_anchor=False)
    assert "best" not in select(members, "root", "best", 3, without, np.random.default_rng(0))


def test_the_anchor_leaves_the_only_place_to_the_rule() -> None:
    config = EvolutionConfig(root_anchor=True)
    assert select(FOUR, "a", "a", 1, config, np.random.default_rng(0)) == ["d"]
    assert select(FOUR[:1], "a", "a", 1, config, np.random.default_rng(0)) == ["a"]
    assert select(FOUR[:1], "a", "a", 3, config, np.random.default_rng(0)) == ["a"]


def test_spare_samples_go_to_the_prompts_that_are_there() -> None:
    assert allocate(["a", "b", "c"], 3, 8) == {"a": 8, "b": 8, "c": 8}
    assert allocate(["a", "b"], 3, 5) == {"a": 8, "b": 7}
    assert allocate(["a"], 3, 8) == {"a": 24}


def settled(members: list[Contender], rounds: int) -> dict[str, int]:
    """How often each plays in `rounds` batches of three places with the root anchor, while nobody is born; whoever
    plays is rated a little more surely, as after a match."""
    config, times = EvolutionConfig(selection="lucb", root_anchor=True), dict.fromkeys((m.id for m in members), 0)
    for seed in range(rounds):
        elite = max((m for m in members if m.games), key=lambda m: m.rating.lower()).id
        chosen = select(members, members[0].id, elite, 3, config, np.random.default_rng(seed))
        assert chosen[0] == members[0].id and len(set(chosen)) == 3
        for i, m in enumerate(members):
            if m.id in chosen:
                times[m.id] += 1
                members[i] = replace(m, rating=Rating(m.rating.mu, 0.9 * m.rating.sigma), games=m.games + 1)
    return times


@pytest.mark.parametrize("skills", [[25] * 7, [25, 24, 27, 23, 26, 25, 22], [25, 28, 22, 22, 22, 22, 22]])
@pytest.mark.parametrize("newest", [0, 6])
def test_no_challenger_is_starved_once_the_newest_has_played(skills: list[float], newest: int) -> None:
    """With the root in the first of three places the champion and one challenger are left. The newest keeps that
    place only until it has played."""
    order = skills[:1] + skills[1:][newest:] + skills[1:][:newest]
    members = [Contender(f"p{i}", Rating(mu, 7.0), games=1) for i, mu in enumerate(order)]
    members[-1] = replace(members[-1], games=0)
    assert min(settled(members, 60).values()) > 0


def test_the_newborn_plays_at_once_and_the_others_come_back_while_nobody_is_born() -> None:
    """The same through the population, with real ratings: six births in a row, then a pause."""
    people = Population(EvolutionConfig(selection="lucb"), RatingConfig(), seed=0)
    after: dict[str, int] = {}
    for step in range(1, 40):
        players = people.select(step, 3, 2)
        if step > 1 and step <= 8:
            assert people.members[-1].prompt.id in players, "the newborn waits"
        if step > 8:
            after |= {p: after.get(p, 0) + 1 for p in players}
        people.rate(batch(step, **{p: [[float((step + i) % 2)] for i in range(4)] for p in players}))
        if step <= 7:
            people.add([Child((Principle("G1", f"Rule {step}."),), "mutation", ("p0000",), 1)], step)
    assert set(after) == {m.prompt.id for m in people.members} and len(after) == 8


def test_thompson_plays_the_best_of_a_joint_draw() -> None:
    drawn = [replace(c, skill=s) for c, s in zip(FOUR, (3.0, 9.0, 7.0, 1.0), strict=True)]
    assert play("thompson", 2, drawn) == ["b", "c"] and play("thompson", 9, drawn) == ["b", "c", "a", "d"]


def test_thompson_plays_each_prompt_as_often_as_it_is_believed_to_be_the_best() -> None:
    """Two ratings: the one plays alone as often as a draw of its skill is above the other's; keyed by step."""
    people = Population(EvolutionConfig(selection="thompson", root_anchor=False), RatingConfig(delta_sigma=4.0), seed=0)
    people.add([Child((Principle("G1", "A."),), "mutation", ("p0000",), 1)], 1)
    people.rate(batch(2, p0000=[[0.0]] * 9, p0001=[[1.0]] * 9))
    a, b = people.rating("p0001"), people.rating("p0000")
    believed = 0.5 * (1 + math.erf((a.mu - b.mu) / math.hypot(a.sigma, b.sigma) / math.sqrt(2)))
    assert 0.6 < believed < 0.95
    plays = [next(iter(people.select(step, 1, 1))) for step in range(1500)]
    assert plays.count("p0001") / 1500 == pytest.approx(believed, abs=0.04)
    assert plays == [next(iter(people.select(step, 1, 1))) for step in range(1500)]


def test_pareto_draws_by_problems_won() -> None:
    won = [replace(c, wins=w, games=1) for c, w in zip(FOUR, (3, 0, 1, 0), strict=True)]
    first = [play("pareto", 1, won, seed=s, newest=False)[0] for s in range(2000)]
    assert first.count("a") / 2000 == pytest.approx(0.75, abs=0.03) and set(first) == {"a", "c"}
    both = [set(play("pareto", 2, won, seed=s, newest=False)) for s in range(50)]
    assert all(chosen == {"a", "c"} for chosen in both)
    third = [play("pareto", 3, won, seed=s, newest=False)[2] for s in range(400)]
    assert 150 < third.count("b") < 250 and set(third) == {"b", "d"}
    assert all("d" in play("pareto", 3, won, seed=s) for s in range(20))
    unplayed = [*won[:3], replace(won[3], games=0)]
    assert all(play("pareto", 2, unplayed, seed=s)[1] == "d" for s in range(20))


def test_the_frontier_keeps_whoever_alone_solves_something() -> None:
    frontier = Frontier(window=3)
    frontier.record(1, {"a": {0: (1.0,), 1: (1.0,), 2: (0.0,)}, "b": {0: (0.0,), 1: (1.0,), 2: (0.5, 1.0)}})
    assert frontier.wins(["a", "b"]) == {"a": 2, "b": 2}
    assert frontier.wins(["b"]) == {"b": 3}                                  # against whoever lives
    frontier.record(2, {"c": {1: (1.0,), 0: (0.2,)}})
    assert frontier.wins("abc") == {"a": 2, "b": 2, "c": 0}    # others are as good wherever c is the best
    frontier.record(3, {"a": {2: (1.0,)}})
    assert frontier.wins("abc") == {"a": 3, "b": 0, "c": 0}
    frontier.record(4, {"b": {2: (1.0,)}})
    assert frontier.wins("abc") == {"a": 0, "b": 1, "c": 2}      # the first is forgotten; of equals the newer stays
    again = Frontier.from_json(json.loads(json.dumps(frontier.to_json())), 3)
    assert again.wins("abc") == frontier.wins("abc") and again.to_json() == frontier.to_json()


def test_juveniles_are_sure_of_a_place_until_they_have_played() -> None:
    config = EvolutionConfig(juvenile_games=2)
    members = [replace(c, games=g) for c, g in zip(FOUR, (9, 2, 1, 0), strict=True)]
    assert select(members, "a", "b", 3, config, np.random.default_rng(0)) == ["a", "c", "d"]      # and the champion
    assert select(members, "a", "b", 4, config, np.random.default_rng(0)) == ["a", "c", "d", "b"]
    assert select(members, "a", "b", 2, config, np.random.default_rng(0)) == ["a", "c"]
    far = members[:3] + [Contender(f"n{i}", Rating(20, 3), games=5) for i in range(20)]
    assert "c" in select(far, "a", "b", 3, config, np.random.default_rng(0)), "however old"
    off = config.model_copy(update={"juvenile_games": 0})
    assert select(members, "a", "b", 4, off, np.random.default_rng(0)) == ["a", "c", "b", "d"]
    assert "c" not in select(far, "a", "b", 3, off, np.random.default_rng(0))


def test_the_newest_slot_can_be_closed() -> None:
    closed = {"newest": False}
    assert play("lucb", 2, **closed) == ["a", "b"] and play("ucb", 2, **closed) == ["b", "d"]
    drawn = [play("uniform", 2, seed=s, **closed) for s in range(300)]
    assert all(110 < sum(x in d for d in drawn) < 190 for x in "abcd")


def games(steps: int, **changes: Any) -> tuple[dict[str, int], Population]:
    """Games by prompt, in a run in which a child of the root is born at every step unless it is too crowded."""
    people = Population(EvolutionConfig(**changes), RatingConfig(), seed=0)
    for step in range(1, steps + 1):
        players = people.select(step, 3, 2)
        groups = batch(step, **{p: [[float((step + i) % 2)] for i in range(4)] for p in players})
        crowded = people.crowded(people.preview(groups)[0])
        people.rate(groups)
        if not crowded:
            people.add([Child((Principle("G1", f"Rule {step}."),), "mutation", ("p0000",), 1)], step)
    return {m.prompt.id: m.games for m in people.members}, people


def test_with_a_nursery_every_child_gets_its_games() -> None:
    """While a child is born at every step the one place for juveniles cannot serve them all; with a nursery births
    wait, and nobody is passed over."""
    flood, _ = games(30, juvenile_games=3)
    assert sum(flood[p] == 0 for p in list(flood)[1:]) > 10
    calm, people = games(30, juvenile_games=3, nursery=2)
    *children, last, newest = list(calm)[1:]
    assert len(children) >= 8 and all(calm[p] >= 3 for p in children) and calm[last] + calm[newest] < 6
    nothing = ratings.match([], RatingConfig())
    assert people.crowded(nothing) and not games(1, nursery=2)[1].crowded(nothing)
