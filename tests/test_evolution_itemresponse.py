"""Item-response ratings: hidden skills come back with honest intervals, and each part of the model earns its place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from evolution_cases import batch, group
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_envs.core.errors import EsplError
from espl_train.config import RatingConfig
from espl_train.evolution import item_response, ratings
from espl_train.evolution.item_response import ItemResponse, laplace
from espl_train.evolution.ratings import Match
from espl_train.randomness import generator

CONFIG = RatingConfig(kind="item_response")
LOGIT = CONFIG.beta
Z = 1.959964


def start(*children: str, config: RatingConfig = CONFIG) -> ItemResponse:
    """The root "r" and children of it."""
    beliefs = ItemResponse.start(config, "r")
    for child in children:
        beliefs = beliefs.born(child, ["r"])
    return beliefs


def seen(beliefs: ItemResponse, step: int = 0, **table: Sequence[Sequence[float]]) -> ItemResponse:
    return beliefs.after(ratings.match(batch(step, **table), beliefs.config))


def truth(
    config: RatingConfig, number: int, prompts: int = 6, steps: int = 12, tasks: int = 30, rise: float = 0.0
) -> tuple[np.ndarray, list[Match]]:
    """Skills in logits, the root first, and matches drawn from the model itself (`rise` is added to the ability at
    every step): all prompts are children of the root, three play at a time, the later born later."""
    random = generator(number, "truth")
    unit = {k: getattr(config, k) / config.beta for k in ("novelty", "difficulty", "drift", "interaction", "sigma")}
    skills = np.append(0.0, unit["novelty"] * random.standard_normal(prompts - 1))
    difficulty = unit["difficulty"] * random.standard_normal(tasks)
    ability = unit["sigma"] * random.standard_normal() + np.cumsum(
        np.append(0.0, rise + unit["drift"] * random.standard_normal(steps - 1))
    )
    matches = []
    for step in range(steps):
        first = min(step * prompts // steps, prompts - 3)
        batch_tasks, rewards = random.permutation(tasks)[:10].tolist(), {}
        for i in range(first, first + 3):
            row = {}
            for q in batch_tasks:
                logit = skills[i] + ability[step] - difficulty[q] + unit["interaction"] * random.standard_normal()
                row[q] = tuple((random.random(5) < 1 / (1 + math.exp(-logit))).astype(float).tolist())
            rewards[f"p{i}"] = row
        matches.append(Match((), {}, {}, rewards, step))
    return skills, matches


def recovered(config: RatingConfig, matches: Sequence[Match], prompts: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of the skills, in logits."""
    beliefs = ItemResponse.start(config, "p0")
    for i in range(1, prompts):
        beliefs = beliefs.born(f"p{i}", ["p0"])
    for match in matches:
        beliefs = beliefs.after(match)
    found = [beliefs.rating(f"p{i}") for i in range(prompts)]
    return np.array([(r.mu - config.mu) / LOGIT for r in found]), np.array([r.sigma / LOGIT for r in found])


def test_hidden_skills_come_back_and_the_intervals_hold_what_they_promise() -> None:
    """80 worlds drawn from the model: 95 % intervals cover about 95 %, and the means follow the truth."""
    inside, errors, spread = [], [], []
    for number in range(80):
        skills, matches = truth(CONFIG, number)
        mean, sigma = recovered(CONFIG, matches)
        inside += (np.abs(mean - skills) <= Z * sigma)[1:].tolist()
        errors += np.square(mean - skills)[1:].tolist()
        spread += np.square(skills)[1:].tolist()
    assert 0.92 <= np.mean(inside) <= 0.98
    assert np.mean(errors) < 0.35 * np.mean(spread)


def worse(broken: Callable[[RatingConfig], RatingConfig], **world: float) -> tuple[float, float]:
    """Mean squared errors of the model and of a broken one, over the same 25 worlds."""
    whole, part = [], []
    for number in range(25):
        skills, matches = truth(CONFIG, 1000 + number, **world)  # type: ignore[arg-type]
        for config, errors in ((CONFIG, whole), (broken(CONFIG), part)):
            errors += np.square(recovered(config, matches)[0] - skills)[1:].tolist()
    return float(np.mean(whole)), float(np.mean(part))


def test_a_policy_that_is_taken_to_stand_still_flatters_the_prompts_born_late() -> None:
    whole, still = worse(lambda c: c.model_copy(update={"drift": 0.0}), rise=0.25)
    assert still > 1.2 * whole


def test_problems_that_are_taken_to_be_alike_cost_precision() -> None:
    whole, alike = worse(lambda c: c.model_copy(update={"difficulty": 1e-3}))
    assert alike > 1.2 * whole


def test_without_interaction_the_intervals_promise_too_much() -> None:
    uneven = CONFIG.model_copy(update={"interaction": 2 * LOGIT})
    inside: dict[float, list[bool]] = {0.0: [], uneven.interaction: []}
    for number in range(25):
        skills, matches = truth(uneven, number)
        for interaction, found in inside.items():
            mean, sigma = recovered(uneven.model_copy(update={"interaction": interaction}), matches)
            found += (np.abs(mean - skills) <= Z * sigma)[1:].tolist()
    assert np.mean(inside[uneven.interaction]) > 0.91 > 0.8 > np.mean(inside[0.0])


def test_a_difficulty_is_remembered() -> None:
    """Solving what everybody failed at says more than solving it for the first time."""
    hard = seen(start(), 0, r=[[0.0] * 5] * 4)
    easy = seen(start(), 0, r=[[1.0] * 5] * 4)
    gained = [seen(b.born("a", ["r"]), 1, a=[[1.0, 0.0, 1.0, 0.0, 1.0]] * 4).rating("a").mu for b in (hard, easy)]
    assert gained[0] > 25 + LOGIT / 2 > 25 - LOGIT / 2 > gained[1]
    elsewhere = hard.born("a", ["r"]).after(
        ratings.match([group("a", q, [1.0, 0.0, 1.0, 0.0, 1.0]) for q in (7, 8, 9)], CONFIG)
    )
    assert elsewhere.rating("a").mu < gained[0]


def test_mode_and_curvature_against_brute_force() -> None:
    """Two cells on a fine grid: Laplace's mode is the maximum, its covariance the inverse Hessian there."""
    prior, kernel = np.array([0.3, -0.8]), np.array([[2.0, 0.7], [0.7, 1.1]])
    successes, counts = np.array([4.0, 0.5]), np.array([5.0, 3.0])
    axis = np.linspace(-2, 2, 401)
    f = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    off = f - prior
    log = (f * successes - counts * np.logaddexp(0, f)).sum(-1)
    log -= 0.5 * np.einsum("abi,ij,abj->ab", off, np.linalg.inv(kernel), off)
    mode = f[np.unravel_index(log.argmax(), log.shape)]
    gradient, root = laplace(prior, kernel, successes, counts)
    found = prior + kernel @ gradient
    assert found == pytest.approx(mode, abs=0.011)
    chance = 1 / (1 + np.exp(-found))
    assert gradient == pytest.approx(successes - counts * chance, abs=1e-6)
    hessian = np.linalg.inv(kernel) + np.diag(counts * chance * (1 - chance))
    assert kernel - (root @ kernel).T @ (root @ kernel) == pytest.approx(np.linalg.inv(hessian), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=40), min_size=1, max_size=4),
    st.floats(0, 1e3), st.floats(1e-2, 1e3), st.integers(0, 10**6),
)  # fmt: skip
def test_beliefs_stay_finite_symmetric_and_positive(
    rows: list[list[float]], drift: float, difficulty: float, later: int
) -> None:
    config = CONFIG.model_copy(update={"drift": drift, "difficulty": difficulty, "tau": drift, "interaction": 0.0})
    beliefs = start("a", "b", config=config)
    for step in (1, 1 + later, 2 + later):
        beliefs = seen(beliefs, step, r=[[1.0 - x for x in row] for row in rows], a=rows, b=[[0.0]] * len(rows))
        assert np.isfinite(beliefs.mean).all() and np.array_equal(beliefs.covariance, beliefs.covariance.T)
        values = np.linalg.eigvalsh(beliefs.covariance)
        assert values.min() >= -1e-9 * values.max()
        assert all(d.variance > 0 and math.isfinite(d.mean) for d in beliefs.problems.values())


def test_hundreds_of_one_sided_games_stay_finite() -> None:
    beliefs = start("a")
    rewards = {"r": dict.fromkeys(range(8), (0.0,) * 64), "a": dict.fromkeys(range(8), (1.0,) * 64)}
    for step in range(1, 301):
        beliefs = beliefs.after(Match((), {}, {}, rewards, step))
    assert 25 < beliefs.rating("a").mu < 25 + 60 * LOGIT and 0 < beliefs.rating("a").sigma < LOGIT


def test_fractions_are_fractional_successes() -> None:
    half = seen(start("a"), r=[[0.5] * 4] * 3, a=[[0.75] * 4] * 3)
    whole = seen(start("a"), r=[[1.0, 0.0] * 2] * 3, a=[[1.0, 1.0, 1.0, 0.0]] * 3)
    assert half.rating("a").mu == pytest.approx(whole.rating("a").mu)
    assert half.rating("a").sigma == pytest.approx(whole.rating("a").sigma)


@pytest.mark.parametrize("reward", [1.5, -0.1, math.nan, math.inf])
def test_rewards_that_are_no_successes_are_refused(reward: float) -> None:
    with pytest.raises(EsplError, match=r"between 0 and 1.*trueskill"):
        seen(start("a"), r=[[0.0]], a=[[reward]])


def test_the_root_is_the_yardstick() -> None:
    beliefs = seen(start("a"), r=[[1.0] * 5] * 5, a=[[0.0] * 5] * 5)
    assert (beliefs.rating("r").mu, beliefs.rating("r").sigma) == (25.0, 0.0)
    assert beliefs.rating("a").mu < 25 < beliefs.ability.mu
    assert start("a").rating("a").sigma == pytest.approx(CONFIG.novelty)


def test_a_family_shares_what_its_members_show() -> None:
    """A child's games say something of its parent, and nothing of a stranger; a child of two is their mean."""
    beliefs = start("parent", "stranger").born("child", ["parent"])
    after = seen(beliefs, r=[[0.0, 1.0] * 3] * 8, child=[[1.0] * 6] * 8)
    assert after.rating("child").mu > after.rating("parent").mu > 25 + 1
    assert after.rating("stranger").mu == pytest.approx(25)
    crossed = after.born("both", ["parent", "stranger"]).rating("both")
    assert crossed.mu == pytest.approx((after.rating("parent").mu + after.rating("stranger").mu) / 2)
    assert crossed.sigma > CONFIG.novelty
    gone = after.without("parent")
    assert gone.rating("child") == after.rating("child") and gone.prompts == ("stranger", "child")


def test_draws_are_joint() -> None:
    beliefs = start("parent").born("child", ["parent"])
    draws = np.array([beliefs.draw(["r", "parent", "child"], generator(i)) for i in range(4000)])
    assert (draws[:, 0] == 25).all()
    assert np.corrcoef(draws[:, 1], draws[:, 2])[0, 1] == pytest.approx(math.sqrt(0.5), abs=0.03)
    assert draws[:, 2].std() == pytest.approx(beliefs.rating("child").sigma, rel=0.05)


def test_an_empty_batch_says_nothing_and_a_lone_player_tells_of_problems() -> None:
    beliefs = start("a")
    assert beliefs.after(ratings.match([], CONFIG)) is beliefs
    alone = seen(beliefs, r=[[0.0] * 5, [1.0] * 5])
    assert alone.problems[0].mean > 0 > alone.problems[1].mean
    assert alone.rating("a") == beliefs.rating("a")


def test_the_round_trip_is_exact_to_the_last_bit() -> None:
    beliefs = seen(seen(start("a", "b"), 1, r=[[0.3, 1.0]], a=[[1.0, 0.1]]), 4, b=[[0.0, 0.7]], a=[[1 / 3, 0.0]])
    text = json.dumps(beliefs.to_json())
    again = ItemResponse.from_json(json.loads(text), CONFIG, "r")
    assert json.dumps(again.to_json()) == text
    then = [json.dumps(seen(b, 9, r=[[1.0]], b=[[0.0, 1.0]]).to_json()) for b in (beliefs, again)]
    assert then[0] == then[1]


def test_newton_without_its_safeguard_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from the mode a full step overshoots; halving it is what keeps the answer right."""
    far = (np.array([-30.0]), np.array([[400.0]]), np.array([50.0]), np.array([50.0]))
    gradient, _ = laplace(*far)
    f = far[0] + far[1] @ gradient
    assert gradient == pytest.approx(50 - 50 / (1 + np.exp(-f)), abs=1e-6)
    monkeypatch.setattr(item_response, "NEWTON_STEPS", 1)
    early, _ = laplace(*far)
    assert abs(early - gradient).max() > 1e-6
