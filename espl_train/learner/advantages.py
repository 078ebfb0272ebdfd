"""How much better than expected each rollout was: baselines as plain functions over the rewards of one problem.

A baseline sees all rewards of a problem, one list per prompt, and answers in the same shape. Rollouts that are not
learnt from (faults; cut off ones, where `shaping` filters them) never get here: they enter no mean and no standard
deviation, and have no advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import fsum, isfinite, sqrt

from espl_envs.core.errors import EsplError
from espl_train.learner.naming import choose
from espl_train.records import Group, Rollout

Rewards = Sequence[Sequence[float]]      # [prompt][sample] of one problem; no list is empty
Expected = list[list[float]]             # the baseline of each reward, same shape


def prompt(rewards: Rewards) -> Expected:
    """The mean of the rollouts under the same prompt (the paper's equation 2)."""
    return [[_mean(row)] * len(row) for row in rewards]


def marginal(rewards: Rewards) -> Expected:
    """The mean over prompts of their means: being under a good prompt counts as doing well."""
    expected = _mean([_mean(row) for row in rewards])
    return [[expected] * len(row) for row in rewards]


def prompt_leave_one_out(rewards: Rewards) -> Expected:
    """`prompt` without the rollout itself; a rollout that is alone is its own baseline."""
    return [[_mean_without(row, j) if len(row) > 1 else row[j] for j in range(len(row))] for row in rewards]


def marginal_leave_one_out(rewards: Rewards) -> Expected:
    """`marginal` without the rollout itself; the mean of a prompt with one rollout falls out of the average."""
    means = [_mean(row) for row in rewards]
    expected: Expected = []
    for i, row in enumerate(rewards):
        others = means[:i] + means[i + 1 :]
        own = [[_mean_without(row, j)] if len(row) > 1 else [] for j in range(len(row))]
        expected.append([_mean(others + mine) if others or mine else row[j] for j, mine in enumerate(own)])
    return expected


BASELINES: dict[str, Callable[[Rewards], Expected]] = {
    "prompt": prompt,
    "marginal": marginal,
    "prompt_leave_one_out": prompt_leave_one_out,
    "marginal_leave_one_out": marginal_leave_one_out,
}
ACROSS_PROMPTS = {"marginal", "marginal_leave_one_out"}    # these compare all prompts of a problem with each other


Judge = Callable[[Rollout], float | None]      # the reward to learn from; None: the rollout is not learnt from


def plain(rollout: Rollout) -> float | None:
    """The reward as the environment gave it."""
    return None if rollout.faulted else rollout.reward


def assign(
    groups: Sequence[Group], baseline: str = "prompt", divide_by_std: bool = False, judge: Judge = plain
) -> list[Group]:
    """The same groups with their advantages: reward minus baseline, over the standard deviation where asked.

    Rewards that are compared and all equal give advantages of exactly 0. The standard deviation is the population's,
    over the rewards that the baseline compares (those of the group, or of the problem for the marginal baselines).
    The rollouts, and with them the rewards that ratings and reports read, stay as they are.
    """
    choose(BASELINES, baseline, "learner.baseline")
    pools: dict[tuple[str, int] | int, list[int]] = {}
    for index, group in enumerate(groups):
        pools.setdefault(group.task if baseline in ACROSS_PROMPTS else (group.prompt, group.task), []).append(index)
    advantages: list[tuple[float | None, ...]] = [()] * len(groups)
    for members in pools.values():
        rewards = [[_reward(rollout, judge) for rollout in groups[i].rollouts] for i in members]
        for index, row in zip(members, _pool(rewards, baseline, divide_by_std), strict=True):
            advantages[index] = row
    return [replace(group, advantages=row) for group, row in zip(groups, advantages, strict=True)]


def _pool(
    rewards: Sequence[Sequence[float | None]], baseline: str, divide_by_std: bool
) -> list[tuple[float | None, ...]]:
    """Advantages of rewards that are compared with each other, group by group."""
    valid = [[reward for reward in row if reward is not None] for row in rewards]
    flat = [reward for row in valid for reward in row]
    if not flat or min(flat) == max(flat):
        return [tuple(None if reward is None else 0.0 for reward in row) for row in rewards]
    scale = 1 / _std(flat) if divide_by_std else 1.0
    expected = iter([base for row in BASELINES[baseline]([row for row in valid if row]) for base in row])
    return [tuple(None if reward is None else (reward - next(expected)) * scale for reward in row) for row in rewards]


def _reward(rollout: Rollout, judge: Judge) -> float | None:
    reward = judge(rollout)
    if reward is not None and not isfinite(reward):
        raise EsplError(f"task '{rollout.task_id}' gave the reward {reward}: rewards must be finite")
    return reward


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def _mean_without(values: Sequence[float], place: int) -> float:
    return _mean([*values[:place], *values[place + 1 :]])


def _std(values: Sequence[float]) -> float:
    mean = _mean(values)
    return sqrt(_mean([(value - mean) ** 2 for value in values]))
