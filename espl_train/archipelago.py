"""What the islands of a run have to do with one another: nobody gives away another's problems, and principles migrate.

Where a run has one island, nothing of this happens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from espl_train.evolution import migration
from espl_train.evolution.migration import Harbour
from espl_train.evolution.population import Population
from espl_train.island import Island


def acquaint(islands: Sequence[Island]) -> None:
    """Let no island write down what gives away the training problems of another."""
    if len(islands) < 2:
        return
    guards = {island.name: island.breeder.guard for island in islands}
    for island in islands:
        guards[island.name].learn(island.sets.train.tasks)
    for name, guard in guards.items():
        guard.heed(other for theirs, other in guards.items() if theirs != name)


def announce(islands: Sequence[Island]) -> None:
    """Let every island know which principles win on the others, before it breeds."""
    if _open(islands):
        migration.land(_ports(islands))


def victories(step: int, islands: Sequence[Island]) -> list[dict[str, Any]] | None:
    """The principles that have come to win on a further island, now that `step` is rated; None where none migrates."""
    return list(migration.count(step, _ports(islands))) if _open(islands) else None


def notes(islands: Sequence[Island]) -> tuple[str, ...]:
    """For the summary: how many principles were tried elsewhere, and those that win on several islands."""
    if not _open(islands):
        return ()
    harbours = [island.breeder.harbour for island in islands]
    won = Counter(key for harbour in harbours for key in harbour.won)
    both = [key for key, count in won.items() if count > 1]
    tried = sum(len(harbour.tried) for harbour in harbours)
    said = ": " + "; ".join(f"“{key}”" for key in both) if both else ""
    return (f"migration: {tried} tried in another environment, {len(both)} won in several{said}",)


def _open(islands: Sequence[Island]) -> bool:
    return len(islands) > 1 and islands[0].config.evolution.migration > 0


def _ports(islands: Sequence[Island]) -> Mapping[str, tuple[Population, Harbour]]:
    return {island.name: (island.population, island.breeder.harbour) for island in islands}
