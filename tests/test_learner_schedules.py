"""Schedules: where they start and end, which clock counts what, and that a resumed run goes on."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from learner_kit import group, random_groups, rollout, tiny_policy

from espl_train.config import LearnerConfig
from espl_train.learner import schedules
from espl_train.learner.advantages import assign
from espl_train.learner.schedules import SCHEDULES, rate
from espl_train.learner.update import Learner

PEAK = 0.4


def rates(updates: int, made: int | None = None, **settings) -> list[float]:
    """Of a run in which nothing is skipped."""
    config = LearnerConfig(learning_rate=PEAK, **settings)
    return [rate(config, updates, step, 0) for step in range(updates if made is None else made)]


def test_constant_is_the_configured_rate_bit_for_bit():
    assert rates(5, schedule="constant") == [PEAK] * 5


def test_linear_by_hand():
    assert rates(5, schedule="linear") == pytest.approx([PEAK * x for x in (1, 0.8, 0.6, 0.4, 0.2)])
    floored = rates(5, schedule="linear", schedule_floor=0.5)
    assert floored == pytest.approx([PEAK * x for x in (1, 0.9, 0.8, 0.7, 0.6)])


def test_cosine_by_hand():
    quarter = (1 + math.cos(math.pi / 4)) / 2
    assert rates(4, schedule="cosine") == pytest.approx([PEAK * x for x in (1, quarter, 0.5, 1 - quarter)])


def test_warm_up_ends_at_the_peak_and_the_fall_begins_there():
    found = rates(8, schedule="linear", warmup=4)
    assert found == pytest.approx([PEAK * x for x in (0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_after_the_last_a_falling_schedule_is_at_its_floor_and_stays(name):
    config = LearnerConfig(learning_rate=PEAK, schedule=name, schedule_floor=0.1, warmup=3)
    end = PEAK if name == "constant" else PEAK * 0.1
    assert [rate(config, 9, step, 0) for step in (9, 10, 50)] == pytest.approx([end] * 3)


@given(
    st.sampled_from(list(SCHEDULES)), st.integers(1, 40), st.integers(0, 50), st.floats(0, 1), st.integers(0, 40),
    st.integers(0, 40),
)
def test_never_above_the_peak_never_0_at_first_never_up_after_the_warm_up(name, updates, warm, floor, made, skipped):
    config = LearnerConfig(learning_rate=PEAK, schedule=name, schedule_floor=floor, warmup=warm)
    here, next_made = rate(config, updates, made, skipped), rate(config, updates, made + 1, skipped)
    assert 0 <= here <= PEAK
    assert rate(config, updates, 0, 0) > 0
    assert rate(config, updates, made, skipped + 1) <= here
    if made + 1 >= warm:
        assert next_made <= here


def learner(steps: int = 8, **settings) -> Learner:
    settings = {"rank": 4, "alpha": 8, "learning_rate": PEAK, **settings}
    return Learner(tiny_policy(0.0, **settings), LearnerConfig(**settings), updates=steps)


FLAT = assign([group(rollout(1.0), rollout(1.0, sample=1))])


def test_a_skipped_update_moves_the_shape_but_not_the_warm_up():
    who = learner(schedule="linear", warmup=2)
    found = []
    for step in range(4):
        assert who.update(FLAT).skipped
        found.append(who.update(random_groups(step)).rate)
    one, three, five, seven = (1 - max(0, done - 2) / 6 for done in (1, 3, 5, 7))
    assert found == pytest.approx([PEAK / 2 * one, PEAK * three, PEAK * five, PEAK * seven])


def test_one_clock_for_both_is_found_out(monkeypatch):
    original = schedules.rate
    monkeypatch.setattr(schedules, "rate", lambda c, updates, made, skipped: original(c, updates, made + skipped, 0))
    with pytest.raises(AssertionError):
        test_a_skipped_update_moves_the_shape_but_not_the_warm_up()


def test_a_resumed_run_goes_on_and_a_longer_one_follows_its_own_shape():
    straight, resumed, longer = (learner(steps, schedule="cosine") for steps in (8, 8, 16))
    for step in range(3):
        straight.update(FLAT if step == 1 else random_groups(step))
    for other in (resumed, longer):
        other.load_state_dict(straight.state_dict())
    groups = random_groups(3)
    assert straight.update(groups).rate == resumed.update(groups).rate == rates(8, 4, schedule="cosine")[3]
    assert longer.update(groups).rate == rates(16, 4, schedule="cosine")[3]


def test_a_falling_schedule_wants_to_know_the_length_of_the_run():
    config = LearnerConfig(schedule="cosine", rank=4)
    with pytest.raises(ValueError, match="say of how many updates"):
        Learner(tiny_policy(), config)


def test_the_configuration_offers_what_there_is():
    assert get_args(LearnerConfig.model_fields["schedule"].annotation) == tuple(SCHEDULES)
