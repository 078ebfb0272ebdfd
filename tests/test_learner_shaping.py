"""Overlong replies: DAPO's penalty by its formula, what counts as cut off, and that only advantages are touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from learner_kit import group, rollout, tiny_policy

from espl_train.config import LearnerConfig, RolloutConfig
from espl_train.learner.advantages import BASELINES, assign, plain
from espl_train.learner.shaping import Shaping
from espl_train.learner.update import Learner
from espl_train.records import Rollout, StopReason

STOP = 1
LIMITS = RolloutConfig(max_new_tokens=10, max_total_tokens=25)


def shaping(overlong: str, **settings) -> Shaping:
    return Shaping(LearnerConfig(overlong=overlong, **settings), LIMITS, frozenset({STOP}))


def talk(
    *lengths: int, reward: float = 1.0, ended: bool = True, stop: StopReason = StopReason.ANSWER, sample: int = 0
) -> Rollout:
    """Replies of these many tokens; the last one ends with the stop token or is cut off."""
    turns = [((2, 3), (5,) * (n - 1) + (STOP,)) for n in lengths]
    if not ended:
        turns[-1] = (turns[-1][0], (5,) * lengths[-1])
    return replace(rollout(reward, turns, sample=sample), stop=stop)


@pytest.mark.parametrize(
    ("lengths", "penalty"),
    [
        ((1,), 0.0), ((6,), 0.0), ((7,), 0.25), ((8,), 0.5), ((9,), 0.75), ((10,), 1.0),      # 0.4 of 10: from 6 on
        ((5, 5, 5), 0.0), ((5, 9, 1), 0.75),                        # the longest reply
        ((6, 6, 6), 0.3), ((6, 6, 6, 6), 0.9),                      # the episode: 0.4 of 25, from 15 on
    ],
)
def test_the_penalty_grows_over_the_buffer(lengths, penalty):
    """(|y| - (L_max - L_cache)) / L_cache, of a reply or of the episode, whichever is further in."""
    judge = shaping("penalise", overlong_buffer=0.4)
    assert judge.penalty(talk(*lengths)) == pytest.approx(penalty)
    assert judge(talk(*lengths, reward=0.5)) == pytest.approx(0.5 - penalty)
    twice = shaping("penalise", overlong_buffer=0.4, overlong_penalty=2.0)
    assert twice(talk(*lengths)) == pytest.approx(1 - 2 * penalty)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=4), st.floats(0.01, 1))
def test_longer_is_never_better(lengths, buffer):
    judge = shaping("penalise", overlong_buffer=buffer)
    shorter = [max(1, n - 1) for n in lengths]
    assert 0 <= judge.penalty(talk(*shorter)) <= judge.penalty(talk(*lengths)) <= 1


@pytest.mark.parametrize(
    ("one", "cut"),
    [
        (talk(4), False),
        (talk(10), False),                                            # exactly as long as it may be, and finished
        (talk(10, ended=False), True),                                # the environment graded half a reply
        (talk(3, 4, stop=StopReason.MAX_TOKENS), True),
        (talk(3, stop=StopReason.CONTEXT), True),
        (talk(3, stop=StopReason.MAX_TURNS), False),
        (talk(3, stop=StopReason.TRUNCATED), False),                  # the environment's own budget
    ],
)
def test_what_a_token_limit_cut_off_is_filtered(one, cut):
    assert shaping("filter").cut(one) == cut
    assert (shaping("filter")(one) is None) == cut
    assert shaping("keep")(one) == plain(one) == 1.0


@pytest.mark.parametrize("overlong", ["keep", "penalise", "filter"])
def test_a_fault_is_not_learnt_from_whatever_its_length(overlong):
    assert shaping(overlong)(talk(10, stop=StopReason.FAULT)) is None


GROUP = group(
    talk(4), talk(9, reward=0.0, sample=1), talk(10, reward=0.0, sample=2, ended=False), talk(3, reward=0.0, sample=3)
)


@pytest.mark.parametrize("overlong", ["keep", "penalise", "filter"])
def test_rewards_that_ratings_and_reports_read_are_never_touched(overlong):
    shaped = assign([GROUP], judge=shaping(overlong))[0]
    assert shaped.rollouts == GROUP.rollouts and shaped.rewards == (1.0, 0.0, 0.0, 0.0)
    assert (shaped.advantages != assign([GROUP])[0].advantages) == (overlong != "keep")


@pytest.mark.parametrize("baseline", BASELINES)
def test_what_is_filtered_is_compared_with_nobody(baseline):
    """As if it had never been played: what is left sums to zero, so nothing is taught about length."""
    first, second, cut, last = assign([GROUP], baseline, divide_by_std=True, judge=shaping("filter"))[0].advantages
    without = group(*(r for i, r in enumerate(GROUP.rollouts) if i != 2))
    assert cut is None
    assert (first, second, last) == assign([without], baseline, divide_by_std=True)[0].advantages
    assert first + second + last == pytest.approx(0)


def test_a_cut_off_reply_in_the_baseline_would_teach_brevity():
    compared = assign([GROUP])[0].advantages
    trained = [a for i, a in enumerate(compared) if i != 2]      # masked from the gradient alone
    assert sum(trained) == pytest.approx(0.25)


def update(groups, **settings):
    config = LearnerConfig(rank=4, **settings)
    return Learner(tiny_policy(0.1, rank=4), config).update(groups)


def test_denominators_count_only_what_is_learnt_from():
    """A filtered rollout leaves an update exactly as it is without it."""
    filtered = assign([GROUP], judge=shaping("filter"))
    without = assign([group(*(r for i, r in enumerate(GROUP.rollouts) if i != 2))])
    for normalise in ("token_mean", "sequence_mean"):
        one, two = update(filtered, normalise=normalise), update(without, normalise=normalise)
        assert (one.tokens, one.sequences) == (two.tokens, two.sequences) == (16, 3)
        assert (one.loss, one.grad_norm) == (two.loss, two.grad_norm)
        assert update(assign([GROUP]), normalise=normalise).loss != one.loss


def test_metrics_show_what_was_done_and_nothing_where_nothing_was():
    rollouts = GROUP.rollouts
    assert shaping("keep").metrics(rollouts) == {}
    assert shaping("filter").metrics(rollouts) == {"reward/shaped": pytest.approx(1 / 3), "rollouts/cut": 1}
    penalised = shaping("penalise", overlong_buffer=0.2).metrics(rollouts)
    assert penalised == {"reward/shaped": pytest.approx((1 - 0.5 - 1) / 4), "rollouts/cut": 1}
    assert shaping("filter").metrics([talk(10, ended=False)]) == {"rollouts/cut": 1}
    assert shaping("filter").metrics([talk(3, stop=StopReason.FAULT)]) == {}
