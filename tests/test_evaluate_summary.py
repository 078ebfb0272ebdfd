"""`summary.json` says what the episodes say: means by hand; faults are masked, and over 1 % of them is no headline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_kit import ENV, episode, write_run

from espl_envs.evaluate import summary as summary_module
from espl_envs.evaluate.config import Prices
from espl_envs.evaluate.directory import RunDirectory
from espl_envs.evaluate.records import Episode, EpisodeKey, Outcome, TurnUsage
from espl_envs.evaluate.report import write_report
from espl_envs.evaluate.summary import summarise

OTHER = "espl/Game24-v0"


def test_the_headline_of_one_environment_is_its_mean_over_tasks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {ENV: [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]})
    summary = summarise(run)
    data = summary.data
    assert summary.mean == data["envs"][0]["mean"] == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert data["low"] < summary.mean < data["high"] and summary.refused is None and not data["partial"]
    env = data["envs"][0]
    assert [env["pass@k"][k]["mean"] for k in "124"] == pytest.approx([0.25, (5 / 6 + 1 / 2 + 0) / 3, 2 / 3])
    assert [env["pass^k"][k]["mean"] for k in "124"] == pytest.approx([0.25, (1 / 6) / 3, 0])
    assert env["pass@k"]["1"] == {**{n: data[n] for n in ("mean", "low", "high")}, "tasks": 3}
    assert json.loads((run / "summary.json").read_text()) == data


def test_environments_weigh_the_same_whatever_their_size(tmp_path: Path) -> None:
    summary = summarise(write_run(tmp_path / "run", {ENV: [[1.0]] * 9, OTHER: [[0.0]]}))
    assert summary.mean == 0.5 and [env["mean"] for env in summary.data["envs"]] == [1.0, 0.0]
    assert summary.data["low"] < 0.5 < summary.data["high"] and summary.data["tasks"] == 10


def test_system_prompts_weigh_the_same_and_their_spread_is_told(tmp_path: Path) -> None:
    scores = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]]
    run = write_run(tmp_path / "run", {ENV: scores}, k=2, system_prompts=("good", "bad"))
    env = summarise(run).data["envs"][0]
    assert env["mean"] == pytest.approx((0.5 + 0.75 + 0.25) / 3)
    assert env["pass@k"]["2"]["mean"] == pytest.approx((0.5 + 1 + 0.5) / 3), "k samples of one prompt, not of any"
    spread = env["prompt_sensitivity"]
    assert [one["mean"] for one in spread["prompts"]] == pytest.approx([2.5 / 3, 0.5 / 3])
    assert (spread["min"], spread["max"], spread["tasks"]) == (pytest.approx(0.5 / 3), pytest.approx(2.5 / 3), 3)
    assert 0 < spread["sd"] < spread["sd_observed"]


def masked(tmp_path: Path, faults: int, missing: int = 0) -> Path:
    """100 tasks, half of them right."""
    scores: list[list[float | None]] = [[None] if i < faults else [float(i % 2)] for i in range(100)]
    scores[100 - missing :] = [[]] * missing
    return write_run(tmp_path / f"run-{faults}-{missing}", {ENV: scores})


def test_more_than_one_percent_of_faulted_or_missing_episodes_is_no_headline(tmp_path: Path) -> None:
    for faults, missing in ((1, 0), (0, 1)):
        summary = summarise(masked(tmp_path, faults, missing))
        assert summary.refused is None and summary.mean == pytest.approx(0.5, abs=0.01)
        assert summary.data["partial"] and summary.data["episodes"]["scored"] == 99
    for faults, missing in ((2, 0), (0, 2), (1, 1)):
        run = masked(tmp_path, faults, missing)
        summary = summarise(run)
        assert summary.mean is None and summary.data["envs"][0]["mean"] is None
        assert "pass@k" not in summary.data["envs"][0], "a number beside the headline would be taken for one"
        assert summary.refused and f"{faults or missing} " in summary.refused and "of 100 episodes" in summary.refused
        assert "no headline" in str(summary)
        allowed = summarise(run, allow_faults=True)
        assert allowed.refused is None and allowed.mean == pytest.approx(0.5, abs=0.01)


def test_one_bad_environment_refuses_the_headline_of_all(tmp_path: Path) -> None:
    summary = summarise(write_run(tmp_path / "run", {ENV: [[1.0]] * 120, OTHER: [[1.0]] * 9 + [[None]]}))
    assert summary.mean is None and summary.refused and summary.refused.startswith(OTHER)
    assert [env["mean"] for env in summary.data["envs"]] == [1.0, None]


def test_a_fault_is_masked_and_never_a_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With faults taken for wrong answers, the mean moves: the check below would notice."""
    run = write_run(tmp_path / "run", {ENV: [[1, None], [0, 0], [None, None]]})

    def mean() -> float | None:
        return summarise(run, allow_faults=True).mean

    assert mean() == 0.5
    add = summary_module._Part.add

    def as_wrong(part: Any, one: Episode) -> None:
        add(part, replace(one, outcome=Outcome.NO_ANSWER, score=0.0) if one.score is None else one)

    monkeypatch.setattr(summary_module._Part, "add", as_wrong)
    assert mean() == pytest.approx(0.5 / 3)


def test_a_run_without_a_score_says_so(tmp_path: Path) -> None:
    for name, scores in (("empty", [[]]), ("faults", [[None]])):
        summary = summarise(write_run(tmp_path / name, {ENV: scores}), allow_faults=True)
        assert summary.mean is None and summary.refused == f"{ENV}: none of 1 episodes has a score"


def test_outcomes_are_rates_over_tasks(tmp_path: Path) -> None:
    kinds = {0: Outcome.NO_ANSWER, 1: Outcome.TRUNCATED, 2: Outcome.AGENT_ERROR}

    def change(one: Episode) -> Episode:
        kind = kinds.get(one.key.task, Outcome.ANSWERED) if one.key.sample == 0 else Outcome.ANSWERED
        broken = {"outcome": kind, "score": 0.0, "answer": None, "error": "It broke."}
        return one if kind is Outcome.ANSWERED else replace(one, **broken)

    run = write_run(tmp_path / "run", {ENV: [[1.0, 1.0]] * 4}, change=change)
    data = summarise(run).data
    rates = {name: found["mean"] for name, found in data["envs"][0]["rates"].items()}
    assert rates == {"answered": 5 / 8, "no_answer": 1 / 8, "truncated": 1 / 8, "agent_error": 1 / 8}
    assert data["envs"][0]["outcomes"] == {"answered": 5, "no_answer": 1, "truncated": 1, "agent_error": 1}
    assert data["mean"] == 5 / 8
    assert data["errors"][0]["error"] == "It broke."


def test_tokens_money_and_time_are_counted_and_the_unknown_is_named(tmp_path: Path) -> None:
    prices = Prices(1, 10)

    def change(one: Episode) -> Episode:
        written = [20, 400, None][one.key.task]
        return replace(one, turns=(TurnUsage(1000, written, one.key.task, 1.0, prices.cost(1000, written)),))

    run = write_run(tmp_path / "run", {ENV: [[1.0], [1.0], [0.0]]}, change=change, prices=prices)
    data = summarise(run).data
    usage = data["usage"]
    written = {"total": 420, "mean": 210, "median": 210, "p95": 400, "max": 400, "unknown": 1}
    assert usage["completion_tokens"] == written
    assert usage["tool_calls"]["total"] == 3 and usage["elapsed_seconds"] == 2.0
    assert usage["cost"]["total"] == pytest.approx(0.0062) and usage["cost"]["per_right"] == pytest.approx(0.0031)
    assert data["envs"][0]["budgets"]["completion_tokens"] is None, "one unknown count makes the curve a guess"
    calls = data["envs"][0]["budgets"]["tool_calls"]
    assert [calls[b]["mean"] for b in "012"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])


def test_what_nobody_counted_is_unknown_and_not_nothing(tmp_path: Path) -> None:
    silent = (TurnUsage(None, None, 0, 1.0),)
    change = lambda one: replace(one, turns=silent)  # noqa: E731
    run = write_run(tmp_path / "run", {ENV: [[1.0]]}, change=change, prices=Prices(1, 1))
    summary = summarise(run)
    nothing = {"total": None, "mean": None, "median": None, "p95": None, "max": None, "unknown": 1}
    assert summary.data["usage"]["completion_tokens"] == nothing
    assert summary.data["usage"]["cost"] == {"currency": "USD", "per_right": None, **nothing}
    assert "1 of 1 episodes" in str(summary) and "tokens" not in str(summary)
    assert write_report(run).exists()


def test_budget_curves_end_at_the_mean(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {ENV: [[1, 0], [1, 1]]}, change=lambda one: replace(
        one, turns=(TurnUsage(5, 100 * (1 + one.key.task), 0, 1.0),)))  # fmt: skip
    curve = summarise(run).data["envs"][0]["budgets"]["completion_tokens"]
    assert {budget: value["mean"] for budget, value in curve.items()} == {"100": 0.25, "150": 0.25, "200": 0.75}


def test_a_summary_is_the_same_whatever_the_order_of_the_episodes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {ENV: [[1, 0, 1], [0, 0, 1], [1, 1, 1]]})
    before = summarise(run).data
    lines = (run / "episodes.jsonl").read_text().splitlines(keepends=True)
    (run / "episodes.jsonl").write_text("".join(reversed(lines)))
    assert summarise(run).data == before


def test_partial_credit_counts_in_the_mean_and_not_as_right(tmp_path: Path) -> None:
    env = summarise(write_run(tmp_path / "run", {ENV: [[0.5, 1.0], [0.5, 0.5]]})).data["envs"][0]
    assert env["mean"] == 0.625 and env["pass@k"]["1"]["mean"] == 0.25 and env["pass@k"]["2"]["mean"] == 0.5


def test_scores_outside_of_the_unit_have_their_own_scale(tmp_path: Path) -> None:
    summary = summarise(write_run(tmp_path / "run", {ENV: [[-3.0], [12.0], [5.0]]}))
    assert summary.mean == pytest.approx(14 / 3) and -3 < summary.data["low"] < 14 / 3 < summary.data["high"] < 12


def test_terminals_are_shown_no_control_characters(tmp_path: Path) -> None:
    error = "\x1b[2J\x07 \u202egnp.exe [bold]x[/bold]"
    run = write_run(tmp_path / "run", {ENV: [[1.0]]}, name="\x1b]0;owned\x07", change=lambda one: replace(
        one, outcome=Outcome.AGENT_ERROR, score=0.0, error=error))  # fmt: skip
    shown = str(summarise(run))
    assert "␛[2J␇ ⟨U+202E⟩gnp.exe [bold]x[/bold]" in shown and not set(shown) & set("\x1b\x07\u202e")


def test_the_summary_of_what_is_written_meanwhile_can_be_read(tmp_path: Path) -> None:
    """A second process looks at a run while the first writes."""
    run = write_run(tmp_path / "run", {ENV: [[1.0], []]})
    with RunDirectory.open(run) as writer:
        assert "1 missing of 2" in str(summarise(run).refused)
        writer.append(episode(EpisodeKey(ENV, "test", 1, 0), 0.0))
        assert summarise(run).mean == 0.5
        assert summarise(writer).mean == 0.5
