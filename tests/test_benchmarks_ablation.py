"""The ablation keeps its own rules, and on small tables the method beats its halves while its controls fail.

The tabular tier plays through the real evolution (`benchmarks/micro/tabular.py`). Worlds are development worlds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.micro import ablation, figures, record, tabular
from benchmarks.micro.arms import ARMS, BOTH, DEVELOPMENT, NO_DECLARATIVE, RATES, REPORT, TRIALS, Cell
from benchmarks.micro.figures import Table, interval
from espl_train.evolution.evidence import Attempt, Contrast

WORLDS = range(60, 68)
Accuracies = Callable[..., list[float]]


@pytest.fixture(scope="module")
def accuracies() -> Accuracies:
    """Test accuracies of an arm in all worlds; every run is made once."""

    @cache
    def found(arm: str, cell: Cell = BOTH) -> list[float]:
        return [tabular.run(tabular.ARMS[arm], world, cell)["test"] for world in WORLDS]

    return found


def gain(left: list[float], right: list[float]) -> dict[str, float]:
    return interval([a - b for a, b in zip(left, right, strict=True)])


def test_with_both_gaps_the_method_beats_either_half(accuracies: Accuracies) -> None:
    joint = accuracies("evolution_rl")
    assert gain(joint, accuracies("rl"))["low"] > 0.063
    assert gain(joint, accuracies("evolution"))["low"] > 0.051


def test_what_principles_say_makes_the_difference(accuracies: Accuracies) -> None:
    joint, rl = accuracies("evolution_rl"), accuracies("rl")
    for control in ("placebo", "shuffled_evidence"):
        assert gain(joint, accuracies(control))["low"] > 0
        assert gain(accuracies(control), rl)["mean"] <= 0


def test_without_a_declarative_gap_nothing_is_gained(accuracies: Accuracies) -> None:
    found = gain(accuracies("evolution_rl", NO_DECLARATIVE), accuracies("rl", NO_DECLARATIVE))
    assert abs(found["mean"]) < 0.05


def test_evidence_turned_upside_down_undoes_the_gain(
    accuracies: Accuracies, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint, rl = accuracies("evolution_rl"), accuracies("rl")
    honest = Contrast.attempts

    def inverted(self: Contrast, *how: Any) -> list[Attempt]:
        other: dict[str, Any] = {"right": "wrong", "wrong": "right"}
        return [replace(attempt, verdict=other[attempt.verdict]) for attempt in honest(self, *how)]

    monkeypatch.setattr(Contrast, "attempts", inverted)
    few = WORLDS[:5]
    broken = [tabular.run(tabular.ARMS["evolution_rl"], world)["test"] for world in few]
    assert gain(broken, rl[: len(few)])["low"] <= 0
    assert gain(joint[: len(few)], broken)["low"] > 0


def test_the_same_run_twice_is_the_same_run() -> None:
    once, again = (tabular.run(tabular.ARMS["evolution_rl"], 3) for _ in range(2))
    assert once == again


def test_every_trained_arm_has_as_many_trials_and_rollouts_as_any_other() -> None:
    trained = [arm for arm in ARMS.values() if arm.trained]
    assert {len(arm.trials) for arm in trained} == {TRIALS} == {len(RATES)}
    sizes = set()
    for arm in trained:
        for trial in arm.trials:
            config = arm.config(7, BOTH, trial, "unused")
            rollout, env = config.rollout, config.env.args
            sizes.add((config.steps, rollout.prompts * rollout.samples * rollout.problems))
            assert (env["world"], env["declarative"], env["procedural"], config.seed) == (7, 1.0, 0.5, 7)
            assert rollout.dynamic_rounds == 0
    assert len(sizes) == 1


def test_report_worlds_are_opened_by_the_report_alone() -> None:
    fixed = {name: {} for name in ARMS}
    early = [*ablation.tuning(list(ARMS)), *ablation.checks(fixed)]
    assert early and all(job.world in DEVELOPMENT for job in early)
    late = list(ablation.report(fixed))
    assert all(job.world >= REPORT for job in late)
    keys = [job.key for job in late]
    assert len(set(keys)) == len(keys)
    main = {(job.arm, job.world) for job in late if job.cell == BOTH}
    assert main == {(arm, world) for arm in ARMS for world in range(REPORT, REPORT + ablation.WORLDS)}
    assert ablation.WORLDS >= 30


def test_the_best_trial_is_fixed_and_never_by_half_a_record() -> None:
    rows = {job.key: {"test": 0.2} for job in ablation.tuning(list(ARMS))}
    wanted = ARMS["rl"].trials[2]
    rows |= {job.key: {"test": 0.3} for job in ablation.tuning(["rl"]) if job.chosen == wanted}
    assert ablation.choose(rows)["rl"] == dict(wanted)
    with pytest.raises(KeyError):
        ablation.choose(dict(list(rows.items())[1:]))


def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    whole = {"key": "a", "principles": ["⊕ adds"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(whole) + "\n" + '{"key": "b", "prin')
    rows = record.read(tmp_path / "rows.jsonl")
    assert rows == {"a": whole}
    record.mend(tmp_path / "rows.jsonl")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"key": "c"}) + "\n")
    assert list(record.read(tmp_path / "rows.jsonl")) == ["a", "c"]
    record.mend(tmp_path / "new" / "rows.jsonl")
    assert record.read(tmp_path / "new" / "rows.jsonl") == {}
    jobs = [ablation.Job("main", "rl", 1, BOTH, after="b"), ablation.Job("main", "rl", 2, BOTH, after="a")]
    assert record.next_ready(jobs, rows) is jobs[1]
    assert record.evolved(jobs[1], rows) == ("⊕ adds",)


def test_the_unit_is_the_world_and_pairs_are_paired() -> None:
    def row(arm: str, world: int, test: float) -> record.Row:
        return {"arm": arm, "world": world, "declarative": 1.0, "procedural": 0.5, "test": test}

    easy = [0.1 * world for world in range(8)]
    rows = [row("evolution_rl", w, easy[w] + 0.1) for w in range(8)] + [row("rl", w, easy[w]) for w in range(7)]
    paired = Table(rows).paired([("evolution_rl", "rl")])["evolution_rl-rl"]
    assert paired == {"mean": 0.1, "low": 0.1, "high": 0.1, "worlds": 7}      # worlds differ much, the gap does not
    alone = Table(rows).means()["rl"]
    assert alone["low"] < alone["mean"] - 0.1 and alone["high"] > alone["mean"] + 0.1
    assert figures.interval([0.0, 1.0] * 50)["low"] == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
