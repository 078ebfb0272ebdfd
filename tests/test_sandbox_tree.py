"""Ending processes: whoever is not to be ended pays neither for a busy machine nor for the slow deaths of others."""

from __future__ import annotations

import os
import signal
from itertools import count

import pytest

from espl_envs.sandbox.worker import tree
from espl_envs.sandbox.worker.tree import Stuck, Tree

SESSION = 7


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Who is sent which signal; nobody gets it."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(Tree, "reap", lambda _: None)
    return sent


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Tree:
    """The processes of a box whose supervisor is PID 1."""
    monkeypatch.setattr(tree, "prctl", lambda *_: None)
    made = Tree()
    made.first = True
    return made


def test_those_who_take_long_to_die_cost_the_session_nothing(
    first: Tree, kills: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = count()
    monkeypatch.setattr(first, "_doomed", lambda *_: [8, 9] if next(rounds) < 10 else [])
    monkeypatch.setattr(tree, "_PATIENCE", 0.001)
    first.sweep(SESSION)
    assert set(kills) == {(pid, number) for pid in (8, 9) for number in (signal.SIGSTOP, signal.SIGKILL)}


def test_those_who_multiply_faster_than_they_are_struck_are_ended_at_one_blow(
    first: Tree, kills: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = count(8)
    monkeypatch.setattr(first, "_doomed", lambda *_: [] if (-1, signal.SIGKILL) in kills else [next(numbers)])
    first.sweep(SESSION)
    assert kills.count((-1, signal.SIGKILL)) == 1


def test_those_who_never_die_are_given_up(
    first: Tree, kills: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tree, "_GIVE_UP", 0.02)
    monkeypatch.setattr(first, "_doomed", lambda *_: [8])
    with pytest.raises(Stuck, match="1 processes"):
        first.sweep(SESSION)
    assert (-1, signal.SIGKILL) not in kills
