"""Migration: a principle that wins on one island is tried on another, and wins there or does not.

A principle wins where the prompt that wrote it beat its own parent, beyond two standard errors, on the problems that
both attempted, and where somebody who carries it today is rated above the root. What is written together shares the
credit at home. The island that takes a migrant in gives its best prompt that one principle more and nothing else, so
there the comparison is of the principle alone. One that wins on several islands is offered to the others first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from espl_train.evolution.edits import Limits, Operation, apply, fingerprint, fingerprints
from espl_train.evolution.lineage import Duel, Written
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Origin, SystemPrompt
from espl_train.evolution.rejections import Reason, Rejection

ERRORS = 2.0       # standard errors by which the prompt that wrote a principle must have beaten its parent
LEAST = 8          # problems that this must have been seen on: few of them may agree by accident


@dataclass(frozen=True, slots=True)
class Win:
    """A principle that wins on an island: where it was written (`name`, "math:p0003.G2"), the lower bound of what the
    prompt that wrote it gained over its parent, and on how many islands it has won."""

    text: str
    name: str
    gain: float
    islands: int = 1


@dataclass
class Harbour:
    """What an island knows of migrants: those `waiting`, the most promising first; the fingerprints it has `tried`; and
    of the principles that have won here, the step at which that was found out."""

    waiting: tuple[Win, ...] = ()
    tried: set[str] = field(default_factory=set)
    won: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; who waits is found anew in every iteration."""
        return {"tried": sorted(self.tried), "won": dict(self.won)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(tried=set(data["tried"]), won=dict(data["won"]))


def wins(population: Population) -> dict[str, Win]:
    """The principles that win in a population, by fingerprint; those of the root are everybody's and do not count."""
    root = population.root
    above = population.rating(root.id).mu
    common, found = fingerprints(root.principles), dict[str, Win]()
    for member in population.members:
        if member.rating.mu <= above or member.prompt.id in population.aside:
            continue
        for principle in member.prompt.principles:
            key, written = fingerprint(principle.text), population.lineage.written(member.prompt.id, principle.id)
            gain = _sure(population.lineage.births[written.prompt].duel)
            if gain > 0 and key not in common and (key not in found or gain > found[key].gain):
                found[key] = _win(written, gain)
    return found


def _win(written: Written, gain: float) -> Win:
    return Win(written.principle.text, written.name, gain)


def _sure(duel: Duel) -> float:
    """What a prompt gained over its parent, at least; 0 where too little was seen of it."""
    return duel.gain - ERRORS * duel.error if duel.problems >= LEAST else 0.0


def land(islands: Mapping[str, tuple[Population, Harbour]]) -> None:
    """Let every harbour know who waits: what wins elsewhere, was not tried here, and does not win here by itself."""
    known = {name: wins(population) for name, (population, _) in islands.items()}
    for name, (_, harbour) in islands.items():
        found: dict[str, Win] = {}
        for other, theirs in known.items():
            fresh = {k: w for k, w in theirs.items() if other != name and k not in harbour.tried | harbour.won.keys()}
            for key, win in fresh.items():
                count = sum(key in port.won for _, port in islands.values())
                if key not in found or win.gain > found[key].gain:
                    found[key] = replace(win, islands=max(count, 1))
        harbour.waiting = tuple(sorted(found.values(), key=lambda win: (-win.islands, -win.gain, win.name)))


def count(step: int, islands: Mapping[str, tuple[Population, Harbour]]) -> Iterator[dict[str, Any]]:
    """Write down what wins by now; yields, for the log, each principle that has come to win on a further island."""
    for name, (population, harbour) in islands.items():
        for key, win in wins(population).items():
            if key in harbour.won:
                continue
            harbour.won[key] = step
            where = [other for other, (_, port) in islands.items() if key in port.won]
            if len(where) > 1:
                yield {"env": name, "principle": win.text, "written": win.name, "gain": win.gain, "islands": where}


def migrate(
    best: SystemPrompt, harbour: Harbour, limits: Limits, events: list[dict[str, Any]]
) -> Child | Rejection:
    """The best prompt with the first migrant that it does not hold yet, or the reason why there is no such child.

    Whether it becomes a child or not, the island does not try that principle again.
    """
    held = fingerprints(best.principles)
    win = next((win for win in harbour.waiting if fingerprint(win.text) not in held), None)
    if win is None:
        return Rejection(Reason.NO_MIGRANT, "no principle wins elsewhere that was not tried here")
    harbour.tried.add(fingerprint(win.text))
    events.append({"event": "migrant", "parent": best.id, "written": win.name, "principle": win.text, "gain": win.gain})
    edited = apply(best.principles, [Operation("add", text=win.text)], limits, best.last_id)
    if isinstance(edited, Rejection):
        return edited
    origins = {principle: Origin("add", (win.name,)) for principle in edited.origins}
    return Child(edited.principles, "migration", (best.id,), edited.last_id, origins)

