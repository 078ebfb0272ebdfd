"""Acceptance: which of the children that were written may enter the population, by a trial before they have a name.

Without it every child enters and the ratings find out. `minibatch` is GEPA's rule (arXiv 2507.19457, algorithm 1): a
child enters if it does better than its parent on the problems of the batch, which the parent has played already. `best`
lets one child of the iteration in, the best of them on those problems, whatever the parent did there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from espl_train.config import EvolutionConfig
from espl_train.evolution.prompts import Child
from espl_train.evolution.prune import Played, Trial
from espl_train.evolution.ratings import ROUNDING, paired_difference
from espl_train.evolution.rejections import Reason, Rejection

TRIED = ("prune",)      # operators whose children have been played, and found better, already


@dataclass(frozen=True, slots=True)
class Decision:
    """What a trial came to for one child: let in unless `refused`. Means are over `problems` problems that child and
    parent both have scores of; `gain` is the child's lead, with its standard error."""

    mean: float
    parent: float
    gain: float
    error: float
    problems: int
    refused: Rejection | None = None


async def decide(
    children: Mapping[str, Child],
    played: Played,
    problems: Sequence[int],
    trial: Trial,
    config: EvolutionConfig,
    random: np.random.Generator,
) -> dict[str, Decision]:
    """A decision for each of the `children` (by a name of the caller's), all of them tried on the same problems.

    `played` are the rewards of the batch: prompt → problem → rewards. A parent needs no rollouts but these; a child
    gets as many attempts per problem as its parent had, or `acceptance_samples`.
    """
    contenders = {name: child for name, child in children.items() if child.operator not in TRIED}
    if config.acceptance == "none" or not contenders:
        return {}
    most = config.acceptance_problems or len(problems)
    tasks = sorted(problems[int(i)] for i in random.permutation(len(problems))[:most])
    parents = {name: played[_parent(child, played)] for name, child in contenders.items()}
    samples = config.acceptance_samples or max(len(row[q]) for row in parents.values() for q in tasks)
    table = await trial({name: child.principles for name, child in contenders.items()}, tasks, samples)
    found = {name: _compared(table[name], parents[name], tasks) for name in contenders}
    if config.acceptance == "best":
        return _only_the_best(found)
    return {name: _better_than_its_parent(decision, config) for name, decision in found.items()}


def _parent(child: Child, played: Played) -> str:
    """The first parent that played the batch; an immigrant's need not have: then whoever played most is the measure."""
    return next((p for p in child.parents if p in played), max(played, key=lambda p: (len(played[p]), p)))


def _compared(
    child: Mapping[int, Sequence[float]], parent: Mapping[int, Sequence[float]], tasks: Sequence[int]
) -> Decision:
    pairs = [(child[q], parent[q]) for q in tasks if child[q] and parent[q]]
    if not pairs:
        refused = Rejection(Reason.NO_TRIAL, "no attempt of the trial could be scored")
        return Decision(math.nan, math.nan, math.nan, math.nan, 0, refused)
    mean, measure = (fmean(map(fmean, side)) for side in zip(*pairs, strict=True))
    return Decision(mean, measure, *paired_difference(pairs), len(pairs))


def _better_than_its_parent(found: Decision, config: EvolutionConfig) -> Decision:
    if found.refused or found.gain > config.acceptance_margin * found.error + ROUNDING:
        return found
    detail = f"{found.mean:.3f} against its parent's {found.parent:.3f} on {found.problems} problems"
    return replace(found, refused=Rejection(Reason.NOT_BETTER, detail))


def _only_the_best(found: Mapping[str, Decision]) -> dict[str, Decision]:
    """The highest mean; among equals the first that was written."""
    scored = [name for name, decision in found.items() if not decision.refused]
    best = max(scored, key=lambda name: round(found[name].mean, 9), default=None)
    lost = Rejection(Reason.NOT_BETTER, f"another child had {found[best].mean:.3f}" if best else "")
    return {name: d if d.refused or name == best else replace(d, refused=lost) for name, d in found.items()}
