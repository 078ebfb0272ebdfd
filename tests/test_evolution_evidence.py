"""Evidence: contrasts of right and wrong attempts, capped, newest first; the reference answer only on request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from evolution_cases import batch, group, tasks

from espl_train.config import EvolutionConfig
from espl_train.evolution.evidence import Evidence, clip, right_from


def buffer(**settings: Any) -> Evidence:
    return Evidence(EvolutionConfig(**settings))


def test_only_problems_with_both_outcomes_are_cases() -> None:
    evidence = buffer()
    evidence.record(0, batch(a=[[1, 1], [0, 0], [1, 0]]), tasks(3))
    (contrast,) = evidence.contrasts(0, "a")
    assert contrast.task == 2 and contrast.right == (True, False)
    assert [t.reward for t in contrast.traces] == [1, 0]


def test_a_contrast_may_lie_between_prompts_and_between_iterations() -> None:
    evidence = buffer(evidence_window=5)
    evidence.record(0, [group("a", 0, [0, 0])], tasks(1))
    assert evidence.contrasts(0, "a") == []
    evidence.record(3, [group("b", 0, [1, 1], step=3)], tasks(1))
    (contrast,) = evidence.contrasts(3, "a")
    assert {(t.step, t.prompt) for t in contrast.traces} == {(0, "a"), (3, "b")}
    evidence.record(5, [group("b", 0, [1], step=5)], tasks(1))
    assert evidence.contrasts(5, "a") == [], "what left the window is forgotten"


def test_without_a_window_only_the_parents_last_batch_counts() -> None:
    """Window 0 is the paper."""
    evidence = buffer(evidence_window=0)
    evidence.record(0, batch(a=[[1, 0]], b=[[1, 0]]), tasks(2))
    evidence.record(1, batch(1, a=[[1, 1], [1, 0]], b=[[1, 0], [0, 0]]), tasks(2))
    (contrast,) = evidence.contrasts(1, "a")
    assert contrast.task == 1 and {(t.prompt, t.step) for t in contrast.traces} == {("a", 1)}
    assert [c.task for c in evidence.contrasts(1, "b")] == [0]


def test_a_contrast_is_as_old_as_its_older_side() -> None:
    """What was wrong long ago and is right now says more about the weights than about principles."""
    evidence = buffer(cases=1, critiques=2)
    evidence.record(0, [group("a", 0, [0, 0])], tasks(3))
    evidence.record(4, [group("a", 1, [1, 0], step=4), group("a", 2, [1, 0], step=4)], tasks(3))
    evidence.record(5, [group("a", 0, [1, 1], step=5)], tasks(3))
    assert [c.task for c in evidence.contrasts(5, "a")] == [1, 2], "problem 0 was attempted last and comes last"


def test_an_attempt_tells_whose_and_how_old_it_is() -> None:
    evidence = buffer()
    evidence.record(2, [group("a", 0, [0], step=2)], tasks(1))
    evidence.record(5, [group("a", 0, [0], step=5), group("b", 0, [1], step=5)], tasks(1))
    (contrast,) = evidence.contrasts(5, "a")
    shown = contrast.shown("verdict", "a").attempts
    assert [(a.verdict, a.own, a.age) for a in shown] == [("right", False, 0), ("wrong", True, 0), ("wrong", True, 3)]
    assert [a.own for a in contrast.shown("none", "b").attempts].count(True) == 1


def test_newest_first_and_each_problem_once() -> None:
    evidence = buffer(cases=2, critiques=1)
    for step, problem in enumerate([4, 2, 7, 2]):
        evidence.record(step, [group("a", problem, [1, 0], step=step)], tasks(8))
    assert [c.task for c in evidence.contrasts(3, "a")] == [2, 7]


@pytest.mark.parametrize(
    ("rewards", "cap", "right", "wrong"),
    [([1] * 9 + [0], 4, 3, 1), ([1] + [0] * 9, 4, 1, 3), ([1] * 9 + [0] * 9, 5, 2, 3), ([1, 0, 0], 1, 1, 1)],
)
def test_the_cap_always_keeps_right_and_wrong_attempts(rewards: list[float], cap: int, right: int, wrong: int) -> None:
    evidence = buffer(attempts=cap)
    evidence.record(0, [group("a", 0, rewards)], tasks(1))
    (contrast,) = evidence.contrasts(0, "a")
    assert contrast.right == (True,) * right + (False,) * wrong


def test_equal_attempts_are_shown_once_and_faulted_ones_never() -> None:
    evidence = buffer()
    evidence.record(0, [group("a", 0, [1, 0], faults=3), group("a", 0, [1, 0])], tasks(1))
    (contrast,) = evidence.contrasts(0, "a")
    assert len(contrast.traces) == 2


def test_memory_stays_bounded_without_losing_the_contrast() -> None:
    evidence = buffer(attempts=4, evidence_window=50)
    evidence.record(0, [group("a", 0, [1])], tasks(1))
    for step in range(1, 40):
        evidence.record(step, [group("a", 0, [0] * 6, step=step)], tasks(1))
    assert len(evidence._traces[0]) <= 8 + 6
    assert evidence.contrasts(39, "a")[0].right == (True, False, False, False)


@pytest.mark.parametrize(("visibility", "answer"), [("none", None), ("verdict", None), ("full", "secret 0")])
def test_the_reference_answer_is_shown_only_on_request(visibility: str, answer: str | None) -> None:
    """Method §11 item 6."""
    evidence = buffer()
    evidence.record(0, [group("a", 0, [0, 1])], tasks(1))
    case = evidence.contrasts(0, "a")[0].shown(visibility, "a")  # type: ignore[arg-type]
    assert case.answer == answer
    verdicts = [a.verdict for a in case.attempts]
    assert verdicts == (["unknown"] * 2 if visibility == "none" else ["right", "wrong"])
    if visibility == "none":
        assert {a.reward for a in case.attempts} == {0.0}
        assert [a.transcript for a in case.attempts] == sorted(a.transcript for a in case.attempts)


def test_an_attempt_is_what_came_after_the_question() -> None:
    evidence = buffer()
    evidence.record(0, [group("a", 0, [1, 0])], tasks(1))
    trace = evidence.contrasts(0, "a")[0].traces[0]
    assert trace.replies == ("attempt a 0 0 of step 0 good",)
    assert trace.transcript == "assistant: attempt a 0 0 of step 0 good"


def test_partial_credit_is_split_at_one_half_or_in_the_middle() -> None:
    assert right_from([0.0, 1.0]) == 0.5 and right_from([0.2, 0.6, 0.9]) == 0.5
    assert right_from([0.1, 0.3]) == pytest.approx(0.2) and right_from([0.6, 0.8]) == pytest.approx(0.7)


def test_long_attempts_lose_their_middle() -> None:
    text = clip("a" * 50 + "b" * 50, 20)
    assert text.startswith("a" * 10) and text.endswith("b" * 10) and "80 characters left out" in text
    assert clip("short", 20) == "short"


def test_the_buffer_survives_a_checkpoint() -> None:
    evidence = buffer()
    evidence.record(0, batch(a=[[1, 0], [1, 0]], b=[[0.1, 0.3], [1, 0]]), tasks(2))
    evidence.contrasts(0, "a")[0].traces[0].summary = "kept"
    text = json.dumps(evidence.to_json())
    again = Evidence.from_json(json.loads(text), EvolutionConfig())
    assert json.dumps(again.to_json()) == text and again.contrasts(0, "a") == evidence.contrasts(0, "a")
