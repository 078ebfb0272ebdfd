"""Encounters: which prompts met on which problem of late, and how they scored there. This is what crossover compares.

Prompts are only ever compared on a problem that they attempted in the same iteration, so with the same weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from espl_train.evolution.ratings import scores
from espl_train.records import Group


@dataclass(frozen=True, slots=True)
class Encounter:
    """One problem of one iteration, and the rewards of everybody who attempted it."""

    step: int
    problem: int
    rewards: Mapping[str, tuple[float, ...]]


class Encounters:
    """The encounters of the last `window` iterations; a window of 0 keeps the last one only."""

    def __init__(self, window: int) -> None:
        self._window = max(window, 1)
        self._found: list[Encounter] = []       # oldest first

    def record(self, step: int, groups: Sequence[Group]) -> None:
        """Take in a batch and forget what has left the window."""
        met: dict[int, dict[str, tuple[float, ...]]] = {}
        for prompt, row in scores(groups).items():
            for problem, rewards in row.items():
                met.setdefault(problem, {})[prompt] = rewards
        self._found = [e for e in self._found if e.step > step - self._window]
        self._found += [Encounter(step, problem, rewards) for problem, rewards in sorted(met.items())]

    def of(self, prompt: str, others: Collection[str]) -> tuple[Encounter, ...]:
        """Where `prompt` met any of `others`, without anybody else, newest first; a problem counts where it was met
        last."""
        newest: dict[int, Encounter] = {}
        for found in reversed(self._found):
            rewards = {p: r for p, r in found.rewards.items() if p == prompt or p in others}
            if prompt in rewards and len(rewards) > 1:
                newest.setdefault(found.problem, Encounter(found.step, found.problem, rewards))
        return tuple(newest.values())

    def pairs(self, prompts: Collection[str]) -> dict[tuple[str, str], list[tuple[tuple[float, ...], ...]]]:
        """The rewards of every two of `prompts` (in their order) wherever they met; one entry per encounter."""
        order = {prompt: place for place, prompt in enumerate(prompts)}
        met: dict[tuple[str, str], list[tuple[tuple[float, ...], ...]]] = {}
        for found in self._found:
            there = sorted((p for p in found.rewards if p in order), key=lambda p: order[p])
            for number, younger in enumerate(there):
                for older in there[:number]:
                    met.setdefault((older, younger), []).append((found.rewards[older], found.rewards[younger]))
        return met

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data; floats survive `json` exactly."""
        return [{"step": e.step, "problem": e.problem, "rewards": dict(e.rewards)} for e in self._found]

    @classmethod
    def from_json(cls, rows: Sequence[Mapping[str, Any]], window: int) -> Encounters:
        """What `to_json` wrote down."""
        encounters = cls(window)
        for row in rows:
            rewards = {prompt: tuple(values) for prompt, values in row["rewards"].items()}
            encounters._found.append(Encounter(row["step"], row["problem"], rewards))
        return encounters
