"""The run's side of a review: bred children go onto the desk, decided ones come back at the next iteration.

The run never waits for anybody. What is waiting stands in the checkpoint; the files are its picture, put right when a
run goes on, and decisions are found again under the same ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from espl_train.evolution.edits import fingerprints
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, SystemPrompt
from espl_train.evolution.rejections import Reason, Rejection
from espl_train.records import Group
from espl_train.reflecting.review import WAITING, Candidate, Damaged, Desk

Event = dict[str, Any]
Evidence = Callable[[str], Sequence[str]]       # of the batch, for a prompt
PROBLEMS = 5                # shown as evidence
CHARACTERS = 300            # of one of them


@dataclass(frozen=True, slots=True)
class Verdict:
    """A child that a person has decided about: the child, with the person's words, or why it is not let in."""

    candidate: Candidate
    child: Child | Rejection
    edited: bool = False


class Queue:
    """Children of one environment that wait. `state` and `restore` carry them over a resume."""

    def __init__(self, run: Path, island: str) -> None:
        self._desk, self._island = Desk(run), island
        self._waiting: dict[str, Candidate] = {}
        self._refused: set[frozenset[str]] = set()         # what a person has said no to: it need not come again
        self._told: set[Damaged] = set()                   # decisions that cannot be read, and of which it was said

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, children: Sequence[Child], step: int, population: Population, batch: Evidence) -> list[Event]:
        """Lay newly bred children on the desk; what became of each, for the log."""
        events = []
        known = {fingerprints(c.child.principles): f"{name} waits with" for name, c in self._waiting.items()}
        known |= dict.fromkeys(self._refused, "a person said no to")
        for child in children:
            parent = population[child.parents[0]]
            own = [f"{name}: {origin.evidence}" for name, origin in child.origins.items() if origin.evidence]
            found = Candidate.of(child, step, self._island, parent.principles, [*own, *batch(parent.id)])
            event = {"event": "review", "step": step, "id": found.id}
            if why := known.get(fingerprints(child.principles)):
                events.append(event | {"outcome": Reason.DUPLICATE_PROMPT.value, "detail": f"{why} these principles"})
                continue
            self._waiting[found.id] = found
            self._desk.write(found)
            new = [line for line in found.changes if not line.startswith(" ")]
            events.append(event | {"outcome": WAITING, "detail": "; ".join(new)})
        return events

    def admit(
        self, step: int, population: Population, examine: Callable[[Child], Rejection | None]
    ) -> tuple[tuple[SystemPrompt, ...], list[Event]]:
        """Take up what was decided: who is in the population now, and what became of every child, for the log.
        `examine` judges a child that a person has rewritten, and whether it is new.

        A child is as old as the evidence that it was written from. Those that would push each other out of a small
        population come in at the next steps."""
        born: list[SystemPrompt] = []
        events = list(self._damaged(step))
        for verdict in list(self.decided()):
            if len(born) == population.room:
                break
            child = verdict.child
            if isinstance(child, Child) and (refused := examine(child)) is not None:
                child = refused
            if isinstance(child, Child):
                (prompt,) = population.add([child], verdict.candidate.step)
                born.append(prompt)
                outcome, became = "edited" if verdict.edited else "accepted", f"in the population as {prompt.id}"
            else:
                outcome, became = child.reason.value, f"refused ({child})"
            self.settle(verdict, became)
            event = {"event": "review", "step": step, "id": verdict.candidate.id}
            events.append(event | {"outcome": outcome, "detail": became})
        return tuple(born), events

    def decided(self) -> Iterator[Verdict]:
        """What a person has decided since, in the order of birth. Each is to be settled. A child whose decision cannot
        be read goes on waiting."""
        for candidate in list(self._waiting.values()):
            decision = self._desk.decision(candidate.id)
            if decision is None or isinstance(decision, Damaged):
                continue
            if decision.verdict == "reject":
                yield Verdict(candidate, Rejection(Reason.REVIEW, decision.why or "a person said no"))
                continue
            final = candidate.edited(decision.principles)
            edited = final.child.principles != candidate.child.principles
            yield Verdict(candidate, final.child if edited else candidate.child, edited)

    def _damaged(self, step: int) -> Iterator[Event]:
        """Decisions that cannot be read, each said once."""
        for name in self._waiting:
            found = self._desk.decision(name)
            if isinstance(found, Damaged) and found not in self._told:
                self._told.add(found)
                detail = f"{found}, so the child goes on waiting: decide again with espl-train review"
                yield {"event": "review", "step": step, "id": name, "outcome": "undecided", "detail": detail}

    def settle(self, verdict: Verdict, became: str) -> None:
        """The child is off the queue; `became` is written on its file."""
        del self._waiting[verdict.candidate.id]
        if isinstance(verdict.child, Rejection):
            self._refused.add(fingerprints(verdict.candidate.child.principles))
        self._desk.write(replace(verdict.candidate, state=became))

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        waiting = [candidate.to_json() for candidate in self._waiting.values()]
        return {"waiting": waiting, "refused": sorted(sorted(texts) for texts in self._refused)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` wrote down; children of steps that are done again leave the desk until then."""
        self._waiting = {row["id"]: Candidate.from_json(row) for row in state["waiting"]}
        self._refused = {frozenset(texts) for texts in state["refused"]}
        for candidate in self._desk.all():
            if candidate.island == self._island and candidate.state == WAITING and candidate.id not in self._waiting:
                self._desk.remove(candidate.id)
        for candidate in self._waiting.values():
            self._desk.write(candidate)


def evidence(groups: Sequence[Group], parent: str, question: Callable[[int], str]) -> list[str]:
    """What a person may want to know of the batch: how the parent did, and where it was right and wrong by turns."""
    own = [g for g in groups if g.prompt == parent and g.rewards]
    rewards = [reward for g in own for reward in g.rewards]
    if not rewards:
        return []
    lines = [f"{parent} in this batch: mean reward {sum(rewards) / len(rewards):.3f} over {len(rewards)} episodes"]
    mixed = [g for g in own if len(set(g.rewards)) > 1]
    for group in mixed[:PROBLEMS]:
        asked = " ".join(question(group.task).split())
        shown = asked if len(asked) <= CHARACTERS else f"{asked[: CHARACTERS - 1]}…"
        lines.append(f"{sum(group.rewards) / len(group.rewards):.2f} over {len(group.rewards)} attempts: {shown}")
    return lines
