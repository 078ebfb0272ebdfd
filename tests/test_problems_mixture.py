"""Problems are shared out by weight: whole numbers in every step, exact in the long run, and nobody gives one back."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_train import problems
from espl_train.problems import shares

WEIGHTS = st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0, 7.0]) | st.floats(1e-3, 50), min_size=1, max_size=6)


def totals(weights: list[float], size: int, steps: int) -> list[int]:
    return [sum(column) for column in zip(*(shares(weights, size, n) for n in range(1, steps + 1)), strict=True)]


def one_by_one(weights: list[float], count: int) -> list[int]:
    """Webster's method as it is defined."""
    exact, seats = [Fraction(repr(w)) for w in weights], [0] * len(weights)
    for _ in range(count):
        seats[max(range(len(exact)), key=lambda i: (exact[i] / (2 * seats[i] + 1), -i))] += 1
    return seats


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(1, 20), st.integers(1, 12))
def test_every_step_is_shared_out_whole_and_the_sums_are_those_of_websters_method(
    weights: list[float], size: int, steps: int
) -> None:
    for step in range(1, steps + 1):
        found = shares(weights, size, step)
        assert sum(found) == size and min(found) >= 0
    assert totals(weights, size, steps) == one_by_one(weights, size * steps)


@pytest.mark.parametrize(
    ("weights", "size", "steps"),
    [([2, 1], 10, 3), ([1, 1, 1], 10, 3), ([0.1, 0.2, 0.7], 3, 10), ([5, 1], 1, 6), ([1], 7, 4), ([0.3, 0.1], 2, 2)],
)
def test_the_shares_are_exact_whenever_the_weights_divide_the_sum(
    weights: list[float], size: int, steps: int
) -> None:
    expected = [size * steps * w / sum(weights) for w in weights]
    assert totals(weights, size, steps) == pytest.approx(expected, abs=1e-9)
    assert totals(weights, size, 3 * steps) == pytest.approx([3 * e for e in expected], abs=1e-9)


def test_a_small_environment_gets_its_turn_even_where_a_step_has_fewer_problems_than_environments() -> None:
    assert [shares([5, 1], 1, step) for step in range(1, 7)].count([0, 1]) == 1


def test_rounding_each_step_by_itself_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that forgets: the small one would never play."""
    monkeypatch.setattr(problems, "_seats", lambda weights, count: [0] * len(weights) if not count else [count, 0])
    with pytest.raises(AssertionError):
        test_a_small_environment_gets_its_turn_even_where_a_step_has_fewer_problems_than_environments()
