"""While the policy improves under them: the default selection ends above the paper's, and ratings are why.

The simulation is that of benchmarks/evolution/drift.py in a smaller world: 24 iterations, three samples per problem. An
average child is one standard deviation worse than its parent. (Where nearly every other child is better, speed is
everything and the paper's selection is ahead: the benchmark shows both.)
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from espl_train.evolution.ladders import Ladder
from espl_train.evolution.ratings import Match

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "evolution"))

from drift import Outcome, World, arm, interval, outcomes, run

WORLD = World(steps=24, samples=3)


@pytest.fixture(scope="module")
def default() -> list[Outcome]:
    return outcomes(arm(), 100, WORLD)


def test_the_default_selection_ends_above_the_papers(default: list[Outcome]) -> None:
    """100 keyed runs of each, the same worlds: the hidden skill of the chosen prompt, paired."""
    paper = outcomes(arm("paper"), 100, WORLD)
    gain = interval([ours.chosen - theirs.chosen for ours, theirs in zip(default, paper, strict=True)])
    assert gain["low"] > 0, gain
    assert interval([o.chosen for o in default])["low"] > 0, "it must end above the root, too"


def test_without_ratings_nothing_is_found(default: list[Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: selection and choice go on, but matches teach nothing."""

    def deaf(self: Ladder, match: Match) -> Ladder:
        del match
        return self

    monkeypatch.setattr(Ladder, "after", deaf)
    blind = outcomes(arm(), 30, WORLD)
    assert interval([ours.chosen - o.chosen for ours, o in zip(default, blind, strict=False)])["low"] > 0


def test_a_run_is_a_function_of_its_number(default: list[Outcome]) -> None:
    assert [run(i, arm(), WORLD) for i in (0, 7)] == [default[0], default[7]] and default[0] != default[7]
    assert {o.born for o in default} == {WORLD.steps}
