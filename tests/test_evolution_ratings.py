"""Ratings from ranks: both packages as their authors expect them, draws where a batch decides nothing, inheritance."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import trueskill
from evolution_cases import batch, group
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_envs.core.errors import MissingExtra
from espl_train.config import RatingConfig
from espl_train.evolution import beliefs, ladders, ratings
from espl_train.evolution.prompts import Rating

CONFIG = RatingConfig()
FILE = Path("reference/trueskill_expectations.jsonl")


def test_all_reference_expectations(mirror: Path) -> None:
    """The 49 expectations of the package's own tests, through the functions that rate our prompts."""
    rows = [json.loads(line) for line in (mirror / FILE).read_text().splitlines()]
    assert len(rows) == 49
    for row in rows:
        config = RatingConfig(**row["env"])
        teams = [tuple(trueskill.Rating(mu, sigma) for mu, sigma in team) for team in row["teams"]]
        extra = {"weights": row["weights"]} if "weights" in row else {}
        if row["kind"] == "quality":
            quality = ladders.environment(config).quality(teams, **extra)
            assert quality == pytest.approx(row["expected"], abs=row["tolerance"]), row["id"]
            continue
        rated = ladders.rate_teams(teams, row.get("ranks"), config, **extra)
        flat = [(float(r.mu), float(r.sigma)) for team in rated for r in team]
        for got, want in zip(flat, row["expected"], strict=True):
            assert got == pytest.approx(tuple(want), abs=max(row["tolerance"], 10 ** -row["precision"])), row["id"]


def test_time_adds_uncertainty_before_a_match() -> None:
    known = {"a": Rating(25.0, 0.01), "b": Rating(25.0, 0.01)}
    even = ratings.match(batch(a=[[1, 0]], b=[[1, 0]]), CONFIG)
    after = ladders.update(known, even, CONFIG)
    assert after["a"].sigma > 0.05


def test_a_free_for_all_is_read_from_mean_rewards() -> None:
    result = ratings.match(batch(a=[[0, 0], [0, 0]], b=[[1, 1], [1, 1]], c=[[1, 0], [1, 0]]), CONFIG)
    assert result.values == {"b": 1.0, "c": 0.5, "a": 0.0}
    assert result.ranks["b"] < result.ranks["a"]
    after = ladders.update(dict.fromkeys("abcd", Rating(25, 25 / 3)), result, CONFIG)
    assert after["b"].mu > after["c"].mu > after["a"].mu
    assert after["d"] == Rating(25, 25 / 3)


def test_alone_there_is_no_match() -> None:
    one = ratings.match(batch(a=[[1.0]]), CONFIG)
    assert ladders.update({"a": Rating(25, 8)}, one, CONFIG) == {"a": Rating(25, 8)}
    nothing = ratings.match([], CONFIG)
    assert nothing.ranks == {} and ladders.update({"a": Rating(25, 8)}, nothing, CONFIG) == {"a": Rating(25, 8)}


def test_faulted_rollouts_are_no_zeros_and_unshared_problems_do_not_count() -> None:
    groups = [group("a", 0, [1.0], faults=3), group("a", 1, [0.0]), group("b", 0, [1.0]), group("b", 1, [], faults=2)]
    result = ratings.match(groups, CONFIG)
    assert result.problems == (0,) and result.values == {"a": 1.0, "b": 1.0} and set(result.ranks.values()) == {0}
    assert ratings.match([group("a", 0, [1.0]), group("b", 1, [1.0])], CONFIG).ranks == {}


@pytest.mark.parametrize(("difference", "draw"), [(0.0, True), (0.01, True), (0.0101, False), (0.5, False)])
def test_tolerance_ties(difference: float, draw: bool) -> None:
    config = RatingConfig(ties="tolerance")
    ranks = ratings.match(batch(a=[[0.5 + difference]], b=[[0.5]]), config).ranks
    assert (ranks["a"] == ranks["b"]) is draw


def test_paired_ties_see_what_a_tolerance_does_not() -> None:
    """A steady small lead wins; a larger one that comes from one lucky problem is a draw."""
    steady_a, steady_b = [[0.6]] * 10, [[0.5]] * 10
    lucky_a, lucky_b = [[1.0]] + [[0.5]] * 9, [[0.0]] + [[0.5]] * 9
    steady = ratings.match(batch(a=steady_a, b=steady_b), CONFIG).ranks
    lucky = ratings.match(batch(a=lucky_a, b=lucky_b), CONFIG).ranks
    assert steady["a"] < steady["b"] and lucky["a"] == lucky["b"]
    reference = RatingConfig(ties="tolerance")
    assert ratings.match(batch(a=lucky_a, b=lucky_b), reference).ranks == {"a": 0, "b": 1}


def test_the_error_of_a_paired_difference() -> None:
    assert ratings.paired_difference([((1.0,), (0.0,)), ((0.0,), (0.0,))]) == (0.5, 0.5)
    mean, error = ratings.paired_difference([((1.0, 0.0), (0.0, 0.0))])
    assert mean == 0.5 and error == pytest.approx(0.5)
    assert ratings.paired_difference([((1.0,), (0.0,))]) == (1.0, 0.0)


REWARDS = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=2), min_size=3, max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(REWARDS, min_size=2, max_size=5), st.sampled_from(["paired", "tolerance"]))
def test_ranks_are_transitive_and_agree_with_the_values(tables: list[list[list[float]]], ties: str) -> None:
    config = RatingConfig(ties=ties)  # type: ignore[arg-type]
    players = {chr(97 + i): rows for i, rows in enumerate(tables)}
    result = ratings.match(batch(**players), config)
    assert sorted(set(result.ranks.values())) == list(range(max(result.ranks.values()) + 1))
    for a, b in itertools.permutations(players, 2):
        if result.values[a] > result.values[b]:
            assert result.ranks[a] <= result.ranks[b]
        mean, error = ratings.paired_difference(list(zip(players[a], players[b], strict=True)))
        if ties == "paired" and mean > error + 1e-6:
            assert result.ranks[a] < result.ranks[b], "a decided pair must not be a draw"


def test_the_order_of_groups_changes_nothing() -> None:
    groups = batch(a=[[1, 0], [0, 0]], b=[[1, 0], [0, 0]], c=[[1, 1], [1, 0]], d=[[0, 0], [0, 0]])
    start = dict.fromkeys("abcd", Rating(25, 25 / 3))
    expected = ladders.update(start, ratings.match(groups, CONFIG), CONFIG)
    for order in itertools.islice(itertools.permutations(groups), 0, 40320, 4999):
        assert ladders.update(start, ratings.match(order, CONFIG), CONFIG) == expected


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_extreme_draw_probabilities_stay_finite(probability: float) -> None:
    config = RatingConfig(draw_probability=probability)
    for rows in ([[1.0]], [[0.0]]):
        result = ratings.match(batch(a=[[1.0]], b=rows), config)
        after = ladders.update(dict.fromkeys("ab", Rating(25, 8)), result, config)
        assert all(math.isfinite(r.mu) and 0 < r.sigma < 9 for r in after.values())


def test_an_upset_that_doubles_cannot_express_is_rated_all_the_same() -> None:
    upset = ratings.match(batch(a=[[1.0]], b=[[0.0]]), CONFIG)
    after = ladders.update({"a": Rating(0, 1), "b": Rating(900, 1)}, upset, CONFIG)
    assert after["a"].mu > 0 and after["b"].mu < 900


def test_inheritance() -> None:
    """Method §6: mutation widens; a crossover child is never more certain than its most certain parent."""
    reference = RatingConfig(inheritance="reference")
    parent, other = Rating(30, 3), Rating(20, 1.5)
    for config in (CONFIG, reference):
        child = ladders.inherit([parent], config)
        assert child.mu == 30 and child.sigma == pytest.approx(math.sqrt(10))
    born = ladders.inherit([parent, other], reference)
    assert born.mu == pytest.approx((30 / 9 + 20 / 2.25) / (1 / 9 + 1 / 2.25))
    assert born.sigma == pytest.approx(math.sqrt(1 / (1 / 9 + 1 / 2.25) + 1))
    careful = ladders.inherit([parent, other], CONFIG)
    assert careful.mu == born.mu and careful.sigma > born.sigma


@given(st.lists(st.builds(Rating, st.floats(-50, 50), st.floats(0.1, 9)), min_size=1, max_size=4), st.floats(0, 2))
def test_no_child_is_surer_than_its_surest_parent(parents: list[Rating], delta: float) -> None:
    child = ladders.inherit(parents, RatingConfig(delta_sigma=delta))
    assert child.sigma >= min(p.sigma for p in parents) - 1e-9
    assert min(p.mu for p in parents) - 1e-9 <= child.mu <= max(p.mu for p in parents) + 1e-9
    twins = ladders.inherit([parents[0]] * 3, RatingConfig(delta_sigma=delta))
    single = ladders.inherit([parents[0]], RatingConfig(delta_sigma=delta))
    assert twins.mu == single.mu and twins.sigma == pytest.approx(single.sigma)


OPEN = RatingConfig(kind="openskill")


def weng_lin(known: list[Rating], ranks: list[int], config: RatingConfig) -> list[Rating]:
    """Algorithm 1 of Weng and Lin (JMLR 12, 2011), Bradley-Terry over all pairs, for teams of one."""
    grown = [math.hypot(r.sigma, config.tau) for r in known]
    after = []
    for i, r in enumerate(known):
        omega = delta = 0.0
        for q, other in enumerate(known):
            if q == i:
                continue
            c = math.sqrt(grown[i] ** 2 + grown[q] ** 2 + 2 * config.beta**2)
            p = 1 / (1 + math.exp((other.mu - r.mu) / c))
            s = 0.5 if ranks[q] == ranks[i] else float(ranks[q] > ranks[i])
            omega += grown[i] ** 2 / c * (s - p)
            delta += grown[i] / c * (grown[i] / c) ** 2 * p * (1 - p)
        after.append(Rating(r.mu + omega, grown[i] * math.sqrt(max(1 - delta, 1e-4))))
    return after


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(0.1, 9), st.integers(0, 2)), min_size=2, max_size=5))
def test_openskill_is_weng_and_lins_algorithm(players: list[tuple[float, float, int]]) -> None:
    known = [Rating(mu, sigma) for mu, sigma, _ in players]
    ranks = [rank for *_, rank in players]
    for got, want in zip(ladders.by_openskill(known, ranks, OPEN), weng_lin(known, ranks, OPEN), strict=True):
        assert (got.mu, got.sigma) == pytest.approx((want.mu, want.sigma), rel=1e-6, abs=1e-6)


def test_openskill_gives_what_its_own_tests_expect() -> None:
    """Of its test data (bradleyterryfull.json, `normal`): one against two, all alike."""
    model = ladders.openskill_model(OPEN.model_copy(update={"mu": 33.93520996667812, "sigma": 9.863910103294474}))
    one, two = model.rate([[model.rating()], [model.rating(), model.rating()]])
    assert (one[0].mu, one[0].sigma) == pytest.approx((38.60492430454205, 9.771557303944002))
    assert (two[1].mu, two[1].sigma) == pytest.approx((29.265495628814193, 9.73289909385935))


@pytest.mark.parametrize("config", [CONFIG, OPEN], ids=lambda c: c.kind)
def test_both_ladders_agree_on_who_gains(config: RatingConfig) -> None:
    result = ratings.match(batch(a=[[0, 0], [0, 0]], b=[[1, 1], [1, 1]], c=[[1, 0], [1, 0]]), config)
    after = ladders.update(dict.fromkeys("abcd", Rating(25, 25 / 3)), result, config)
    assert after["b"].mu > after["c"].mu > after["a"].mu and after["d"] == Rating(25, 25 / 3)
    draw = ratings.match(batch(a=[[1.0, 0.0]], b=[[1.0, 0.0]]), config)
    closer = ladders.update({"a": Rating(30, 4), "b": Rating(20, 4)}, draw, config)
    assert 20 < closer["b"].mu < closer["a"].mu < 30


def test_a_draw_that_was_taken_for_a_win_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way round, too: where every match is a draw, nobody ever rises."""
    start = dict.fromkeys("ab", Rating(25, 8))
    clear = ratings.match(batch(a=[[1.0]] * 8, b=[[0.0]] * 8), CONFIG)
    assert ladders.update(start, clear, CONFIG)["a"].mu > 27
    monkeypatch.setattr(ratings, "_paired", lambda *_: lambda *_: False)
    blurred = ratings.match(batch(a=[[1.0]] * 8, b=[[0.0]] * 8), CONFIG)
    assert ladders.update(start, blurred, CONFIG)["a"].mu == pytest.approx(25)


def test_differences_without_a_finite_exponential_are_rated_all_the_same() -> None:
    after = ladders.by_openskill([Rating(0, 1), Rating(1e7, 1)], [0, 1], OPEN)
    assert 0 < after[0].mu < 1 and 1e7 - 1 < after[1].mu < 1e7


@pytest.mark.parametrize(("kind", "package", "extra"), [
    ("trueskill", "trueskill", "train"), ("openskill", "openskill.models", "openskill")
])  # fmt: skip
def test_a_missing_package_is_named_at_the_start(
    kind: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"rating.kind {kind}.*espl\[{extra}\]"):
        beliefs.start(RatingConfig(kind=kind), "p0000")  # type: ignore[arg-type]
    beliefs.start(RatingConfig(kind="item_response"), "p0000")
