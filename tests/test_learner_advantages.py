"""Advantages: the identities every baseline must keep, on any rewards."""

from __future__ import annotations

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from learner_kit import group, rollout

from espl_envs.core.errors import EsplError
from espl_train.learner.advantages import BASELINES, assign
from espl_train.records import Group

reward = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))
problem = st.lists(st.lists(reward, min_size=1, max_size=6), min_size=1, max_size=4)      # [prompt][sample]
even_problem = st.integers(2, 5).flatmap(
    lambda n: st.lists(st.lists(reward, min_size=n, max_size=n), min_size=1, max_size=4)
)


def groups_of(rewards: list[list[float]], task: int = 0) -> list[Group]:
    def one(i: int, row: list[float]) -> Group:
        return group(*(rollout(r, prompt=f"p{i}", task=task, sample=j) for j, r in enumerate(row)))

    return [one(i, row) for i, row in enumerate(rewards)]


def advantages(rewards: list[list[float]], baseline: str, divide: bool = False) -> list[tuple[float, ...]]:
    return [g.advantages for g in assign(groups_of(rewards), baseline, divide)]


# Two prompts on one problem, rewards 1 0 0 and 1 (fault) 0.5; a third prompt whose rollouts all faulted, and one alone.
TABLE = [[1.0, 0.0, 0.0], [1.0, None, 0.5], [None], [0.5]]
SPREAD = sqrt(((1 - 0.5) ** 2 * 2 + 0.5**2 * 2) / 6)      # of 1 0 0 1 0.5 0.5, whose mean is 0.5
BY_HAND = {
    # means of the prompts: 1/3, 3/4, 1/2
    "prompt": [[2 / 3, -1 / 3, -1 / 3], [1 / 4, None, -1 / 4], [None], [0.0]],
    # mean of the means: 19/36
    "marginal": [[17 / 36, -19 / 36, -19 / 36], [17 / 36, None, -1 / 36], [None], [-1 / 36]],
    # means of the others: 0, 1/2, 1/2; 1/2, 1; none
    "prompt_leave_one_out": [[1.0, -1 / 2, -1 / 2], [1 / 2, None, -1 / 2], [None], [0.0]],
    # means of (own without oneself, 3/4, 1/2), of (1/3, own without oneself, 1/2), of (1/3, 3/4)
    "marginal_leave_one_out": [
        [1 - 5 / 12, -7 / 12, -7 / 12], [1 - 4 / 9, None, 1 / 2 - 11 / 18], [None], [1 / 2 - 13 / 24],
    ],
}  # fmt: skip


def table_groups() -> list[Group]:
    return [
        group(*(rollout(r or 0.0, prompt=f"p{i}", sample=j, faulted=r is None) for j, r in enumerate(row)))
        for i, row in enumerate(TABLE)
    ]


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_by_hand(baseline):
    found = [list(g.advantages) for g in assign(table_groups(), baseline)]
    assert found == [pytest.approx(row) for row in BY_HAND[baseline]]


def test_the_standard_deviation_is_that_of_what_is_compared():
    within, across = (assign(table_groups(), baseline, divide_by_std=True) for baseline in ("prompt", "marginal"))
    assert within[0].advantages == pytest.approx([2 / 3 / (sqrt(2) / 3), *[-1 / 3 / (sqrt(2) / 3)] * 2])
    assert within[1].advantages == pytest.approx([1.0, None, -1.0])
    assert across[0].advantages == pytest.approx([17 / 36 / SPREAD, *[-19 / 36 / SPREAD] * 2])
    two = groups_of([[1.0, 0.0]]) + groups_of([[9.0, 1.0]], task=1)          # one prompt, two problems
    assert [g.advantages for g in assign(two, divide_by_std=True)] == [(1.0, -1.0)] * 2


def test_a_baseline_that_counts_a_fault_as_a_zero_is_found_out():
    """The reward of a faulted rollout is 0 by accident of its type, not because it failed the problem."""
    counted = assign(table_groups(), judge=lambda r: r.reward)
    assert counted[1].advantages != pytest.approx(BY_HAND["prompt"][1])


@given(problem)
def test_prompt_baseline_sums_to_zero_in_every_group(rewards):
    assert all(abs(sum(row)) < 1e-9 for row in advantages(rewards, "prompt"))


@given(even_problem)
def test_leave_one_out_is_n_over_n_minus_1_times_the_plain_advantage(rewards):
    n = len(rewards[0])
    plain, alone = advantages(rewards, "prompt"), advantages(rewards, "prompt_leave_one_out")
    for a, b in zip(plain, alone, strict=True):
        assert b == pytest.approx([x * n / (n - 1) for x in a], abs=1e-9)


@given(problem)
def test_marginal_is_the_prompts_advantage_plus_how_good_the_prompt_is(rewards):
    means = [sum(row) / len(row) for row in rewards]
    overall = sum(means) / len(means)
    plain, marginal = advantages(rewards, "prompt"), advantages(rewards, "marginal")
    for a, b, mean in zip(plain, marginal, means, strict=True):
        assert b == pytest.approx([x + mean - overall for x in a], abs=1e-9)


@given(even_problem)
def test_marginal_sums_to_zero_over_the_problem_and_leave_one_out_scales_the_own_part(rewards):
    prompts, n = len(rewards), len(rewards[0])
    marginal, alone = advantages(rewards, "marginal"), advantages(rewards, "marginal_leave_one_out")
    plain = advantages(rewards, "prompt")
    assert abs(sum(map(sum, marginal))) < 1e-8
    for a, b, own in zip(marginal, alone, plain, strict=True):
        assert b == pytest.approx([x + y / (prompts * (n - 1)) for x, y in zip(a, own, strict=True)], abs=1e-9)


@given(st.lists(reward, min_size=1, max_size=6), st.sampled_from(list(BASELINES)))
def test_with_one_prompt_marginal_is_prompt(row, baseline):
    twin = baseline.replace("marginal", "prompt")
    assert advantages([row], baseline)[0] == pytest.approx(advantages([row], twin)[0], abs=1e-9)


@given(problem, st.sampled_from(list(BASELINES)))
def test_adding_a_constant_to_all_rewards_changes_nothing(rewards, baseline):
    moved = [[r + 5 for r in row] for row in rewards]
    for a, b in zip(advantages(rewards, baseline), advantages(moved, baseline), strict=True):
        assert b == pytest.approx(a, abs=1e-8)


@given(st.lists(st.lists(st.integers(0, 10).map(float), min_size=2, max_size=6), min_size=1, max_size=3))
def test_dividing_by_the_standard_deviation_gives_unit_variance(rewards):
    for row in advantages(rewards, "prompt", divide=True):
        if any(row):
            assert sqrt(sum(a * a for a in row) / len(row)) == pytest.approx(1.0)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_give_exact_zeros(baseline, value):
    rows = advantages([[value] * 3, [value] * 7], baseline, divide=True)
    assert [a for row in rows for a in row] == [0.0] * 10


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_faulted_rollout_changes_nobodys_advantage_and_has_none(baseline):
    with_fault = group(rollout(1.0), rollout(0.0, faulted=True), rollout(0.0, sample=2))
    without = group(rollout(1.0), rollout(0.0, sample=2))
    a, b = assign([with_fault], baseline)[0].advantages, assign([without], baseline)[0].advantages
    assert (a[0], a[2]) == b
    assert a[1] is None


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_group_of_faults_or_a_single_rollout_has_no_contrast(baseline):
    faults = group(rollout(1.0, faulted=True), rollout(0.0, faulted=True))
    single = group(rollout(1.0, task=1))
    assert [g.advantages for g in assign([faults, single], baseline)] == [(None, None), (0.0,)]


def test_marginal_compares_prompts_of_the_same_problem_only():
    groups = groups_of([[1.0, 1.0], [0.0, 0.0]]) + groups_of([[5.0, 5.0], [5.0, 5.0]], task=1)
    assert [g.advantages for g in assign(groups, "marginal")] == [(0.5, 0.5), (-0.5, -0.5), (0.0, 0.0), (0.0, 0.0)]
    assert not any(a for g in assign(groups, "prompt") for a in g.advantages)


def test_assign_leaves_its_arguments_alone_and_keeps_their_order():
    groups = groups_of([[1.0, 0.0], [0.0, 1.0]])
    out = assign(groups, "prompt")
    assert [g.prompt for g in out] == ["p0", "p1"]
    assert all(g.advantages == () for g in groups)


def test_an_unknown_baseline_names_the_nearest():
    with pytest.raises(EsplError, match=r"learner.baseline is 'promt'; did you mean 'prompt'\?"):
        assign([], "promt")


def test_a_reward_that_is_no_number_is_an_error_that_names_the_task():
    with pytest.raises(EsplError, match="'t0' gave the reward nan"):
        assign([group(rollout(float("nan")), rollout(1.0))])
