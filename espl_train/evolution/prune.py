"""Pruning: the best prompt plays without each of its principles in turn, and loses one that nobody misses.

Leave-one-out in two rounds, on problems that are drawn anew. All variants are screened on the same few problems; then
the prompt without its least useful principle plays the whole prompt on others. The second round is what decides: of
many variants that were played little, the best one owes much of its lead to luck.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from espl_train.evolution.edits import fingerprints
from espl_train.evolution.prompts import Child, Principle, SystemPrompt
from espl_train.evolution.ratings import ROUNDING, paired_difference
from espl_train.evolution.rejections import Reason, Rejection

Played = Mapping[str, Mapping[int, Sequence[float]]]        # candidate → problem → rewards


class Trial(Protocol):
    """Who plays candidates that are in no population: `trials.py`, a test's function."""

    async def __call__(
        self, candidates: Mapping[str, tuple[Principle, ...]], tasks: Sequence[int], samples: int, /
    ) -> Played:
        """The rewards of every candidate on the given problems, `samples` attempts each; what faulted is left out."""
        ...


@dataclass(frozen=True, slots=True)
class Absence:
    """What a prompt gains by the absence of one principle: a paired difference per problem, and its standard error."""

    id: str
    text: str
    gain: float
    error: float
    problems: int

    @property
    def missed(self) -> bool:
        """Whether the prompt is worse without it. The standard error does not count: what may well do harm to lose is
        kept, and what is useless will be drawn again."""
        return self.gain < -ROUNDING


async def prune(
    best: SystemPrompt,
    taken: Collection[frozenset[str]],
    problems: Sequence[int],
    budget: int,
    trial: Trial,
    random: np.random.Generator,
    events: list[dict[str, Any]],
) -> Child | Rejection:
    """`best` without a principle, or the reason why it keeps all of them.

    `budget` rollouts at most are played, half of them in each round, but at least one per candidate; `taken` are the
    fingerprints of prompts that exist, whose variants are not played. What was found is appended to `events`.
    """
    if len(best.principles) < 2:
        return Rejection(Reason.TOO_FEW_PRINCIPLES, f"{best.id} has {len(best.principles)} principles; it takes two")
    shorter = {p.id: tuple(o for o in best.principles if o.id != p.id) for p in best.principles}
    fresh = {i: principles for i, principles in shorter.items() if fingerprints(principles) not in taken}
    if not fresh:
        return Rejection(Reason.DUPLICATE_PROMPT, f"{best.id} without any one principle is a prompt that exists")
    drawn = [problems[i] for i in random.permutation(len(problems))]
    screening, samples = _affordable(drawn, budget // 2, len(fresh) + 1)
    table = await trial(_candidates(best, fresh), screening, samples)
    found = _absences(best, table)
    event: dict[str, Any] = {"event": "leave_one_out", "prompt": best.id, "samples": samples}
    events.append(event | {"absences": [asdict(absence) for absence in found]})
    if not found:
        return Rejection(Reason.NO_TRIAL, "no attempt of the trial could be scored")
    if len({reward for row in table.values() for rewards in row.values() for reward in rewards}) < 2:
        return Rejection(Reason.NO_CONTRAST, "all attempts of the trial have the same reward")
    least = max(found, key=lambda a: (round(a.gain, 9), len(a.text)))
    rest = [q for q in drawn if q not in screening] or drawn
    duel, samples = _affordable(rest, budget // 2, 2)
    table = await trial(_candidates(best, {least.id: shorter[least.id]}), duel, samples)
    confirmed = _absences(best, table)
    events.append({**event, "samples": samples, "absences": [asdict(absence) for absence in confirmed]})
    if not confirmed:
        return Rejection(Reason.NO_TRIAL, "no attempt of the trial could be scored")
    (again,) = confirmed
    if again.missed:
        detail = f"without {again.id} the reward changes by {again.gain:+.3f} ± {again.error:.3f}"
        return Rejection(Reason.ALL_NEEDED, f"{detail} on {again.problems} problems, and it is missed least")
    return Child(shorter[again.id], "prune", (best.id,), best.last_id)


def _candidates(
    best: SystemPrompt, shorter: Mapping[str, tuple[Principle, ...]]
) -> dict[str, tuple[Principle, ...]]:
    return {best.id: best.principles, **{_without(best, i): principles for i, principles in shorter.items()}}


def _without(best: SystemPrompt, principle: str) -> str:
    return f"{best.id}-{principle}"


def _affordable(problems: Sequence[int], rollouts: int, candidates: int) -> tuple[list[int], int]:
    """As many problems as the rollouts allow, and more than one sample only where there are no more problems: the
    spread between problems is what makes differences uncertain."""
    each = max(rollouts // candidates, 1)
    chosen = list(problems[:each])
    return chosen, max(each // len(chosen), 1)


def _absences(best: SystemPrompt, table: Played) -> list[Absence]:
    """The differences of all variants that were played, in the order of the principles."""
    whole, found = table.get(best.id, {}), []
    for principle in best.principles:
        row = table.get(_without(best, principle.id), {})
        pairs = [(row[q], whole[q]) for q in sorted(row) if row[q] and whole.get(q)]
        if pairs:
            found.append(Absence(principle.id, principle.text, *paired_difference(pairs), len(pairs)))
    return found
