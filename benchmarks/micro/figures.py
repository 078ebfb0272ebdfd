"""From the record of runs to figures: means over worlds with paired bootstrap intervals. The unit is the world.

A comparison uses the worlds in which both sides were run, and a group of arms those in which all of them were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.micro.arms import BOTH, Cell
from benchmarks.micro.record import Row
from espl_train.randomness import generator

DRAWS = 10_000
PAIRS = (
    ("evolution_rl", "rl"), ("evolution_rl", "evolution"), ("evolution_rl", "placebo"),
    ("evolution_rl", "shuffled_evidence"), ("evolution_rl", "sequential"), ("evolution_rl", "paper"),
    ("evolution_rl", "rl_oracle"), ("evolution_rl", "oracle"), ("evolution_rl", "base"),
    ("placebo", "rl"), ("shuffled_evidence", "rl"), ("sequential", "rl"), ("evolution", "rl"),
)  # fmt: skip
WEIGHTS = ("base", "rl", "evolution_rl")
PROMPTS = ("none", "evolved", "oracle")
Interval = dict[str, float]


def interval(values: Sequence[float], *key: str | int) -> Interval:
    """The mean over worlds and its 95 % bootstrap interval (Efron's percentiles, `DRAWS` resamples of the worlds)."""
    found = np.asarray(values, float)
    picks = generator("ablation", *key).integers(0, len(found), (DRAWS, len(found)))
    low, high = np.quantile(found[picks].mean(axis=1), (0.025, 0.975))
    return {"mean": round(float(found.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


class Table:
    """The report's rows of one cell: (arm, world) → row."""

    def __init__(self, rows: Iterable[Row], cell: Cell = BOTH) -> None:
        self.rows = {
            (row["arm"], row["world"]): row
            for row in rows
            if (row["declarative"], row["procedural"]) == (cell.declarative, cell.procedural)
        }

    @property
    def arms(self) -> list[str]:
        """Who was run at all, in the order of the record."""
        return list(dict.fromkeys(arm for arm, _ in self.rows))

    def worlds(self, *arms: str) -> list[int]:
        """Where all of `arms` were run."""
        found = [{world for name, world in self.rows if name == arm} for arm in arms]
        return sorted(set.intersection(*found)) if found else []

    def values(self, arm: str, worlds: Sequence[int], what: str = "test") -> list[float]:
        """One figure per world."""
        return [self.rows[arm, world][what] for world in worlds]

    def means(self, what: str = "test") -> dict[str, Interval]:
        """Per arm, over all its worlds."""
        return {arm: interval(self.values(arm, self.worlds(arm), what), what) for arm in self.arms}

    def paired(self, pairs: Iterable[tuple[str, str]] = PAIRS, what: str = "test") -> dict[str, Interval]:
        """Differences world by world, `left - right`, of the pairs that were run."""
        found = {}
        for left, right in pairs:
            if worlds := self.worlds(left, right):
                both = zip(self.values(left, worlds, what), self.values(right, worlds, what), strict=True)
                found[f"{left}-{right}"] = interval([a - b for a, b in both], what) | {"worlds": len(worlds)}
        return found

    def budget(self) -> dict[str, dict[str, float]]:
        """Per arm and run: training rollouts, sampled tokens with those of reflection, and of which reflection."""
        found = {}
        for arm in self.arms:
            rows = [self.rows[arm, world] for world in self.worlds(arm)]
            reflection = float(np.mean([row["reflection_tokens"] for row in rows]))
            found[arm] = {
                "rollouts": round(float(np.mean([row["rollouts"] for row in rows]))),
                "tokens": round(float(np.mean([row["tokens"] for row in rows])) + reflection),
                "reflection_tokens": round(reflection),
                "validation_tokens": round(float(np.mean([row.get("validation_tokens", 0) for row in rows]))),
                "seconds": round(float(np.mean([row["seconds"] for row in rows])), 1),
            }
        return found

    def transplant(self) -> dict[str, dict[str, Interval]]:
        """Weights × prompt, in the worlds that have all nine cells."""
        moved = {(arm, world): cells(row) for (arm, world), row in self.rows.items() if arm in WEIGHTS}
        whole = [w for w in self.worlds(*WEIGHTS) if all(set(PROMPTS) <= set(moved[arm, w]) for arm in WEIGHTS)]
        if not whole:
            return {}
        return {
            arm: {prompt: interval([moved[arm, w][prompt] for w in whole], arm, prompt) for prompt in PROMPTS}
            for arm in WEIGHTS
        }

    def curve(self, arm: str, leader: bool) -> np.ndarray:
        """Training reward per step, mean over worlds: of the whole batch, or of the prompt that led before it."""
        rows = [self.rows[arm, world]["curve"] for world in self.worlds(arm)]
        points = np.array([[step[1] if leader and step[1] is not None else step[0] for step in row] for row in rows])
        return np.asarray(points.mean(axis=0))


def cells(row: Row) -> Mapping[str, float]:
    """The row of the transplant matrix that a run measured: E-SPL's own prompt is the evolved one."""
    return {**row["transplant"], **({"evolved": row["test"]} if row["arm"] == "evolution_rl" else {})}


def percent(found: Mapping[str, Any], signed: bool = False) -> str:
    """"81.2 [77.0, 85.1]", in points."""
    form = "+.1f" if signed else ".1f"
    mean, low, high = (format(100 * found[name], form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
