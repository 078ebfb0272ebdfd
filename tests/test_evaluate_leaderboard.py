"""Strengths are those that games were drawn from, fair to who played other parts, and never mix data."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from evaluation_kit import ENV, write_run

from espl_envs.core.errors import EsplError
from espl_envs.evaluate import leaderboard as leaderboard_module
from espl_envs.evaluate.leaderboard import POINTS, Board, leaderboard, strengths_of

OTHER = "espl/Game24-v0"


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are rougher and come sooner."""
    monkeypatch.setattr(leaderboard_module, "DRAWS", 60)


def expected_games(logs: list[float], tie: float, games: float) -> tuple[np.ndarray, np.ndarray]:
    """What Davidson's model expects of `games` games of every pair."""
    strength = np.exp(np.array(logs))
    parts = np.stack([strength[:, None] + 0 * strength, tie * np.sqrt(np.outer(strength, strength)),
                      strength[None, :] + 0 * strength[:, None]])  # fmt: skip
    parts = games * parts / parts.sum(axis=0) * (1 - np.eye(len(logs)))
    return parts[0], parts[1]


@pytest.mark.parametrize("tie", [0.001, 0.7, 20.0])
def test_strengths_are_those_that_the_games_came_from(tie: float) -> None:
    logs = [0.0, 1.0, -1.5, 0.3]
    wins, ties = expected_games(logs, tie, 1e6)
    assert strengths_of(wins, ties) == pytest.approx(1000 + POINTS * (np.array(logs) - np.mean(logs)), abs=0.5)


def test_ties_pull_together_and_say_nothing_of_who_is_better() -> None:
    wins = np.array([[0, 30], [10, 0]], float)
    gaps = [np.ptp(strengths_of(wins, np.array([[0, n], [n, 0]], float))) for n in (0, 40)]
    assert gaps[0] == pytest.approx(POINTS * math.log(30.5 / 10.5), rel=0.02)
    assert gaps[1] == pytest.approx(gaps[0], rel=0.35)
    assert strengths_of(np.zeros((2, 2)), np.array([[0, 9], [9, 0]], float)) == pytest.approx([1000, 1000])


def test_who_wins_always_is_strong_and_not_infinite() -> None:
    wins = np.triu(np.full((3, 3), 50.0), 1)
    found = strengths_of(wins, np.zeros((3, 3)))
    assert np.isfinite(found).all() and found[0] > found[1] > found[2] and found[0] - found[2] < 4000


def only(board: Path) -> Board:
    boards = leaderboard(board).boards
    assert len(boards) == 1
    return boards[0]


def test_a_run_of_the_easy_half_is_not_put_above_a_better_one(tmp_path: Path) -> None:
    """By the plain mean it would be: that is what the strength is for."""
    random = np.random.default_rng(3)
    tasks = [0.95] * 40 + [0.25] * 40
    draw = lambda chances, shift: [[float(random.random() < p + shift) for _ in range(4)] for p in chances]  # noqa: E731
    write_run(tmp_path / "strong", {ENV: draw(tasks, 0.04)}, "strong")
    write_run(tmp_path / "middle", {ENV: draw(tasks, -0.1)}, "middle")
    write_run(tmp_path / "easy", {ENV: draw(tasks[:40], -0.15)}, "easy")
    board = only(tmp_path)
    assert [s.name for s in board.standings] == ["strong", "middle", "easy"]
    assert board.standings[2].mean.mean > board.standings[0].mean.mean
    assert board.tasks == 80 and [s.mean.tasks for s in board.standings] == [80, 80, 40]
    for standing in board.standings:
        assert standing.low is not None and standing.high is not None and standing.strength is not None
        assert standing.low < standing.strength < standing.high
    assert board.standings[0].ranks == (1, 1)


def test_other_data_is_another_board(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {ENV: [[1.0], [0.0]], OTHER: [[1.0], [1.0]]}, "a")
    write_run(tmp_path / "deeper" / "b", {ENV: [[0.0], [0.0]], OTHER: [[0.0], [1.0]]}, "b")
    found = leaderboard(tmp_path)
    assert [board.title.split()[0] for board in found.boards] == ["all", ENV, OTHER]
    assert found.boards[0].envs == tuple(sorted(e for board in found.boards[1:] for e in board.envs))
    write_run(tmp_path / "c", {OTHER: [[1.0]]}, "c")
    found = leaderboard(tmp_path)
    assert [board.title.split()[0] for board in found.boards] == [ENV, OTHER], "nothing is common to two environments"
    assert [len(board.standings) for board in found.boards] == [2, 3]


def test_a_single_run_has_its_mean_and_no_strength(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {ENV: [[1.0], [0.0]]}, "alone")
    board = only(tmp_path)
    assert board.tasks == 0 and board.standings[0].strength is None and board.standings[0].mean.mean == 0.5
    assert "alone" in str(leaderboard(tmp_path)) and "—" in str(leaderboard(tmp_path))


def test_faulted_runs_are_left_out_by_name(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {ENV: [[1.0], [0.0]]}, "good")
    write_run(tmp_path / "b", {ENV: [[1.0], [None]]}, "broken")
    found = leaderboard(tmp_path)
    assert found.left_out == ("broken: 1 of 2 episodes have no score",) and "left out: broken" in str(found)
    assert len(leaderboard(tmp_path, allow_faults=True).boards[0].standings) == 2


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EsplError, match="no run of espl-eval"):
        leaderboard(tmp_path)
    write_run(tmp_path / "b", {ENV: [[None]]}, "broken")
    with pytest.raises(EsplError, match=r"No run .* has a score"):
        leaderboard(tmp_path, allow_faults=True)


def test_the_overall_mean_weighs_environments_alike(tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / name, {ENV: [[1.0]] * 6, OTHER: [[0.0]] * 2}, name)
    overall = leaderboard(tmp_path).boards[0]
    assert [s.mean.mean for s in overall.standings] == [0.5, 0.5]
    assert [s.strength for s in overall.standings] == pytest.approx([1000, 1000])
