"""What the cells say: every mean with its interval, and the differences that one asks for, each paired over problems.

Intervals are those of `espl-eval`: a Bayesian bootstrap over problems (`espl_envs/evaluate/intervals.py`). A difference
is taken within every problem before it is averaged, so that easy and hard problems cancel out. Each interval is of 95 %
for itself: among twenty differences of nothing, one is expected to look like something.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from espl_envs.evaluate.intervals import Bounds, Estimate, estimates, replicates, scale_of
from espl_train.transplant.plan import BASE, NONE, Plan
from espl_train.transplant.store import Cell

At = tuple[str, str]            # weights, prompt


@dataclass(frozen=True)
class Contrast:
    """A sum of cells with signs: what it asks, and the terms."""

    question: str
    terms: Mapping[At, int]

    def __str__(self) -> str:
        """As a formula: joint × joint − rl × none."""
        signed = [("+" if sign > 0 else "−", f"{w} × {p}") for (w, p), sign in self.terms.items()]
        return " ".join(f"{sign} {name}" for sign, name in signed).removeprefix("+ ")


@dataclass(frozen=True)
class Matrix:
    """Means and differences over the problems of a plan."""

    plan: Plan
    cells: Mapping[At, Cell]
    means: Mapping[At, Estimate | None]
    contrasts: Sequence[tuple[Contrast, Estimate]]

    @classmethod
    def of(cls, plan: Plan, cells: Sequence[Cell]) -> Matrix:
        """Computed from cells that are all there."""
        by_place = {(cell.weights, cell.prompt): cell for cell in cells}
        values = {at: _values(cell, plan.indices) for at, cell in by_place.items()}
        every = [reward for cell in cells for rewards in cell.rewards.values() for reward in rewards]
        scale = scale_of(every)
        table = np.stack(list(values.values()), axis=1)                     # (problems, cells)
        means = estimates(table, replicates(table, scale, "transplant"), scale)
        found = [(contrast, difference(contrast, values, scale)) for contrast in contrasts(plan)]
        return cls(
            plan, by_place, dict(zip(values, means, strict=True)), [(c, e) for c, e in found if e is not None]
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            **self.plan.identity,
            "cells": [
                {
                    "weights": weights, "prompt": prompt, **(mean.to_json() if mean else {"mean": None}),
                    **{key: getattr(self.cells[weights, prompt], key) for key in ("faulted", "tokens", "stops")},
                }
                for (weights, prompt), mean in self.means.items()
            ],
            "contrasts": [
                {"question": contrast.question, "formula": str(contrast), **difference.to_json()}
                for contrast, difference in self.contrasts
            ],
        }  # fmt: skip


def contrasts(plan: Plan) -> list[Contrast]:
    """The questions that these rows and columns can answer."""
    rows, columns = {w.name for w in plan.weights}, {p.name for p in plan.prompts}
    asked = {str(one): one for one in _asked(plan) if all(w in rows and p in columns for w, p in one.terms)}
    return list(asked.values())


def _asked(plan: Plan) -> Iterator[Contrast]:
    bare = (BASE, NONE)
    trained = [one.name for one in plan.weights if one.run]
    own = {
        weights.name: prompt.name
        for weights in plan.weights
        for prompt in plan.prompts
        if weights.run and prompt.run and weights.run.folder.resolve() == prompt.run.folder.resolve()
    }
    for name in trained:
        if name in own:
            prompt = own[name]
            yield Contrast("weights and prompt together", {(name, prompt): 1, bare: -1})
            yield Contrast("its weights without its prompt", {(name, NONE): 1, (name, prompt): -1})
            yield Contrast("more than the sum of both", {
                (name, prompt): 1, (name, NONE): -1, (BASE, prompt): -1, bare: 1,
            })
        yield Contrast("weights alone", {(name, NONE): 1, bare: -1})
    for prompt in (one.name for one in plan.prompts if one.name != NONE):
        yield Contrast("prompt alone", {(BASE, prompt): 1, bare: -1})
    for name, prompt in own.items():
        for other in trained:
            theirs = (other, own.get(other, NONE))
            if other not in own or trained.index(name) < trained.index(other):
                yield Contrast("the two runs, each with its own prompt", {(name, prompt): 1, theirs: -1})
            if other != name:
                yield Contrast("its prompt on the other's weights", {(other, prompt): 1, theirs: -1})


def _values(cell: Cell, indices: Sequence[int]) -> np.ndarray:
    """The mean reward of every problem [problems]; NaN where all its episodes faulted."""
    rewards = [cell.rewards[index] for index in indices]
    return np.array([math.fsum(found) / len(found) if found else math.nan for found in rewards])


def difference(contrast: Contrast, values: Mapping[At, np.ndarray], scale: Bounds) -> Estimate | None:
    """A contrast over the problems that all its cells have a value [problems] for; None without any. `scale`: the
    bounds of a value."""
    column = sum(sign * values[at] for at, sign in contrast.terms.items())
    most = len(contrast.terms) / 2
    bounds = None if scale is None else (-most, most)
    table = np.asarray(column)[:, None]
    return estimates(table, replicates(table, bounds, "transplant", str(contrast)), bounds)[0]
